"""What runs on the nodes, one task a GPU, outside the container: submitit calls a Supervisor.

Each task starts its trainer, passes signals on and waits. Task 0 leads: it collects how all of them
have ended, and decides by slurm/policy.py whether the job is requeued.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from submitit.helpers import DelayedSubmission

from job.common.errors import Exit
from job.common.places import SCRATCH_BYTES, disk, free_bytes, read_problem, write_problem
from slurm.leader import Leader
from slurm.record import Outcome, Record
from slurm.submission import Submission
from slurm.task import POLL_SECONDS, Post, leave, say
from slurm.trainer import Trainer, rank_environment, threads

_OTHERS_SECONDS = 2.0  # between two looks at the other tasks


@dataclass(frozen=True)
class Supervisor:
    """One run's job; submitit pickles it at submission and calls it in every task."""

    run: str
    submission: Submission

    def __call__(self) -> str:
        post = Post.taken(Record(self.run))
        leader = Leader(self, self.submission, post) if post.task.rank == 0 else None
        outcome = self._outcome(post, leader)
        say(f"rank {post.task.rank}: {outcome.reason}")
        post.report(outcome)
        if leader is None:
            leave(0)  # without a result: only task 0's counts
        return leader.conclude(outcome)

    def _outcome(self, post: Post, leader: Leader | None) -> Outcome:
        """How this task's trainer has ended, or what this task could not write for it to begin."""
        try:
            if leader is not None:
                leader.begin()
            return _Watch(self.submission, post, leader).outcome()
        except OSError as error:
            problem = f"input or output failed: {error} ({disk(post.attempt.folder)})"
            return post.failed(Exit.IO_FAILED, problem)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs again if a signal comes between its handlers and ours."""
        return DelayedSubmission(self)


@dataclass(frozen=True)
class _Watch:
    """One task's watch over its trainer; task 0 leads."""

    submission: Submission
    post: Post
    leader: Leader | None

    def outcome(self) -> Outcome:
        """Run this task's trainer to its end."""
        attempt = self.post.attempt
        meeting = attempt.meeting()
        if "leave" in meeting:
            leave(0)
        config = str(attempt.record.config)
        if missing := read_problem(config):  # where this process comes from a moment ago
            return self.post.failed(Exit.IO_FAILED, f"{missing}: was the run's folder renamed?")
        if unfit := unfitness(self.submission):
            return self.post.failed(Exit.UNFIT_NODE, unfit)
        given = self._environment(meeting["environment"])
        if self.submission.profile["preflight"]:
            # at an address of its own: who is faster must not meet those who still are there
            own = given | {"MASTER_PORT": given["PREFLIGHT_PORT"]}
            command = self.submission.preflight_command(config, self.post.task.local_size)
            before = self._run(command, own)
            if before.code != Exit.FINISHED:
                return before
        return self._run(self.submission.train_command(config), given)

    def _environment(self, shared: dict[str, str]) -> dict[str, str]:
        """What the trainer's environment has besides this task's own."""
        task = self.post.task
        ranks = rank_environment(task.rank, task.size, task.local_rank, task.local_size)
        given = {"OMP_NUM_THREADS": threads()} | shared | ranks
        if self.submission.scratch is not None:
            given["TMPDIR"] = os.path.expandvars(self.submission.scratch)
        return given | self.submission.environment

    def _run(self, command: list[str], given: dict[str, str]) -> Outcome:
        """Run a command of the job to its end."""
        environment = self.submission.task_environment(given)
        task, log = self.post.task, self.post.attempt.log(self.post.task.rank)
        log.touch()  # what keeps it from being written is not the node's fault
        try:
            trainer = Trainer(command, environment, Path(self.submission.cwd), log)
        except OSError as error:
            return self.post.failed(*_not_started(command[0], error))
        self._wait_for_the_end(trainer)
        return trainer.outcome(task.rank, task.node)

    def _wait_for_the_end(self, trainer: Trainer) -> None:
        """Wait for a trainer, pass the first signal on, and end it where it waits in vain."""
        received, passed_on, looked = self.post.signals.received, False, time.monotonic()
        while not trainer.wait(POLL_SECONDS):
            if received and not passed_on:  # more would change nothing
                trainer.send(received[0])
                passed_on = True
            if self.leader is not None:
                self.leader.watch()
            if time.monotonic() - looked > _OTHERS_SECONDS:
                looked = time.monotonic()
                if any(one.code == Exit.UNFIT_NODE for one in self.post.attempt.outcomes()):
                    trainer.send(signal.SIGKILL)  # the others will not come, and all is saved


def _not_started(program: str, error: OSError) -> tuple[int, str]:
    """The code and reason where a command cannot be started; a program is the same on each node."""
    problem = f"cannot start {program}: {error.strerror}"
    if not isinstance(error, FileNotFoundError | PermissionError) or error.filename != program:
        return Exit.UNFIT_NODE, problem
    return Exit.BAD_INPUT, (
        f"{problem}; the nodes must have it on the job's PATH, which the cluster profile's `setup` "
        "may change; or submit with another --image, or none"
    )


def unfitness(submission: Submission) -> str | None:
    """What this node lacks that other nodes may have."""
    for path in filter(None, [submission.cwd, submission.image]):
        if problem := read_problem(path):
            return problem
    return None if submission.scratch is None else _unfit_scratch(submission.scratch)


def _unfit_scratch(name: str) -> str | None:
    scratch = Path(os.path.expandvars(name))
    if problem := write_problem(scratch):
        return f"scratch {scratch}: {problem.strerror}"
    free = free_bytes(scratch)
    return f"scratch {scratch}: {free / 1e9:.1f} GB free" if free < SCRATCH_BYTES else None
