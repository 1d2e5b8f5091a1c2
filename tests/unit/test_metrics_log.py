"""Lines of metrics outlive descriptors that fail and names that come to lead elsewhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.common.nested import to_dict
from job.common.schema import CriticConfig
from job.run.directory import RunDirectory
from job.run.fence import Fence
from job.run.metrics_log import Tracker

NAMES = ("metrics.jsonl", "telemetry.jsonl")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    config = CriticConfig()
    config.mlflow.enabled = False
    run = RunDirectory(tmp_path / "run")
    run.claim(to_dict(config))
    return run


@pytest.fixture
def tracker(run: RunDirectory) -> Iterator[Tracker]:
    with Tracker(run) as tracker:
        _write(tracker, 1, 2)
        tracker.flush()
        _write(tracker, 3)
        yield tracker


def _write(tracker: Tracker, *steps: int) -> None:
    for step in steps:
        tracker.metrics(step, {"loss": step / 7})
        tracker.telemetry(step, {"speed": step})


def _steps(run: RunDirectory) -> list[list[int]]:
    return [[record["step"] for record in run.records(name)] for name in NAMES]


def _kill_descriptors(run: RunDirectory) -> None:
    """Let what is open refuse everything, as a handle does that has become stale."""
    dead = os.open("/dev/full", os.O_WRONLY)
    for link in list(Path("/proc/self/fd").iterdir()):
        if link.exists() and any(link.samefile(run.file(name)) for name in NAMES):
            os.dup2(dead, int(link.name))
    os.close(dead)


def test_a_descriptor_that_fails_is_opened_anew_and_no_line_is_lost(
    run: RunDirectory, tracker: Tracker
) -> None:
    _kill_descriptors(run)
    _write(tracker, 4)
    assert _steps(run) == [[1, 2, 3]] * 2
    tracker.flush()
    assert _steps(run) == [[1, 2, 3, 4]] * 2
    _write(tracker, 5)
    assert _steps(run) == [[1, 2, 3, 4, 5]] * 2


def test_the_end_of_a_run_opens_anew_what_has_failed(run: RunDirectory) -> None:
    with Tracker(run) as tracker:
        _write(tracker, 1)
        _kill_descriptors(run)
        _write(tracker, 2)
    assert _steps(run) == [[1, 2]] * 2


def test_files_that_were_removed_are_made_anew_with_all_lines(
    run: RunDirectory, tracker: Tracker
) -> None:
    for name in NAMES:
        run.file(name).unlink()
    _write(tracker, 4)
    tracker.flush()
    assert _steps(run) == [[1, 2, 3, 4]] * 2


def test_lines_that_are_gone_for_good_are_said_to_be(
    run: RunDirectory, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    first = run.file("metrics.jsonl").read_bytes().splitlines(True)[0]
    _kill_descriptors(run)
    run.file("metrics.jsonl").write_bytes(first + b'{"step": 2, "lo')
    with caplog.at_level(logging.ERROR):
        tracker.flush()
    assert "metrics.jsonl was removed or cut" in caplog.text
    _write(tracker, 4)
    assert _steps(run) == [[1, 3, 4], [1, 2, 3, 4]]


def test_a_folder_that_is_renamed_for_a_while_costs_no_line(
    run: RunDirectory, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = run.path.rename(run.path.with_name("elsewhere"))
    _write(tracker, 4)
    tracker.flush()
    assert "metrics.jsonl: No such file or directory; lines are kept in memory" in caplog.text
    elsewhere.rename(run.path)
    _write(tracker, 5)
    tracker.flush()
    assert _steps(run) == [[1, 2, 3, 4, 5]] * 2


def test_a_newer_attempts_lines_are_left_alone(run: RunDirectory, tracker: Tracker) -> None:
    run.fence = Fence.take(run.path)
    newer = RunDirectory(run.path)
    newer.fence = Fence.take(run.path)
    newer.keep_lines(1)
    _write(tracker, 4)
    tracker.flush()
    assert _steps(run) == [[1]] * 2
