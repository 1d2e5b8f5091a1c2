"""Runs that Slurm interrupts in all its ways: they come back by themselves and lose nothing.

With SLURM_MEASUREMENTS=FILE, what each interruption took is added to that file.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_job import ClusterJob, Submitted
from lab import Lab
from launch import SAVE
from micro_job import MicroRun

pytestmark = pytest.mark.slow
ALSO = pytest.mark.all  # another variant of the same behaviour

INTERRUPTIONS = int(os.environ.get("SOAK_INTERRUPTIONS", "5"))
STEPS = 400
PAIR_STEPS = 60 + 20 * INTERRUPTIONS
SETTINGS = (
    f"training.max_steps={STEPS}",
    "evaluation.every_steps=100000",
    "checkpoint.every_steps=100000",  # what is saved is saved because of the interruption
)
# Trainers that stay for a moment in each save.
DWELLING = {"PYTHONPATH": str(Path(__file__).parent / "dwelling"), "DWELL_AT_RENAME": SAVE}
PREEMPTED = ("low", "low0", "lowc", "lowc0")  # partitions: c is PreemptMode=CANCEL, 0 no grace
REQUEUE_SECONDS = 12  # longer than a job of the lab ever waits before it is started again
SAVED_SECONDS, BACK_SECONDS = 30, 120  # bounds that are far off


@pytest.fixture(scope="module")
def job(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> ClusterJob:
    lab.cancel_all()
    return ClusterJob.prepare(lab, tmp_path_factory.mktemp("interruptions"), *SETTINGS)


@pytest.fixture(scope="module")
def alone(job: ClusterJob) -> MicroRun:
    """Undisturbed, on this machine without Slurm, one process."""
    return job.micro.finish("alone", world=1)


@pytest.fixture(scope="module")
def pair(job: ClusterJob) -> MicroRun:
    return job.micro.finish("pair", f"training.max_steps={PAIR_STEPS}", world=2)


@pytest.fixture(autouse=True)
def _nothing_left(lab: Lab) -> Iterator[None]:
    yield
    lab.cancel_all()
    lab.send_user_signal(True)


# What an interruption takes


@dataclass(frozen=True)
class Taken:
    """What an interruption of a run has taken."""

    event: str
    checkpoint_seconds: float | None  # from the signal to the durable checkpoint
    slurm_seconds: float  # from the end of the job to its next start
    start_seconds: float  # from there to the first new step
    lost_steps: int  # done again


def _starts(run: Submitted) -> list[float]:
    return [one["time"] for one in run.events if one["event"] == "started"]


def _follow(run: Submitted, event: str, since: float, before: int) -> Taken:
    """See a run that was interrupted come back, `before` being its starts so far, and go on."""
    run.wait_until(lambda: len(_starts(run)) > before, f"a start after: {event}")
    started, last = _starts(run)[before], run.results.step
    checkpoints = run.results.checkpoints
    newest = checkpoints[-1] if checkpoints else 0
    manifest = run.path / f"checkpoints/step-{newest:08}/manifest.json"
    saved = manifest.stat().st_mtime - since if newest else 0.0
    left = [
        one["time"]
        for one in run.events
        if since <= one["time"] < started and one["event"] in ("requeued", "submitted again")
    ]
    run.wait_until(lambda: _resumed(run, before) is not None, "where it goes on")
    resumed = _resumed(run, before) or 0
    run.wait_until(lambda: run.results.step > resumed, "a new step", poll=0.01)
    taken = Taken(
        event=event,
        checkpoint_seconds=round(saved, 2) if saved > 0 else None,  # none was made
        slurm_seconds=round(started - (left[-1] if left else since), 2),
        start_seconds=round(time.time() - started, 2),
        lost_steps=max(0, last - resumed),
    )
    _record(taken)
    assert resumed == newest
    assert saved < SAVED_SECONDS
    assert taken.slurm_seconds + taken.start_seconds < BACK_SECONDS
    return taken


def _resumed(run: Submitted, number: int) -> int | None:
    """Where the attempt after the first `number` on nodes has gone on."""
    file = run.path / "attempts" / run.attempts[number].name / "attempt.json"
    return json.loads(file.read_text())["resumed_step"] if file.exists() else None


def _record(taken: Taken) -> None:
    if file := os.environ.get("SLURM_MEASUREMENTS"):
        with Path(file).open("a") as stream:
            stream.write(json.dumps(vars(taken)) + "\n")


def _let_go(runs: Sequence[Submitted], signals: int = 1) -> float:
    """Let halted runs go on when each has been told to stop, and not before; when that was."""
    for run in runs:
        run.wait_until(lambda: run.count("signal") >= signals, "a signal", poll=0.02)  # noqa: B023
    for run in runs:
        run.send(signal.SIGCONT)
    return max(one["time"] for run in runs for one in run.events if one["event"] == "signal")


# One interruption


def test_at_the_time_limit_a_run_saves_before_and_comes_back(
    job: ClusterJob, alone: MicroRun
) -> None:
    run = job.submit("--gpus", "1", "--time", "2", signal_delay_seconds=60, max_attempts=10)
    run.freeze_at(20)
    (environment,) = run.trainers().values()
    deadline = float(environment["CRITIC_DEADLINE"])
    assert 0 < deadline - time.time() < 60
    # a training that has nothing to do until shortly before the deadline, or Slurm's warning
    run.wait_until(lambda: time.time() > deadline - 0.5 or run.count("signal"), "the deadline")
    since = min(deadline, time.time())
    run.send(signal.SIGCONT)
    _follow(run, "time limit", since, 1)
    run.wait_for("finished")
    run.results.assert_equals(alone)
    ended = next(one for one in run.events if one["event"] == "ended")
    assert "the deadline" in ended["reason"] or "SIGUSR2" in ended["reason"]
    assert ended["time"] < deadline + SAVED_SECONDS
    assert run.count("requeued") == len(run.attempts) - 1 > 0


def _user_signal(lab: Lab, job_id: str) -> None:
    lab.run("scancel", "-s", "USR2", job_id)


def _requeue(lab: Lab, job_id: str) -> None:
    lab.run("scontrol", "requeue", job_id)


@pytest.mark.parametrize(
    ("event", "interrupt"),
    [
        pytest.param("USR2 by scancel", _user_signal, marks=ALSO),
        ("requeue by hand", _requeue),
    ],
)
def test_a_run_that_is_interrupted_by_hand_comes_back_where_it_was(
    job: ClusterJob, alone: MicroRun, event: str, interrupt: Callable[[Lab, str], None]
) -> None:
    run = job.submit("--gpus", "1")
    run.freeze_at(20)
    interrupt(job.lab, run.job_id)
    taken = _follow(run, event, _let_go([run]), 1)
    run.wait_for("finished")
    run.results.assert_equals(alone)
    assert taken.lost_steps == 0
    assert len(run.attempts) == len(run.results.attempts) == 2
    assert run.count("requeued") == 1


@pytest.mark.parametrize(
    "user_signal",
    [pytest.param(True, id="USR2 first"), pytest.param(False, id="TERM only", marks=ALSO)],
)
def test_preempted_runs_come_back_where_they_were(
    job: ClusterJob, alone: MicroRun, user_signal: bool
) -> None:
    job.lab.send_user_signal(user_signal)
    runs = {name: job.submit("--gpus", "1", partition=name) for name in PREEMPTED}
    for run in runs.values():
        run.freeze_at(20)
    job.preempt()
    since = _let_go(list(runs.values()))
    how = "with USR2" if user_signal else "without USR2"
    with ThreadPoolExecutor() as pool:
        follow = lambda name: _follow(runs[name], f"preemption, {name}, {how}", since, 1)  # noqa: E731
        taken = dict(zip(runs, pool.map(follow, runs), strict=True))
    for name, run in runs.items():
        run.wait_for("finished")
        run.results.assert_equals(alone)
        assert len(run.attempts) == len(run.results.attempts) == 2
        if not name.endswith("0"):
            assert taken[name].lost_steps == 0
        signals = [one["signals"] for one in run.events if one["event"] == "signal"]
        assert ("SIGUSR2" in " ".join(signals)) == user_signal, name


def test_signals_from_the_first_moment_on_end_nothing(
    job: ClusterJob, alone: MicroRun, tmp_path: Path
) -> None:
    begins, sent = tmp_path / "begins", 0  # once the first signal is sent, however slowly
    run = job.submit("--gpus", "1", setup=[f"until test -e {begins}; do sleep 0.1; done"])
    job.lab.wait_until(lambda: run.queue.startswith("RUNNING"), "a running job")

    def trains() -> bool:
        nonlocal sent
        job.lab.run("scancel", "-s", "USR2", run.job_id, check=False)
        sent += 1
        there = bool(run.trainers())
        begins.touch()
        return there

    run.wait_until(trains, "a trainer", poll=0)
    assert sent > 1
    run.wait_for("finished")
    run.results.assert_equals(alone)


@pytest.mark.parametrize("number", [pytest.param("USR2", marks=ALSO), "TERM"])
def test_a_signal_that_kills_a_task_before_it_can_listen_ends_nothing(
    job: ClusterJob, alone: MicroRun, tmp_path: Path, number: str
) -> None:
    (tmp_path / "env").write_text(
        f"test -e {tmp_path}/there || {{ touch {tmp_path}/there; sleep 60; }}"
    )
    # what bash reads before it does anything
    run = job.submit("--gpus", "1", setup=[f"export BASH_ENV={tmp_path}/env"])
    run.wait_until((tmp_path / "there").exists, "a task that is deaf")
    job.lab.run("scancel", "-s", number, run.job_id)
    run.wait_for("finished")
    run.results.assert_equals(alone)
    assert len(run.attempts) == 1
    log = next((run.path / "slurm").glob("*_log.out")).read_text()
    assert ("User defined signal 2" if number == "USR2" else "Terminated") in log


# Cancelling


@dataclass(frozen=True)
class Cancelled:
    """A run that was cancelled, and how often it had been started by then."""

    run: Submitted
    starts: int


CASES = (
    "scancel in training",
    "scancel in saving",
    "scancel of one that does not end in time",
    "scancel while it waits",
    "submit.py cancel in training",
    "submit.py cancel while it waits",
)


@pytest.fixture(scope="module")
def cancelled(job: ClusterJob) -> dict[str, Cancelled]:
    """One run for each case, cancelled; then the time has passed in which it might come back."""
    environment = os.environ | job.lab.environment | DWELLING
    runs = {
        case: job.submit("--gpus", "1", settings=_settings(case), environment=environment)
        for case in CASES
    }
    for case, run in runs.items():
        if "saving" in case:
            run.freeze_when(run.results.saving, "a checkpoint that is being written")
        else:
            run.freeze_at(20)
    for case, run in runs.items():
        if "waits" in case:  # for some seconds only: then Slurm starts it again
            _user_signal(job.lab, run.job_id)
            run.send(signal.SIGCONT)
            run.wait_until(lambda: run.queue.startswith("PENDING"), "a requeue")  # noqa: B023
        if "submit.py" in case:
            assert run.command("cancel").returncode == 0
        else:
            job.lab.run("scancel", run.job_id)
        if "in time" not in case:
            run.send(signal.SIGCONT)
    starts = {case: len(run.attempts) for case, run in runs.items()}
    time.sleep(REQUEUE_SECONDS)
    for run in runs.values():
        assert not run.queue, run.describe()
    return {case: Cancelled(run, starts[case]) for case, run in runs.items()}


def _settings(case: str) -> tuple[str, ...]:
    endless = "training.max_steps=100000"  # none is through before all have been submitted
    return (endless, "checkpoint.every_steps=5") if "saving" in case else (endless,)


@pytest.mark.parametrize("case", CASES)
def test_a_cancelled_run_stays_cancelled(cancelled: dict[str, Cancelled], case: str) -> None:
    run = cancelled[case].run
    assert len(run.attempts) == cancelled[case].starts == 1
    assert run.count("requeued") == ("waits" in case)
    assert not run.trainers()
    status = run.status
    assert status["state"] == "cancelled", run.describe()
    assert run.command("status").returncode == 1
    own = json.loads((run.path / "slurm" / "status.json").read_text())["state"]
    assert own == ("pending" if "waits" in case else "cancelled")
    if "training" in case or "saving" in case:
        assert run.results.checkpoints[-1] == run.results.step  # nothing is lost for --resume


# Many interruptions


def _preempt_without_user_signal(job: ClusterJob, run: Submitted) -> None:
    job.lab.send_user_signal(False)
    job.preempt()


WAYS: dict[str, Callable[[ClusterJob, Submitted], None]] = {
    "USR2 by scancel": lambda job, run: _user_signal(job.lab, run.job_id),
    "preemption with USR2": lambda job, run: job.preempt(),
    "requeue by hand": lambda job, run: _requeue(job.lab, run.job_id),
    "preemption without USR2": _preempt_without_user_signal,
}


@pytest.mark.all
def test_many_interruptions_leave_no_trace_in_the_result(job: ClusterJob, pair: MicroRun) -> None:
    setting = f"training.max_steps={PAIR_STEPS}"
    run = job.submit("--gpus", "2", settings=(setting,), partition="low")
    for number in range(INTERRUPTIONS):
        event, interrupt = list(WAYS.items())[number % len(WAYS)]
        start = run.results.checkpoints[-1] if run.results.checkpoints else 0
        run.freeze_at(start + 5)
        job.lab.send_user_signal(True)
        signals = run.count("signal")
        interrupt(job, run)
        since = _let_go([run], signals + 1)
        taken = _follow(run, f"{event}, 2 GPUs", since, number + 1)
        assert taken.lost_steps == 0, run.describe()
        assert run.results.lines == pair.lines[: len(run.results.lines)], event
    run.wait_for("finished")
    run.results.assert_equals(pair)
    assert len(run.attempts) == len(run.results.attempts) == INTERRUPTIONS + 1
    resumed = [attempt["resumed_step"] for attempt in run.results.attempts]
    assert resumed == sorted(set(resumed)), "every attempt made progress"
