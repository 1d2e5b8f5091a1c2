"""Runs that are killed, continued on other numbers of ranks, or started twice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from launch import COMMIT_NOTED, END, SAVE, MicroJob, Ranks
from micro_job import MicroRun

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SOAK_KILLS", "8"))
SOAK_STEPS = 40 + 12 * KILLS
STEPS = 40


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> MicroJob:
    settings = (f"training.max_steps={STEPS}", "checkpoint.every_steps=4")
    return MicroJob.prepare(tmp_path_factory.mktemp("resume"), *settings)


@pytest.fixture(scope="module")
def undisturbed(job: MicroJob) -> MicroRun:
    return job.finish("undisturbed")


# Kills


@dataclass(frozen=True)
class Attempt:
    """A new attempt at a run, seen from outside, and the step after which to look for a moment."""

    run: MicroRun
    number: int
    after: int = 0

    def file(self, name: str) -> Path:
        return self.run.path / f"attempts/{self.number:04}" / name

    def is_far_enough(self) -> bool:
        return self.file("attempt.json").exists() and self.run.step >= self.after


MOMENTS: dict[str, Callable[[Attempt], bool]] = {
    "loading": lambda a: a.file("").exists(),
    "resuming": lambda a: a.file("attempt.json").exists(),
    "mid-step": lambda a: a.is_far_enough(),
    "mid-save": lambda a: a.is_far_enough() and bool(a.run.saving()),
    "mid-commit": lambda a: a.is_far_enough() and _has_manifest(a.run),
    "mid-cleanup": lambda a: a.is_far_enough() and _is_cleaning_up(a.run),
}


def _has_manifest(run: MicroRun) -> bool:
    return any((folder / "manifest.json").exists() for folder in run.saving())


def _is_cleaning_up(run: MicroRun) -> bool:
    """A checkpoint is renamed into place, and the run does not know yet."""
    committed = run.checkpoints
    return bool(committed) and committed[-1] > run.status.get("checkpoint", 0)


def _is_ending(run: MicroRun) -> bool:
    return run.checkpoints[-1:] == [SOAK_STEPS] and run.status["state"] == "running"


def _kill(ranks: Ranks, victims: list[int], moment: Callable[[], bool], what: str) -> list[int]:
    """Kill some ranks when `moment` holds, and see the others end; all exit codes."""
    ranks.freeze_when(moment, what)
    ranks.signal(signal.SIGKILL, victims)
    ranks.signal(signal.SIGCONT)
    codes = ranks.wait(60)
    assert all((code == -signal.SIGKILL) == (rank in victims) for rank, code in enumerate(codes))
    return codes


def _moments(draw: random.Random, n: int) -> list[str]:
    """Each moment about equally often, in any order."""
    rounds = [draw.sample(list(MOMENTS), len(MOMENTS)) for _ in range(n // len(MOMENTS) + 1)]
    return [moment for one in rounds for moment in one][:n]


def test_kills_at_any_moment_leave_no_trace_in_the_result(job: MicroJob) -> None:
    settings = (f"training.max_steps={SOAK_STEPS}", "checkpoint.every_steps=2")
    expected = job.finish("soak-undisturbed", *settings)
    draw, run = random.Random(8), job.run("soak")
    for number, name in enumerate(_moments(draw, KILLS - 1), 1):
        victims = draw.choice([[0], [1], [0, 1]])
        attempt = Attempt(run, number, run.step + draw.randint(2, 7))
        what = f"kill {number} of {victims}, {name}, from step {attempt.after} on"
        with job.start("soak", *settings, dwell=f"{SAVE}|{COMMIT_NOTED}") as ranks:
            if name in ("loading", "mid-step"):
                ranks.wait_until(lambda: MOMENTS[name](attempt), what)  # noqa: B023
                time.sleep(draw.uniform(0, 0.3))
            codes = _kill(ranks, victims, lambda: MOMENTS[name](attempt), what)  # noqa: B023
            assert set(codes) <= {-signal.SIGKILL, 1}, ranks.log()
        assert run.lines == expected.lines[: len(run.lines)], what
    with job.start("soak", *settings, dwell=END) as ranks:
        _kill(ranks, [0, 1], lambda: _is_ending(run), "the end")
    job.finish("soak", *settings).assert_equals(expected)
    assert len(run.attempts) == KILLS + 1


# Elastic worlds


def test_a_run_goes_on_with_any_number_of_ranks(job: MicroJob) -> None:
    alone = job.finish("alone", world=1)
    run = job.run("elastic")
    with job.start("elastic", world=1) as ranks:
        ranks.wait_until(lambda: run.step >= 5, "step 5")
        (run.path / "stop").touch()
        assert ranks.wait() == [75]
    with job.start("elastic", world=2) as ranks:
        start = run.step
        ranks.wait_until(lambda: run.step >= start + 3, "three more steps on two ranks")
        ranks.signal(signal.SIGTERM)
        assert ranks.wait() == [75, 75]
    with job.start("elastic", world=4) as ranks:
        start = run.checkpoints[-1]
        ranks.wait_until(lambda: run.checkpoints[-1] > start, "a checkpoint of four ranks")
        _kill(ranks, [0, 1, 2, 3], lambda: True, "now")
    job.finish("elastic", world=1)
    assert [attempt["world_size"] for attempt in run.attempts] == [1, 2, 4, 1]
    resumed = [attempt["resumed_step"] for attempt in run.attempts]
    assert resumed == sorted(set(resumed)), "every attempt made progress"
    assert any(step % 7 for step in resumed), "some window has parts of several worlds"
    for ours, theirs in zip(run.records, alone.records, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), theirs["step"]


# Two copies


def _content(run: MicroRun) -> dict[Path, object]:
    """Every folder and file of a run but logs and configuration, with time and content."""
    return {
        path: (path.stat().st_mtime_ns, zlib.crc32(path.read_bytes())) if path.is_file() else None
        for path in sorted(run.path.rglob("*"))
        if path.suffix != ".log" and path.name != "config.yaml"
    }


def test_of_two_copies_started_at_once_one_finishes(job: MicroJob, undisturbed: MicroRun) -> None:
    with job.start("twice") as first, job.start("twice") as second:
        codes = sorted([first.wait(), second.wait()])
        assert codes == [[0, 0], [73, 73]], first.log() + second.log()
    run = job.run("twice")
    run.assert_equals(undisturbed)
    assert run.status["attempt"] == len(run.attempts) == 2


def test_a_second_copy_takes_over_from_the_last_checkpoint(
    job: MicroJob, undisturbed: MicroRun
) -> None:
    run = job.run("taken-over")
    with job.start("taken-over") as first:
        first.wait_until(lambda: 4 in run.checkpoints, "a checkpoint")
        first.signal(signal.SIGSTOP)  # until the second copy runs, or it would have finished
        with job.start("taken-over") as second:
            second.wait_until(lambda: len(run.attempts) == 2, "the second copy")
            first.signal(signal.SIGCONT)
            assert first.wait() == [73, 73], first.log()
            assert second.wait() == [0, 0], second.log()
    assert run.attempts[1]["resumed_step"] >= 4
    run.assert_equals(undisturbed)


@pytest.mark.parametrize("moment", ["between saves", "mid-commit"])
def test_a_copy_that_was_asleep_changes_nothing_when_it_wakes(
    job: MicroJob, undisturbed: MicroRun, moment: str
) -> None:
    name = f"asleep-{moment.replace(' ', '-')}"
    run = job.run(name)
    conditions: dict[str, Callable[[], object]] = {
        "between saves": lambda: run.step > 5 and not run.saving(),
        "mid-commit": lambda: run.step > 5 and _has_manifest(run),
    }
    with job.start(name, "checkpoint.every_steps=2", dwell=SAVE) as first:
        first.freeze_when(conditions[moment], moment)
        job.finish(name)
        before = _content(run)
        first.signal(signal.SIGCONT)
        assert first.wait(90) == [73, 73], first.log()
    assert _content(run) == before
    run.assert_equals(undisturbed)


def test_a_copy_superseded_during_its_last_save_leaves_at_once(
    job: MicroJob, undisturbed: MicroRun
) -> None:
    run = job.run("last-save")
    with job.start("last-save", "checkpoint.every_steps=1000", dwell=SAVE) as first:
        first.freeze_when(run.saving, "the last save")
        (run.path / "attempts/0002").mkdir()
        first.signal(signal.SIGCONT)
        assert first.wait(30) == [73, 73], first.log()
    assert not run.checkpoints
    job.finish("last-save").assert_equals(undisturbed)


# Finished runs


@pytest.fixture
def finished(job: MicroJob, undisturbed: MicroRun, request: pytest.FixtureRequest) -> MicroRun:
    """A copy of the undisturbed run, for one test."""
    run = job.run(request.node.name)
    shutil.copytree(undisturbed.path, run.path)
    return run


def test_a_finished_run_is_left_as_it_is(job: MicroJob, finished: MicroRun) -> None:
    before = _content(finished)
    job.finish(finished.path.name)
    assert _content(finished) == before


def test_a_finished_run_made_longer_goes_on_from_its_end(job: MicroJob, finished: MicroRun) -> None:
    before = finished.lines
    job.finish(finished.path.name, f"training.max_steps={STEPS + 10}")
    assert finished.lines[:STEPS] == before
    assert [record["step"] for record in finished.records] == list(range(1, STEPS + 11))
    assert finished.attempts[-1]["resumed_step"] == STEPS
    assert finished.checkpoints[-1] == STEPS + 10
    assert finished.status["state"] == "finished"


def test_resume_never_refuses_a_run_that_exists(job: MicroJob, finished: MicroRun) -> None:
    before = _content(finished)
    with job.start(finished.path.name, options=["--resume", "never"]) as ranks:
        assert ranks.wait() == [78, 78]
        assert "--resume is `never`" in ranks.log()
    assert _content(finished) == before
