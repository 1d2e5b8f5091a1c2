"""One rank that loads bases into a sharded critic and compares them with the whole weights.

python loading_worker.py EXPECTED.safetensors FOLDER [FOLDER ...]
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file

from job.config import DistributedConfig, FsdpConfig, ShardingStrategy
from job.learning.sharding import shard
from job.learning.world import World, joined_world
from job.model.architecture import read_architecture
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.shards import own, whole
from job.model.weights import check_trunk, load_trunk

STRATEGIES = (ShardingStrategy.FULL_SHARD, ShardingStrategy.REPLICATE_FROZEN)


def _load(folder: Path, strategy: ShardingStrategy, world: World) -> Critic:
    check_trunk(folder, 64)
    with torch.device("meta"):
        critic = Critic(read_architecture(folder))
    unfreeze_last_blocks(critic, 1)
    shard(critic, FsdpConfig(sharding_strategy=strategy), world)
    for parameter in critic.parameters():
        own(parameter).fill_(torch.nan)  # what is not written shows
    load_trunk(critic.trunk, folder)
    return critic


def main() -> None:
    expected = load_file(sys.argv[1])
    with joined_world(DistributedConfig()) as world:
        for folder, strategy in product(sys.argv[2:], STRATEGIES):
            critic = _load(Path(folder), strategy, world)
            named = dict(critic.trunk.named_parameters())
            assert named.keys() == expected.keys()
            for name, parameter in named.items():
                wanted = expected[name].to(parameter.dtype)
                assert torch.equal(whole(parameter.detach()), wanted), (folder, strategy, name)


if __name__ == "__main__":
    main()
