"""Which weights are gathered between a forward and a backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from job.common.schema import FsdpConfig, ShardingStrategy
from job.distributed.fsdp import shard
from job.distributed.world import World
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.packed_layout import PackedLayout

SMALL = TransformerConfig(dim=16, n_layers=4, n_heads=2, vocab_size=32, multiple_of=8)


@pytest.fixture
def world() -> Iterator[World]:
    """The first of two ranks, of which the other does not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield World(size=2, local_size=2)
    finally:
        dist.destroy_process_group()


def _sharded(strategy: ShardingStrategy, n: int, world: World) -> Critic:
    with torch.device("meta"):
        critic = Critic(SMALL)
    unfreeze_last_blocks(critic, n)
    shard(critic, FsdpConfig(sharding_strategy=strategy), world)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.zero_()
    return critic


def _gathered(module: torch.nn.Module) -> bool:
    assert isinstance(module, FSDPModule)
    group = module._get_fsdp_state()._fsdp_param_group
    assert group is not None
    return group.is_unsharded


def _forward(critic: Critic) -> torch.Tensor:
    output = critic(torch.arange(6), PackedLayout([4, 2]), torch.arange(1, 5))
    assert isinstance(output, torch.Tensor)
    return output


@pytest.mark.parametrize(
    ("strategy", "trained"),
    [
        # the last block's backward pass comes at once
        (ShardingStrategy.FULL_SHARD, [False, True]),
        (ShardingStrategy.HYBRID_SHARD, [False, True]),
        (ShardingStrategy.SHARD_GRAD_OP, [True, True]),
        (ShardingStrategy.NO_SHARD, [True, True]),
    ],
)
def test_frozen_blocks_are_given_up_after_their_forward_pass(
    strategy: ShardingStrategy, trained: list[bool], world: World
) -> None:
    critic = _sharded(strategy, 2, world)
    output = _forward(critic)
    assert not _gathered(critic.trunk.tok_embeddings)
    assert [_gathered(block) for block in critic.trunk.layers] == [False, False, *trained]
    output.sum().backward()
    assert not any(_gathered(block) for block in critic.trunk.layers)


def test_embeddings_stay_only_where_they_are_trained(world: World) -> None:
    for n, stay in [(4, False), (5, True)]:
        critic = _sharded(ShardingStrategy.SHARD_GRAD_OP, n, world)
        _forward(critic)
        assert _gathered(critic.trunk.tok_embeddings) is stay
