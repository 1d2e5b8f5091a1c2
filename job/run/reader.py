"""What is stored of a run, for all who read it: trainer, report, comparison, MLflow and Slurm.

Free of torch, since it is read outside the container too. Files that are not there yet are empty,
and a last line that is still being written is left out.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from job.common.config import completed
from job.common.errors import Ending, InputError, file_error
from job.common.schema import CriticConfig
from job.common.state_files import name_unreadable, read_json, read_yaml
from job.run.committed import committed
from job.run.names import (
    ATTEMPT_FACTS,
    MACHINE,
    attempt_name,
    attempts_seen,
    checkpoint_step,
    checkpoint_steps,
)

VALIDATION = "validation/value/"
_TAIL_BYTES = 100_000
_BYTES_PER_LINE = 1000  # of a log, at most on average

Record = dict[str, Any]


class Line(NamedTuple):
    offset: int  # of its first byte
    record: Record


class StoredRun:
    """The files of one run, read anew at each question; what cannot be read counts as absent."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def has_config(self) -> bool:
        return self.file("config.yaml").exists()

    def config(self) -> dict[str, Any]:
        """The configuration; keys that the stored one lacks mean what was done without them.

        Raises:
            InputError: there is none.
        """
        return completed(self.stored_config(), CriticConfig)

    def stored_config(self) -> dict[str, Any]:
        """The configuration as config.yaml has it, or else the newest checkpoint.

        Raises:
            InputError: there is none.
        """
        stored = next((one for file in self.config_files() if (one := read_yaml(file))), None)
        if stored is None:
            raise self._no_config()
        return stored

    def _no_config(self) -> Ending:
        """What is wrong where no configuration can be read: perhaps only the file system."""
        text = f"{self.path}: not a run directory: no readable config.yaml"
        try:
            self.file("config.yaml").read_bytes()
        except OSError as error:
            return file_error(error, text)
        return InputError(text)

    def config_files(self) -> list[Path]:
        """Where the configuration is, the best place first."""
        checkpoints = checkpoint_steps(self.file("checkpoints")).values()
        folders = [self.path, *reversed(checkpoints)]
        return [folder / "config.yaml" for folder in folders]

    def status(self) -> dict[str, Any]:
        """The stored status; empty before the first one."""
        return self._object("status.json")

    def parameters(self) -> dict[str, Any]:
        """The parameter report."""
        return self._object("parameters.json")

    def memory(self) -> dict[str, Any]:
        """Predicted and measured memory."""
        return self._object("memory.json")

    def reliability(self) -> dict[str, Any]:
        """Calibration and value by position at the last evaluation."""
        return self._object("reliability.json")

    def attempt(self) -> dict[str, Any]:
        """What the newest attempt has noted of itself and its machine."""
        newest = max(attempts_seen(self.file("attempts")), default=0)
        folder = self.file("attempts") / attempt_name(newest)
        noted = (read_json(folder / name, dict) for name in (ATTEMPT_FACTS, MACHINE))
        return {key: value for facts in noted for key, value in (facts or {}).items()}

    def bad_steps(self) -> list[int]:
        """The steps that are passed over."""
        steps = read_json(self.file("bad_steps.json"), list) or []
        return [step for step in steps if isinstance(step, int)]

    def _object(self, name: str) -> dict[str, Any]:
        return read_json(self.file(name), dict) or {}

    def records(self, name: str = "metrics.jsonl") -> list[Record]:
        """The lines of metrics.jsonl or telemetry.jsonl that can be read."""
        return [r for r in complete_records(self.file(name)) if isinstance(r.get("step"), int)]

    def lines(self, name: str, offset: int = 0, step: int = -1) -> Iterator[Line]:
        """The whole lines beyond a step, in the order of steps, of which each has one.

        The line of `step` began at `offset`. If it does no more, the file has been replaced,
        however long it is by now, and is read from its start.
        """
        with _opened(self.file(name)) as stream:
            stream.seek(offset)
            if _record(stream.readline()).get("step") != step:
                offset = 0
            for start, line in _complete_lines(stream, offset):
                record = _record(line)
                if record and record["step"] > step:
                    step = record["step"]
                    yield Line(start, record)

    def newest_values(self, name: str) -> Record:
        """The newest value of each key, looking at the end; empty if it cannot be read now."""
        merged: Record = {}
        for line in _end(self.file(name), _TAIL_BYTES).splitlines(True):
            merged |= _parsed(line) if line.endswith(b"\n") else {}
        return merged

    def newest_checkpoint(self) -> int:
        """The last committed step that counts; 0 without one."""
        return max(map(checkpoint_step, committed(self.path)), default=0)

    def log_tail(self, count: int) -> list[str]:
        """The last lines of the trainer's log."""
        return last_lines(self.file("train.log"), count)


@dataclass(frozen=True)
class Snapshot:
    """A run as it was at one moment, under the name that tells it from others."""

    stored: StoredRun
    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    parameters: dict[str, Any]
    reliability: dict[str, Any]
    memory: dict[str, Any]
    metrics: list[Record]
    telemetry: list[Record]

    @classmethod
    def read(cls, path: Path, name: str) -> Snapshot:
        """Read a run directory.

        Raises:
            InputError: its configuration, or what a file in it says, makes no sense.
        """
        stored = StoredRun(path)
        try:
            return cls(
                stored,
                name,
                stored.stored_config() if stored.has_config else {},
                stored.status(),
                stored.parameters(),
                stored.reliability(),
                stored.memory(),
                stored.records("metrics.jsonl"),
                stored.records("telemetry.jsonl"),
            )
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: a file of this run is damaged: {error}") from None

    @property
    def state(self) -> str:
        return str(self.status.get("state", "not started"))

    @property
    def failed(self) -> bool:
        return self.state == "failed" or bool(self.status.get("error"))

    @property
    def final(self) -> dict[str, float]:
        """The last evaluation's metrics."""
        return self.validation()[1]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric or telemetry entry, where it is a finite number."""
        points = [
            (record["step"], record[key])
            for record in self.metrics + self.telemetry
            if _is_number(record.get(key))
        ]
        return [step for step, _ in points], [value for _, value in points]

    def validation(self) -> tuple[int | None, dict[str, float]]:
        """Step and metrics, without their prefix, of the last evaluation.

        Where mse_optimal is known, r2_optimal, the optimal predictor's R², is added.
        """
        for record in reversed(self.metrics):
            found = {
                key.removeprefix(VALIDATION): value
                for key, value in record.items()
                if key.startswith(VALIDATION) and _is_number(value)
            }
            if found:
                return record["step"], found | _r2_optimal(found)
        return None, {}


def snapshots(runs: Sequence[Path]) -> list[Snapshot]:
    """Each run under a name of its own: the configured one, or its path where two share theirs."""
    names = [_configured_name(run) or run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    return [Snapshot.read(run, name) for run, name in zip(runs, names, strict=True)]


def complete_records(file: Path) -> list[Record]:
    """The whole lines of a JSON Lines file, without those that cannot be read."""
    with _opened(file) as stream:
        found = [_parsed(line) for _, line in _complete_lines(stream, 0)]
    kept = [record for record in found if record]
    if len(kept) < len(found):
        name_unreadable(file, f"{len(found) - len(kept)} of its lines")
    return kept


def last_lines(file: Path, count: int = 20) -> list[str]:
    """The end of a log; empty if it cannot be read now."""
    text = _end(file, _BYTES_PER_LINE * count).decode("utf-8", errors="replace")
    return text.splitlines()[-count:]


def enclosing_run(path: Path) -> Path | None:
    """The run directory that a path lies inside of."""
    return next((folder for folder in path.resolve().parents if _is_run(folder)), None)


def _is_run(folder: Path) -> bool:
    try:
        begun = (folder / "config.yaml").is_file() and (folder / "attempts").is_dir()
        return begun or (folder / "slurm" / "submission.json").is_file()
    except OSError:  # a folder above that is not for this user to see
        return False


def _configured_name(run: Path) -> str | None:
    stored = StoredRun(run)
    config = stored.stored_config() if stored.has_config else {}
    name: str | None = config.get("run", {}).get("name")
    return name


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _r2_optimal(metrics: dict[str, float]) -> dict[str, float]:
    constant = metrics.get("mse_constant", 0.0)
    if not constant or "mse_optimal" not in metrics:
        return {}
    return {"r2_optimal": 1 - metrics["mse_optimal"] / constant}


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except FileNotFoundError:
        return io.BytesIO()


def _complete_lines(stream: BinaryIO, offset: int) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line."""
    stream.seek(offset)
    for line in stream:
        if not line.endswith(b"\n"):
            return  # still being written
        yield offset, line
        offset += len(line)


def _parsed(line: bytes) -> Record:
    """Empty for a part of a line: torn by a crash, or cut off by an offset of another file."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _record(line: bytes) -> Record:
    """A line that belongs to a step; empty for anything else."""
    record = _parsed(line)
    return record if isinstance(record.get("step"), int) else {}


def _end(file: Path, most: int) -> bytes:
    """The last bytes of a file; none if it is not there, or its file system is away."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - most))
            return stream.read()
    except OSError:
        return b""
