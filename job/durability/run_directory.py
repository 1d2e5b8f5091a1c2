"""A run directory: the single truth of a run.

config.yaml       the resolved configuration
status.json       state, step, and what a reader must know at once
metrics.jsonl     deterministic figures, one object a line, `step` first
telemetry.jsonl   time, speed and memory, one object a line
parameters.json   the parameter report
reliability.json  calibration and value by position at the last evaluation
critic.safetensors  the trained parameters
bad_rows.*.jsonl  rows left out
train.log, plots/, report.html
mlflow.json       what MLflow has been sent (mlflow.lock and mlflow.log belong to it)
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from job.config import differences
from job.durability.files import write_atomic
from job.outcome import InputError, listing

# May differ between two attempts of one run: they change neither data nor model, and the
# arithmetic by rounding at most.
MAY_CHANGE = ("mlflow.", "run.dir", "data.cache_dir", "training.threads")


class RunDirectory:
    """Paths and small files of one run; where `writes` is false, writing does nothing."""

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes

    def file(self, name: str) -> Path:
        return self.path / name

    def claim(self, config: dict[str, Any]) -> None:
        """Make the directory and store the configuration, or check it against the stored one.

        Raises:
            InputError: the directory cannot be written, or holds another configuration.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.file("config.yaml").exists():
                self._refuse_other(config)
            elif self.file("metrics.jsonl").exists() or self.file("plots").exists():
                raise InputError(f"run.dir: {self.path} holds files that no run here has written")
            write_atomic(self.file("config.yaml"), yaml.safe_dump(config, sort_keys=False))
        except OSError as error:
            raise InputError(f"run.dir: cannot write {self.path}: {error.strerror}") from None

    def _refuse_other(self, config: dict[str, Any]) -> None:
        changed = [
            line for line in differences(self.config(), config) if not line.startswith(MAY_CHANGE)
        ]
        if changed:
            raise InputError(
                f"{self.path}: this run directory holds a different configuration "
                "(stored -> asked for); choose another run.dir or run.name" + listing(changed)
            )

    def config(self) -> dict[str, Any]:
        try:
            stored = yaml.safe_load(self.file("config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            stored = None
        if not isinstance(stored, dict):
            raise InputError(f"{self.path}: not a run directory: no readable config.yaml")
        return stored

    def status(self) -> dict[str, Any]:
        """The stored status; empty before the first one.

        Raises:
            InputError: status.json is damaged.
        """
        file = self.file("status.json")
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            stored = None
        if not isinstance(stored, dict):
            raise InputError(f"{file}: damaged; remove it to let the run start over")
        return stored

    def set_status(self, **changes: Any) -> None:
        """Change some entries of status.json, leaving the rest."""
        if not self.writes:
            return
        self.write_json("status.json", self.status() | {"updated": time.time()} | changes)

    @contextmanager
    def recorded(self, **changes: Any) -> Iterator[None]:
        """Record that the run is running, and if the body raises, that and how it failed."""
        self.set_status(state="running", error=None, **changes)
        try:
            yield
        except BaseException as error:
            if self.status().get("state") != "finished":  # what fails after it undoes nothing
                self.set_status(state="failed", error=f"{type(error).__name__}: {error}")
            raise

    def write_json(self, name: str, content: Any) -> None:
        if self.writes:
            write_atomic(self.file(name), json.dumps(content, indent=2) + "\n")

    def records(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl or telemetry.jsonl; a torn last line is left out."""
        try:
            text = self.file(name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        try:
            return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
        except ValueError:
            raise InputError(f"{self.file(name)}: damaged") from None

    def start_over(self) -> None:
        """Remove what an unfinished attempt left; mlflow.json stays, so that its copy is ended."""
        if not self.writes:
            return
        for name in ("metrics.jsonl", "telemetry.jsonl", "reliability.json", "report.html"):
            self.file(name).unlink(missing_ok=True)
        shutil.rmtree(self.file("plots"), ignore_errors=True)
