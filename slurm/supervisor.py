"""What runs on the nodes, one task a GPU, outside the container: submitit calls a Supervisor.

Each task starts its trainer, passes signals on and waits. Task 0 leads: it collects how all of them
have ended, and decides by slurm/verdict.py whether the job comes back.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from submitit.helpers import DelayedSubmission

from job.common.errors import Exit
from slurm.lead import Lead
from slurm.record import Attempt, Outcome, Record
from slurm.submission import Submission
from slurm.task import POLL_SECONDS, Signals, Task, leave, say, wait_for
from slurm.trainer import Trainer, rank_environment, threads

_MEETING_SECONDS = 300.0  # for a task that starts early to wait for task 0
_OTHERS_SECONDS = 2.0  # between two looks at the other tasks
_SCRATCH_BYTES = 1 << 30


@dataclass(frozen=True)
class Supervisor:
    """One run's job; submitit pickles it at submission and calls it in every task."""

    run: str
    submission: Submission

    def __call__(self) -> str:
        signals, task = Signals(), Task.here()
        attempt = Attempt(Record(self.run), task.job, task.restart)
        lead = Lead(self, self.submission, task, attempt, signals) if task.rank == 0 else None
        if lead is not None:
            lead.begin()
        outcome = self._supervise(task, attempt, signals, lead)
        say(f"rank {task.rank}: {outcome.reason}")
        attempt.set_outcome(outcome)
        if lead is None:
            leave(0)  # without a result: only task 0's counts
        return lead.conclude()

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs again if a signal comes between its handlers and ours."""
        return DelayedSubmission(self)

    def _supervise(
        self, task: Task, attempt: Attempt, signals: Signals, lead: Lead | None
    ) -> Outcome:
        """Run this task's trainer to its end."""
        meeting = wait_for(attempt.meeting, _MEETING_SECONDS)
        if meeting is None:
            problem = f"task 0 did not say where to meet: no file in {attempt.folder}"
            return Outcome(task.rank, task.node, Exit.CRASHED, time.time(), problem, [])
        if "leave" in meeting:
            leave(0)
        if unfit := self.unfitness():
            return Outcome(task.rank, task.node, Exit.UNFIT_NODE, time.time(), unfit, [])
        config, given = str(Record(self.run).config), self._environment(task, meeting)
        outcome = None
        if self.submission.profile["preflight"]:
            # at an address of its own: who is faster must not meet those who still are there
            own = given | {"MASTER_PORT": meeting["PREFLIGHT_PORT"]}
            command = self.submission.preflight_command(config, task.local_size)
            outcome = self._run(command, own, task, attempt, signals, lead)
        if outcome is None or outcome.code == Exit.FINISHED:
            command = self.submission.command("train", "--config", config)
            outcome = self._run(command, given, task, attempt, signals, lead)
        return outcome

    def _run(
        self,
        command: list[str],
        given: dict[str, str],
        task: Task,
        attempt: Attempt,
        signals: Signals,
        lead: Lead | None,
    ) -> Outcome:
        """Run a command of the job to its end."""
        environment = self.submission.task_environment(given)
        cwd, log = Path(self.submission.cwd), attempt.log(task.rank)
        try:
            trainer = Trainer(command, environment, cwd, log)
        except OSError as error:
            problem = f"cannot start {command[0]}: {error.strerror}"
            return Outcome(task.rank, task.node, Exit.UNFIT_NODE, time.time(), problem, [])
        _wait_for_the_end(trainer, attempt, signals, lead)
        return trainer.outcome(task.rank, task.node)

    def unfitness(self) -> str | None:
        """What this node lacks that other nodes may have."""
        submission = self.submission
        needed = [submission.cwd, str(Record(self.run).config), submission.image]
        for path in filter(None, needed):
            if not os.access(path, os.R_OK):
                return f"cannot read {path}"
        if submission.scratch is None:
            return None
        scratch = Path(os.path.expandvars(submission.scratch))
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(scratch).free
        except OSError as error:
            return f"scratch {scratch}: {error.strerror}"
        if not os.access(scratch, os.W_OK):
            return f"scratch {scratch} is not writable"
        if free < _SCRATCH_BYTES:
            return f"scratch {scratch}: {free / 1e9:.1f} GB free"
        return None

    def _environment(self, task: Task, meeting: dict[str, str]) -> dict[str, str]:
        """What the trainer's environment has besides this task's own."""
        ranks = rank_environment(task.rank, task.size, task.local_rank, task.local_size)
        given = {"OMP_NUM_THREADS": threads()} | meeting | ranks
        if self.submission.scratch is not None:
            given["TMPDIR"] = os.path.expandvars(self.submission.scratch)
        return given | self.submission.environment


def _wait_for_the_end(
    trainer: Trainer, attempt: Attempt, signals: Signals, lead: Lead | None
) -> None:
    """Wait for a trainer, pass the first signal on, and end it where it waits in vain."""
    passed_on, looked = False, time.monotonic()
    while not trainer.wait(POLL_SECONDS):
        if signals.received and not passed_on:  # more would change nothing
            trainer.send(signals.received[0])
            passed_on = True
        if lead is not None:
            lead.watch()
        if time.monotonic() - looked > _OTHERS_SECONDS:
            looked = time.monotonic()
            if any(outcome.code == Exit.UNFIT_NODE for outcome in attempt.outcomes()):
                trainer.send(signal.SIGKILL)  # the others will not come, and nothing is unsaved
