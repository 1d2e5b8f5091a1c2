"""Run directories as the trainer writes them, and what MLflow has of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from job.common.files import write_atomic
from job.run.mlflow_sync import sync_run

MARKS = [
    pytest.mark.slow,
    pytest.mark.usefixtures("outside_slurm"),
    # MLflow 3.17 still uses a loader strategy that SQLAlchemy 2.1 deprecates.
    pytest.mark.filterwarnings(
        "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"
    ),
]
START = 1_700_000_000.5


class Example:
    """A run directory as the trainer writes it."""

    def __init__(self, path: Path, uri: str | None = None, **mlflow: Any) -> None:
        self.path = path
        self.digits = 17  # of a loss; another number of them makes lines of another length
        self.late = 0.0  # seconds; every attempt has its own
        self.metrics: dict[tuple[str, int], tuple[float, int]] = {}  # -> value, milliseconds
        path.mkdir(parents=True)
        self.config: dict[str, Any] = {
            "run": {"name": path.name, "dir": str(path)},
            "training": {"learning_rate": 1e-05, "betas": [0.9, 0.95], "threads": None},
            "data": {"train": "x" * 7000, "cache_dir": "cache"},
            "mlflow": {"enabled": True, "tracking_uri": uri, "experiment": "critic", **mlflow},
        }
        self.write_config()

    def write_config(self) -> None:
        (self.path / "config.yaml").write_text(yaml.safe_dump(self.config))

    def step(self, step: int, told_at: int, **values: float) -> None:
        """One line of metrics.jsonl, expected at the time of the telemetry of `told_at`."""
        line = {"step": step, "train/loss": round(1 / (step + 3), self.digits), **values}
        self.append("metrics.jsonl", line)
        milliseconds = round(1000 * (START + told_at + self.late))
        self.metrics |= {(k, step): (v, milliseconds) for k, v in line.items() if k != "step"}

    def telemetry(self, step: int) -> None:
        speed, seconds = 1e4 + step / 7 + self.late, START + step + self.late
        line = {"step": step, "time": seconds, "tokens_per_second": speed}
        self.append("telemetry.jsonl", line)
        self.metrics["telemetry/tokens_per_second", step] = (speed, round(1000 * seconds))

    def append(self, name: str, line: dict[str, Any]) -> None:
        with (self.path / name).open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def steps(self, first: int, last: int) -> None:
        """Metrics at each step, telemetry at each second one."""
        for step in range(first, last + 1):
            if step % 2 == 0:
                self.telemetry(step)
            self.step(step, step + step % 2)

    def resume(self, checkpoint: int, digits: int = 17) -> None:
        """Replace both files by their lines up to a step; what follows is of another attempt."""
        for name in ("metrics.jsonl", "telemetry.jsonl"):
            lines = (self.path / name).read_text().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= checkpoint]
            write_atomic(self.path / name, "".join(kept))
        self.metrics = {key: point for key, point in self.metrics.items() if key[1] <= checkpoint}
        self.late += 100
        self.digits = digits

    def status(self, state: str, **more: Any) -> None:
        text = {"state": state, "alarm": None, "error": None, "updated": START + 1000, **more}
        (self.path / "status.json").write_text(json.dumps(text))

    def artifacts(self) -> None:
        parameters = {"model_trainable_trunk_params": 12, "components": [{"name": "trunk"}]}
        (self.path / "parameters.json").write_text(json.dumps(parameters))
        (self.path / "plots").mkdir()
        (self.path / "plots" / "a.png").write_bytes(b"\x89PNG\x00")
        for name in ("report.html", "reliability.json", "train.log"):
            (self.path / name).write_text(f"content of {name}\n")

    def note(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "mlflow.json").read_text()))

    def log(self) -> str:
        path = self.path / "mlflow.log"
        return path.read_text() if path.exists() else ""


def finished(path: Path, uri: str | None = None, steps: int = 6, **mlflow: Any) -> Example:
    example = Example(path, uri, **mlflow)
    example.steps(1, steps)
    example.artifacts()
    example.status("finished")
    return example


def copy_of(example: Example) -> Run:
    return MlflowClient(example.note()["tracking_uri"]).get_run(example.note()["run_id"])


def received(example: Example) -> dict[tuple[str, int], tuple[float, int]]:
    """Every metric point that MLflow holds; fails on two points of one step."""
    run = copy_of(example)
    client = MlflowClient(example.note()["tracking_uri"])
    points = [
        ((m.key, m.step), (m.value, m.timestamp))
        for key in run.data.metrics
        if not key.startswith("system/")
        for m in client.get_metric_history(run.info.run_id, key)
    ]
    assert len(points) == len(dict(points))
    return dict(points)


def artifact(example: Example, name: str, folder: Path) -> bytes:
    run = copy_of(example)
    client = MlflowClient(example.note()["tracking_uri"])
    return Path(client.download_artifacts(run.info.run_id, name, str(folder))).read_bytes()


def copies(uri: str, experiment: str) -> list[Run]:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def assert_complete(example: Example, folder: Path) -> None:
    """Everything is there, with exact values and the times of the files."""
    run = copy_of(example)
    assert received(example) == example.metrics
    assert run.data.params == {
        "run.name": example.path.name,
        "run.dir": str(example.path),
        "training.learning_rate": "1e-05",
        "training.betas": "[0.9, 0.95]",
        "training.threads": "None",
        "data.train": "x" * 6000,
        "data.cache_dir": "cache",
        "mlflow.enabled": "True",
        "mlflow.tracking_uri": str(example.config["mlflow"]["tracking_uri"]),
        "mlflow.experiment": example.config["mlflow"]["experiment"],
        "model_trainable_trunk_params": "12",
    }
    assert run.info.run_name == example.path.name
    assert run.data.tags["run_directory"] == str(example.path)
    names = [p.relative_to(example.path) for p in example.path.rglob("*") if p.is_file()]
    sent = {str(n) for n in names if "mlflow" not in n.name and n.suffix != ".jsonl"}
    for name in sent - {"status.json"}:
        assert artifact(example, name, folder) == (example.path / name).read_bytes()


def assert_states(example: Example) -> None:
    """The run goes through all states, and MLflow with it."""
    runs = {
        "running": "RUNNING",
        "stopped": "SCHEDULED",
        "failed": "FAILED",
        "finished": "FINISHED",
    }
    step, run_ids = 1, set()
    for state in ("stopped", "running", "failed", "running", "stopped", "finished", "running"):
        example.steps(step, step + 1)
        example.status(state, error="out of memory" if state == "failed" else None)
        run_ids.add(sync_run(example.path).run_id)
        run = copy_of(example)
        assert (run.info.status, run.data.tags["state"]) == (runs[state], state)
        assert run.data.tags.get("error", "") == ("out of memory" if state == "failed" else "")
        step += 2
    example.status("finished", updated=START + 2000)
    sync_run(example.path)
    ended = copy_of(example).info
    assert (ended.status, ended.end_time) == ("FINISHED", round(1000 * (START + 2000)))
    assert run_ids == {ended.run_id}
    assert received(example) == example.metrics


def noted(example: Example) -> bool:
    return (example.path / "mlflow.json").exists()
