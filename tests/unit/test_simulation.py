"""The closed form of memory is what torch's own code takes, stepped through without memory.

All of the grid is in bench/memory_grid.py; here small trunks, which take all branches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from job.config import FsdpConfig, ShardingStrategy
from job.memory.footprint import Moment, Setting, footprint
from job.memory.simulation import simulate
from job.model.architecture import TransformerConfig

# wide enough that no component is lost in what the closed form leaves out
TRUNK = TransformerConfig(dim=1024, n_layers=6, n_heads=8, vocab_size=4000)
GROUPED = replace(TRUNK, n_kv_heads=2, head_dim=128, ffn_hidden=3584)
TOTAL, COMPONENT = 0.02, 0.05
LEAST = 1_000_000  # bytes of a component that must agree by itself
STATE_AND_TRANSIENT = ("frozen_weights", "masters", "gradients", "optimizer", "gathered_weights")


def setting(n: int, architecture: TransformerConfig = TRUNK, **changes: Any) -> Setting:
    fsdp = {
        key: changes.pop(key)
        for key in ("sharding_strategy", "mixed_precision", "activation_checkpointing")
        if key in changes
    }
    one = Setting(architecture, n, FsdpConfig(**fsdp), 2048, response_tokens=1024)
    return replace(one, **changes)


def check(one: Setting) -> None:
    predicted, stepped = footprint(one), simulate(one)
    assert predicted.peak.total == pytest.approx(stepped.peak.total, rel=TOTAL)
    for name in ("after_backward", "peak"):
        _check_components(getattr(predicted, name), getattr(stepped, name))


def _check_components(predicted: Moment, stepped: Moment) -> None:
    ours = dict(predicted.components)
    ours["activations"] += ours.pop("working_set")  # which the trackers count as one
    for name, count in ours.items():
        if count > LEAST:
            assert stepped.components[name] == pytest.approx(count, rel=COMPONENT), name


@pytest.mark.parametrize("n", [0, 2])
def test_one_gpu(n: int) -> None:
    check(setting(n))


def test_four_gpus() -> None:
    check(setting(2, world_size=4, per_node=4))


def test_frozen_blocks_are_given_up_after_their_forward_pass() -> None:
    kept = ShardingStrategy.SHARD_GRAD_OP
    one = setting(1, world_size=8, per_node=8, sharding_strategy=kept)
    block = 2 * (4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024)  # bytes, in bfloat16
    assert simulate(one).peak.components["gathered_weights"] <= 3.1 * block  # not all six


@pytest.mark.slow
@pytest.mark.parametrize("n", [0, 1, 6, 7])
@pytest.mark.parametrize("strategy", ShardingStrategy)
@pytest.mark.parametrize("gpus", [2, 16])
def test_each_strategy(strategy: ShardingStrategy, gpus: int, n: int) -> None:
    check(setting(n, world_size=gpus, per_node=min(gpus, 8), sharding_strategy=strategy))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": GROUPED, "world_size": 4, "per_node": 4},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "world_size": 4, "per_node": 4},
        {"mixed_precision": False},
        {"mixed_precision": False, "cuda": False, "sequence_tokens": 48},
        {"mixed_precision": False, "world_size": 4, "per_node": 4},
        {"prefix_cached": True, "world_size": 4, "per_node": 4},
        {"accumulates": False},
        {"accumulates": False, "micro_batch_tokens": 64, "response_tokens": 32},
        {"head_bias": False},
    ],
    ids=str,
)
def test_each_setting(changes: dict[str, Any]) -> None:
    check(setting(3, **changes))
