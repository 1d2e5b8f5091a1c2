"""What a supervisor does about files that it cannot write itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_slurm import FakeSlurm, submission

from job.common.errors import Exit
from slurm import supervisor
from slurm.leader import Leader
from slurm.record import Attempt, Outcome, Record, Start
from slurm.supervisor import Supervisor
from slurm.task import Post, Signals, Task


def _post(run: Path, restart: int = 0) -> Post:
    task = Task(0, 1, 0, 1, "node1", Start(7, restart, 0), "7")
    signals = cast(Signals, SimpleNamespace(received=[]))
    return Post(task, Attempt.next(Record(run)), signals)


def _leader(run: Path, restart: int = 0) -> Leader:
    return Leader(lambda: "", submission(run), _post(run, restart))


def _record(run: Path, **status: Any) -> None:
    record = Record(run)
    record.folder.mkdir()
    record.start_status(**status)


@pytest.mark.parametrize(("restart", "fruitless"), [(1, 2), (2, 3), (5, 6)])
def test_attempts_that_could_not_even_write_that_they_had_begun_count(
    restart: int, fruitless: int, tmp_path: Path
) -> None:
    _record(tmp_path, attempt=1, start=[7, 0, 0], first_checkpoint=0, fruitless=1)
    assert _leader(tmp_path, restart)._fruitless_before() == fruitless


def test_only_attempts_since_the_last_progress_count(tmp_path: Path) -> None:
    _record(tmp_path, attempt=1, start=[7, 2, 0], first_checkpoint=-1, fruitless=3)
    assert _leader(tmp_path, 3)._fruitless_before() == 0
    assert _leader(tmp_path, 5)._fruitless_before() == 2


def _spoiled(run: Path) -> None:
    (run / "slurm").mkdir()
    (run / "slurm" / "attempts").write_text("")  # no folder can be made here


def _renamed(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))


@pytest.mark.parametrize("trouble", [_spoiled, _renamed])
def test_an_attempt_whose_files_cannot_be_made_fails_with_path_and_disk(
    trouble: Any, tmp_path: Path, slurm: FakeSlurm
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    trouble(run)
    post = _post(run)
    supervisor = Supervisor(str(run), submission(run))
    outcome = supervisor._outcome(post, Leader(supervisor, supervisor.submission, post))
    assert outcome.code == Exit.IO_FAILED
    assert f"'{run}/" in outcome.reason
    assert "GB free)" in outcome.reason
    post.report(outcome)  # cannot be written either, and ends nothing
    assert not (run / "slurm" / "status.json").exists()


def test_a_run_that_is_renamed_after_its_start_is_no_fault_of_the_node(tmp_path: Path) -> None:
    post = _post(tmp_path)
    post.attempt.begin()
    post.attempt.set_meeting(post.task.start, environment={"MASTER_ADDR": "node1"})
    outcome = supervisor._Watch(submission(tmp_path), post, None).outcome()
    assert outcome.code == Exit.IO_FAILED
    assert f"cannot read {tmp_path}/slurm/config.yaml" in outcome.reason


def test_what_a_task_knows_of_itself_needs_no_file(tmp_path: Path) -> None:
    own = Outcome(0, "node1", Exit.IO_FAILED, 1.0, "no space", [])
    assert _leader(tmp_path)._collect(own) == [own]
