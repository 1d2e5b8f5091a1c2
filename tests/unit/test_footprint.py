"""The closed form of a GPU's memory: known figures, each formula by hand, and how it grows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from job.common.errors import InputError
from job.common.schema import FsdpConfig, ShardingStrategy
from job.distributed.fsdp import shard
from job.distributed.world import World
from job.memory.footprint import (
    COMPONENTS,
    STATE,
    Moment,
    Setting,
    copy_share,
    footprint,
)
from job.memory.settings import SHAPES
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.shards import local_shard

# In a block 64 x (2 x 64 + 2 x 32) + 3 x 64 x 160 + 2 x 64 = 43,136 parameters.
SMALL = TransformerConfig(
    dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=96, ffn_hidden=160
)
BLOCK, EMBEDDING, HEAD = 43_136, 6_144, 65


def _setting(n: int, gpus: int = 1, *, trunk: str = "7b", **changes: Any) -> Setting:
    """8192 tokens of a well-known trunk, 8 GPUs a node."""
    fsdp = FsdpConfig(**{key: changes.pop(key) for key in changes.keys() & vars(FsdpConfig())})
    setting = Setting(SHAPES[trunk], n, fsdp, 8192, world_size=gpus, per_node=min(gpus, 8))
    return replace(setting, **changes)


def _small(n: int, gpus: int = 2, **changes: Any) -> Setting:
    """10 tokens of the small architecture, of which 4 are of responses."""
    given: dict[str, Any] = {"micro_batch_tokens": 10, "response_tokens": 4}
    return _setting(n, gpus, architecture=SMALL, **given | changes)


def _moment(setting: Setting, name: str) -> Moment:
    """The one moment of this name, or the last of several."""
    return [moment for moment in footprint(setting).moments if moment.name == name][-1]


def _on_top(moment: Moment) -> dict[str, int]:
    """What a moment has beyond the state, without what has no bytes."""
    others = moment.components.items()
    return {name: count for name, count in others if count and name not in STATE}


def test_nothing_heavy_is_imported() -> None:
    modules = "job.memory.fit, job.memory.settings"
    code = f"import sys, {modules}; print({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# Known figures


def test_four_blocks_of_a_seven_b_trunk_cost_what_the_plan_says() -> None:
    state = footprint(_setting(4)).after_backward.components
    trained = 4 * 202_383_360 + 4096
    learning = state["gradients"] + state["optimizer"]
    assert learning == 12 * trained == 9_714_450_432
    assert learning + state["masters"] - 2 * trained == 11_333_525_504  # net of bf16 copies
    assert learning + state["masters"] == 12_952_600_576
    assert state["value_head"] == 16 * 4097


@pytest.mark.parametrize(
    ("n", "gpus", "strategy", "gigabytes"),
    [
        (0, 1, "FULL_SHARD", 13.21),
        (4, 1, "FULL_SHARD", 24.55),
        (4, 2, "FULL_SHARD", 12.27),
        (4, 4, "FULL_SHARD", 6.14),
        (4, 4, "REPLICATE_FROZEN", 14.84),
        (8, 1, "FULL_SHARD", 35.88),
        (8, 4, "FULL_SHARD", 8.97),
        (32, 4, "FULL_SHARD", 25.97),
    ],
)
def test_what_is_left_after_a_backward_pass(
    n: int, gpus: int, strategy: str, gigabytes: float
) -> None:
    setting = _setting(n, gpus, sharding_strategy=ShardingStrategy[strategy])
    after = footprint(setting).after_backward
    assert after.total / 1e9 == pytest.approx(gigabytes, abs=0.006)
    assert set(_on_top(after)) == {"batch"}


# State


@pytest.mark.parametrize(
    ("strategy", "frozen_shards", "trained_shards"),
    [
        ("FULL_SHARD", 8, 8),
        ("SHARD_GRAD_OP", 8, 8),
        ("HYBRID_SHARD", 4, 4),
        ("NO_SHARD", 1, 1),
        ("REPLICATE_FROZEN", 1, 8),
    ],
)
def test_state_by_strategy(strategy: str, frozen_shards: int, trained_shards: int) -> None:
    setting = _small(2, 8, per_node=4, sharding_strategy=ShardingStrategy[strategy])
    state = footprint(setting).after_backward.components
    trained = (2 * BLOCK + 64) // trained_shards
    assert state["frozen_weights"] == 2 * (BLOCK + EMBEDDING) // frozen_shards
    assert state["masters"] == state["gradients"] == 4 * trained
    assert state["optimizer"] == 8 * trained
    assert state["value_head"] == 16 * HEAD  # its one row is not split


def test_full_precision_doubles_the_frozen_part_alone() -> None:
    mixed = footprint(_small(2)).after_backward.components
    exact = footprint(_small(2, mixed_precision=False)).after_backward.components
    assert exact == mixed | {"frozen_weights": 2 * mixed["frozen_weights"]}


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
def test_weights_are_those_of_the_shards(strategy: ShardingStrategy, mixed: bool) -> None:
    setting = _small(2, 8, per_node=4, sharding_strategy=strategy, mixed_precision=mixed)
    with torch.device("meta"):
        critic = Critic(SMALL)
    unfreeze_last_blocks(critic, 2)
    with _first_of(8, per_node=4) as world:
        shard(critic, setting.fsdp, world)
        frozen = sum(local_shard(p).nbytes for p in critic.parameters() if not p.requires_grad)
        masters = sum(local_shard(p).nbytes for p in critic.parameters() if p.requires_grad)
    state = footprint(setting).after_backward.components
    assert state["frozen_weights"] == frozen
    assert state["masters"] + state["value_head"] // 4 == masters


def test_offloaded_state_is_in_host_memory() -> None:
    on_gpu, offloaded = (footprint(_small(2, cpu_offload=offload)) for offload in (False, True))
    state = sum(on_gpu.after_backward.components[name] for name in STATE)
    assert (on_gpu.host, offloaded.host) == (0, state)
    for moment, other in zip(on_gpu.moments, offloaded.moments, strict=True):
        assert _on_top(moment) == _on_top(other)
        assert not any(other.components[name] for name in STATE)


def test_with_a_cache_the_prefix_is_nowhere() -> None:
    cached = footprint(_small(2, prefix_cached=True))
    assert cached.after_backward.components["frozen_weights"] == 0
    assert not {"embedding", "prefix"} & {moment.name for moment in cached.moments}
    hidden = 10 * 64 * 2
    assert cached.peak.components["batch"] == 10 * 2 * 8 + 4 * 8 + hidden
    probe = footprint(_small(0, prefix_cached=True)).after_backward.components
    assert probe["frozen_weights"] == 2 * 64 // 2  # the final norm


def test_with_a_cache_of_everything_an_evaluation_is_the_head_alone() -> None:
    moments = {
        cached: footprint(_small(0, prefix_cached=cached, evaluation_tokens=10)).moments[-1]
        for cached in (True, False)
    }
    read, computed = moments[True].components, moments[False].components
    assert moments[True].name == "evaluate"
    assert read["gathered_weights"] == 0 < computed["gathered_weights"]
    assert read["working_set"] < computed["working_set"]


def test_frozen_blocks_behind_the_cached_states_are_there() -> None:
    alone, between = (footprint(_small(2, prefix_cached=True, between=n)) for n in (0, 1))
    one = between.after_backward.components["frozen_weights"]
    assert 0 == alone.after_backward.components["frozen_weights"] < one
    whole = footprint(_small(2)).after_backward.components["frozen_weights"]
    assert one < whole
    assert "prefix" in {moment.name for moment in between.moments}
    assert "embedding" not in {moment.name for moment in between.moments}


def test_full_training_has_no_prefix_to_cache() -> None:
    assert footprint(_small(4, prefix_cached=True)) == footprint(_small(4))


# Moments, by hand: bf16 of d = q = 64, k = 32, f = 160, 4 heads of 16 channels, t = 10, n = 4

BATCH = 10 * (8 + 8) + 4 * 8
HIDDEN, INNER, ROW, ROTATIONS = 10 * 64 * 2, 10 * 160 * 2, 4 * 64 * 4, 10 * 8 * 8
READ, READ_INNER = 4 * 64 * 2, 4 * 160 * 2  # of the rows that are read, in the last block
NORM, READ_NORM = (tokens * (64 * 2 + 4 + 64 * 2) for tokens in (10, 4))  # input, 1 / rms, output
MIXED = 10 * (2 * 64 * 2 + 2 * 32 * 2 + 4 * 4)  # q, result, k, v, log-sum-exp
READ_MIXED = 4 * (2 * 64 * 2 + 4 * 4) + 10 * 2 * 32 * 2
SAVED = 2 * NORM + MIXED + 4 * INNER
LAST = NORM + 2 * READ_NORM + READ_MIXED + 4 * READ_INNER + 4 * 8 * 8  # the rows' rotations
BLOCKS = {  # of two trained ones on two GPUs
    "prefix": {
        # input, attention's result, the norm's, and silu(a), b, silu(a) * b
        "working_set": 3 * HIDDEN + ROTATIONS + 3 * INNER,
        "gathered_weights": 2 * 2 * BLOCK,
    },
    "suffix": {
        "activations": SAVED + LAST + ROTATIONS,
        "working_set": 2 * READ,
        "gathered_weights": 2 * 2 * BLOCK,
    },
    "value head": {
        "activations": SAVED + LAST + ROTATIONS,
        "working_set": READ + 2 * ROW,
        "gathered_weights": 2 * 2 * BLOCK,
    },
    "head": {
        "activations": SAVED + LAST + ROTATIONS,
        "working_set": 3 * ROW,
        "gathered_weights": 2 * BLOCK,
    },
    "block 0": {
        "activations": SAVED + LAST + ROTATIONS - READ_INNER,
        "working_set": READ + 3 * READ_INNER + 2 * 64 * 160,
        "gathered_weights": 2 * 2 * BLOCK,
    },
    "attention 0": {
        "activations": SAVED + ROTATIONS + NORM,
        "working_set": 4 * HIDDEN + 2 * BLOCK,
        "gathered_weights": 2 * 2 * BLOCK,
    },
    "reduce 0": {
        "activations": SAVED + ROTATIONS,
        "working_set": HIDDEN,
        "gathered_weights": 2 * BLOCK,
        "gradient_buffers": 4 * BLOCK + 2 * BLOCK,  # in float32, from bf16
    },
    "block 1": {
        "activations": SAVED + ROTATIONS - INNER,
        "working_set": HIDDEN + 3 * INNER + 2 * 64 * 160,
        "gathered_weights": 2 * BLOCK,
        "gradient_buffers": 4 * BLOCK,
    },
    "attention 1": {
        "activations": NORM,
        "working_set": 3 * HIDDEN + 2 * BLOCK,  # the prefix asks for no gradient
        "gathered_weights": 2 * BLOCK,
        "gradient_buffers": 4 * BLOCK,
    },
    "reduce 1": {"gradient_buffers": 4 * BLOCK + 2 * BLOCK},
    "optimizer": {},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_each_moment_by_hand(name: str) -> None:
    assert _on_top(_moment(_small(2), name)) == BLOCKS[name] | {"batch": BATCH}


def test_moments_are_all_of_a_step_in_order() -> None:
    names = [moment.name for moment in footprint(_small(2)).moments]
    assert names == ["embedding", "gather", "prefix", "gather", "keys", *list(BLOCKS)[1:]]
    full = [moment.name for moment in footprint(_small(4)).moments]
    assert full[0] == "gather"
    assert full[-3:] == ["embeddings", "embeddings", "optimizer"]
    assert footprint(_small(2)).moments[0].components.keys() == set(COMPONENTS)


def test_the_last_block_rotates_the_keys_of_all_tokens_and_the_queries_of_those_read() -> None:
    found = _moment(_small(1), "keys").components
    # rotations of 10 tokens and of 4; both norms' inputs, roots and results
    assert found["activations"] == 640 + 256 + (2 * 1280 + 40) + (2 * 512 + 16)
    # queries of 4, keys and values of 10; keys in float32, their product and its copy
    assert found["working_set"] == 2 * (4 * 64 + 2 * 10 * 32) + (4 + 4 + 2) * 10 * 32


def test_recomputed_blocks_keep_their_inputs_alone() -> None:
    setting = _small(2, activation_checkpointing=True)
    assert _moment(setting, "suffix").components["activations"] == 2 * HIDDEN + ROTATIONS
    first = _moment(setting, "block 0").components["activations"]
    assert first == HIDDEN + ROTATIONS + LAST - READ_INNER


def test_gradients_come_block_by_block_where_none_are_left_from_before() -> None:
    whole = footprint(_small(2)).after_backward.components["gradients"]
    once = _small(2, accumulates=False)
    for name, blocks in [("prefix", 0), ("block 0", 0), ("block 1", 1)]:
        assert _moment(_small(2), name).components["gradients"] == whole
        assert _moment(once, name).components["gradients"] == blocks * 4 * BLOCK // 2
    assert footprint(once).after_backward.components["gradients"] == whole


def test_gathered_weights_by_strategy() -> None:
    gathered = {
        strategy: [
            _moment(_small(2, sharding_strategy=strategy), name).components["gathered_weights"]
            for name in ("prefix", "suffix", "block 0", "block 1")
        ]
        for strategy in ShardingStrategy
    }
    one = 2 * BLOCK
    once_more = [2 * one, 2 * one, 2 * one, one]  # a buffer, and the next block's on their way
    assert gathered[ShardingStrategy.FULL_SHARD] == once_more
    assert gathered[ShardingStrategy.HYBRID_SHARD] == once_more
    assert gathered[ShardingStrategy.REPLICATE_FROZEN] == [0, *once_more[1:]]
    assert gathered[ShardingStrategy.SHARD_GRAD_OP] == [2 * one, 3 * one, 2 * one, one]
    assert gathered[ShardingStrategy.NO_SHARD] == [one, 2 * one, 2 * one, one]


def test_one_process_in_full_precision_gathers_and_reduces_nothing() -> None:
    for moment in footprint(_small(2, 1, mixed_precision=False)).moments:
        assert moment.components["gathered_weights"] == 0
        assert moment.components["gradient_buffers"] == 0


# Evaluation


def test_an_evaluation_saves_nothing_and_has_no_gradients() -> None:
    setting = _small(2, evaluation_tokens=20)
    evaluated = _moment(setting, "evaluate")
    assert evaluated.components["gradients"] == 0
    assert _on_top(evaluated) == {
        # all are read, and taken out of the last block's input
        "working_set": 2 * (BLOCKS["prefix"]["working_set"] + HIDDEN + ROTATIONS),
        "gathered_weights": 3 * 2 * BLOCK,  # the last one's stay from batch to batch
        "batch": 20 * 3 * 8,
    }
    assert "evaluate" not in {moment.name for moment in footprint(_small(2)).moments}


def test_an_evaluation_of_larger_batches_is_the_peak() -> None:
    assert footprint(_small(1, evaluation_tokens=10)).peak.name != "evaluate"
    large = footprint(_small(1, evaluation_tokens=1000))
    assert large.peak.name == "evaluate"


def test_trained_blocks_stay_gathered_from_batch_to_batch_of_an_evaluation() -> None:
    setting = _small(2, evaluation_tokens=10, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)
    assert _moment(setting, "evaluate").components["gathered_weights"] == 4 * 2 * BLOCK


# Growth


def _peaks(settings: list[Setting]) -> list[int]:
    return [footprint(setting).peak.total for setting in settings]


@pytest.mark.parametrize("gpus", [1, 8, 64])
@pytest.mark.parametrize("strategy", ShardingStrategy)
def test_it_grows_with_n(strategy: ShardingStrategy, gpus: int) -> None:
    # full training has more only where embeddings were not whole on every GPU before
    most = 32 if strategy is ShardingStrategy.REPLICATE_FROZEN else 33
    peaks = _peaks([_setting(n, gpus, sharding_strategy=strategy) for n in range(most + 1)])
    assert all(less < more for less, more in pairwise(peaks))


@pytest.mark.parametrize("n", [0, 4, 32, 33])
@pytest.mark.parametrize("strategy", ShardingStrategy)
def test_it_grows_with_tokens(strategy: ShardingStrategy, n: int) -> None:
    tokens = [64, 256, 1024, 2048, 4096, 8192, 65_536]
    settings = [_setting(n, 8, sharding_strategy=strategy, micro_batch_tokens=t) for t in tokens]
    peaks = _peaks(settings)
    assert all(less <= more for less, more in pairwise(peaks))
    assert peaks[0] < peaks[-1]


def test_sharding_over_more_gpus_takes_less() -> None:
    peaks = _peaks([_setting(4, gpus) for gpus in (1, 2, 4, 8, 64)])
    assert all(more > less for more, less in pairwise(peaks))


def test_sequences_that_share_prompts_have_keys_and_values_of_their_own() -> None:
    plain, shared = _small(2), _small(2, keys_per_token=1.5)
    before, after = (_moment(one, "suffix").components for one in (plain, shared))
    keys = 5 * 2 * 32 * 2  # those of half as many tokens once more, in bfloat16
    assert after["activations"] - before["activations"] == 2 * keys  # of both blocks
    assert after["batch"] - before["batch"] == 15 * 8


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("trunk", ["7b", "70b"])
@pytest.mark.parametrize("n", [0, 1, 4])
def test_copies_in_their_share_of_the_budget_take_no_more_than_tokens(
    n: int, trunk: str, compiled: bool
) -> None:
    settings: dict[str, Any] = {
        "trunk": trunk,
        "compiled": compiled,
        "evaluation_tokens": 8192,
    }
    most = footprint(_setting(n, **settings)).peak.total
    share = copy_share(SHAPES[trunk])
    for keys in (1.2, 1.5, 3.0, 10.0, 200.0):
        tokens = int(8192 / (1 + share * (keys - 1)))
        changes = {"micro_batch_tokens": tokens, "evaluation_tokens": tokens}
        shared = _setting(n, **settings | changes, keys_per_token=keys)
        indices = round(tokens * keys) * 8  # next to nothing
        assert footprint(shared).peak.total <= most + indices


def test_a_negative_n_is_refused() -> None:
    with pytest.raises(InputError, match="num_unfrozen_layers: -1"):
        footprint(_small(-1))
