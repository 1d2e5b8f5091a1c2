"""Where a training stands, beside its parameters: what one rank needs to go on to the bit."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from job.run.alarm import ConstantPredictorAlarm
from job.run.metrics_log import Window


@dataclass
class TrainingState:
    """One rank's state after `step` optimizer steps.

    Attributes:
        window: what was measured since the last log line.
        unfinished: the metrics of `step` while they still lack its evaluation.
        bad_steps: how many steps in a row had a loss or gradient that was not finite.
        skipped_steps: how many there were in all.
        skipped_at: which they were; states of 0.1.0 do not say.
    """

    alarm: ConstantPredictorAlarm
    step: int = 0
    window: Window = field(default_factory=Window)
    unfinished: dict[str, float] | None = None
    bad_steps: int = 0
    skipped_steps: int = 0
    skipped_at: tuple[int, ...] = ()

    @property
    def recorded_step(self) -> int:
        """The last step whose metrics are complete."""
        return self.step if self.unfinished is None else self.step - 1

    def to_bytes(self) -> bytes:
        return pickle.dumps((self, _random_states()))

    @classmethod
    def of_rank(cls, stored: Sequence[bytes], rank: int, size: int) -> TrainingState:
        """This rank's state from those of all ranks of the attempt that stored them.

        With as many ranks as then, each gets its own; otherwise rank 0 takes over what all of
        them had measured.
        """
        states = [_Unpickler(io.BytesIO(one)).load() for one in stored]
        state, random_states = states[rank if len(states) == size else 0]
        if len(states) == size:
            _set_random_states(random_states)
        else:
            state.window = Window.merged([s.window for s, _ in states] if rank == 0 else [])
        assert isinstance(state, TrainingState)
        return state


# Modules whose classes are in the checkpoints of an earlier layout, and where they are now.
_MOVED = {
    "job.learning.training_state": "job.training.state",
    "job.telemetry.alarm": "job.run.alarm",
    "job.telemetry.tracking": "job.run.metrics_log",
    "job.telemetry.value_metrics": "job.run.value_metrics",
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        return super().find_class(_MOVED.get(module, module), name)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
