"""What a run writes while it goes on: metrics.jsonl first, MLflow behind it."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import torch

from job.data.packing import Batch
from job.durability.run_directory import RunDirectory
from job.learning.world import World
from job.telemetry.mirror import Mirror, live_mirror_allowed, tracking_uri
from job.telemetry.value_metrics import ValueMetrics

CLOSE_SECONDS = 60.0  # how long the end of a run waits for MLflow
_log = logging.getLogger(__name__)


class Tracker:
    """Appends to a run's metrics.jsonl and telemetry.jsonl, and keeps its MLflow copy going.

    metrics.jsonl holds only what two equal runs write alike; time, speed and memory go to
    telemetry.jsonl. As a context it ends, within a limit, when MLflow has caught up.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._metrics = _Lines(run.file("metrics.jsonl") if run.writes else Path(os.devnull))
        self._telemetry = _Lines(run.file("telemetry.jsonl") if run.writes else Path(os.devnull))
        self._mirror = self._start_mirror() if run.writes else None

    def _start_mirror(self) -> Mirror | None:
        config = self._run.config()
        if not config["mlflow"]["enabled"]:
            return None
        if not live_mirror_allowed(tracking_uri(config)):
            _log.info("MLflow: no server in a cluster job; later: %s", self._sync_command())
            return None
        return Mirror.start(self._run.path)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._metrics.write(step, values)

    def telemetry(self, step: int, values: Mapping[str, float]) -> None:
        self._telemetry.write(step, {"time": time.time(), **values})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._metrics.close()
        self._telemetry.close()
        if self._mirror is not None and not self._mirror.close(CLOSE_SECONDS):
            _log.warning("MLflow has not received everything; later: %s", self._sync_command())

    def _sync_command(self) -> str:
        return f"python -m job.report --sync {self._run.path}"


class _Lines:
    """A JSON Lines file, flushed line by line."""

    def __init__(self, path: Path) -> None:
        self._stream: IO[str] = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._stream.write(json.dumps({"step": step, **finite}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Window:
    """What happened since the last log line."""

    def __init__(self) -> None:
        self.metrics = ValueMetrics()
        self._tokens = self._response_tokens = self._steps = 0
        self._seconds = 0.0

    def add(self, batches: Sequence[Batch], seconds: float) -> None:
        """Count one optimizer step that took `seconds`."""
        self._tokens += sum(len(batch.tokens) for batch in batches)
        self._response_tokens += sum(len(batch.responses) for batch in batches)
        self._steps += 1
        self._seconds += seconds

    def telemetry(self, world: World) -> dict[str, float]:
        """Speed of all ranks together, and this rank's memory; every rank must take part."""
        tokens, response_tokens = world.sum([self._tokens, self._response_tokens])
        return {
            "tokens_per_second": tokens / self._seconds,
            "response_tokens_per_second": response_tokens / self._seconds,
            "seconds_per_step": self._seconds / self._steps,
            "memory_bytes": peak_memory_bytes(world.device),
        }
