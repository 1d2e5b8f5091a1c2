"""What one optimizer step asks of the GPU: launches, copies, and where it waits.

python trace_step.py '[{"trunk": "small", "n": 2}, ...]'
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import training
from recording import Recording
from training import Case

from job.run.value_metrics import ValueMetrics


def trace(case: Case) -> dict[str, Any]:
    """The third step's, whose batches are assembled in it; the first two warm up."""
    recording = Recording()
    with training.ranks(case) as world:
        learner = training.learner(case, world, recording.within)
        for step in range(2):
            batches = [
                training.batch(case.lengths, case.solutions) for _ in range(case.micro_batches)
            ]
            learner.step(step, batches, ValueMetrics())
        with recording.running():
            with recording.within("assemble"):
                batches = [
                    training.batch(case.lengths, case.solutions) for _ in range(case.micro_batches)
                ]
            learner.step(2, batches, ValueMetrics())
        del learner, batches
    launches = [event.name for event in recording.events if event.is_launch]
    return {
        "launches": len(launches),
        "kernels": dict(Counter(launches).most_common()),
        "collectives": Counter(e.name for e in recording.events if e.kind == "N"),
        "waits": sorted(recording.waits),
    }


if __name__ == "__main__":
    training.answer(trace)
