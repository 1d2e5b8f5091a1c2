"""How a contestant of bench/throughput.py takes its turns: one JSON object a line, in and out.

The first line in has its settings, and its answer says what is trained. Each further line asks for
one step, and its answer is what that took: everything between two answers, fetching of data
included. The end of input is the end. Standard library only, besides torch: peers have environments
of their own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    """What all contestants are told.

    Attributes:
        folder: a language model with a head of one label, in Hugging Face's layout.
        data: a folder as `job.data.token_cache.TokenizedSet` reads it; rows 2i and 2i + 1 are a
            pair, the better one first.
        n: unfrozen blocks.
        sequences: of a step.
        scratch: a folder for whatever a library wants to write.
        options: of this contestant alone.
    """

    folder: str
    data: str
    n: int
    sequences: int
    learning_rate: float
    betas: Sequence[float]
    weight_decay: float
    max_grad_norm: float
    seed: int
    device: str
    scratch: str
    options: dict[str, Any] = field(default_factory=dict)


class Turns:
    """One contestant's end of the line to the benchmark."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer
        self.settings = Settings(**json.loads(sys.stdin.readline()))
        self._batches: deque[tuple[list[int], int]] = deque()
        self._loss: torch.Tensor | float | None = None
        self._began = 0.0

    def ready(self, model: torch.nn.Module | None, groups: Iterable[dict[str, Any]]) -> None:
        """Say what is trained, and with which settings of AdamW."""
        parameters = [] if model is None else [p for p in model.parameters() if p.requires_grad]
        self._answer(
            {
                "trainable": sum(p.numel() for p in parameters),
                "adamw": sorted(
                    [g["lr"], *g["betas"], g["eps"], g["weight_decay"]] for g in groups
                ),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
        )

    def batch(self, rows: Sequence[int], computed_tokens: int) -> None:
        """Note what some coming step trains on; a loader may be a batch ahead."""
        self._batches.append((list(rows), computed_tokens))

    def loss(self, loss: torch.Tensor | float | None) -> None:
        """Note the loss of the current step, before its update."""
        self._loss = loss.detach() if isinstance(loss, torch.Tensor) else loss

    def wait(self) -> bool:
        """Wait for a step to be asked for, from which on time counts; false when none is."""
        asked = bool(sys.stdin.readline())
        self._began = time.perf_counter()
        return asked

    def done(self) -> None:
        """The step is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        rows, computed = self._batches.popleft()
        self._answer(
            {
                "seconds": seconds,
                "rows": rows,
                "computed_tokens": computed,
                "loss": None if self._loss is None else float(self._loss),
                "peak_memory_mb": _peak_memory_mb(),
            }
        )

    def _answer(self, found: dict[str, Any]) -> None:
        print(json.dumps(found), file=self._answers, flush=True)


def _peak_memory_mb() -> float:
    """Most memory in MB of 1e6 bytes: of the GPU by the allocator, else resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    # not getrusage: a child's ru_maxrss starts at what its parent had resident
    status = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(kilobytes) * 1024 / 1e6
