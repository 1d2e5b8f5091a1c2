"""The MLflow copy of a run directory, with the real MLflow: a database, and a server process."""

from __future__ import annotations

import itertools
import json
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from job.common.errors import InputError
from job.common.files import write_atomic
from job.run import mlflow_sync
from job.run.mlflow_mirror import Mirror, live_mirror_allowed
from job.run.mlflow_sync import sync_run, tracking_uri

pytestmark = [
    pytest.mark.slow,
    # MLflow 3.17 still uses a loader strategy that SQLAlchemy 2.1 deprecates.
    pytest.mark.filterwarnings(
        "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"
    ),
]

START = 1_700_000_000.5


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "SLURM_JOB_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


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


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all tests: making one takes two seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    MlflowClient(uri).search_experiments()
    return uri


# --- where to ----------------------------------------------------------------------------------


def test_tracking_uri_is_configured_or_in_the_environment_or_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"run": {"dir": str(tmp_path / "runs" / "a")}, "mlflow": {"tracking_uri": None}}
    assert tracking_uri(config) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri(config) == "http://environment"
    assert tracking_uri(config | {"mlflow": {"tracking_uri": "http://file"}}) == "http://file"


def test_tracking_uri_of_a_relative_directory_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"run": {"dir": "runs/a"}, "mlflow": {"tracking_uri": None}}
    assert tracking_uri(config) == f"sqlite:///{tmp_path}/runs/mlflow.db"


@pytest.mark.parametrize("variable", ["SLURM_PROCID", "SLURM_JOB_ID"])
def test_local_stores_are_not_mirrored_to_from_a_cluster_job(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = ("sqlite:////a/mlflow.db", "file:///a", "/a/mlruns", "./mlruns")
    others = ("http://server:5000", "https://server", "databricks", "postgresql://host/db")
    assert all(live_mirror_allowed(uri) for uri in local + others)
    monkeypatch.setenv(variable, "0")
    assert not any(live_mirror_allowed(uri) for uri in local)
    assert all(live_mirror_allowed(uri) for uri in others)


def test_importing_the_module_loads_neither_mlflow_nor_torch() -> None:
    code = "import sys, job.run.mlflow_mirror; print({'mlflow', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- one sync ----------------------------------------------------------------------------------


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


def test_a_finished_run_arrives_whole(tmp_path: Path, database: str) -> None:
    example = finished(tmp_path / "whole", database)
    example.status("finished", alarm="constant predictions")
    result = sync_run(example.path)
    assert_complete(example, tmp_path)
    run = copy_of(example)
    assert run.data.tags["state"] == "finished"
    assert run.data.tags["alarm"] == "constant predictions"
    assert (run.info.status, run.info.end_time) == ("FINISHED", round(1000 * (START + 1000)))
    assert run.info.start_time == round(1000 * (START + 2))
    assert (result.metrics, result.params, result.artifacts) == (9, 11, 6)
    assert (result.run_id, result.waiting) == (run.info.run_id, 0)
    sent = f"11 parameters, 9 values and 6 files sent to run {result.run_id} of {database}"
    assert str(result) == sent
    assert str(replace(result, waiting=2)) == f"{sent}; 2 steps wait for their time"


def test_a_second_sync_sends_nothing(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = finished(tmp_path / "twice", database)
    first = sync_run(example.path)
    for name in ("log_batch", "log_artifact", "create_run", "update_run", "set_terminated"):
        monkeypatch.delattr(MlflowClient, name)
    second = sync_run(example.path)
    assert second.run_id == first.run_id
    assert (second.metrics, second.params, second.artifacts) == (0, 0, 0)


def test_what_comes_later_is_sent_later(tmp_path: Path, database: str) -> None:
    example = Example(tmp_path / "later", database)
    sync_run(example.path)
    assert copy_of(example).info.status == "RUNNING"
    example.status("running")
    example.steps(1, 4)
    assert sync_run(example.path).metrics == 6
    example.steps(5, 8)
    example.artifacts()
    (example.path / "train.log").write_text("longer\n")
    assert sync_run(example.path).artifacts == 5
    (example.path / "train.log").write_text("longer still\n")
    example.status("finished")
    assert sync_run(example.path).artifacts == 1
    assert_complete(example, tmp_path)
    assert len([r for r in copies(database, "critic") if r.info.run_name == "later"]) == 1


def test_a_metric_waits_for_the_telemetry_that_gives_it_a_time(
    tmp_path: Path, database: str
) -> None:
    example = Example(tmp_path / "waiting", database)
    example.status("running")
    example.steps(1, 3)
    result = sync_run(example.path)
    assert (result.metrics, result.waiting) == (3, 1)
    example.status("failed", error="CUDA out of memory")  # there will be no more telemetry
    sync_run(example.path)
    example.metrics["train/loss", 3] = (1 / 6, round(1000 * (START + 2)))
    assert received(example) == example.metrics
    run = copy_of(example)
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "CUDA out of memory")
    example.status("running")  # a second attempt
    sync_run(example.path)
    assert copy_of(example).info.status == "RUNNING"
    assert copy_of(example).data.tags["error"] == ""


def test_a_run_that_failed_before_any_telemetry_arrives(tmp_path: Path, database: str) -> None:
    example = Example(tmp_path / "early", database)
    example.step(0, told_at=1000)
    example.status("failed")
    sync_run(example.path)
    assert received(example) == example.metrics


def test_a_torn_last_line_waits_and_a_torn_middle_line_is_passed_over(
    tmp_path: Path, database: str
) -> None:
    example = Example(tmp_path / "torn", database)
    example.status("finished")
    example.steps(1, 2)
    metrics = example.path / "metrics.jsonl"
    with metrics.open("a") as stream:
        stream.write('{"step": 3, "value/mse": 0.')
    sync_run(example.path)
    assert received(example) == example.metrics
    with metrics.open("a") as stream:
        stream.write("25}\n" + '{"step": 4, "value/r{"step": 4, "a": 1.0}\n')
    example.step(5, told_at=2, after=0.5)
    example.metrics["value/mse", 3] = (0.25, round(1000 * (START + 2)))
    sync_run(example.path)
    assert received(example) == example.metrics


def test_names_and_values_that_mlflow_refuses_do_not_stop_the_rest(
    tmp_path: Path, database: str
) -> None:
    example = Example(tmp_path / "names", database)
    example.telemetry(1)
    odd = {"explained (%)": 0.5, "/a//../b/": 1.0, "..": 2.0, "n" * 300: 3.0, "ok.a-b c:d": 4.0}
    line = {"step": 1, **odd, "nan": math.nan, "inf": math.inf, "none": None, "text": "x"}
    example.append("metrics.jsonl", line)
    sync_run(example.path)
    values = {key: value for (key, _), (value, _) in received(example).items()}
    assert math.isnan(values.pop("nan"))
    assert values.pop("inf") > 1e308
    assert values.pop("telemetry/tokens_per_second")
    assert values == {"explained ___": 0.5, "a/b": 1.0, "_": 2.0, "n" * 250: 3.0, "ok.a-b c:d": 4.0}


def test_a_long_backlog_goes_in_batches(tmp_path: Path, database: str) -> None:
    example = Example(tmp_path / "backlog", database)
    for step in range(2, 302, 2):
        example.step(step, step, **{f"value/{i}": step + i / 3 for i in range(19)})
    wide = {f"wide/{i}": i / 3 for i in range(1200)}
    example.step(302, 302, **wide)
    for step in range(2, 304, 2):
        example.telemetry(step)
    assert sync_run(example.path).metrics == len(example.metrics) == 150 * 20 + 1201 + 151
    assert received(example) == example.metrics


def test_a_crash_between_sending_and_noting_duplicates_nothing(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_sync, "_METRICS_PER_CALL", 2)
    for crash in itertools.count():
        example = finished(tmp_path / f"crash{crash}", database, experiment=f"crash{crash}")
        if not _crashes_at(crash, example, monkeypatch):
            break
        sync_run(example.path)
        assert_complete(example, tmp_path)
        assert len(copies(database, f"crash{crash}")) == 1
    assert crash == 2 + 2 * 5 + 6  # the run, before and after each batch, the artifacts


def _crashes_at(number: int, example: Example, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Sync and die instead of writing the note of this number, if there is one."""
    numbers = itertools.count()

    def write(path: Path, text: str) -> None:
        if next(numbers) == number:
            raise KeyboardInterrupt
        write_atomic(path, text)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(mlflow_sync, "write_atomic", write)
        sync_run(example.path)
        return False
    return True


def test_a_request_that_went_out_twice_leaves_one_run(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = finished(tmp_path / "lost", database, experiment="lost")
    create = MlflowClient.create_run

    def repeat_and_lose_the_answer(*arguments: Any) -> None:
        create(*arguments)
        create(*arguments)
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", repeat_and_lose_the_answer)
        with pytest.raises(TimeoutError):
            sync_run(example.path)
    assert len(copies(database, "lost")) == 2
    sync_run(example.path)
    assert_complete(example, tmp_path)
    assert len(copies(database, "lost")) == 1


def test_storage_for_artifacts_that_fails_stops_nothing_else(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = finished(tmp_path / "storage", database)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", fail)
        with pytest.raises(OSError, match="no space left"):
            sync_run(example.path)
    assert received(example) == example.metrics
    assert copy_of(example).info.status == "FINISHED"
    sync_run(example.path)
    assert_complete(example, tmp_path)


def test_a_setting_that_may_change_between_attempts_keeps_its_first_value(
    tmp_path: Path, database: str
) -> None:
    example = finished(tmp_path / "changed", database)
    sync_run(example.path)
    example.config["data"] = {"train": "y", "cache_dir": "elsewhere", "new": 1}
    example.write_config()
    assert sync_run(example.path).params == 1
    assert copy_of(example).data.params["data.cache_dir"] == "cache"


def test_a_run_that_the_database_does_not_know_is_sent_again(tmp_path: Path, database: str) -> None:
    example = finished(tmp_path / "unknown", database)
    sync_run(example.path)
    note = example.note() | {"run_id": "0" * 32}
    (example.path / "mlflow.json").write_text(json.dumps(note))
    sync_run(example.path)
    assert example.note()["run_id"] != "0" * 32
    assert_complete(example, tmp_path)


def test_a_run_goes_whole_to_another_database(tmp_path: Path, database: str) -> None:
    example = finished(tmp_path / "runs" / "moved", database)
    sync_run(example.path)
    example.config["mlflow"]["tracking_uri"] = None
    example.write_config()
    sync_run(example.path)
    assert example.note()["tracking_uri"] == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert_complete(example, tmp_path)
    assert copy_of(example).info.artifact_uri.startswith(f"file://{tmp_path}/runs/mlartifacts/")


def test_a_folder_without_a_run_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        sync_run(tmp_path)


def test_two_runs_share_a_new_database(tmp_path: Path) -> None:
    examples = [finished(tmp_path / f"run{i}", steps=300) for i in range(2)]
    code = "import sys, pathlib, job.run.mlflow_sync as m; m.sync_run(pathlib.Path(sys.argv[1]))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, example.path]) for example in examples
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    for example in examples:
        assert_complete(example, tmp_path)
    assert len(copies(f"sqlite:///{tmp_path}/mlflow.db", "critic")) == 2


# --- resumed runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", ["each step", "only the end"])
@pytest.mark.parametrize(("first", "second"), [(17, 17), (17, 3), (3, 17)])
def test_a_resumed_run_has_each_step_once(
    first: int, second: int, seen: str, tmp_path: Path, database: str
) -> None:
    example = Example(tmp_path / f"resumed {first} {second} {seen}", database)
    example.status("running")
    example.digits = first
    example.steps(1, 10)
    run_id = sync_run(example.path).run_id
    sent = received(example)
    sizes = [path.stat().st_size for path in sorted(example.path.glob("*.jsonl"))]
    example.resume(4, digits=second)
    for step in range(5, 17):
        if seen == "each step":
            assert sync_run(example.path).run_id == run_id
        example.steps(step, step)
    grown = [path.stat().st_size for path in sorted(example.path.glob("*.jsonl"))]
    assert all(now > before for now, before in zip(grown, sizes, strict=True))
    assert sync_run(example.path).run_id == run_id
    assert received(example) == example.metrics | sent
    assert len(received(example)) == 16 + 8


def test_a_run_that_starts_over_from_nothing_stays_the_same(tmp_path: Path, database: str) -> None:
    example = Example(tmp_path / "over", database)
    example.steps(1, 6)
    run_id = sync_run(example.path).run_id
    sent = received(example)
    example.resume(0)
    assert sync_run(example.path).metrics == 0
    example.steps(1, 8)
    result = sync_run(example.path)
    assert (result.run_id, result.metrics) == (run_id, 3)
    assert received(example) == example.metrics | sent


def test_a_run_that_is_resumed_again_and_again_misses_nothing(
    tmp_path: Path, database: str
) -> None:
    example = Example(tmp_path / "often", database)
    sent: dict[tuple[str, int], tuple[float, int]] = {}
    for checkpoint, last in ((0, 2), (0, 6), (4, 4), (4, 8), (2, 4), (2, 10)):
        if sent:
            example.resume(checkpoint, digits=3 + last)
        example.steps(checkpoint + 1, last)
        sync_run(example.path)
        assert received(example) == example.metrics | sent
        sent = received(example)


def test_a_line_that_waited_takes_its_time_from_the_attempt_that_goes_on(
    tmp_path: Path, database: str
) -> None:
    example = Example(tmp_path / "waited", database)
    example.status("running")
    example.steps(1, 5)
    assert sync_run(example.path).waiting == 1
    example.resume(5)
    example.steps(6, 7)
    example.metrics["train/loss", 5] = (1 / 8, round(1000 * (START + 6 + example.late)))
    assert sync_run(example.path).waiting == 1
    example.status("finished")
    assert sync_run(example.path).waiting == 0
    example.metrics["train/loss", 7] = (1 / 10, round(1000 * (START + 6 + example.late)))
    assert received(example) == example.metrics


def test_a_copy_of_the_directory_goes_on_as_the_run(tmp_path: Path, database: str) -> None:
    example = Example(tmp_path / "original", database)
    example.steps(1, 4)
    run_id = sync_run(example.path).run_id
    example.path = Path(shutil.copytree(example.path, tmp_path / "copy"))
    example.steps(5, 6)
    result = sync_run(example.path)
    assert (result.run_id, result.metrics) == (run_id, 3)
    assert received(example) == example.metrics


@pytest.mark.parametrize("lost", range(4))
def test_a_resumed_run_repeats_nothing_whose_answer_was_lost(
    lost: int, tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = Example(tmp_path / f"unanswered{lost}", database)
    example.steps(1, 4)
    sync_run(example.path)
    example.steps(5, 10)
    numbers = itertools.count()
    log_batch = MlflowClient.log_batch

    def lose_the_answer(*arguments: Any, **options: Any) -> None:
        log_batch(*arguments, **options)
        if next(numbers) == lost:
            raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lose_the_answer)
        patch.setattr(mlflow_sync, "_METRICS_PER_CALL", 2)
        with pytest.raises(TimeoutError):
            sync_run(example.path)
    for last in (8, 12):
        sent = received(example)
        example.resume(4, digits=3)
        sync_run(example.path)
        example.steps(5, last)
        sync_run(example.path)
        assert received(example) == example.metrics | sent


@pytest.mark.parametrize("checkpoint", [None, 4])
def test_a_note_of_a_time_before_steps_were_noted(
    checkpoint: int | None, tmp_path: Path, database: str
) -> None:
    example = Example(tmp_path / f"older {checkpoint}", database)
    example.steps(1, 8)
    run_id = sync_run(example.path).run_id
    sent = received(example)
    names = ("telemetry.jsonl", "metrics.jsonl")
    note = example.note() | {"offsets": {n: (example.path / n).stat().st_size for n in names}}
    del note["steps"]
    (example.path / "mlflow.json").write_text(json.dumps(note))
    if checkpoint:
        example.resume(checkpoint, digits=3)
    example.steps(5 if checkpoint else 9, 10)
    result = sync_run(example.path)
    assert (result.run_id, result.metrics) == (run_id, 3)
    assert received(example) == example.metrics | sent


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


def test_a_run_goes_on_from_every_state(tmp_path: Path, database: str) -> None:
    assert_states(Example(tmp_path / "states", database))


def test_a_stopped_run_has_no_end_and_waits_for_no_telemetry(tmp_path: Path, database: str) -> None:
    example = Example(tmp_path / "stopped", database)
    example.steps(1, 5)
    example.status("stopped")
    assert sync_run(example.path).waiting == 0
    assert copy_of(example).info.end_time is None
    sent = received(example)
    assert sent["train/loss", 5] == (1 / 8, round(1000 * (START + 4)))
    example.status("running")
    example.resume(5)
    example.steps(6, 8)
    sync_run(example.path)
    assert received(example) == example.metrics | sent


# --- a server ----------------------------------------------------------------------------------


class Gate:
    """A port before the server that passes connections on, or takes them and stays silent."""

    def __init__(self, target: int, port: int = 0) -> None:
        self.silent = False
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                if not self.silent:
                    server = socket.create_connection(("127.0.0.1", self._target))
                    self._open.append(server)
                    self._threads.append(
                        threading.Thread(target=self._pass_on, args=(client, server))
                    )
                    self._threads[-1].start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        with suppress(OSError):
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return other[ready].shutdown(socket.SHUT_RDWR)
                    if not self.silent:
                        other[ready].sendall(data)

    def close(self) -> None:
        # Closing alone does not wake a thread that waits on the socket.
        for opened in (self._listener, *self._open):
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for opened in (self._listener, *self._open):
            opened.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an MLflow server process."""
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: _healthy(port) or process.poll() is not None, 120)
        assert process.poll() is None, (folder / "log").read_text()
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _healthy(port: int) -> bool:
    with (
        suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer,
    ):
        return bool(answer.status == 200)
    return False


@pytest.fixture
def gate(server: int) -> Iterator[Gate]:
    opened = Gate(server)
    yield opened
    opened.close()


def test_a_run_arrives_whole_at_a_server(tmp_path: Path, server: int) -> None:
    example = finished(tmp_path / "served", f"http://127.0.0.1:{server}", steps=1500)
    example.step(1501, told_at=1500, **{"explained (%)": 0.5})
    example.metrics["explained ___", 1501] = example.metrics.pop(("explained (%)", 1501))
    sync_run(example.path)
    assert_complete(example, tmp_path)
    assert copy_of(example).info.status == "FINISHED"
    second = sync_run(example.path)
    assert (second.metrics, second.params, second.artifacts) == (0, 0, 0)


def test_a_run_on_a_server_goes_on_from_every_state(tmp_path: Path, server: int) -> None:
    assert_states(Example(tmp_path / "served states", f"http://127.0.0.1:{server}"))


def follow(example: Example, deadline: float) -> subprocess.Popen[bytes]:
    """The child process with another deadline than its own."""
    code = (
        "import os, pathlib, sys; from job.run.mlflow_mirror import follow\n"
        "os._exit(follow(pathlib.Path(sys.argv[1]), float(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(example.path), str(deadline)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_a_server_that_never_answers_holds_the_process_no_longer_than_its_deadline(
    tmp_path: Path, gate: Gate
) -> None:
    gate.silent = True
    example = finished(tmp_path / "silent", gate.uri)
    process = follow(example, deadline=2)
    wait_for(lambda: "token" in (example.note() if _noted(example) else {}))
    began = time.monotonic()
    process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert process.returncode == 1
    gate.silent = False
    sync_run(example.path)
    assert_complete(example, tmp_path)
    assert len([r for r in copies(gate.uri, "critic") if r.info.run_name == "silent"]) == 1


def _noted(example: Example) -> bool:
    return (example.path / "mlflow.json").exists()


def test_a_server_that_falls_silent_during_the_run_gets_the_rest_later(
    tmp_path: Path, gate: Gate
) -> None:
    example = Example(tmp_path / "falls", gate.uri)
    example.status("running")
    example.steps(1, 4)
    live = Mirror.start(example.path)
    wait_for(lambda: _noted(example) and len(example.note()["steps"]) == 2)
    gate.silent = True
    example.steps(5, 8)
    assert not live.close(timeout=2)
    assert live.process is not None
    assert live.process.returncode == -signal.SIGKILL
    gate.silent = False
    example.artifacts()
    example.status("finished")
    sync_run(example.path)
    assert_complete(example, tmp_path)


def test_a_server_that_is_down_at_first_gets_everything_when_it_is_up(
    tmp_path: Path, server: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    example = Example(tmp_path / "down", f"http://127.0.0.1:{port}")
    example.status("running")
    example.steps(1, 4)
    live = Mirror.start(example.path)
    wait_for(lambda: "MLflow gets it later" in example.log())
    time.sleep(7)  # more attempts, none of them logged
    gate = Gate(server, port)
    try:
        example.steps(5, 8)
        example.artifacts()
        example.status("finished")
        assert live.close(timeout=60)
        assert_complete(example, tmp_path)
    finally:
        gate.close()
    assert example.log().count("MLflow gets it later") == 1
    assert example.log().count("MLflow takes the run again") == 1


# --- the process -------------------------------------------------------------------------------


def test_the_process_survives_signals_and_sends_system_metrics(
    tmp_path: Path, database: str
) -> None:
    example = Example(tmp_path / "signals", database)
    example.status("running")
    example.steps(1, 2)
    live = Mirror.start(example.path)
    assert live.process is not None
    _signal(live.process)  # before it can have said that it ignores them
    wait_for(lambda: _noted(example) and example.note()["run_id"])
    wait_for(lambda: "system/cpu_utilization_percentage" in copy_of(example).data.metrics)
    _signal(live.process)
    assert os.getpriority(os.PRIO_PROCESS, live.process.pid) == os.nice(0) + 5
    example.steps(3, 4)
    example.artifacts()
    example.status("finished")
    assert live.close(timeout=30)
    assert live.close(timeout=30)
    assert_complete(example, tmp_path)


def _signal(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(process.pid, number)


def test_a_killed_trainer_leaves_a_process_that_sends_the_rest_and_ends(
    tmp_path: Path, database: str
) -> None:
    example = Example(tmp_path / "killed", database)
    example.status("running")
    code = (
        "import sys, time, pathlib; from job.run.mlflow_mirror import Mirror\n"
        "print(Mirror.start(pathlib.Path(sys.argv[1])).process.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(example.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        wait_for(lambda: _noted(example) and example.note()["run_id"])
        example.steps(1, 40)
        example.artifacts()
        trainer.kill()
    wait_for(lambda: not _alive(pid))
    assert_complete(example, tmp_path)
    assert copy_of(example).info.status == "RUNNING"


def _alive(pid: int) -> bool:
    """Also false for a process that has ended and that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_process_refuses_a_local_database_in_a_cluster_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = finished(tmp_path / "cluster")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert not Mirror.start(example.path).close(timeout=30)
    assert "python -m job.report --sync" in example.log()
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("obstacle", ["folder", "python"])
def test_a_process_that_cannot_start_is_a_warning(
    obstacle: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if obstacle == "python":
        monkeypatch.setattr(sys, "executable", "/no/python")
    live = Mirror.start(tmp_path / "none" if obstacle == "folder" else tmp_path)
    assert not live.close(timeout=1)
    assert caplog.records[0].name == "job.run.mlflow_mirror"
    assert "no live mirror" in caplog.text


def test_a_process_that_dies_at_once_is_not_all_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    live = Mirror.start(tmp_path)
    assert live.process is not None
    pid = live.process.pid
    wait_for(lambda: not _alive(pid))
    assert not live.close(timeout=1)
