"""Trains with what `auto` takes of the GPU's memory, in sequences of lengths as data has them.

python fill_gpu.py '[{"trunk": "7b", "n": 4}, ...]'
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import training
from training import Case

from job.common.schema import AUTO, CriticConfig
from job.memory.fit import fit
from job.memory.footprint import Setting
from job.memory.settings import setting_of
from job.run.value_metrics import ValueMetrics
from job.training.allocator import segments_grow

STEPS, MICRO_BATCHES = 6, 3
SHORTEST, LONGEST = 100, 2048  # tokens
SEQUENCES = 96  # of a step on each GPU: more tokens than the largest micro-batch has


def fill(case: Case) -> dict[str, Any]:
    """What was chosen and predicted, and what the allocator then reserved and gave up."""
    capacity = torch.cuda.get_device_properties(0).total_memory
    setting = chosen(case, capacity)
    tokens, strategy = setting.micro_batch_tokens, setting.fsdp.sharding_strategy.name
    case = replace(case, fsdp={**case.fsdp, "sharding_strategy": strategy})
    with training.ranks(case) as world:
        learner = training.learner(case, world)
        rng = np.random.default_rng(0)
        torch.cuda.reset_peak_memory_stats()
        for step in range(STEPS):
            batches = [training.batch([*lengths(rng, tokens)]) for _ in range(MICRO_BATCHES)]
            learner.step(step, batches, ValueMetrics())
        found = torch.cuda.memory_stats()
        del learner, batches
    return {
        "tokens": tokens,
        "strategy": strategy,
        "predicted": fit(setting, capacity).reserved,
        "reserved": found["reserved_bytes.all.peak"],
        "allocated": found["allocated_bytes.all.peak"],
        "retries": found["num_alloc_retries"],
    }


def chosen(case: Case, capacity: int) -> Setting:
    """As a job chooses: the micro-batch, and where the case says so the strategy."""
    config = CriticConfig()
    config.distributed.fsdp = case.fsdp_config
    config.data.max_length = LONGEST
    training = config.training
    training.num_unfrozen_layers, training.compile = case.n, case.compiled
    training.micro_batch_tokens, training.batch_size = AUTO, SEQUENCES * case.world
    return setting_of(
        config,
        case.architecture,
        world_size=case.world,
        per_node=min(case.world, case.per_node),
        capacity=capacity,
        segments_grow=segments_grow(),
    )


def lengths(rng: np.random.Generator, budget: int) -> Iterator[int]:
    """Sequences that fill a budget as a packer does: mostly, and sometimes less."""
    left = int(budget * rng.uniform(0.75, 1.0))
    while left >= LONGEST:
        length = int(rng.integers(SHORTEST, LONGEST + 1))
        yield length
        left -= length
    yield max(left, 1)


if __name__ == "__main__":
    training.answer(fill)
