"""The closed form's memory beside what torch's own allocator counts, for each case that is given.

python measure_memory.py '[{"trunk": "7b", "n": 4}, ...]'
"""

from __future__ import annotations

import gc
from typing import Any

import torch
import training
from training import Case

from job.memory.footprint import footprint
from job.run.value_metrics import ValueMetrics


def measure(case: Case) -> dict[str, Any]:
    """Bytes above what was there before: the peak of a step, and after its backward passes."""
    gc.collect()  # what the case before has left in cycles would be freed meanwhile
    before = torch.cuda.memory_allocated()
    with training.ranks(case) as world:
        learner = training.learner(case, world)
        after: list[int] = []
        learner.optimizer.register_step_pre_hook(
            lambda *_: after.append(torch.cuda.memory_allocated() - before)
        )
        batches = [training.batch(case.lengths, case.solutions) for _ in range(case.micro_batches)]
        learner.step(0, batches, ValueMetrics())  # makes the optimizer's state
        torch.cuda.reset_peak_memory_stats()
        learner.step(1, batches, ValueMetrics())
        found = {
            "peak": torch.cuda.max_memory_allocated() - before,
            "after_backward": after[-1],
            "reserved": torch.cuda.max_memory_reserved() - before,
            "before": before,
        }
        del learner, batches
    predicted = footprint(case.setting)
    expected = {
        "peak": predicted.peak.total,
        "moment": predicted.peak.name,
        "after_backward": predicted.after_backward.total,
    }
    return {"predicted": expected, "measured": found}


if __name__ == "__main__":
    training.answer(measure)
