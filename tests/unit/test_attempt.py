"""What an attempt leaves in status.json when other threads and other ranks come in between."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from disturbed_runs import crash_before

from job.distributed.world import World
from job.run.directory import RunDirectory


@pytest.mark.slow
@pytest.mark.usefixtures("training_folder")
def test_an_error_is_reported_to_other_ranks_before_it_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To report it ends the process if it follows from another's, whose name then stands there."""
    states: list[str] = []

    def report(_: World, error: BaseException) -> None:
        states.append(RunDirectory("runs/reported").status()["state"])

    monkeypatch.setattr(World, "report_failure", report)
    run = crash_before(2, "reported")
    assert (states[0], run.status()["state"]) == ("running", "failed")


def test_two_threads_that_set_the_status_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other_is_done = RunDirectory(tmp_path), threading.Event()
    write = RunDirectory.write_json

    def slow_at_first(self: RunDirectory, name: str, content: Any) -> None:
        if "checkpoint" not in content:
            other.start()
            other_is_done.wait(0.3)
        write(self, name, content)

    def set_another() -> None:
        run.set_status(checkpoint=3)
        other_is_done.set()

    other = threading.Thread(target=set_another)
    monkeypatch.setattr(RunDirectory, "write_json", slow_at_first)
    run.set_status(step=4)
    other.join()
    status = RunDirectory(tmp_path).status()
    assert (status["step"], status["checkpoint"]) == (4, 3)
