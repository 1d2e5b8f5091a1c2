"""The process that sends a run to MLflow while it is trained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mirrored_runs import MARKS, Example, assert_complete, copy_of, finished, noted
from waiting import wait_for

from job.run.mlflow_mirror import Mirror

pytestmark = MARKS


def test_the_process_survives_signals_and_sends_system_metrics(
    tmp_path: Path, database: str
) -> None:
    example = Example(tmp_path / "signals", database)
    example.status("running")
    example.steps(1, 2)
    live = Mirror.start(example.path)
    assert live.process is not None
    _signal(live.process)  # before it can have said that it ignores them
    wait_for(lambda: noted(example) and example.note()["run_id"])
    wait_for(lambda: "system/cpu_utilization_percentage" in copy_of(example).data.metrics)
    _signal(live.process)
    assert os.getpriority(os.PRIO_PROCESS, live.process.pid) == min(os.nice(0) + 5, 19)
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
        wait_for(lambda: noted(example) and example.note()["run_id"])
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
