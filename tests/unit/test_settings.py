"""What a configuration means for memory, and what `micro_batch_tokens: auto` stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from job.common.errors import InputError
from job.common.schema import (
    AUTO,
    CriticConfig,
    FsdpConfig,
    Loss,
    PrefixCacheMode,
    ShardingStrategy,
)
from job.memory.fit import fit, largest_unfrozen
from job.memory.footprint import Setting
from job.memory.settings import SHAPES, setting_of

SEVEN_B = SHAPES["7b"]
A100_40GB, A100_80GB = 42_300_000_000, 85_000_000_000


def _config(**training: Any) -> CriticConfig:
    """16 sequences of at most 2048 tokens a step."""
    config = CriticConfig()
    for key, value in training.items():
        setattr(config.training, key, value)
    return config


def _auto(world_size: int = 1, capacity: int = A100_80GB, **training: Any) -> Setting:
    config = _config(micro_batch_tokens=AUTO, **training)
    return setting_of(config, SEVEN_B, world_size=world_size, capacity=capacity)


def test_a_configuration_is_taken_over() -> None:
    config = _config(num_unfrozen_layers=2, micro_batch_tokens=4096)
    config.distributed.fsdp.sharding_strategy = ShardingStrategy.HYBRID_SHARD
    setting = setting_of(config, SEVEN_B, world_size=16, per_node=8, cuda=False)
    assert (setting.architecture, setting.num_unfrozen_layers) == (SEVEN_B, 2)
    assert setting.fsdp is config.distributed.fsdp
    assert (setting.world_size, setting.per_node, setting.cuda) == (16, 8, False)
    assert setting.micro_batch_tokens == setting.evaluation_tokens == 4096
    assert setting.response_tokens is None  # of any data, all tokens may be


def test_a_micro_batch_holds_no_more_than_a_step_but_an_evaluation_may() -> None:
    setting = setting_of(_config(batch_size=2, micro_batch_tokens=8192), SEVEN_B)
    assert setting.micro_batch_tokens == 2 * 2048
    assert setting.evaluation_tokens == 8192


@pytest.mark.parametrize(
    ("batch_size", "tokens", "world_size", "accumulates"),
    [
        (16, 8192, 1, True),  # four of 2048 in each
        (16, 8192, 4, False),
        (17, 8192, 4, True),
        (16, 32_768, 1, False),
        (16, 32_767, 1, True),
        (12, 8191, 4, False),  # three in each, at the worst
        (13, 8191, 4, True),  # although 13 x 2048 is less than 4 x 8191
    ],
)
def test_gradients_are_there_already_where_a_rank_may_have_two_micro_batches(
    batch_size: int, tokens: int, world_size: int, accumulates: bool
) -> None:
    config = _config(batch_size=batch_size, micro_batch_tokens=tokens)
    assert setting_of(config, SEVEN_B, world_size=world_size).accumulates is accumulates


def test_the_largest_micro_batch_that_fits_is_chosen() -> None:
    chosen = _auto(capacity=A100_40GB)
    tokens = chosen.micro_batch_tokens
    assert tokens == chosen.evaluation_tokens
    assert 8192 < tokens < 16 * 2048
    assert fit(chosen, A100_40GB).fits
    more = replace(chosen, micro_batch_tokens=tokens + 256, evaluation_tokens=tokens + 256)
    assert not fit(more, A100_40GB).fits


def test_no_more_than_a_rank_has_of_a_step_is_chosen() -> None:
    assert _auto().micro_batch_tokens == 16 * 2048
    assert not _auto().accumulates
    assert _auto(world_size=4).micro_batch_tokens == 4 * 2048
    assert _auto(world_size=64).micro_batch_tokens == 2048  # one sequence
    assert _auto(batch_size=512, num_unfrozen_layers=0).micro_batch_tokens == 65_536


def test_a_pair_stays_together() -> None:
    config = _config(micro_batch_tokens=AUTO)
    config.objective.loss = Loss.pairwise
    setting = setting_of(config, SEVEN_B, world_size=64, capacity=A100_80GB)
    assert setting.micro_batch_tokens == 2 * 2048
    assert not setting.accumulates


def test_where_nothing_fits_it_is_said_what_would() -> None:
    needed = fit(replace(_auto(num_unfrozen_layers=16), micro_batch_tokens=2048), 0).needed
    with pytest.raises(InputError) as error:
        _auto(capacity=A100_40GB, num_unfrozen_layers=16)
    said = str(error.value)
    assert said.startswith(f"training.micro_batch_tokens: auto: N=16 takes {needed / 1e9:.1f} GB")
    assert " of a GPU's 42.3 GB even with 2048 tokens; N=7 fits. Unfreeze fewer blocks" in said
    assert said.endswith("or set distributed.fsdp.activation_checkpointing")
    with pytest.raises(InputError, match=r"GPU's 12\.0 GB even with 2048 tokens; no N fits"):
        _auto(capacity=12_000_000_000)


GPU_24GB = 24_000_000_000


def test_where_nothing_fits_it_is_said_that_cached_states_would() -> None:
    config = _config(micro_batch_tokens=AUTO)
    cached = setting_of(config, SEVEN_B, capacity=GPU_24GB, prefix_cached=True)
    assert fit(cached, GPU_24GB).fits
    smallest = replace(cached, micro_batch_tokens=2048, evaluation_tokens=0)
    needed = fit(smallest, GPU_24GB).needed / 1e9
    with pytest.raises(InputError) as error:
        setting_of(config, SEVEN_B, capacity=GPU_24GB)
    built = "built first (python -m job.cache build): "
    said = float(str(error.value).partition(built)[2].removesuffix(" GB"))
    assert said == pytest.approx(needed, abs=0.1)
    config.training.prefix_cache = PrefixCacheMode.none
    with pytest.raises(InputError, match=r"set distributed\.fsdp\.activation_checkpointing$"):
        setting_of(config, SEVEN_B, capacity=GPU_24GB)


def test_with_cached_states_frozen_weights_take_no_room_from_micro_batches() -> None:
    config = _config(micro_batch_tokens=AUTO)
    read, computed = (
        setting_of(config, SEVEN_B, capacity=A100_40GB, prefix_cached=cached)
        for cached in (True, False)
    )
    assert read.micro_batch_tokens > computed.micro_batch_tokens


@pytest.mark.parametrize(
    ("cached", "strategy"), [(False, "FULL_SHARD"), (True, "REPLICATE_FROZEN")]
)
def test_auto_knows_that_cached_blocks_are_nowhere(cached: bool, strategy: str) -> None:
    setting = setting_of(
        _config(), SEVEN_B, world_size=4, capacity=18 * 10**9, prefix_cached=cached
    )
    assert setting.fsdp.sharding_strategy.name == strategy


@pytest.mark.parametrize(
    ("capacity", "world_size", "strategy"),
    [
        (A100_80GB, 4, "REPLICATE_FROZEN"),
        (A100_80GB, 1, "REPLICATE_FROZEN"),
        (18 * 10**9, 4, "FULL_SHARD"),  # 20.4 with frozen weights whole, 11.7 without
        (0, 4, "FULL_SHARD"),  # not known
    ],
)
def test_auto_keeps_frozen_weights_whole_where_they_fit(
    capacity: int, world_size: int, strategy: str
) -> None:
    config = _config(micro_batch_tokens=8192)
    assert config.distributed.fsdp.sharding_strategy is ShardingStrategy.auto
    chosen = setting_of(config, SEVEN_B, world_size=world_size, per_node=8, capacity=capacity)
    assert chosen.fsdp.sharding_strategy is ShardingStrategy[strategy]
    assert fit(chosen, capacity).fits or not capacity
    for other in ({"cuda": False}, {}):
        config.distributed.fsdp.cpu_offload = not other
        sharded = setting_of(config, SEVEN_B, world_size=4, capacity=A100_80GB, **other)
        assert sharded.fsdp.sharding_strategy is ShardingStrategy.FULL_SHARD


def test_the_largest_n_of_auto_is_that_of_the_strategy_it_would_fall_back_to() -> None:
    named: dict[ShardingStrategy, int | None] = {}
    for strategy in (ShardingStrategy.auto, ShardingStrategy.FULL_SHARD):
        config = _config(micro_batch_tokens=8192)
        config.distributed.fsdp.sharding_strategy = strategy
        setting = setting_of(config, SEVEN_B, world_size=4, per_node=4, capacity=A100_40GB)
        named[strategy] = largest_unfrozen(setting, A100_40GB)
    setting = replace(setting, fsdp=FsdpConfig(ShardingStrategy.REPLICATE_FROZEN))
    whole, found = largest_unfrozen(setting, A100_40GB), named[ShardingStrategy.auto]
    assert whole is not None
    assert found is not None
    assert whole < found == named[ShardingStrategy.FULL_SHARD]


def test_a_strategy_that_is_named_is_kept() -> None:
    config = _config(micro_batch_tokens=8192)
    config.distributed.fsdp.sharding_strategy = ShardingStrategy.SHARD_GRAD_OP
    kept = setting_of(config, SEVEN_B, world_size=4, capacity=A100_80GB)
    assert kept.fsdp.sharding_strategy is ShardingStrategy.SHARD_GRAD_OP


def test_with_both_auto_whole_weights_leave_room_for_a_usual_micro_batch() -> None:
    config = _config(batch_size=256, micro_batch_tokens="auto")
    for capacity in range(16, 40, 2):
        found = setting_of(config, SEVEN_B, world_size=4, capacity=capacity * 10**9)
        if found.fsdp.sharding_strategy is ShardingStrategy.REPLICATE_FROZEN:
            assert found.micro_batch_tokens >= 8192


@pytest.mark.parametrize(("given", "compiled"), [("auto", True), (True, True), (False, False)])
def test_blocks_are_predicted_as_compiled_on_gpus(given: bool | str, compiled: bool) -> None:
    config = _config(micro_batch_tokens=8192)
    config.training.compile = given
    assert setting_of(config, SEVEN_B).compiled is compiled
    assert not setting_of(config, SEVEN_B, cuda=False).compiled
