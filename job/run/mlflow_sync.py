"""MLflow as a copy of a run directory.

The run directory is the truth; MLflow receives what its files hold, and `mlflow.json` there says
what was sent. A directory is one run in MLflow for ever. A resumed training takes its files back
to a checkpoint and writes the steps after it again; of those, what MLflow has already stays as the
superseded attempt wrote it, equal up to rounding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.common.files import lock_file, write_atomic
from job.common.nested import flatten
from job.common.state_files import read_json
from job.run.reader import Line, Record, StoredRun

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_METRICS_PER_CALL = 1000  # MLflow's limits
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 6000
_NAME_LENGTH = 250
_TAG_LENGTH = 5000
_ARTIFACTS = (
    "config.yaml",
    "parameters.json",
    "memory.json",
    "reliability.json",
    "report.html",
    "train.log",
)
_TERMINATED = {"finished": "FINISHED", "failed": "FAILED"}
# The states in which nothing is written. MLflow's SCHEDULED, "to run at a later time", is what a
# stopped run is: it will be resumed, so it has no end, and RUNNING would say that it holds a GPU.
AT_REST = _TERMINATED | {"stopped": "SCHEDULED"}
_SETTINGS = {
    # MLflow's own defaults let one call to a silent server last a quarter of an hour.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # One, because a server may close an idle connection just as it is used again.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # no calls to the outside from a cluster
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_TimeOf = Callable[[Record], float | None]


def tracking_uri(config: dict[str, Any]) -> str:
    """Where a run is mirrored: configuration, then environment, then a database beside the runs."""
    beside = Path(config["run"]["dir"]).absolute().parent.resolve() / "mlflow.db"
    configured = config["mlflow"]["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI")
    return configured or f"sqlite:///{beside}"


@dataclass(frozen=True)
class SyncResult:
    """What one sync sent, and where to.

    Attributes:
        state: the run's state in status.json.
        metrics: values of metrics.jsonl and telemetry.jsonl.
        waiting: lines of metrics.jsonl that wait for a telemetry line to take their time from.
    """

    tracking_uri: str
    run_id: str
    state: str
    params: int
    metrics: int
    artifacts: int
    waiting: int

    def __str__(self) -> str:
        sent = f"{self.params} parameters, {self.metrics} values and {self.artifacts} files"
        later = f"; {self.waiting} steps wait for their time" if self.waiting else ""
        return f"{sent} sent to run {self.run_id} of {self.tracking_uri}{later}"


def sync_run(run_dir: Path, *, artifacts: bool = True) -> SyncResult:
    """Send everything that MLflow lacks of a run.

    Raises:
        InputError: there is no run in the directory.
        mlflow.exceptions.MlflowException: MLflow did not take it; what it took is noted.
    """
    stored = StoredRun(run_dir)
    uri = tracking_uri_of(stored)
    with _exclusive(stored.file("mlflow.lock")), database_lock(uri):
        return _Syncer(stored, uri, connect(uri)).sync(artifacts)


def tracking_uri_of(stored: StoredRun) -> str:
    """Where a run is mirrored: a server that has it already stays its own."""
    config = stored.config()
    known = _Sent.stored_uri(stored.file("mlflow.json"))
    named = config["mlflow"]["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI")
    if named is None and known.startswith("http"):
        return known  # a later shell may lack the environment that named the server
    # Where it is, not where it was made: it may have been moved, or its path be a relative one.
    return tracking_uri(config | {"run": {"dir": stored.path}})


def connect(uri: str) -> MlflowClient:
    """A client with our limits on how long MLflow may take."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """The experiment of this name, made where there is none."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, _artifact_location(uri))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise  # otherwise another run made it in the meantime
    return str(experiment.experiment_id)


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock file; the system releases it whichever way the process ends."""
    with lock.open("a") as file:
        lock_file(file, wait=True)
        yield


def database_lock(uri: str) -> AbstractContextManager[None]:
    """Held while a database file is written; nothing where a server is."""
    database = _database_file(uri)
    if database is None:
        return nullcontext()
    database.parent.mkdir(parents=True, exist_ok=True)
    return _exclusive(database.with_name(f"{database.name}.lock"))


def _database_file(uri: str) -> Path | None:
    match = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    return Path(match[1]).absolute() if match else None


@dataclass
class _Sent:
    """mlflow.json: what MLflow has of this run."""

    tracking_uri: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    run_id: str | None = None
    # The last line sent of each file: where it begins, and its step. No step means that MLflow must
    # be asked what it has: a batch got no answer, or the note is of a time before steps were noted.
    offsets: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, uri: str) -> _Sent:
        """What was sent to `uri`: nothing where the file is missing or about another place."""
        sent = cls._stored(path)
        return sent if sent is not None and sent.tracking_uri == uri else cls(uri)

    @classmethod
    def stored_uri(cls, path: Path) -> str:
        """Where the run was sent last; empty if nowhere yet."""
        sent = cls._stored(path)
        return "" if sent is None else sent.tracking_uri

    @classmethod
    def _stored(cls, path: Path) -> _Sent | None:
        content = read_json(path, dict) or {}
        try:
            return cls(**content)
        except TypeError:  # nothing, or not these names
            return None


class _Syncer:
    """One sync of one run; the caller holds the locks."""

    def __init__(self, stored: StoredRun, uri: str, client: MlflowClient) -> None:
        self._stored = stored
        self._config = stored.config()
        self._uri = uri
        self._client = client
        # Read before every other file: `finished` then promises that those are complete.
        self._status = stored.status()
        self._state = str(self._status.get("state", "running"))
        self._sent = _Sent.load(stored.file("mlflow.json"), uri)
        self._histories: dict[str, set[int]] = {}
        self._values = 0

    def sync(self, artifacts: bool) -> SyncResult:
        run = self._open()
        params = self._send_params(run)
        waiting = self._send_metrics()
        try:
            files = self._send_artifacts() if artifacts else 0
        finally:  # storage for artifacts may be missing where the rest works
            self._send_status(run)
        run_id = run.info.run_id
        return SyncResult(self._uri, run_id, self._state, params, self._values, files, waiting)

    def _note(self) -> None:
        content = json.dumps(dataclasses.asdict(self._sent), indent=2)
        write_atomic(self._stored.file("mlflow.json"), content + "\n")

    def _open(self) -> Run:
        """The run in MLflow, made where there is none."""
        known = self._known()
        if known is None and self._sent.run_id:
            self._sent = _Sent(self._uri)
        return known or self._create()

    def _known(self) -> Run | None:
        from mlflow.exceptions import MlflowException

        if self._sent.run_id is None:
            return None
        try:
            return self._client.get_run(self._sent.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _create(self) -> Run:
        # The token is noted before the run is made, and finds it where the answer got lost.
        self._note()
        experiment = self._experiment()
        if not self._made(experiment):
            self._make(experiment)
        run, *repeated = self._made(experiment)  # HTTP retries may have made two
        for extra in repeated:
            self._client.delete_run(extra.info.run_id)
        self._sent.run_id = run.info.run_id
        self._note()
        return run

    def _made(self, experiment: str) -> list[Run]:
        return list(
            self._client.search_runs([experiment], f"tags.mirror_token = '{self._sent.token}'")
        )

    def _make(self, experiment: str) -> None:
        first = next(self._telemetry(), {"time": time.time()})
        path = str(self._stored.path.absolute())
        tags = {"run_directory": path, "mirror_token": self._sent.token}
        name = self._config["run"]["name"]
        self._client.create_run(experiment, _milliseconds(first["time"]), tags, name)

    def _experiment(self) -> str:
        return experiment_id(self._client, self._config["mlflow"]["experiment"], self._uri)

    def _send_params(self, run: Run) -> int:
        from mlflow.entities import Param

        wanted = flatten(self._stored.stored_config()) | self._parameters()
        # A parameter cannot change in MLflow, while e.g. data.cache_dir may between two attempts.
        params = [
            Param(_metric_name(key), str(value)[:_PARAM_LENGTH])
            for key, value in wanted.items()
            if _metric_name(key) not in run.data.params
        ]
        for i in range(0, len(params), _PARAMS_PER_CALL):
            chunk = params[i : i + _PARAMS_PER_CALL]
            self._client.log_batch(run.info.run_id, params=chunk, synchronous=True)
        return len(params)

    def _parameters(self) -> dict[str, Any]:
        report = self._stored.parameters()
        return {key: value for key, value in report.items() if not isinstance(value, dict | list)}

    def _telemetry(self) -> Iterator[Record]:
        return (line.record for line in self._stored.lines("telemetry.jsonl"))

    def _send_metrics(self) -> int:
        """Send both files; return how many lines of metrics.jsonl have no time yet."""
        self._send_lines("telemetry.jsonl", "telemetry/", lambda record: record["time"])
        return self._send_lines("metrics.jsonl", "", lambda r: self._clock.time(r["step"]))

    @cached_property
    def _clock(self) -> _Clock:
        return _Clock(self._telemetry(), self._status if self._state in AT_REST else None)

    def _send_lines(self, name: str, prefix: str, time_of: _TimeOf) -> int:
        batch: list[Metric] = []
        waiting = 0
        last = None
        for line in self._unsent(name, prefix):
            seconds = time_of(line.record)
            if seconds is None or waiting:
                waiting += 1
                continue
            metrics = _metrics(line.record, prefix, seconds)
            if last and len(batch) + len(metrics) > _METRICS_PER_CALL:
                self._send_batch(name, batch, last)
                batch = []
            batch += metrics
            last = line
        if last:
            self._send_batch(name, batch, last)
        return waiting

    def _unsent(self, name: str, prefix: str) -> Iterator[Line]:
        step = self._sent.steps.get(name)
        if step is not None:
            return self._stored.lines(name, self._sent.offsets[name], step)
        lines = self._stored.lines(name)
        return (line for line in lines if not self._arrived(line.record, prefix))

    def _arrived(self, record: Record, prefix: str) -> bool:
        """Whether MLflow has a line: its last value, because a long line goes in parts."""
        values = _values(record, prefix)
        return not values or record["step"] in self._history(next(reversed(values)))

    def _history(self, metric: str) -> set[int]:
        """The steps of which MLflow has the metric."""
        if metric not in self._histories:
            assert self._sent.run_id
            points = self._client.get_metric_history(self._sent.run_id, metric)
            self._histories[metric] = {point.step for point in points}
        return self._histories[metric]

    def _send_batch(self, name: str, batch: list[Metric], last: Line) -> None:
        assert self._sent.run_id
        # Unsure until the answer: MLflow drops a repeated value only if its time is the same too,
        # and a resumed training gives these steps other times.
        self._sent.steps.pop(name, None)
        self._note()
        for i in range(0, len(batch), _METRICS_PER_CALL):
            chunk = batch[i : i + _METRICS_PER_CALL]
            self._client.log_batch(self._sent.run_id, metrics=chunk, synchronous=True)
        self._sent.offsets[name] = last.offset
        self._sent.steps[name] = last.record["step"]
        self._note()
        self._values += len(batch)

    def _send_artifacts(self) -> int:
        root = self._stored.path
        plots = [str(path.relative_to(root)) for path in sorted(root.glob("plots/*.png"))]
        changed = [
            name
            for name in (*_ARTIFACTS, *plots)
            if (root / name).is_file() and _digest(root / name) != self._sent.artifacts.get(name)
        ]
        for name in changed:
            self._send_artifact(name)
        return len(changed)

    def _send_artifact(self, name: str) -> None:
        assert self._sent.run_id
        with tempfile.TemporaryDirectory() as scratch:
            # A log that grows while it is uploaded would break the request.
            snapshot = Path(shutil.copy(self._stored.file(name), scratch))
            folder = posixpath.dirname(name) or None
            self._client.log_artifact(self._sent.run_id, str(snapshot), folder)
            self._sent.artifacts[name] = _digest(snapshot)
        self._note()

    def _send_status(self, run: Run) -> None:
        from mlflow.entities import RunTag

        entries = {"state": self._state} | {k: self._status.get(k) for k in ("alarm", "error")}
        texts = {key: str(value or "")[:_TAG_LENGTH] for key, value in entries.items()}
        tags = [RunTag(k, v) for k, v in texts.items() if v != run.data.tags.get(k, "")]
        if tags:
            self._client.log_batch(run.info.run_id, tags=tags, synchronous=True)
        wanted = AT_REST.get(self._state, "RUNNING")
        if wanted == run.info.status:
            return
        if self._state in _TERMINATED:
            ended = self._status.get("updated", time.time())
            self._client.set_terminated(run.info.run_id, wanted, _milliseconds(ended))
        else:
            self._client.update_run(run.info.run_id, wanted)


class _Clock:
    """The time of a step: that of the first telemetry line with at least that step."""

    def __init__(self, telemetry: Iterable[Record], ended: Record | None) -> None:
        """`ended` is the status of a run that is at rest, None while it goes on."""
        self._steps: list[int] = []
        self._times: list[float] = []
        for record in telemetry:
            self._steps.append(record["step"])
            self._times.append(record["time"])
        self._beyond: float | None = None
        if ended is not None:
            self._beyond = self._times[-1] if self._times else ended.get("updated", 0.0)

    def time(self, step: int) -> float | None:
        """Unix seconds; None where no telemetry line is that far yet."""
        i = bisect_left(self._steps, step)
        return self._times[i] if i < len(self._steps) else self._beyond


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _metrics(record: Record, prefix: str, seconds: float) -> list[Metric]:
    from mlflow.entities import Metric

    return [
        Metric(name, value, _milliseconds(seconds), record["step"])
        for name, value in _values(record, prefix).items()
    ]


def _values(record: Record, prefix: str) -> dict[str, float]:
    """The numbers of a line under their names in MLflow."""
    return {
        _metric_name(prefix + key): float(value)
        for key, value in record.items()
        if key not in ("step", "time") and _is_number(value)
    }


def _metric_name(name: str) -> str:
    """The nearest name that MLflow takes: it reads names as paths."""
    parts = re.sub(r"[^\w.\- :/]", "_", name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:_NAME_LENGTH] or "_"


def _artifact_location(uri: str) -> str | None:
    """Beside a local database, which by itself would take the current folder; a server knows."""
    database = _database_file(uri)
    return (database.parent / "mlartifacts").as_uri() if database else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
