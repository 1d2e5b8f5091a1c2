"""What a run writes while it goes on: metrics.jsonl first, MLflow behind it."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from job.data.packing import Batch
from job.distributed.world import World
from job.run.directory import RunDirectory
from job.run.mlflow_mirror import Mirror, live_mirror_allowed
from job.run.mlflow_sync import tracking_uri
from job.run.value_metrics import ValueMetrics

CLOSE_SECONDS = 60.0  # how long the end of a run waits for MLflow
INTERRUPTED_SECONDS = 5.0  # the same where the run was stopped or failed: others may not wait
_log = logging.getLogger(__name__)


class Tracker:
    """Appends to a run's metrics.jsonl and telemetry.jsonl, and keeps its MLflow copy going.

    metrics.jsonl holds only what two equal runs write alike; time, speed and memory go to
    telemetry.jsonl. As a context it ends, within a limit, when MLflow has caught up.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._open()
        self._mirror = self._start_mirror() if run.writes else None

    def _open(self) -> None:
        places = [self._run.file(name) for name in ("metrics.jsonl", "telemetry.jsonl")]
        if not self._run.writes:
            places = [Path(os.devnull)] * 2
        self._metrics, self._telemetry = map(_Lines, places)

    def rewind(self, step: int) -> None:
        """Go on after `step`, whatever was written since."""
        self._close()
        self._run.keep_lines(step)
        self._open()

    def flush(self) -> None:
        """Have everything on the disk itself.

        Raises:
            OSError: the file system does not take it.
        """
        self._metrics.flush()
        self._telemetry.flush()

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
        self._close()
        seconds = CLOSE_SECONDS if error is None else INTERRUPTED_SECONDS
        if self._mirror is not None and not self._mirror.close(seconds):
            _log.warning("MLflow has not received everything; later: %s", self._sync_command())

    def _close(self) -> None:
        self._metrics.close()
        self._telemetry.close()

    def _sync_command(self) -> str:
        return f"python -m job.report --sync {self._run.path}"


class _Lines:
    """A JSON Lines file. What a full disk does not take waits for the next line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""
        self._lock = threading.Lock()  # checkpoints are committed by a thread of their own

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with self._lock:
            failed_before = bool(self._waiting)
            self._waiting += json.dumps({"step": step, **finite}).encode() + b"\n"
            try:
                self._write_waiting()
            except OSError as error:
                if not failed_before:
                    _log.error("%s: %s; lines are kept in memory", self._path, error.strerror)

    def flush(self) -> None:
        with self._lock:
            self._write_waiting()
            if self._path != Path(os.devnull):
                os.fsync(self._file)

    def close(self) -> None:
        with self._lock:
            try:
                self._write_waiting()
            except OSError as error:
                _log.error("%s: lines are lost: %s", self._path, error.strerror)
            os.close(self._file)

    def _write_waiting(self) -> None:
        while self._waiting:
            written = os.write(self._file, self._waiting)
            self._waiting = self._waiting[written:]


class Window:
    """What happened since the last log line."""

    def __init__(self) -> None:
        self.metrics = ValueMetrics()
        self._tokens = self._response_tokens = self._steps = 0
        self._seconds = 0.0

    @classmethod
    def merged(cls, parts: Sequence[Window]) -> Window:
        """One window with what several ranks measured; they took the same time."""
        whole = cls()
        for part in parts:
            whole.metrics.merge(part.metrics)
            whole._tokens += part._tokens
            whole._response_tokens += part._response_tokens
            whole._steps, whole._seconds = part._steps, part._seconds
        return whole

    def add(self, batches: Sequence[Batch], seconds: float) -> None:
        """Count one optimizer step that took `seconds`."""
        self._tokens += sum(len(batch.tokens) for batch in batches)
        self._response_tokens += sum(len(batch.responses) for batch in batches)
        self._steps += 1
        self._seconds += seconds

    def telemetry(self, world: World) -> dict[str, float]:
        """Speed of all ranks together, each of which must take part; empty without a step."""
        tokens, response_tokens = world.sum([self._tokens, self._response_tokens])
        if not self._steps:
            return {}
        return {
            "tokens_per_second": tokens / self._seconds,
            "response_tokens_per_second": response_tokens / self._seconds,
            "seconds_per_step": self._seconds / self._steps,
        }
