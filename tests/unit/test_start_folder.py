"""From where a run was started, by what it calls itself and where it lies, or as it noted."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.run.fence import Fence
from job.run.start_folder import start_folder


@pytest.mark.parametrize(
    ("lies", "called", "started"),
    [
        ("project/runs/critic", "runs/critic", "project"),
        ("project/runs/critic", "./runs/x/../critic", "project"),
        ("project/runs/critic", "critic", "project/runs"),
        ("project/runs/renamed", "runs/critic", None),
        ("elsewhere/runs/critic", "../runs/critic", None),
    ],
)
def test_a_run_lies_where_it_was_started_under_its_own_name(
    tmp_path: Path, lies: str, called: str, started: str | None
) -> None:
    found = start_folder(tmp_path / lies, called)
    assert found == (None if started is None else tmp_path / started)


def test_a_run_with_a_whole_path_has_noted_where_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, here = tmp_path / "scratch" / "critic", tmp_path / "here"
    run.mkdir(parents=True)
    here.mkdir()
    assert start_folder(run, str(run)) is None
    monkeypatch.chdir(here)
    Fence.take(run).record(world_size=1, resumed_step=0)
    monkeypatch.chdir(tmp_path)
    assert start_folder(run, str(run)) == here
