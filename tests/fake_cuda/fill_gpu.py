"""Trains with the micro-batches that `auto` takes of the GPU's memory, of lengths as data has them.

python fill_gpu.py '[{"trunk": "7b", "n": 4}, ...]'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import training
from training import Case

from job.memory.fit import fit, largest_micro_batch
from job.run.value_metrics import ValueMetrics

STEPS, MICRO_BATCHES = 6, 3
SHORTEST, LONGEST, MOST = 100, 2048, 65_536  # tokens


def fill(case: Case) -> dict[str, Any]:
    """What was chosen and predicted, and what the allocator then reserved and gave up."""
    capacity = torch.cuda.get_device_properties(0).total_memory
    setting = replace(case.setting, response_tokens=None, accumulates=True)
    tokens = largest_micro_batch(setting, capacity, MOST, LONGEST)
    assert tokens is not None, f"not even {LONGEST} tokens fit"
    with training.ranks(case) as world:
        learner = training.learner(case, world)
        rng = np.random.default_rng(0)
        torch.cuda.reset_peak_memory_stats()
        for step in range(STEPS):
            batches = [training.batch([*lengths(rng, tokens)]) for _ in range(MICRO_BATCHES)]
            learner.step(step, batches, ValueMetrics())
        found = torch.cuda.memory_stats()
        del learner, batches
    chosen = fit(replace(setting, micro_batch_tokens=tokens), capacity)
    return {
        "tokens": tokens,
        "predicted": chosen.reserved,
        "reserved": found["reserved_bytes.all.peak"],
        "allocated": found["allocated_bytes.all.peak"],
        "retries": found["num_alloc_retries"],
    }


def lengths(rng: np.random.Generator, budget: int) -> Iterator[int]:
    """Sequences that fill a budget as a packer does: mostly, and sometimes less."""
    left = int(budget * rng.uniform(0.75, 1.0))
    while left >= LONGEST:
        length = int(rng.integers(SHORTEST, LONGEST + 1))
        yield length
        left -= length
    yield max(left, 1)


if __name__ == "__main__":
    training.prepare()
    print(json.dumps([fill(Case(**given)) for given in json.loads(sys.argv[1])]))
