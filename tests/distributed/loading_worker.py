"""One rank that loads bases into a sharded critic and compares them with the whole weights.

    python loading_worker.py CASE [CASE ...]

A case is a folder of bases, with the weights that each of them must give.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from job.common.schema import DistributedConfig, FsdpConfig, ShardingStrategy
from job.distributed.fsdp import shard
from job.distributed.world import World, joined_world
from job.model.architecture_file import read_architecture
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.shards import full_tensor, local_shard
from job.model.weights import check_trunk, load_trunk

EXPECTED = "expected.safetensors"
STRATEGIES = (ShardingStrategy.FULL_SHARD, ShardingStrategy.REPLICATE_FROZEN)


def _load(folder: Path, strategy: ShardingStrategy, world: World) -> Critic:
    check_trunk(folder, 64)
    with torch.device("meta"):
        critic = Critic(read_architecture(folder))
    unfreeze_last_blocks(critic, 1)
    shard(critic, FsdpConfig(sharding_strategy=strategy), world)
    for parameter in critic.parameters():
        local_shard(parameter).fill_(torch.nan)  # what is not written shows
    load_trunk(critic.trunk, folder)
    return critic


def _compare(critic: Critic, expected: dict[str, Tensor]) -> None:
    named = dict(critic.trunk.named_parameters())
    assert named.keys() == expected.keys()
    for name, parameter in named.items():
        wanted = expected[name].to(parameter.dtype)
        assert torch.equal(full_tensor(parameter.detach()), wanted), name


def main() -> None:
    with joined_world(DistributedConfig()) as world:
        for case in map(Path, sys.argv[1:]):
            expected = load_file(case / EXPECTED)
            folders = sorted(path for path in case.iterdir() if path.is_dir())
            assert len(folders) == 5
            for folder, strategy in product(folders, STRATEGIES):
                _compare(_load(folder, strategy, world), expected)


if __name__ == "__main__":
    main()
