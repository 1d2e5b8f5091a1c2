"""How a critic lies on its GPUs: FSDP2 with frozen and trainable parameters side by side.

Frozen parameters are stored in the compute dtype and trainable ones as float32 masters; gradients
are reduced in float32. A frozen block is given up after its forward pass, and never gathered in the
backward pass. Strategies:

    FULL_SHARD        everything sharded over all GPUs
    SHARD_GRAD_OP     the same, but a trainable block's gathered parameters stay until its backward
    HYBRID_SHARD      sharded inside a node, replicated across nodes
    NO_SHARD          everything whole on every GPU
    REPLICATE_FROZEN  the frozen part whole on every GPU, the trainable part sharded
    auto              as FULL_SHARD; a training knows before what it stands for
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from job.common.schema import FsdpConfig, ShardingStrategy
from job.distributed.world import World
from job.model.critic import Critic
from job.model.transformer import LeftOut


def shard(critic: Critic, config: FsdpConfig, world: World) -> None:
    """Shard a critic that lies on the meta device, its N blocks unfrozen already.

    `load_trunk` and the head's initialisation fill the shards afterwards.
    """
    lay_out(critic, config, world)
    critic.to_empty(device="cpu" if config.cpu_offload else world.device)


def lay_out(critic: Critic, config: FsdpConfig, world: World) -> None:
    """The part of `shard` that needs no memory: dtypes and placements, on the meta device."""
    compute = torch.bfloat16 if config.mixed_precision else torch.float32
    # frozen weights need no master: FSDP would keep and gather float32 ones
    for parameter in critic.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(compute)
    if world.size > 1 or config.mixed_precision or config.cpu_offload:
        _fully_shard(critic, config, world, compute)  # else nothing to shard, cast or move


def _fully_shard(critic: Critic, config: FsdpConfig, world: World, compute: torch.dtype) -> None:
    strategy = config.sharding_strategy
    trunk = critic.trunk
    # inputs are what they are to be already, and the table of rotations stays float32
    mixed = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    on_gpu = world.device.type == "cuda"  # a CPU has no memory to pin for transfers
    gather_again = strategy not in (ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD)
    settings: dict[str, Any] = {
        "mesh": build_mesh(strategy, world),
        "offload_policy": CPUOffloadPolicy(on_gpu) if config.cpu_offload else OffloadPolicy(),
        "ignored_params": _replicated(critic, strategy),
    }
    first = trunk.first_trainable_block()
    left_out = sum(isinstance(block, LeftOut) for block in trunk.layers)
    for index, block in enumerate(trunk.layers[left_out:], left_out):
        # the last block's backward comes next: gathering it again would be waste
        again = index < first or (gather_again and block is not trunk.layers[-1])
        fully_shard(block, mp_policy=mixed, reshard_after_forward=again, **settings)
    if not isinstance(trunk.tok_embeddings, LeftOut):
        again = gather_again or not trunk.trains_embeddings
        fully_shard(trunk.tok_embeddings, mp_policy=mixed, reshard_after_forward=again, **settings)
    fully_shard(critic.value_head, mp_policy=exact, reshard_after_forward=False, **settings)
    fully_shard(critic, mp_policy=mixed, reshard_after_forward=False, **settings)
    for block in trunk.layers[left_out:first]:
        assert isinstance(block, FSDPModule)
        block.set_unshard_in_backward(False)  # nothing in it has a gradient


def _replicated(critic: Critic, strategy: ShardingStrategy) -> set[nn.Parameter]:
    """Parameters that stay whole on every GPU outside FSDP."""
    if strategy is not ShardingStrategy.REPLICATE_FROZEN:
        return set()
    return {p for p in critic.parameters() if not p.requires_grad}


def build_mesh(strategy: ShardingStrategy, world: World) -> DeviceMesh:
    """One dimension to shard over, or (replicate, shard) for the strategies that replicate."""
    kind = world.device.type
    if strategy is ShardingStrategy.NO_SHARD:
        return init_device_mesh(kind, (world.size, 1), mesh_dim_names=("replicate", "shard"))
    if strategy is ShardingStrategy.HYBRID_SHARD:
        nodes = world.size // world.local_size
        shape = (nodes, world.local_size)
        return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
