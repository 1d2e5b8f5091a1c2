"""What runs on the nodes, one task a GPU, outside the container: submitit calls a Supervisor.

Each task starts its trainer, passes signals on and waits. Task 0 collects how all of them ended
and decides by slurm/verdict.py whether the job comes back. Handlers only set flags.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from submitit.helpers import DelayedSubmission

from job.outcome import Exit
from slurm import scheduler
from slurm.record import Attempt, Outcome, Record
from slurm.scheduler import ControllerAway, Job, Refused
from slurm.submission import Submission, submit
from slurm.trainer import STOP_SIGNALS, Trainer, rank_environment, threads
from slurm.verdict import Action, Budget, Verdict, decide, exit_status, first_cause

Found = TypeVar("Found")
HEARTBEAT_SECONDS = 10.0
_POLL_SECONDS = 0.2
_MEETING_SECONDS = 300.0  # for the task that starts first to wait for task 0
_OUTCOME_SECONDS = 60.0  # between the first trainer's end and the last one's
_PAUSES = (1, 2, 5, 10, 20, 30)  # between requests to a controller that is away; then the last
_PORTS = range(15000, 32000)  # below those that systems give to clients
_SCRATCH_BYTES = 1 << 30


@dataclass(frozen=True)
class Task:
    """This process among the tasks of the job, as srun tells it."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    node: str
    job: int
    job_name: str  # as clients know it: 12, or 12_3 of an array
    restart: int

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
            job=int(env["SLURM_JOB_ID"]),
            job_name=f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"],
            restart=int(env.get("SLURM_RESTART_COUNT", 0)),
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
class Supervisor:
    """One run's job; submitit pickles it at submission and calls it in every task."""

    run: str
    submission: Submission

    def __call__(self) -> str:
        signals, task = Signals(), Task.here()
        attempt = Attempt(Record(self.run), task.job, task.restart)
        lead = Lead(self, task, attempt, signals) if task.rank == 0 else None
        if lead is not None:
            lead.begin()
        outcome = self._supervise(task, attempt, signals, lead)
        _say(f"rank {task.rank}: {outcome.reason}")
        attempt.set_outcome(outcome)
        if lead is None:
            _leave(0)  # without a result: only task 0's counts
        return lead.conclude()

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs again if a signal comes between its handlers and ours."""
        return DelayedSubmission(self)

    def _supervise(
        self, task: Task, attempt: Attempt, signals: Signals, lead: Lead | None
    ) -> Outcome:
        """Run this task's trainer to its end."""
        meeting = _wait_for(attempt.meeting, _MEETING_SECONDS)
        if meeting is None:
            problem = f"task 0 did not say where to meet: no file in {attempt.folder}"
            return Outcome(task.rank, task.node, Exit.CRASHED, time.time(), problem, [])
        if "leave" in meeting:
            _leave(0)
        if unfit := self.unfitness():
            return Outcome(task.rank, task.node, Exit.UNFIT_NODE, time.time(), unfit, [])
        environment = self._environment(task, meeting)
        command = self.submission.trainer_command(Record(self.run).config, environment)
        trainer = Trainer(
            command, os.environ | environment, Path(self.submission.cwd), attempt.log(task.rank)
        )
        passed_on = 0
        while not trainer.wait(_POLL_SECONDS):
            received = signals.received[passed_on:]
            for number in received[: 1 - passed_on]:  # the first; more would change nothing
                trainer.send(number)
            passed_on += len(received)
            if lead is not None:
                lead.watch(received)
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


class Lead:
    """Task 0's part: the run's record, and the decision in the end."""

    def __init__(
        self, supervisor: Supervisor, task: Task, attempt: Attempt, signals: Signals
    ) -> None:
        self._submission, self._supervisor = supervisor.submission, supervisor
        self._task, self._attempt, self._signals = task, attempt, signals
        self._record = attempt.record
        self._beaten = 0.0
        self._returns = False  # the job is to run again, and Slurm knows
        self._first_checkpoint = self._record.newest_checkpoint()
        self._fruitless = _fruitless_before(self._record, self._first_checkpoint)

    def begin(self) -> None:
        """Take the run over, and tell all tasks where to meet and until when."""
        self._attempt.begin()
        if self._record.cancelled.exists():
            self._turn_away("cancelled", "cancelled before it ran")
        job = _ask(self._task.job_name)
        self._set_status(
            state="running",
            reason=None,
            attempt=[self._task.job, self._task.restart],
            node=self._task.node,
            nodes=job.nodes if job is not None else None,
            started=time.time(),
            ends=job.end if job is not None else None,
            first_checkpoint=self._first_checkpoint,
            fruitless=self._fruitless,
            last_lines=[],
        )
        if self._fruitless >= self._submission.max_attempts:
            self._turn_away("failed", f"{self._fruitless} attempts in a row without progress")
        self._event("started", node=self._task.node, checkpoint=self._first_checkpoint)
        self._beat()
        self._attempt.set_meeting(**self._meeting(job))

    def _turn_away(self, state: str, reason: str) -> NoReturn:
        self._attempt.set_meeting(leave=reason)
        self._end(state, reason, [])
        _leave(0 if state == "cancelled" else Exit.CRASHED)

    def _meeting(self, job: Job | None) -> dict[str, str]:
        """Variables that all trainers share."""
        host, port = self._address()
        meeting = {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        if job is not None and job.end is not None:
            deadline = job.end - self._submission.signal_delay_seconds
            meeting["CRITIC_DEADLINE"] = f"{deadline:.0f}"
        return meeting

    def _address(self) -> tuple[str, int]:
        """Where ranks meet: a port that follows from the job, or the next one that is free."""
        start = self._task.job % len(_PORTS)
        ports = [*_PORTS[start:], *_PORTS[:start]]
        return self._task.node, next(port for port in ports if _is_free(port))

    def watch(self, received: list[int]) -> None:
        """Keep the heartbeat, and on signals see that the job will return."""
        if received:
            names = ", ".join(signal.Signals(number).name for number in received)
            _say(f"received {names}")
            self._event("signal", signals=names)
            self._see_to_return()
        if time.monotonic() - self._beaten > HEARTBEAT_SECONDS:
            self._beat()

    def _beat(self) -> None:
        self._beaten = time.monotonic()
        self._set_status()

    def _see_to_return(self) -> None:
        """Have a job that is being ended already come back; its trainers may still be saving."""
        job = _ask(self._task.job_name)
        if job is None or self._returns or self._record.cancelled.exists():
            return
        if job.state in ("PREEMPTED", "TIMEOUT"):
            self._come_back(Verdict(Action.COME_BACK, f"{job.state.lower()} by Slurm"))

    def conclude(self) -> str:
        """Decide, act and end this task; the text returned is for a job that has finished."""
        if self._attempt.superseded:
            _say("a newer attempt has taken over")
            _leave(Exit.SUPERSEDED)
        outcomes = self._collect()
        cause = first_cause(outcomes, self._task.size)
        verdict = decide(cause, self._budget(), by_a_person=self._asked_by_a_person())
        _say(f"{verdict.action.value}: {verdict.reason}")
        self._event("ended", reason=verdict.reason, code=verdict.code)
        if verdict.action is Action.FINISH:
            self._end("finished", verdict.reason, [])
            return verdict.reason
        if verdict.action is Action.COME_BACK:
            self._come_back(verdict)
            _leave(0)
        if verdict.action is Action.STOP:
            stopped = verdict.code == Exit.STOPPED
            lines = cause.last_lines if cause is not None else []
            self._end("stopped" if stopped else "failed", verdict.reason, lines)
        return _leave(verdict.code)

    def _collect(self) -> list[Outcome]:
        """Every rank's outcome, or of those that report in time."""

        def all_there() -> list[Outcome] | None:
            self.watch([])
            outcomes = self._attempt.outcomes()
            return outcomes if len(outcomes) == self._task.size else None

        return _wait_for(all_there, _OUTCOME_SECONDS) or self._attempt.outcomes()

    def _budget(self) -> Budget:
        progress = self._record.newest_checkpoint() > self._first_checkpoint
        fruitless = 0 if progress else self._fruitless + 1
        return Budget(fruitless, self._submission.max_attempts)

    def _asked_by_a_person(self) -> bool:
        """Whether the trainer has stopped because of a file in the run directory."""
        return bool(self._record.trainer_status().get("stop_file")) and not self._signals.received

    def _come_back(self, verdict: Verdict) -> None:
        """Let the job run again, unless it was cancelled; wait for a controller that is away."""
        for pause in _pauses():
            try:
                self._try_to_come_back(verdict)
                return
            except ControllerAway as away:
                _say(f"{away}; trying again in {pause} s")
                self._set_status(reason=f"waiting for Slurm's controller: {away}")
                time.sleep(pause)

    def _try_to_come_back(self, verdict: Verdict) -> None:
        job = scheduler.show_job(self._task.job_name)
        if self._record.cancelled.exists() or (job is not None and job.state == "CANCELLED"):
            self._end("cancelled", "cancelled while it ran", [])
            _leave(0)
        self._set_status(state="pending", reason=verdict.reason)
        if self._returns:
            return
        try:
            self._requeue(job, verdict)
        except Refused as refused:
            self._submit_again(str(refused))
        self._returns = True

    def _requeue(self, job: Job | None, verdict: Verdict) -> None:
        if job is None:
            raise Refused("Slurm does not know the job any more")
        if not job.waits:
            scheduler.requeue(self._task.job_name)
        self._event("requeued", reason=verdict.reason)
        _say("requeued")
        if verdict.avoid_node is not None:
            try:
                scheduler.exclude_node(self._task.job_name, verdict.avoid_node)
            except Refused as refused:
                _say(f"cannot keep the job from {verdict.avoid_node}: {refused}")

    def _submit_again(self, why: str) -> None:
        """Where the site does not requeue, submit the same run as a new job."""
        _say(f"not requeued ({why}): submitting the run again")
        supervisor = self._supervisor
        try:
            job_id = submit([supervisor], supervisor.submission.of_one_run())[0]
        except Refused as refused:
            self._end("failed", f"not requeued ({why}) and not submitted again: {refused}", [])
            _leave(Exit.CRASHED)
        self._record.add_job(job_id)
        self._event("submitted again", job_id=job_id, reason=why)

    def _end(self, state: str, reason: str, lines: list[str]) -> None:
        self._set_status(state=state, reason=reason, last_lines=lines)
        self._event(state, reason=reason)
        for line in lines:
            _say(f"  | {line}")

    def _event(self, event: str, **facts: object) -> None:
        if not self._attempt.superseded:
            name, restart = self._task.job_name, self._task.restart
            self._record.add_event(event, job_id=name, restart=restart, **facts)

    def _set_status(self, **changes: object) -> None:
        if self._attempt.superseded:
            return
        try:
            self._record.set_status(heartbeat=time.time(), **changes)
        except OSError as error:  # the trainer has a word in that, not this record
            _say(f"cannot write the status: {error}")


def _fruitless_before(record: Record, checkpoint: int) -> int:
    """Attempts in a row, up to the last one, that brought no newer checkpoint."""
    before = record.status()
    if "attempt" not in before or checkpoint > before["first_checkpoint"]:
        return 0
    return int(before["fruitless"]) + 1


def _pauses() -> list[int]:
    return [*_PAUSES, *[_PAUSES[-1]] * 1000]  # Slurm's time limit ends it


def _ask(job_name: str) -> Job | None:
    """The controller's answer, or None if it is away: then nothing that depends on it is done."""
    try:
        return scheduler.show_job(job_name)
    except ControllerAway as away:
        _say(str(away))
        return None


def _wait_for(condition: Callable[[], Found], seconds: float) -> Found | None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if found := condition():
            return found
        time.sleep(_POLL_SECONDS)
    return None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def _leave(code: int) -> NoReturn:
    """End this task without a result for submitit, which would take it for the run's."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status(code))
