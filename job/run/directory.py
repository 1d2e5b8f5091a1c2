"""A run directory: the single truth of a run.

config.yaml       the resolved configuration
status.json       state, step, and what a reader must know at once
metrics.jsonl     deterministic figures, one object a line, `step` first
telemetry.jsonl   time, speed and memory, one object a line
attempts/         one folder an attempt: where it went on, logs of its ranks, stack traces
checkpoints/      see job.training.checkpoint
stop              made by you: save and stop
bad_steps.json    steps that are passed over since their loss was not finite
parameters.json   the parameter report
memory.json       memory predicted before the first step, and measured in all phases
prefix_cache.json  what is settled about frozen blocks' states on disk
reliability.json  calibration and value by position at the last evaluation
critic.safetensors  the trained parameters
bad_rows.*.jsonl  rows left out
train.log, plots/, report.html
mlflow.json       what MLflow has been sent (mlflow.lock and mlflow.log belong to it)
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from job.common.config import kept_from_before
from job.common.errors import InputError, Stopped, file_error
from job.common.files import write_atomic
from job.common.nested import refuse_differences
from job.common.state_files import read_yaml
from job.common.text_values import dump
from job.run.fence import Fence
from job.run.reader import StoredRun, enclosing_run

_log = logging.getLogger(__name__)

# May differ between two attempts of one run: length, cadence of logs and checkpoints, devices,
# sharding, and paths to the same content (trunk and data are compared by content). They change the
# arithmetic by rounding at most; a new length also changes the schedule from there on.
MAY_CHANGE = (
    "run.",
    "training.max_steps",
    "training.max_bad_steps",
    "training.micro_batch_tokens",
    "training.threads",
    "training.compile",
    "training.deterministic",
    "training.prefix_cache",
    "logging.",
    "checkpoint.",
    "distributed.start_timeout_seconds",
    "distributed.timeout_seconds",
    "distributed.fsdp.sharding_strategy",
    "distributed.fsdp.cpu_offload",
    "distributed.fsdp.activation_checkpointing",
    "model.path",
    "model.recipe",
    "tokenizer.path",
    "data.train",
    "data.validation",
    "data.cache_dir",
    "mlflow.",
    "report.",
)


class RunDirectory(StoredRun):
    """A run that is written; where `writes` is false, writing does nothing."""

    def __init__(self, path: str | Path, *, is_main: bool = True) -> None:
        super().__init__(path)
        self._is_main = is_main
        self.fence: Fence | None = None
        self._status: dict[str, Any] | None = None  # as this process has set it
        self._setting = threading.Lock()  # what ends a process is another thread
        self._asked: dict[str, Any] | None = None  # of an attempt that goes on

    @property
    def writes(self) -> bool:
        """Whether this is rank 0 of the newest attempt."""
        return self._is_main and not (self.fence is not None and self.fence.superseded())

    def claim(self, config: dict[str, Any]) -> None:
        """Make the directory and store the configuration, or check it against the stored one.

        What may differ between attempts is stored by `store_config`, after contents were compared.

        Raises:
            InputError: the directory cannot be written, holds another configuration, or would lie
                in another run's.
        """
        if not self.has_config:
            refuse_inside_another(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_other(config)
            if self._is_configured and self._binds:
                self._asked = config
            else:
                self._write_config(config)
        except OSError as error:
            raise file_error(
                error, f"run.dir: cannot write {self.path}: {error.strerror}"
            ) from None

    def store_config(self) -> None:
        """Let what was claimed be the run's configuration from now on, if it is not yet."""
        if self._asked is not None:
            self._write_config(self._asked)

    def _write_config(self, config: dict[str, Any]) -> None:
        write_atomic(self.file("config.yaml"), dump(config))

    def is_finished(self, max_steps: int) -> bool:
        """Whether the run has come to its end; a longer one goes on from there."""
        status = self.status()
        return status.get("state") == "finished" and status.get("step", 0) >= max_steps

    def kept_from_before(self, config: Any) -> dict[str, Any]:
        """What this run does otherwise than `config`, whose defaults were not when it began."""
        if not self._is_configured or not self._binds:
            return {}
        return kept_from_before(self.config(), config)

    @property
    def _is_configured(self) -> bool:
        return any(read_yaml(file) for file in self.config_files())

    @property
    def _has_begun(self) -> bool:
        return any(self.path.glob("attempts/*/attempt.json"))

    @property
    def _binds(self) -> bool:
        """Whether later attempts are held to its configuration.

        Those that ended before their first step bind nobody to what was wrong.
        """
        return self._has_begun or bool(self.records())

    def _refuse_other(self, config: dict[str, Any]) -> None:
        """Raise InputError if the directory is another run's, or no run's."""
        if not self._is_configured:
            foreign = self.file("metrics.jsonl").exists() or self.file("plots").exists()
            if foreign and not (self._has_begun or self.has_config):
                raise InputError(f"run.dir: {self.path} holds files that no run here has written")
            return
        if not self._binds:
            return
        problem = (
            f"{self.path}: this run directory holds a different configuration "
            "(stored -> asked for); choose another run.dir or run.name"
        )
        refuse_differences(self.config(), config, problem, MAY_CHANGE)

    def set_status(self, **changes: Any) -> None:
        """Change some entries of status.json, leaving the rest."""
        if self.writes:
            with self._setting:
                self._change_status(changes)
                self.write_json("status.json", self._status)

    def finish(self, **changes: Any) -> None:
        """Record the end of the run, without which it would not be known.

        Raises:
            OSError: the file system refuses.
        """
        if self.writes:
            with self._setting:
                self._change_status({"state": "finished", **changes})
                self.replace("status.json", _as_json(self._status))

    def _change_status(self, changes: dict[str, Any]) -> None:
        known = self.status() if self._status is None else self._status
        self._status = known | {"updated": time.time()} | changes

    @contextmanager
    def recorded(self, **changes: Any) -> Iterator[None]:
        """Record that the run is running, and if the body raises, that and how it ended."""
        self.set_status(state="running", error=None, **changes)
        try:
            yield
        except BaseException as error:
            # what fails after the end undoes nothing
            if self._status is None or self._status.get("state") != "finished":
                self.set_status(**_ending(error))
            raise

    def write_json(self, name: str, content: Any) -> None:
        """Replace a JSON file; a file system that refuses is reported and ends nothing."""
        if not self.writes:
            return
        try:
            self.replace(name, _as_json(content))
        except OSError as error:
            _log.error("cannot write %s: %s; going on", self.file(name), error.strerror)

    def replace(self, name: str, text: str) -> None:
        """Replace a file whole; a newer attempt's stays as it is.

        Raises:
            OSError: the file system refuses.
        """
        replace = write_atomic if self.fence is None else self.fence.replace
        replace(self.file(name), text)

    def keep_lines(self, last: int) -> None:
        """Let metrics.jsonl and telemetry.jsonl end with step `last`: what follows is done again.

        Both become new files, so that an attempt that was superseded and does not know it yet
        writes into the old ones, which are gone.
        """
        if not self.writes:
            return
        for name in ("metrics.jsonl", "telemetry.jsonl"):
            kept = [record for record in self.records(name) if record["step"] <= last]
            self.replace(name, "".join(json.dumps(record) + "\n" for record in kept))
        missing = last - len(self.records())
        if missing:
            _log.error("%s lacks %d of %d steps", self.file("metrics.jsonl"), missing, last)


def refuse_inside_another(path: Path) -> None:
    """Raise InputError where a new run would lie in another run's directory."""
    other = enclosing_run(path)
    if other is not None:
        raise InputError(
            f"run.dir: {path} lies inside another run, {other}; choose another run.dir"
        )


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"


def _ending(error: BaseException) -> dict[str, Any]:
    if isinstance(error, Stopped):
        return {"state": "stopped", "error": None, "reason": str(error)}
    return {"state": "failed", "error": f"{type(error).__name__}: {error}"}
