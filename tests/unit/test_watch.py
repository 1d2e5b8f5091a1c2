"""What a person sees of runs: in one line each, or on a page."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from slurm import watch as watch_module
from slurm.status import Standing
from slurm.watch import page, summary, watch

PENDING = Standing(
    run="/runs/mine",
    state="pending",
    reason="waits in the queue (Priority)",
    job_id="7",
    attempts=0,
    expected_start=time.mktime((2026, 1, 2, 3, 4, 0, 0, 0, -1)),
)
RUNNING = Standing(
    run="/runs/mine",
    state="running",
    reason=None,
    job_id="7",
    attempts=2,
    nodes="node[1-2]",
    step=40,
    max_steps=200,
    checkpoint=30,
    loss=0.25,
    r2=0.5,
    memory_gb=23.4,
    last_lines=[f"line {k} [bold]" for k in range(5)],
)
FAILED = replace(
    RUNNING,
    state="failed",
    reason="rank 3 on node2: killed by SIGKILL",
    alarm="predictions are constant",
    last_lines=[f"line {k}" for k in range(25)],
)


def _text(renderable: RenderableType) -> str:
    """What a terminal of 100 columns without colours shows."""
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


# One line


def test_a_run_that_waits_in_one_line() -> None:
    assert summary(PENDING) == (
        "mine  pending  expected to start at 2026-01-02 03:04  waits in the queue (Priority)"
    )


def test_a_run_that_trains_in_one_line() -> None:
    assert summary(RUNNING) == (
        "mine  running  step 40/200, checkpoint 30  loss 0.2500  R2 0.5000  memory GB 23.4000"
    )


def test_a_run_that_failed_in_one_line() -> None:
    assert summary(replace(FAILED, loss=None, r2=None, memory_gb=None)) == (
        "mine  failed  step 40/200, checkpoint 30  rank 3 on node2: killed by SIGKILL"
    )


# A page


def test_a_page_on_a_run_that_waits() -> None:
    assert _text(page([PENDING])) == (
        "mine  pending  job 7, attempt 1, expected to start at 2026-01-02 03:04\n"
        "  waits in the queue (Priority)"
    )


def test_a_page_on_a_run_that_trains() -> None:
    lines = _text(page([RUNNING])).splitlines()
    assert lines[0] == "mine  running  job 7 on node[1-2], attempt 2"
    assert lines[1].endswith(
        "  40/200 steps, checkpoint 30  loss 0.2500  R2 0.5000  memory GB 23.4000"
    )
    assert lines[2:] == ["  line 2 [bold]", "  line 3 [bold]", "  line 4 [bold]"]


def test_a_page_on_a_run_that_failed_has_its_last_words() -> None:
    lines = _text(page([FAILED])).splitlines()
    assert lines[:3] == [
        "mine  failed  job 7 on node[1-2], attempt 2",
        "  rank 3 on node2: killed by SIGKILL",
        "  predictions are constant",
    ]
    assert lines[4:] == [f"  line {k}" for k in range(5, 25)]


def test_a_page_on_a_sweep_has_all_runs() -> None:
    text = _text(page([replace(PENDING, run="/runs/sweep/n0"), RUNNING]))
    assert [line.split()[0] for line in text.splitlines() if "  job 7" in line] == ["n0", "mine"]


# Watching


@pytest.fixture
def standings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Standing | BaseException]]:
    """What becomes of a run, from look to look."""
    coming: list[Standing | BaseException] = []

    def look(_: Sequence[Path]) -> list[Standing]:
        now = coming.pop(0)
        if isinstance(now, BaseException):
            raise now
        return [now]

    monkeypatch.setattr(watch_module, "standings", look)
    monkeypatch.setattr(watch_module, "_PAUSE_SECONDS", 0.0)
    yield coming
    assert not coming


def _watch(terminal: bool = False) -> tuple[list[Standing], str]:
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
    shown = watch([Path("/runs/mine")], console)
    assert isinstance(console.file, io.StringIO)
    return shown, console.file.getvalue()


def test_a_file_gets_a_line_for_each_change(standings: list[Standing | BaseException]) -> None:
    standings += [PENDING, PENDING, RUNNING, FAILED]
    shown, text = _watch()
    assert shown == [FAILED]
    assert text.splitlines() == [summary(PENDING), summary(RUNNING), summary(FAILED)]


def test_a_terminal_gets_a_page_that_changes(standings: list[Standing | BaseException]) -> None:
    standings += [PENDING, RUNNING, FAILED]
    shown, text = _watch(terminal=True)
    assert shown == [FAILED]
    assert text.index("mine  pending") < text.index("mine  running") < text.index("mine  failed")


def test_leaving_leaves_the_job_alone(standings: list[Standing | BaseException]) -> None:
    standings += [RUNNING, KeyboardInterrupt()]
    shown, text = _watch()
    assert shown == [RUNNING]
    assert "The job goes on" in text
