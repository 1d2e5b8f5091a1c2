"""One task of the job: who it is, what it hears and says, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from job.common.errors import Exit
from slurm.policy import exit_status
from slurm.record import Attempt, Outcome, Record, Start
from slurm.trainer import STOP_SIGNALS

POLL_SECONDS = 0.2
_MEETING_SECONDS = 300.0  # for a task that starts early to wait for task 0
Found = TypeVar("Found")


@dataclass(frozen=True)
class Task:
    """This process among the tasks of the job, as srun tells it."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    node: str
    start: Start
    job_name: str  # as clients know it: 12, or 12_3 of an array

    @classmethod
    def here(cls) -> Task:
        env = os.environ
        size, nodes = int(env["SLURM_NTASKS"]), int(env["SLURM_JOB_NUM_NODES"])
        array = env.get("SLURM_ARRAY_JOB_ID")
        return cls(
            rank=int(env["SLURM_PROCID"]),
            size=size,
            local_rank=int(env["SLURM_LOCALID"]),
            local_size=size // nodes,
            node=env.get("SLURMD_NODENAME") or socket.gethostname(),
            start=Start(
                job=int(env["SLURM_JOB_ID"]),
                restart=int(env.get("SLURM_RESTART_COUNT", 0)),
                step=int(env.get("SLURM_STEP_ID", 0)),
            ),
            job_name=f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"],
        )


class Signals:
    """The stop signals that this task has received."""

    def __init__(self) -> None:
        self.received: list[int] = []
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _receive(self, number: int, _frame: object) -> None:
        self.received.append(number)


@dataclass(frozen=True)
class Post:
    """This task's place in one attempt at a run: who it is, what all tasks share, what it hears."""

    task: Task
    attempt: Attempt
    signals: Signals

    @classmethod
    def taken(cls, record: Record) -> Post:
        """The next attempt for task 0, which has it to begin; for the others the one it has begun.

        From here on signals are heard.
        """
        signals, task = Signals(), Task.here()
        if task.rank == 0:
            return cls(task, Attempt.next(record), signals)
        attempt = wait_for(lambda: Attempt.of(record, task.start), _MEETING_SECONDS)
        if attempt is None:
            say(f"task 0 did not say where to meet: nothing of it in {record.folder}/attempts")
            leave(Exit.CRASHED)
        return cls(task, attempt, signals)

    def failed(self, code: int, problem: str) -> Outcome:
        """The outcome of a task that has no trainer."""
        return Outcome(self.task.rank, self.task.node, code, time.time(), problem, [])

    def report(self, outcome: Outcome) -> None:
        """Let the others know how this task's trainer has ended."""
        try:
            self.attempt.set_outcome(outcome)
        except OSError as error:
            say(f"cannot write the outcome: {error}")


def wait_for(condition: Callable[[], Found], seconds: float) -> Found | None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if found := condition():
            return found
        time.sleep(POLL_SECONDS)
    return None


def say(text: str) -> None:
    with suppress(OSError):  # the disk may be full that the log is on
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def leave(code: int) -> NoReturn:
    """End this task without a result for submitit, which would take it for the run's."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(exit_status(code))
