"""The jobs of a night: an array a size of resources, and one that collects what they leave."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission

from job.common.errors import Exit
from job.nightly.figures import TOLD_TO_STOP
from job.nightly.matrix import Kind
from job.nightly.record import NightFolder, Verdict
from slurm import scheduler
from slurm.night_plan import FULL, NightRun, QueueFull, binds, by_size
from slurm.record import Record
from slurm.scheduler import ControllerAway, Refused
from slurm.submission import Submission, script, submit
from slurm.supervisor import Supervisor
from slurm.task import POLL_SECONDS, Signals, leave
from slurm.telling import Channels, tell
from slurm.trainer import Trainer, rank_environment, threads

COLLECTOR_HOURS = 1


@dataclass(frozen=True)
class NightSubmission(Submission):
    """Entries of one size: behind everybody else, and given up before the next night."""

    nice: int = 0
    deadline_hours: float = 20

    def parameters(self) -> dict[str, Any]:
        given = super().parameters()
        more = {"nice": self.nice, "deadline": f"now+{int(60 * self.deadline_hours)}minutes"}
        return given | {"additional_parameters": given["additional_parameters"] | more}


@dataclass(frozen=True)
class CollectorSubmission(Submission):
    """The job after all others, however they have ended; it needs no GPU."""

    after_any: tuple[str, ...] = ()

    def parameters(self) -> dict[str, Any]:
        given = super().parameters()
        del given["gpus_per_node"]
        return given | {"dependency": f"afterany:{':'.join(self.after_any)}"}


@dataclass(frozen=True)
class Training:
    """An entry that trains: an ordinary job, that may be told to stop once on its way."""

    supervisor: Supervisor
    stop_at: int | None

    def __call__(self) -> str:
        if self.stop_at is not None and os.environ["SLURM_PROCID"] == "0":
            arguments = (Record(self.supervisor.run), self.stop_at, _signal_this_task)
            threading.Thread(target=tell_to_stop, args=arguments, daemon=True).start()
        return self.supervisor()

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(self)


def tell_to_stop(record: Record, step: int, send: Callable[[], object]) -> None:
    """Tell a run to stop, once, when it has come to a step."""
    if any(event["event"] == TOLD_TO_STOP for event in record.events()):
        return
    while record.stored.newest_values("metrics.jsonl").get("step", 0) < step:
        time.sleep(POLL_SECONDS / 4)
    record.add_event(TOLD_TO_STOP)
    send()


def _signal_this_task() -> None:
    os.kill(os.getpid(), signal.SIGUSR2)


@dataclass(frozen=True)
class Command:
    """An entry that is a command, on the first of the job's tasks."""

    run: str
    words: list[str]
    submission: Submission

    def __call__(self) -> str:
        Signals()  # a command that is ended is begun again, if Slurm requeues the job
        if os.environ["SLURM_PROCID"] != "0":
            leave(0)
        leave(execute(Record(self.run), self.words, self.submission))

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(self)


def execute(record: Record, words: list[str], submission: Submission) -> int:
    """Run an entry's command to its end, and note how that was; its exit code."""
    record.set_status(state="running")
    record.add_event("started")
    given = {"OMP_NUM_THREADS": threads()} | submission.environment | rank_environment(0, 1, 0, 1)
    log = record.folder / "command.log"
    environment = submission.task_environment(given)
    try:
        trainer = Trainer(words, environment, Path(submission.cwd), log)
    except OSError as error:
        record.set_status(state="failed", reason=f"cannot start {words[0]}: {error.strerror}")
        return Exit.UNFIT_NODE
    while not trainer.wait(1):
        pass
    outcome = trainer.outcome(0, "")
    # a validation that has found something wrong is complete, and says so in its file
    done = outcome.code == 0 or (record.run / "memory-validation.json").exists()
    record.set_status(state="finished" if done else "failed", reason=outcome.reason)
    return 0 if done else outcome.code


def command_of(run: NightRun) -> list[str]:
    """How an entry that is no training is started."""
    assert run.plan is not None
    submission, config = run.plan.submission, str(Record(run.path).config)
    if run.entry.kind is Kind.preflight:
        return submission.preflight_command(config, run.entry.gpus)
    blocks = [str(n) for n in run.entry.unfreeze]
    words = ["validate", "--config", config, "--unfreeze", *blocks]
    return submission.command(
        "memory", *words, "--gpus", str(run.entry.gpus), "--out", str(run.path)
    )


@dataclass(frozen=True)
class Collector:
    """The job that judges the night."""

    night: str
    submission: Submission
    channels: Channels

    def __call__(self) -> str:
        Signals()
        leave(collect(NightFolder(Path(self.night)), self.submission, self.channels))

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(self)


def collect(night: NightFolder, submission: Submission, channels: Channels) -> int:
    """Judge a night where its trainings ran, tell of it, and return the verdict's exit code."""
    environment = submission.task_environment(submission.environment)
    words = submission.command("nightly", str(night.path))
    try:
        subprocess.run(words, env=environment, cwd=submission.cwd, check=False)
    except OSError as error:
        print(f"cannot start {words[0]}: {error.strerror}", flush=True)
    tell(night, channels)
    if not night.record_file.exists():
        return Verdict.INCOMPLETE.exit_code
    return night.night().verdict.exit_code


def arrays(
    runs: Sequence[NightRun], nice: int, deadline_hours: float, night: NightFolder
) -> list[tuple[NightSubmission, list[NightRun]]]:
    """What is asked of Slurm for the entries of each size."""
    found = []
    for number, group in enumerate(by_size(runs)):
        assert group[0].plan is not None
        base = replace(
            group[0].plan.submission,
            name=night.path.name,
            folder=str(night.path / "slurm" / f"array-{number}"),
            binds=binds(group),
        )
        submission = NightSubmission(**_values(base), nice=nice, deadline_hours=deadline_hours)
        found.append((submission, group))
    return found


def _values(submission: Submission) -> dict[str, Any]:
    return {one.name: getattr(submission, one.name) for one in fields(Submission)}


def scripts(
    of_night: Sequence[tuple[NightSubmission, list[NightRun]]], night: NightFolder
) -> list[str]:
    """What sbatch is given for each array and the collector, which names them by their numbers."""
    shown = [script(submission, len(group)) for submission, group in of_night]
    names = tuple(f"ARRAY-{number}" for number in range(len(shown)))
    return [*shown, script(_collector_of(of_night[0][0], names, night))]


def submit_night(
    of_night: Sequence[tuple[NightSubmission, list[NightRun]]],
    night: NightFolder,
    channels: Channels,
    note: Callable[[dict[Path, str]], None],
) -> tuple[dict[Path, str], str]:
    """Submit everything, or nothing; the job of each run, and the collector's.

    `note` is told of the jobs so far after each array: this process may end at any moment.

    Raises:
        ControllerAway, QueueFull, Refused: what was submitted is cancelled again.
    """
    ids: dict[Path, str] = {}
    try:
        for submission, group in of_night:
            jobs = _submit([_job(run, submission) for run in group], submission)
            ids |= dict(zip([run.path for run in group], jobs, strict=True))
            note(ids)
        return ids, _submit_collector(of_night[0][0], ids, night, channels)
    except BaseException as error:
        _take_back(ids)
        if isinstance(error, ControllerAway | Refused) and FULL.search(str(error)):
            raise QueueFull(f"the queue is full, and nothing was submitted: {error}") from None
        raise


def _submit(jobs: Sequence[Callable[[], str]], submission: Submission) -> list[str]:
    """As submit.py does, without what submitit prints before it raises: cron mails one line."""
    with contextlib.redirect_stderr(io.StringIO()):
        return submit(jobs, submission)


def _job(run: NightRun, submission: NightSubmission) -> Callable[[], str]:
    if run.entry.kind is Kind.train:
        return Training(Supervisor(str(run.path), submission), run.entry.stop_at)
    return Command(str(run.path), command_of(run), submission)


def _submit_collector(
    like: Submission, ids: dict[Path, str], night: NightFolder, channels: Channels
) -> str:
    arrays_of_it = tuple(sorted({job.partition("_")[0] for job in ids.values()}))
    submission = _collector_of(like, arrays_of_it, night)
    return _submit([Collector(str(night.path), submission, channels)], submission)[0]


def _collector_of(
    like: Submission, arrays_of_it: tuple[str, ...], night: NightFolder
) -> CollectorSubmission:
    base = replace(
        like,
        name=f"{night.path.name}-judge",
        folder=str(night.path / "slurm" / "collector"),
        profile=like.profile | {"time": f"{COLLECTOR_HOURS}:00:00"},
        gpus=1,
        nodes=1,
        binds=[*like.binds, str(night.path.parent)],
    )
    return CollectorSubmission(**_values(base), after_any=arrays_of_it)


def _take_back(ids: dict[Path, str]) -> None:
    for job in {job.partition("_")[0] for job in ids.values()}:
        try:
            scheduler.cancel(job)
        except (ControllerAway, Refused) as error:
            print(f"job {job} could not be cancelled: {error}", flush=True)
