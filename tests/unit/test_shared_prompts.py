"""Prompts that are computed once: the same values and gradients, and fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from job.common.schema import CriticConfig, Loss, ObjectiveConfig, Spread, TermsConfig
from job.data.packing import Batch, Indices, Packer, assemble, bundle, single_units, step_units
from job.data.pairs import balanced_pairs, with_others
from job.data.shared_prompts import Groups, SharedPrompts
from job.data.stored_targets import Targets
from job.data.token_cache import TokenizedSet
from job.distributed.world import World
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.transformer import PackedLayout, Shared
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
        Targets.of(
            [{a: (0.25, 1.0), f: (0.75, 2.0)} for a, f in zip(at, firsts, strict=True)]
        ).write(folder)
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
    torch.testing.assert_close(outputs, torch.cat(parts), rtol=2e-6, atol=2e-6)
    found = _learned(critic, objective.loss(outputs, shared, 0, whole))
    _assert_alike(found, _learned(other, torch.stack(losses).sum()), 1e-6)
