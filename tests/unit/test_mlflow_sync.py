"""The MLflow copy of a run directory, in a database of the real MLflow."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mirrored_runs import (
    MARKS,
    START,
    Example,
    assert_complete,
    assert_states,
    copies,
    copy_of,
    finished,
    received,
)
from mlflow import MlflowClient

from job.common.errors import InputError
from job.common.files import write_atomic
from job.run import mlflow_sync
from job.run.mlflow_mirror import live_mirror_allowed
from job.run.mlflow_sync import sync_run, tracking_uri

pytestmark = MARKS


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
