"""From steps to micro-batches: nothing is lost, doubled or torn apart, and the work is balanced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from job.common.schema import ArithmeticConfig, DataConfig
from job.data.arithmetic import ALPHABET
from job.data.packing import (
    Batch,
    Indices,
    Packer,
    assemble,
    distribute,
    mixed_step,
    sequence_cost,
    single_units,
    step_units,
)
from job.data.pairs import balanced_pairs, with_others
from job.data.token_cache import TokenizedSet, load_split
from job.data.tokenizer import load_tokenizer, write_character_tokenizer

CPU = torch.device("cpu")
DIM = 64
BUDGET = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_character_tokenizer(folder, ALPHABET)
    return folder


@pytest.fixture(scope="module")
def embedded(folder: Path) -> TokenizedSet:
    """Chains with optimal values, four solutions to a problem."""
    config = DataConfig("embedded", "embedded", cache_dir=str(folder / "cache"))
    config.arithmetic = ArithmeticConfig(train_examples=500, min_steps=1, error_probability=0.3)
    return load_split(config, "train", load_tokenizer(folder))


@pytest.fixture(scope="module")
def uneven(folder: Path) -> TokenizedSet:
    """Rows of very different lengths, without optimal values; some prompts are empty."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": "1" * int(rng.integers(0, 60)),
            "response": "2" * int(rng.integers(1, 120)),
            "reward": float(rng.random()),
            "problem_id": int(rng.integers(0, 30)),
        }
        for _ in range(300)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(folder / "rows.jsonl")
    config = DataConfig(path, path, cache_dir=str(folder / "cache"))
    return load_split(config, "train", load_tokenizer(folder))


@pytest.fixture(params=["embedded", "uneven"])
def data(request: pytest.FixtureRequest) -> TokenizedSet:
    found: TokenizedSet = request.getfixturevalue(request.param)
    return found


def random_lengths(rng: np.random.Generator, n: int) -> Indices:
    """Lengths as in reasoning data: many of some hundred tokens, a few of a thousand or more."""
    return np.clip(rng.lognormal(5.5, 0.6, n).astype(np.int64), 2, 2048)


# --- the order of units ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "per_step"), [(10, 1), (10, 3), (10, 10), (10, 7), (3, 10), (1, 4), (7, 100), (64, 16)]
)
def test_every_epoch_has_each_unit_once_wherever_steps_end(n: int, per_step: int) -> None:
    for seed in (0, 1, 12345):
        steps = [step_units(n, per_step, step, seed) for step in range(6 * n)]
        assert all(len(step) == per_step for step in steps)
        drawn = np.concatenate(steps)
        epochs = drawn[: len(drawn) // n * n].reshape(-1, n)
        assert len(epochs) >= 6
        assert (np.sort(epochs, 1) == np.arange(n)).all()


def test_the_units_of_a_step_depend_on_seed_and_step_alone() -> None:
    rng = np.random.default_rng(0)
    first = {step: step_units(50, 8, step, 3) for step in range(40)}
    for step in rng.permutation(40).tolist():
        assert np.array_equal(step_units(50, 8, step, 3), first[step])


def test_the_batch_size_does_not_change_the_order_of_units() -> None:
    whole = np.concatenate([step_units(30, 5, step, 0) for step in range(24)])
    for per_step in (1, 3, 8, 40, 120):
        drawn = np.concatenate([step_units(30, per_step, s, 0) for s in range(120 // per_step)])
        assert np.array_equal(drawn, whole)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(step_units(40, 40, epoch, seed)) for epoch in range(5) for seed in range(5)]
    assert len(set(orders)) == len(orders)


# --- micro-batches ---------------------------------------------------------------------------


def check_plan(plan: list[list[Indices]], tokens: Indices, world: int, budget: int) -> None:
    """All units once, equally many micro-batches on each rank, none above the budget."""
    assert len(plan) == world
    assert len({len(rank) for rank in plan}) == 1
    everything = np.concatenate([part for rank in plan for part in rank])
    assert np.array_equal(np.sort(everything), np.arange(len(tokens)))
    assert all(tokens[part].sum() <= budget for rank in plan for part in rank)


def test_every_unit_is_in_one_micro_batch_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens = rng.integers(1, 200, rng.integers(1, 80))
        world, budget = int(rng.integers(1, 9)), int(rng.integers(200, 800))
        plan = distribute(tokens, sequence_cost(tokens, DIM), world, budget)
        check_plan(plan, tokens, world, budget)


def test_no_micro_batch_is_more_than_a_greedy_filling_needs() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        tokens = random_lengths(rng, int(rng.integers(1, 200)))
        world, budget = int(rng.integers(1, 9)), 2048 * int(rng.integers(1, 5))
        plan = distribute(tokens, sequence_cost(tokens, DIM), world, budget)
        per_rank, total = len(plan[0]), int(tokens.sum())
        least = max(1, -(-total // (world * budget)))
        assert per_rank >= least
        # One fewer was too few: some unit found no room, so each of them was nearly full.
        if per_rank > least:
            assert world * (per_rank - 1) * (budget - tokens.max() + 1) <= total


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("tokens", "budget", "per_rank"),
    [
        ([10] * 8, 100, 1),
        ([10] * 40, 100, 4),
        ([100] * 8, 100, 8),
        ([60] * 8, 100, 8),
        ([50] * 8, 100, 4),
        ([90, 10] * 4, 100, 4),
        ([70, 20, 10] * 4, 100, 4),
        ([99, 2] * 4, 101, 4),
    ],
)
def test_as_few_micro_batches_as_anyone_would_make(
    tokens: list[int], budget: int, per_rank: int, world: int
) -> None:
    given = np.array(tokens * world)
    plan = distribute(given, sequence_cost(given, DIM), world, budget)
    check_plan(plan, given, world, budget)
    assert len(plan[0]) == per_rank


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_have_equal_work(world: int) -> None:
    for seed in range(30):
        tokens = random_lengths(np.random.default_rng(seed), 24 * world)
        costs = sequence_cost(tokens, 1024)
        plan = distribute(tokens, costs, world, 8192)
        check_plan(plan, tokens, world, 8192)
        work = np.array([[costs[part].sum() for part in rank] for rank in plan])
        # No plan does better than its costliest unit.
        assert work.sum(1).max() < max(1.1 * work.sum(1).mean(), costs.max() + 1e-9)
        assert work.sum(1).max() / work.sum(1).mean() < 1.1
        assert (work.max(0) < 1.1 * np.maximum(work.mean(0), costs.max())).all()


def test_ranks_do_their_costliest_micro_batches_at_the_same_time() -> None:
    for seed in range(30):
        tokens = random_lengths(np.random.default_rng(seed), 100)
        costs = sequence_cost(tokens, DIM)
        plan = distribute(tokens, costs, 3, 4096)
        work = np.array([[costs[part].sum() for part in rank] for rank in plan])
        assert len(work[0]) > 1
        assert (work[:, :-1].min(0) >= work[:, 1:].max(0)).all()


def test_ranks_without_a_unit_get_an_empty_micro_batch() -> None:
    tokens = np.array([5, 3, 8])
    plan = distribute(tokens, sequence_cost(tokens, DIM), 5, 10)
    check_plan(plan, tokens, 5, 10)
    assert sorted(len(part) for rank in plan for part in rank) == [0, 0, 1, 1, 1]
    nothing = np.empty(0, np.int64)
    empty = distribute(nothing, sequence_cost(nothing, DIM), 2, 10)
    assert [[part.tolist() for part in rank] for rank in empty] == [[[]], [[]]]


def test_a_single_rank_never_gets_an_empty_micro_batch() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        tokens = rng.integers(1, 300, rng.integers(1, 60))
        (parts,) = distribute(tokens, sequence_cost(tokens, DIM), 1, 300)
        assert all(len(part) for part in parts)


def test_a_unit_above_the_budget_is_refused() -> None:
    tokens = np.array([5, 11])
    with pytest.raises(ValueError, match="a unit of 11 tokens exceeds the budget of 10"):
        distribute(tokens, sequence_cost(tokens, DIM), 1, 10)


def test_the_plan_is_the_same_each_time() -> None:
    tokens = random_lengths(np.random.default_rng(3), 100)
    costs = sequence_cost(tokens, DIM)
    first, second = (distribute(tokens, costs, 3, 4096) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_cost_grows_with_the_square_of_the_length() -> None:
    costs = sequence_cost(np.array([0, 6, 6000]), 1000)
    assert costs == pytest.approx([0, 6 + 36 / 6000, 6000 + 6000])


# --- assembling ------------------------------------------------------------------------------


def sequence(data: TokenizedSet, i: int) -> list[int]:
    return data.tokens[int(data.offsets[i]) : int(data.offsets[i + 1])].tolist()


def check_batch(
    batch: Batch, data: TokenizedSet, rows: list[int], *, prompt_value: bool = False
) -> None:
    """A batch against the same laid out one sequence after the other."""
    tokens: list[int] = []
    positions: list[int] = []
    at_prompts: list[bool] = []
    optimal: list[float] = []
    for i in rows:
        ids, start = sequence(data, i), int(data.response_starts[i])
        before = prompt_value and start > 0
        at_prompts += [True] * before + [False] * (len(ids) - start)
        positions += range(len(tokens) + start - before, len(tokens) + len(ids))
        tokens += ids
        if data.optimal is not None:
            optimal += data.optimal[data.offsets[i] + start - before : data.offsets[i + 1]].tolist()
    lengths = [len(sequence(data, i)) for i in rows]
    assert batch.tokens.tolist() == tokens
    assert batch.layout.lengths == lengths
    assert batch.layout.n_tokens == len(tokens)
    assert batch.layout.positions.tolist() == [p for n in lengths for p in range(n)]
    assert batch.positions.tolist() == positions
    assert batch.at_prompts.tolist() == at_prompts
    assert batch.lengths.sum() == len(positions)
    assert batch.response_lengths.tolist() == [
        n - int(data.response_starts[i]) for i, n in zip(rows, lengths, strict=True)
    ]
    assert batch.rewards.tolist() == data.rewards[rows].astype(np.float32).tolist()
    assert batch.problems.tolist() == [int(data.problems[i]) for i in rows]
    if data.optimal is None:
        assert batch.optimal is None
    else:
        assert batch.optimal is not None
        assert batch.optimal.tolist() == optimal
        assert not np.isnan(batch.optimal).any()


def test_a_batch_is_its_sequences_end_to_end(data: TokenizedSet) -> None:
    rng = np.random.default_rng(0)
    for size in [1, 1, 2, 3, 7, 20, 60]:
        rows = rng.choice(len(data), size, replace=False)
        batch = assemble(data, rows, None, CPU)
        check_batch(batch, data, rows.tolist())
        assert batch.pairs.shape == (0, 2)
        valued = assemble(data, rows, None, CPU, prompt_value=True)
        check_batch(valued, data, rows.tolist(), prompt_value=True)


def test_a_begin_token_stands_for_an_empty_prompt_and_nothing_for_none(tmp_path: Path) -> None:
    """Which has a value before its response, if the tokenizer has a begin token or none."""
    rows = [{"prompt": p, "response": "2=2;A2", "reward": 1} for p in ("", "2?")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    starts = {}
    for begins in (True, False):
        folder = tmp_path / str(begins)
        folder.mkdir()
        write_character_tokenizer(folder, ALPHABET)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings = json.dumps(settings | {"add_bos_token": begins})
        (folder / "tokenizer_config.json").write_text(settings)
        path = str(tmp_path / "rows.jsonl")
        config = DataConfig(path, path, cache_dir=str(tmp_path / "cache"))
        data = load_split(config, "train", load_tokenizer(folder))
        batch = assemble(data, np.arange(2), None, CPU, prompt_value=True)
        starts[begins] = data.response_starts.tolist()
        assert (batch.lengths - batch.response_lengths).tolist() == [int(begins), 1]
        assert batch.positions[0] == 0
    assert starts == {True: [1, 3], False: [0, 2]}


def test_a_sequence_may_come_twice_as_at_the_end_of_an_epoch(data: TokenizedSet) -> None:
    rows = np.array([3, 5, 3, 0, len(data) - 1, 3])
    check_batch(assemble(data, rows, None, CPU), data, rows.tolist())


def test_a_batch_has_the_types_that_it_promises(embedded: TokenizedSet) -> None:
    batch = assemble(embedded, np.arange(4), np.array([[0, 1], [2, 3]]), CPU)
    whole = (batch.tokens, batch.positions, batch.lengths, batch.response_lengths, batch.pairs)
    assert {tensor.dtype for tensor in whole} == {torch.int64}
    assert batch.rewards.dtype == torch.float32
    assert batch.problems.dtype == np.uint64
    assert batch.optimal is not None
    assert type(batch.optimal) is np.ndarray
    assert batch.optimal.dtype == np.float32


def pairs_of(data: TokenizedSet) -> Indices:
    pairs = balanced_pairs(data.rewards, data.problems, data.response_lengths)
    assert len(pairs) > 20
    return pairs


def test_pairs_stay_together_and_point_at_their_sequences(data: TokenizedSet) -> None:
    units = pairs_of(data)
    packer = Packer(data, units, dim=DIM, budget=BUDGET, device=CPU)
    seen: list[list[int]] = []
    for part in packer.everything:
        batch = packer.assemble(part)
        rows = part.ravel().tolist()
        check_batch(batch, data, rows)
        assert batch.pairs.shape == (len(part), 2)
        better, worse = batch.rewards[batch.pairs].T
        assert (better > worse).all()
        problems = batch.problems[batch.pairs.numpy()]
        assert (problems[:, 0] == problems[:, 1]).all()
        seen += [[rows[i] for i in pair] for pair in batch.pairs.tolist()]
    assert sorted(seen) == sorted(units.tolist())


# --- the packer ------------------------------------------------------------------------------


def packers(data: TokenizedSet, units: Indices, world: int) -> list[Packer]:
    return [
        Packer(data, units, dim=DIM, budget=BUDGET, device=CPU, rank=rank, world=world)
        for rank in range(world)
    ]


def sequences_of(data: TokenizedSet, batches: list[Batch]) -> Iterator[tuple[int, ...]]:
    for batch in batches:
        start = 0
        for length in batch.layout.lengths:
            yield tuple(batch.tokens[start : start + length].tolist())
            start += length


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_an_evaluation_covers_everything_once_over_all_ranks(
    data: TokenizedSet, world: int
) -> None:
    mixed = with_others(pairs_of(data), len(data))
    for units in (single_units(len(data)), single_units(37), pairs_of(data), mixed):
        parts = [packer.everything for packer in packers(data, units, world)]
        assert len({len(part) for part in parts}) == 1
        covered = np.concatenate([np.concatenate(part) for part in parts])
        assert sorted(covered.tolist()) == sorted(units.tolist())
        for part in (one for rank in parts for one in rank):
            assert data.lengths[part[part >= 0]].sum() <= BUDGET


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_ranks_of_a_step_share_the_sequences_of_that_step(
    data: TokenizedSet, world: int
) -> None:
    units = single_units(len(data))
    ranks = packers(data, units, world)
    for step in (0, 1, 7, 100):
        batches = [packer.step(step, 24, seed=5) for packer in ranks]
        assert len({len(rank) for rank in batches}) == 1
        assert all(len(batch.tokens) <= BUDGET for rank in batches for batch in rank)
        found = sorted(s for rank in batches for s in sequences_of(data, rank))
        chosen = step_units(len(units), 24, step, 5)
        assert found == sorted(tuple(sequence(data, int(i))) for i in chosen)


def test_a_step_of_pairs_counts_sequences(data: TokenizedSet) -> None:
    units = pairs_of(data)
    (packer,) = packers(data, units, 1)
    for step in range(3):
        batches = packer.step(step, 16, seed=5)
        assert sum(len(batch.layout.lengths) for batch in batches) == 16
        assert sum(len(batch.pairs) for batch in batches) == 8
        found = sorted(sequences_of(data, batches))
        rows = units[step_units(len(units), 8, step, 5)].ravel()
        assert found == sorted(tuple(sequence(data, int(i))) for i in rows)


def test_steps_of_pairs_and_others_have_every_sequence_once_an_epoch(data: TokenizedSet) -> None:
    """Pairs stay whole, but for those that lie across the end of a step or an epoch."""
    pairs, n = pairs_of(data), len(data)
    units = with_others(pairs, n)
    steps = [mixed_step(units, 7, step, seed=5) for step in range(2 * n)]
    assert all((step >= 0).sum() == 7 for step in steps)
    assert all((step[:, 0] >= 0).all() for step in steps)
    seen = np.concatenate([step[step >= 0] for step in steps])
    for epoch in range(14):
        assert np.array_equal(np.sort(seen[epoch * n : (epoch + 1) * n]), np.arange(n))
    known = set(map(tuple, pairs.tolist()))
    whole = [tuple(unit) for step in steps for unit in step.tolist() if unit[1] >= 0]
    assert set(whole) == known
    assert 14 * len(pairs) - len(steps) <= len(whole) < 14 * len(pairs)
    first = [one[one >= 0] for one in (steps[0], mixed_step(units, 7, 0, 6))]
    assert not np.array_equal(*first)


def test_pairs_among_others_are_paired_in_the_batch(data: TokenizedSet) -> None:
    units = with_others(pairs_of(data), len(data))
    seen = 0
    for packer in packers(data, units, 2):
        for batch in packer.step(3, 60, seed=1):
            better, worse = batch.rewards[batch.pairs].T
            assert (better > worse).all()
            problems = batch.problems[batch.pairs.numpy()]
            assert (problems[:, 0] == problems[:, 1]).all()
            assert len(batch.rewards) >= 2 * len(batch.pairs)
            seen += len(batch.pairs)
    assert seen > 3


def test_a_step_is_the_same_each_time(embedded: TokenizedSet) -> None:
    first, second = (packers(embedded, single_units(500), 2)[1].step(9, 32, 1) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.positions, b.positions)


@pytest.mark.parametrize("world", [1, 3])
def test_parts_keep_all_units_in_order_and_are_as_large_as_they_may(
    data: TokenizedSet, world: int
) -> None:
    packer = Packer(data, single_units(len(data)), dim=DIM, budget=BUDGET, device=CPU, world=world)
    units = packer.units[::-1][:200]
    parts = list(packer.parts(units, 2))
    assert np.array_equal(np.concatenate(parts), units)
    sizes = [int(data.lengths[part].sum()) for part in parts]
    assert max(sizes) <= 2 * BUDGET * world
    for size, following in zip(sizes, parts[1:], strict=False):
        assert size + data.lengths[following[0, 0]] > 2 * BUDGET * world
    assert [len(part) for part in packer.parts(units, 0)] == [1] * 200
    assert list(packer.parts(units[:0], 2)) == []
