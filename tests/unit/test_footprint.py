"""What a critic takes of a GPU: what stays to the byte, the peak by known figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from job.config import FsdpConfig, ShardingStrategy
from job.learning.sharding import shard
from job.learning.world import World
from job.memory.fit import fit, largest_micro_batch, largest_unfrozen, outside_bytes
from job.memory.footprint import STATE, Setting, footprint
from job.memory.shapes import SHAPES
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.shards import own

SMALL = TransformerConfig(dim=64, n_layers=6, n_heads=8, vocab_size=96, multiple_of=8)
GPU = 85_000_000_000


def setting(n: int = 4, **changes: Any) -> Setting:
    return replace(Setting(SHAPES["7b"], n, FsdpConfig(), 8192), **changes)


def after_backward(one: Setting) -> float:
    return sum(footprint(one).after_backward.components[name] for name in STATE) / 1e9


@pytest.mark.parametrize(
    ("gpus", "n", "expected"),
    [(1, 0, 13.21), (1, 4, 24.55), (2, 4, 12.27), (4, 4, 6.14), (1, 8, 35.88), (4, 8, 8.97)],
)
def test_what_is_left_after_the_backward_pass_of_a_7b_trunk(
    gpus: int, n: int, expected: float
) -> None:
    one = setting(n, world_size=gpus, per_node=gpus)
    assert after_backward(one) == pytest.approx(expected, abs=0.005)


def test_the_plans_ten_to_twelve_gigabytes() -> None:
    state = footprint(setting()).after_backward.components
    trained = 4 * 202_383_360 + 4096
    assert state["gradients"] == 4 * trained  # 3.24 GB
    assert state["optimizer"] == 8 * trained  # 6.48 GB
    assert state["gradients"] + state["optimizer"] == 9_714_450_432
    net = state["gradients"] + state["optimizer"] + state["masters"] // 2
    assert net == 11_333_525_504
    assert net + state["masters"] // 2 == 12_952_600_576


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 31.05),
        ({"accumulates": False}, 28.04),
        ({"fsdp": FsdpConfig(activation_checkpointing=True)}, 27.88),
        ({"world_size": 4, "per_node": 4}, 13.04),
        ({"micro_batch_tokens": 64}, 26.19),
    ],
)
def test_the_peak_of_four_blocks_of_a_7b_trunk(changes: dict[str, Any], expected: float) -> None:
    assert footprint(setting(**changes)).peak.total / 1e9 == pytest.approx(expected, abs=0.03)


def test_more_blocks_and_more_tokens_take_more() -> None:
    by_blocks = [footprint(setting(n)).peak.total for n in range(34)]
    assert by_blocks == sorted(by_blocks)
    by_tokens = [footprint(setting(micro_batch_tokens=t)).peak.total for t in range(256, 9000, 512)]
    assert by_tokens == sorted(set(by_tokens))


def test_what_a_block_saves_by_hand() -> None:
    one = Setting(SMALL, 2, FsdpConfig(), 1000, world_size=1)
    two = footprint(replace(one, num_unfrozen_layers=3))
    first = footprint(one)
    d, f, h = 64, 176, 8
    # norms: inputs and roots in float32, outputs; q, k, v, result, log-sum-exp; four of width f
    saved = 2 * (6 * d + 4) + 8 * d + 4 * h + 8 * f
    moments = [next(m for m in found.moments if m.name == "suffix") for found in (first, two)]
    activations = [moment.components["activations"] for moment in moments]
    assert activations[1] - activations[0] == 1000 * saved


def test_offloaded_state_is_in_host_memory() -> None:
    whole = footprint(setting(fsdp=FsdpConfig(cpu_offload=True)))
    assert whole.host / 1e9 == pytest.approx(24.55, abs=0.005)
    assert all(moment.components[name] == 0 for moment in whole.moments for name in STATE)


def test_a_cached_prefix_takes_the_frozen_weights_off_the_gpu() -> None:
    cached = footprint(setting(prefix_cached=True)).after_backward.components
    assert cached["frozen_weights"] == 0
    assert cached["masters"] == footprint(setting()).after_backward.components["masters"]


def test_a_large_evaluation_can_be_the_peak() -> None:
    one = setting(0, micro_batch_tokens=512, evaluation_tokens=65_536)
    assert footprint(one).peak.name == "evaluate"


@contextmanager
def _first_of(size: int, per_node: int) -> Iterator[World]:
    """Rank 0 of a world whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(rank=0, size=size, local_size=per_node)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("strategy", ShardingStrategy)
def test_what_stays_is_that_of_the_shards(strategy: ShardingStrategy, mixed: bool) -> None:
    with torch.device("meta"):
        critic = Critic(SMALL)
    unfreeze_last_blocks(critic, 2)
    fsdp = FsdpConfig(sharding_strategy=strategy, mixed_precision=mixed)
    with _first_of(8, per_node=4) as world:
        shard(critic, fsdp, world)
        frozen = sum(own(p).nbytes for p in critic.parameters() if not p.requires_grad)
        masters = sum(own(p).nbytes for p in critic.parameters() if p.requires_grad)
    found = footprint(Setting(SMALL, 2, fsdp, 64, world_size=8, per_node=4)).after_backward
    assert found.components["frozen_weights"] == frozen
    assert found.components["masters"] + found.components["value_head"] // 4 == masters


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize("capacity", [42_300_000_000, GPU])
def test_the_largest_n_fits_and_one_more_does_not(gpus: int, capacity: int) -> None:
    one = setting(world_size=gpus, per_node=gpus)
    n = largest_unfrozen(one, capacity)
    assert n is not None
    assert fit(replace(one, num_unfrozen_layers=n), capacity).fits
    assert n == 32 or not fit(replace(one, num_unfrozen_layers=n + 1), capacity).fits


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    t = largest_micro_batch(setting(), GPU, 262_144, 2048)
    assert t is not None
    assert t % 256 == 0
    assert fit(setting(micro_batch_tokens=t, evaluation_tokens=t), GPU).fits
    larger = t + 256
    assert not fit(setting(micro_batch_tokens=larger, evaluation_tokens=larger), GPU).fits


def test_a_micro_batch_is_at_most_what_is_asked_for_and_none_where_the_least_does_not_fit() -> None:
    assert largest_micro_batch(setting(), GPU, 5000, 2048) == 5000
    assert largest_micro_batch(setting(), 20_000_000_000, 5000, 2048) is None
    assert largest_unfrozen(setting(), 5_000_000_000) is None


def test_a_margin_stays_free_and_a_process_takes_more_than_tensors() -> None:
    needed = fit(setting(), GPU).needed
    assert needed == footprint(setting()).peak.total + 600_000_000
    assert fit(setting(), needed).is_tight
    assert fit(setting(), int(needed / 0.92) + 1).fits
    assert not fit(setting(), needed - 1).is_tight
    assert outside_bytes(setting(world_size=2)) == 1_600_000_000
    assert outside_bytes(setting(cuda=False)) == 0
