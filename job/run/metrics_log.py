"""What a run writes while it goes on: metrics.jsonl first, MLflow behind it."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
        self._metrics = self._lines("metrics.jsonl")
        self._telemetry = self._lines("telemetry.jsonl")

    def _lines(self, name: str) -> _Lines | _Nowhere:
        return _Lines(self._run, name) if self._run.writes else _Nowhere()

    def rewind(self, step: int) -> None:
        """Go on after `step`, whatever was written since."""
        self._close()
        self._run.keep_lines(step)
        self._open()

    def flush(self) -> None:
        """Have everything on the disk itself, as far as it takes it: the rest stays in memory."""
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


class _Nowhere:
    """Takes the lines of ranks that write nothing."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class _Lines:
    """A JSON Lines file whose lines stay in memory until the disk itself has them.

    A descriptor can fail for good (a stale handle), and the name can come to lead elsewhere; then
    the file is made anew. What a full disk does not take waits.
    """

    def __init__(self, run: RunDirectory, name: str) -> None:
        self._run, self._name, self._path = run, name, run.file(name)
        self._lines: list[bytes] = []  # of which the disk may know nothing yet
        self._waiting = b""  # the end of them, which the system has not taken
        self._failed = False
        self._lock = threading.Lock()  # checkpoints are committed by a thread of their own
        self._open()

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._durable = os.fstat(self._file).st_size  # bytes before those of `_lines`

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"step": step, **finite}).encode() + b"\n"
        with self._lock:
            self._lines.append(line)
            self._waiting += line
            try:
                self._write_waiting()
            except OSError as error:
                if not self._failed:
                    _log.error("%s: %s; lines are kept in memory", self._path, error.strerror)
                self._failed = True

    def flush(self) -> None:
        """Have everything on the disk itself, or in memory."""
        with self._lock:
            try:
                self._put_on_disk()
            except OSError as error:
                _log.error("%s: %s; lines are kept in memory", self._path, error.strerror)
                self._failed = True

    def close(self) -> None:
        with self._lock:
            try:
                self._put_on_disk()
            except OSError as error:
                _log.error("%s: lines are lost: %s", self._path, error.strerror)
            with suppress(OSError):
                os.close(self._file)

    def _write_waiting(self) -> None:
        while self._waiting:
            written = os.write(self._file, self._waiting)
            self._waiting = self._waiting[written:]

    def _put_on_disk(self) -> None:
        try:
            self._write_waiting()
            os.fsync(self._file)
            whole = os.path.samestat(os.fstat(self._file), self._path.stat())
        except OSError as error:
            _log.warning("%s: %s; making it anew", self._path, error.strerror)
            whole = False
        if not whole:
            self._make_anew()
            os.fsync(self._file)
        self._durable += sum(map(len, self._lines))
        self._lines, self._waiting, self._failed = [], b"", False

    def _make_anew(self) -> None:
        """Put a new file in place, from what can be read of the old one and the lines in memory.

        After an error nobody knows which of these the disk has, and a second `fsync` may say that
        all is well.
        """
        if not self._run.writes:  # the name is a newer attempt's
            return
        before = self._read_back()
        self._run.replace(self._name, (before + b"".join(self._lines)).decode())
        failed = self._file
        self._open()
        self._durable, self._waiting = len(before), b""
        with suppress(OSError):
            os.close(failed)

    def _read_back(self) -> bytes:
        """The lines before those in memory, from the descriptor or else by name."""
        with suppress(OSError):
            content = os.pread(self._file, self._durable, 0)
            if len(content) == self._durable:
                return content
        content = self._path.read_bytes()[: self._durable] if self._path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if missing := self._durable - len(whole):
            _log.error("%s was removed or cut: %d bytes are missing", self._path, missing)
        return whole


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
        """Count one optimizer step that took `seconds`, and the tokens of its sequences: those of
        a prompt that is computed once for several of them as often as they are.
        """
        self._tokens += sum(batch.layout.n_keys for batch in batches)
        self._response_tokens += sum(int(batch.response_lengths.sum()) for batch in batches)
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
