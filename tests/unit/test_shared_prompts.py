"""Prompts that are computed once: the same values and gradients, and fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from job.common.schema import CriticConfig, Loss, ObjectiveConfig, Spread, TermsConfig
from job.data.packing import Batch, Indices, Packer, bundle, single_units, step_units
from job.data.pairs import balanced_pairs, with_others
from job.data.shared_prompts import Groups, SharedPrompts
from job.data.stored_targets import TargetList
from job.data.token_cache import TokenizedSet
from job.distributed.world import World
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.packed_layout import PackedLayout, Shared
from job.training.data import together
from job.training.learner import Learner
from job.training.objective import Objective

CPU = torch.device("cpu")
CONFIG = TransformerConfig(
    dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=40, qk_norm=True, norm_eps=1e-6
)
# of each problem: tokens of its prompt, and of the responses to it
PROBLEMS: list[tuple[int, list[int]]] = [
    (70, [90, 1, 30, 64]),  # longer than a span of attention, and a response of one token
    (1, [5, 9]),  # a begin token alone
    (12, [7]),
    (0, [3, 4]),  # nothing to share
    (33, [1, 1]),
]


def write_set(
    folder: Path, problems: list[tuple[int, list[int]]], *, targets: bool = False
) -> TokenizedSet:
    """Random prompts, and random responses to each; solutions of a problem lie apart."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(40, size=n) for n, _ in problems]
    rows = [(p, n) for p, (_, lengths) in enumerate(problems) for n in lengths]
    order = rng.permutation(len(rows)).tolist()
    parts = [np.concatenate((prompts[p], rng.integers(40, size=n))) for p, n in rows]
    folder.mkdir(exist_ok=True)
    np.concatenate([parts[i] for i in order]).astype(np.uint32).tofile(folder / "tokens.bin")
    np.savez(
        folder / "index.npz",
        offsets=np.concatenate(([0], np.cumsum([len(parts[i]) for i in order]))),
        response_starts=np.array([problems[rows[i][0]][0] for i in order]),
        rewards=rng.random(len(rows)),
        problems=np.array([rows[i][0] for i in order], np.uint64) * 7,
        lines=np.arange(len(rows)),
    )
    (folder / "bad_rows.jsonl").touch()
    if targets:
        at = [len(parts[i]) - 1 for i in order]
        firsts = [max(problems[rows[i][0]][0] - 1, 0) for i in order]
        listed = TargetList()
        for a, f in zip(at, firsts, strict=True):
            listed.add({a: (0.25, 1.0), f: (0.75, 2.0)})
        listed.stored().write(folder)
    return TokenizedSet(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenizedSet:
    return write_set(tmp_path_factory.mktemp("data") / "set", PROBLEMS)


def packer(data: TokenizedSet, units: Indices | None = None, **changes: Any) -> Packer:
    settings: dict[str, Any] = {"dim": 32, "budget": 4096, "device": CPU, "prompt_value": True}
    units = single_units(len(data)) if units is None else units
    return Packer(data, units, **settings | changes)


# --- the model -------------------------------------------------------------------------------


def _critic(n: int, outputs: int = 1, *, recompute: bool = False) -> Critic:
    torch.manual_seed(0)
    critic = Critic(CONFIG, head_outputs=outputs)
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    unfreeze_last_blocks(critic, n)
    if recompute:
        critic.trunk.recompute_trainable_blocks()
    return critic


def _learned(critic: Critic, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {n: p.grad for n, p in critic.named_parameters() if p.grad is not None}


def _assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], bar: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        apart = (found[name].double() - gradient.double()).norm()
        assert apart <= bar * gradient.double().norm(), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_values_and_gradients_are_those_of_separate_sequences(
    data: TokenizedSet, n: int, recompute: bool
) -> None:
    rows = np.arange(len(data))
    shared = packer(data, prompts=SharedPrompts(data)).assemble(rows[:, None])
    assert len(shared.tokens) == sum(prompt + sum(r) for prompt, r in PROBLEMS)
    objective = Objective(ObjectiveConfig())
    whole = objective.counts(shared)
    critic, other = _critic(n, recompute=recompute), _critic(n)
    outputs = critic(shared.tokens, shared.layout, shared.positions)
    parts, losses = [], []
    for row in rows:
        alone = packer(data).assemble(np.array([[row]]))
        parts.append(other(alone.tokens, alone.layout, alone.positions))
        losses.append(objective.loss(parts[-1], alone, 0, whole))
    _assert_alike({"values": outputs}, {"values": torch.cat(parts)}, 1e-6)
    found = _learned(critic, objective.loss(outputs, shared, 0, whole))
    _assert_alike(found, _learned(other, torch.stack(losses).sum()), 1e-6)


JOINT = ObjectiveConfig(terms=TermsConfig(monte_carlo=1.0, td=0.5, pairwise=2.0))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (JOINT, {}),
        (ObjectiveConfig(loss=Loss.hl_gauss, bins=7), {}),
        (ObjectiveConfig(), {"spread": Spread.next}),
        (ObjectiveConfig(prompt_value=False), {"prompt_value": False}),
        (ObjectiveConfig(loss=Loss.pairwise), {"prompt_value": False}),
    ],
    ids=["joint", "bins", "targets", "without-v0", "pairs"],
)
def test_every_objective_learns_the_same(
    data: TokenizedSet, tmp_path: Path, config: ObjectiveConfig, changes: dict[str, Any]
) -> None:
    if "spread" in changes:
        data = write_set(tmp_path / "set", PROBLEMS, targets=True)
    pairs = balanced_pairs(data.rewards, data.problems, data.response_lengths)
    units = pairs if config.ranks_only else with_others(pairs, len(data))
    objective, results = Objective(config), []
    for prompts in (SharedPrompts(data), None):
        batch = packer(data, units, prompts=prompts, **changes).assemble(units)
        assert (len(batch.tokens) < batch.layout.n_keys) is (prompts is not None)
        assert len(batch.pairs) == len(pairs) > 1
        critic = _critic(2, config.head_outputs)
        outputs = critic(batch.tokens, batch.layout, batch.positions)
        loss = objective.loss(outputs, batch, 3, objective.counts(batch))
        results.append({"outputs": outputs, "loss": loss} | _learned(critic, loss))
    _assert_alike(*results, 1e-6)


def test_the_value_before_each_response_is_read_at_the_prompts_last_token_for_each(
    data: TokenizedSet,
) -> None:
    batch = packer(data, prompts=SharedPrompts(data)).assemble(single_units(len(data)))
    first = batch.positions[batch.at_prompts]
    with_prompt = batch.problems[(batch.lengths > batch.response_lengths).numpy()]
    for problem, (_, responses) in enumerate(PROBLEMS):
        at = first[torch.from_numpy(with_prompt == problem * 7)]
        assert len(at) in (0, len(responses))
        assert len(set(at.tolist())) <= 1
    plain = packer(data).assemble(single_units(len(data)))
    shown = batch.layout.positions[batch.positions]  # RoPE's, as if each were alone
    assert torch.equal(shown, plain.layout.positions[plain.positions])
    assert torch.equal(batch.tokens[batch.positions], plain.tokens[plain.positions])
    assert batch.layout.n_keys == len(plain.tokens)


def test_a_layout_repeats_the_keys_of_what_is_shared() -> None:
    layout = PackedLayout(
        [5, 1, 3, 2], shared=Shared(torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 2, 1]))
    )
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 0, 2, 3, 4, 1, 2]
    assert layout.keys is not None
    assert layout.keys.lengths == [5, 1, 5, 3]
    assert layout.keys.rows.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 6, 7, 8, 5, 9, 10]
    assert layout.keys.places.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 12, 13]
    assert layout.keys.boundaries.tolist() == [0, 5, 6, 11, 14]
    assert layout.boundaries.tolist() == [0, 5, 6, 9, 11]
    assert PackedLayout([5, 1], shared=Shared(torch.arange(2), torch.zeros(2).long())).keys is None


# --- which tokens are shared -----------------------------------------------------------------


def _raw_set(folder: Path, rows: list[tuple[list[int], int, int]]) -> TokenizedSet:
    """Of (tokens, where the response starts, problem)."""
    folder.mkdir()
    np.concatenate([tokens for tokens, _, _ in rows]).astype(np.uint32).tofile(
        folder / "tokens.bin"
    )
    np.savez(
        folder / "index.npz",
        offsets=np.cumsum([0, *(len(tokens) for tokens, _, _ in rows)]),
        response_starts=np.array([start for _, start, _ in rows]),
        rewards=np.zeros(len(rows)),
        problems=np.array([problem for *_, problem in rows], np.uint64),
        lines=np.arange(len(rows)),
    )
    (folder / "bad_rows.jsonl").touch()
    return TokenizedSet(folder)


def test_the_longest_common_prefix_is_shared_and_no_token_of_a_response(tmp_path: Path) -> None:
    found = _raw_set(
        tmp_path / "set",
        [
            ([1, 2, 3, 4, 5], 4, 9),
            ([1, 2, 3, 4, 5], 3, 9),  # a token across the border counts as response
            ([1, 2, 3, 7, 7], 4, 9),
            ([1, 2, 3, 4, 5], 3, 5),
            ([6, 6, 6], 1, 8),  # prompts cut at their fronts, one problem all the same
            ([7, 6, 6], 1, 8),
            ([1, 8, 8, 9], 3, 2**64 - 1),
            ([1, 8, 3, 9, 9], 3, 2**64 - 1),
        ],
    )
    prompts = SharedPrompts(found)
    assert prompts.counts(np.arange(8)).tolist() == [3, 3, 3, 0, 0, 0, 2, 2]
    leaders, counts = prompts.shared(np.array([7, 1, 3, 0, 6, 1]))
    assert leaders.tolist() == [0, 1, 2, 1, 0, 1]
    assert counts.tolist() == [0, 0, 0, 3, 2, 3]


# --- the plan --------------------------------------------------------------------------------

FOURS: list[tuple[int, list[int]]] = [(20 + p % 30, [10 + p % 7, 40, 25, 31]) for p in range(60)]


@pytest.fixture(scope="module")
def fours(tmp_path_factory: pytest.TempPathFactory) -> TokenizedSet:
    """Four solutions of each problem."""
    return write_set(tmp_path_factory.mktemp("fours") / "set", FOURS)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 16])
def test_an_epoch_has_every_unit_once_and_groups_in_a_row(fours: TokenizedSet, most: int) -> None:
    problems = SharedPrompts(fours).problems
    groups, n = Groups(problems, most), len(fours)
    epochs = [step_units(n, n, epoch, 3, groups) for epoch in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(n))
    runs = [np.diff(np.flatnonzero(np.diff(problems[e], prepend=-1, append=-1))) for e in epochs]
    if most == 4:
        assert all((run % 4 == 0).all() for run in runs)
    if most > 1:
        assert all(run.mean() >= min(most, 4) - 1 for run in runs)
    assert not np.array_equal(epochs[0], epochs[1])
    mates = [{tuple(sorted(e[i : i + 2].tolist())) for i in range(0, n, 2)} for e in epochs]
    if most == 2:  # others in each epoch
        assert len(mates[0] & mates[1]) < n // 4
    steps = [step_units(n, 7, step, 3, Groups(problems, most)) for step in range(n)]
    assert np.array_equal(np.concatenate(steps)[: 3 * n], np.concatenate(epochs))


def test_a_problem_with_many_solutions_is_no_whole_step(tmp_path: Path) -> None:
    found = write_set(tmp_path / "set", [(5, [3] * 32), *[(5, [3])] * 32])
    packed = packer(found, prompts=SharedPrompts(found), together=4)
    for step in range(4):
        rows = np.concatenate(packed.plan(step, 16, 0))[:, 0]
        assert (found.problems[rows] == 0).sum() <= 12  # three groups, by chance


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("copies", [0.0, 0.3])
def test_every_unit_comes_once_and_computed_tokens_keep_to_the_budget(
    fours: TokenizedSet, world: int, copies: float
) -> None:
    pairs = balanced_pairs(fours.rewards, fours.problems, fours.response_lengths)
    for units in (single_units(len(fours)), pairs, with_others(pairs, len(fours))):
        changes: dict[str, Any] = {"budget": 300, "together": 4, "copy_share": copies}
        changes["prompts"] = SharedPrompts(fours)
        ranks = [packer(fours, units, rank=r, world=world, **changes) for r in range(world)]
        for plans in ([r.everything for r in ranks], [r.plan(2, 24, 0) for r in ranks]):
            assert len({len(plan) for plan in plans}) == 1
            parts = [part for plan in plans for part in plan]
            rows = np.concatenate([part[part >= 0] for part in parts])
            assert len(set(rows.tolist())) == len(rows)
            sizes = [ranks[0].size(part) for part in parts]
            taken = [s.tokens + copies * (s.of_sequences - s.tokens) for s in sizes]
            assert max(taken) <= 300
            assert sum(s.tokens for s in sizes) < sum(s.of_sequences for s in sizes)
        everything = np.concatenate([part for rank in ranks for part in rank.everything])
        assert sorted(everything.tolist()) == sorted(units.tolist())


def test_work_shrinks_by_what_is_shared_at_4_and_at_16_solutions(tmp_path: Path) -> None:
    """With prompts of 37.6 % of the tokens, as in GSM8K."""
    for solutions, least in ((4, 1.38), (16, 1.53)):
        found = write_set(tmp_path / str(solutions), [(38, [63] * solutions)] * 20)
        packed = packer(found, prompts=SharedPrompts(found), together=solutions)
        sizes = [packed.size(part) for part in packed.plan(0, 64, 0)]
        computed, whole = sum(s.tokens for s in sizes), sum(s.of_sequences for s in sizes)
        assert whole / computed > least
        assert SharedPrompts(found).saving(solutions) == pytest.approx(whole / computed)


def test_ranks_have_equal_work_where_a_step_has_few_problems(tmp_path: Path) -> None:
    found = write_set(tmp_path / "set", [(30, [60] * 16)] * 3)
    changes: dict[str, Any] = {"prompts": SharedPrompts(found), "together": 16}
    ranks = [packer(found, rank=r, world=4, **changes) for r in range(4)]
    work = [sum(r.size(part).tokens for part in r.plan(0, 48, 0)) for r in ranks]
    assert max(work) < 1.1 * np.mean(work)
    assert sum(work) < 48 * 90 / 1.3


def test_a_bundle_is_cut_where_it_would_be_too_large() -> None:
    problems = np.array([3, 1, 3, 3, 1, 3])
    leading, following = np.array([10, 10, 10, 10, 50, 10]), np.array([6, 6, 6, 6, 46, 6])
    assert bundle(problems, leading, following, 22).tolist() == [0, 1, 0, 0, 2, 3]
    assert bundle(problems, leading, following, 100).tolist() == [0, 1, 0, 0, 1, 0]
    assert bundle(problems, leading, following, 1).tolist() == list(range(6))


def test_sequences_of_a_step_are_those_without_sharing_where_the_order_stays(
    fours: TokenizedSet,
) -> None:
    """Pairs, for which nothing else is put together."""
    for step in range(3):
        one, other = (
            packer(fours, budget=500, prompts=prompts).plan(step, 24, 1)
            for prompts in (SharedPrompts(fours), None)
        )
        rows = [np.sort(np.concatenate(plan).ravel()) for plan in (one, other)]
        assert np.array_equal(*rows)


def test_a_step_is_the_same_each_time(fours: TokenizedSet) -> None:
    def batches() -> list[Batch]:
        settings: dict[str, Any] = {"prompts": SharedPrompts(fours), "together": 4, "world": 2}
        return packer(fours, budget=500, rank=1, **settings).step(9, 24, 1)

    for one, other in zip(batches(), batches(), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.positions, other.positions)


@pytest.mark.parametrize(
    ("choice", "solutions", "batch_size", "expected"),
    [
        ("auto", 4, 16, 4),
        ("auto", 4, 64, 16),
        ("auto", 1, 16, 1),  # nothing to save
        (True, 1, 16, 4),
        ("auto", 4, 4, 1),
        (False, 4, 16, 1),
    ],
)
def test_solutions_are_grouped_where_that_saves_enough(
    tmp_path: Path, choice: bool | str, solutions: int, batch_size: int, expected: int
) -> None:
    found = write_set(tmp_path / "set", [(38, [63] * solutions)] * 8)
    config = CriticConfig()
    config.data.group_by_problem, config.training.batch_size = choice, batch_size
    assert together(config, SharedPrompts(found)) == expected


def test_an_evaluation_has_the_same_figures(fours: TokenizedSet) -> None:
    config = CriticConfig()
    learner = Learner(_critic(1), Objective(config.objective), config.training, World())
    figures = [
        learner.evaluate(packer(fours, budget=500, prompts=prompts), lambda *_: None).compute()
        for prompts in (SharedPrompts(fours), None)
    ]
    # values before the responses to one prompt are equal, where rounding told them apart before
    of_ties = [one.pop("prompt/auc") for one in figures]
    assert of_ties[0] == pytest.approx(of_ties[1], abs=0.01)
    assert figures[0] == pytest.approx(figures[1], rel=1e-5, nan_ok=True)
    assert len(figures[0]) > 5
