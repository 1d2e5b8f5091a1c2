"""Task 0's part of a job: the run's record, the decision in the end, and the way back.

Requests to the controller are repeated while it is away: a run that has saved its state can wait.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import NoReturn

from job.common.errors import Exit
from job.common.files import write_atomic
from job.common.progress import ATTEMPT
from slurm import scheduler
from slurm.policy import Action, Budget, Decision, decide, first_cause
from slurm.record import Outcome
from slurm.scheduler import ControllerAway, Job, Refused
from slurm.submission import Submission, submit
from slurm.task import Post, leave, say, wait_for

HEARTBEAT_SECONDS = 10.0
_OUTCOME_SECONDS = 60.0  # between the first trainer's end and the last one's
_PAUSES = (1, 2, 5, 10, 20, 30)  # between requests to a controller that is away; then the last
_PORTS = range(15000, 32000)  # below those that systems give to clients


class Leader:
    """Task 0's part: the run's record, and the decision in the end."""

    def __init__(self, supervisor: Callable[[], str], submission: Submission, post: Post) -> None:
        self._supervisor, self._submission = supervisor, submission
        self._task, self._attempt, self._signals = post.task, post.attempt, post.signals
        self._record = post.attempt.record
        self._beaten, self._heard = 0.0, 0
        self._requeued = False  # the job is to run again, and Slurm knows
        self._code = 0  # of a job that runs again
        self._first_checkpoint = self._fruitless = 0

    def begin(self) -> None:
        """Take the run over, and tell all tasks where to meet and until when."""
        self._first_checkpoint = self._record.stored.newest_checkpoint()
        self._fruitless = self._fruitless_before()
        self._attempt.begin()
        self._record.add_job(self._task.job_name)  # perhaps not the one submitted last
        good = self._record.readable_config()
        if good != self._record.config:
            write_atomic(self._record.config, good.read_text(encoding="utf-8"))
        if self._record.cancelled.exists():
            self._turn_away("cancelled", "cancelled before it ran")
        job = _ask(self._task.job_name)
        self._set_status(
            state="running",
            reason=None,
            attempt=self._attempt.number,
            start=self._task.start,
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
        self._attempt.set_meeting(self._task.start, environment=self._shared(job))

    def _fruitless_before(self) -> int:
        """Attempts in a row, up to the last one, that brought no newer checkpoint."""
        before, start = self._record.status(), self._task.start
        if "attempt" not in before:
            return 0
        job, restart, _ = before.get("start", (None, 0, 0))
        # those that could not even write that they had begun
        silent = max(0, start.restart - restart - 1) if job == start.job else 0
        if self._first_checkpoint > before.get("first_checkpoint", 0):
            return silent
        return int(before.get("fruitless", 0)) + 1 + silent

    def _turn_away(self, state: str, reason: str) -> NoReturn:
        self._attempt.set_meeting(self._task.start, leave=reason)
        self._end(state, reason, [])
        leave(0 if state == "cancelled" else Exit.CRASHED)

    def _shared(self, job: Job | None) -> dict[str, str]:
        """Variables that all trainers share."""
        port, another = self._ports()
        shared = {"MASTER_ADDR": self._task.node, "MASTER_PORT": str(port)}
        shared |= {"PREFLIGHT_PORT": str(another), ATTEMPT: str(self._attempt.number)}
        return shared | deadline(job, self._submission.signal_delay_seconds)

    def _ports(self) -> tuple[int, int]:
        """Ports that follow from the job, or the next ones that are free."""
        start = 2 * self._task.start.job % len(_PORTS)
        ports = (port for port in (*_PORTS[start:], *_PORTS[:start]) if _is_free(port))
        return next(ports), next(ports)

    def watch(self) -> None:
        """Keep the heartbeat, and on new signals see that the job will return."""
        received = self._signals.received[self._heard :]
        self._heard += len(received)
        if received:
            names = ", ".join(signal.Signals(number).name for number in received)
            say(f"received {names}")
            self._event("signal", signals=names)
            self._see_to_requeue()
        if time.monotonic() - self._beaten > HEARTBEAT_SECONDS:
            self._beat()

    def _beat(self) -> None:
        self._beaten = time.monotonic()
        self._set_status()

    def _see_to_requeue(self) -> None:
        """Requeue a job that is being ended already; its trainers may still be saving."""
        job = _ask(self._task.job_name)
        if self._is_cancelled(job):
            # said now: Slurm may kill all of the job before its trainers have saved
            self._set_status(state="cancelled", reason="cancelled while it ran")
            return
        if job is None or self._requeued:
            return
        if job.state in ("PREEMPTED", "TIMEOUT"):
            self._requeue_or_submit(Decision(Action.REQUEUE, f"{job.state.lower()} by Slurm"))

    def _is_cancelled(self, job: Job | None) -> bool:
        # os.path, which never raises: the file system may be away for a moment
        asked = os.path.exists(self._record.cancelled)  # noqa: PTH110
        return asked or (job is not None and job.state == "CANCELLED")

    def conclude(self, own: Outcome) -> str:
        """Decide, act and end this task; the text returned is for a job that has finished."""
        if self._attempt.superseded:
            say(str(self._attempt.fence.ending()))
            leave(Exit.SUPERSEDED)
        outcomes = self._collect(own)
        cause = first_cause(outcomes, self._task.size)
        decision = decide(cause, self._budget(), by_a_person=self._asked_by_a_person())
        say(f"{decision.action.value}: {decision.reason}")
        self._event("ended", reason=decision.reason, code=decision.code)
        if decision.action is Action.FINISH:
            self._end("finished", decision.reason, [])
            return decision.reason
        if decision.action is Action.REQUEUE:
            self._requeue_or_submit(decision)
            leave(self._code)
        if decision.action is Action.STOP:
            stopped = decision.code == Exit.STOPPED
            lines = cause.last_lines if cause is not None else []
            self._end("stopped" if stopped else "failed", decision.reason, lines)
        return leave(decision.code)

    def _collect(self, own: Outcome) -> list[Outcome]:
        """Every rank's outcome, or of those that report in time."""

        def there() -> list[Outcome]:
            return [own, *(one for one in self._attempt.outcomes() if one.rank != own.rank)]

        def all_there() -> list[Outcome] | None:
            self.watch()
            outcomes = there()
            return outcomes if len(outcomes) == self._task.size else None

        return wait_for(all_there, _OUTCOME_SECONDS) or there()

    def _budget(self) -> Budget:
        progress = self._record.stored.newest_checkpoint() > self._first_checkpoint
        fruitless = 0 if progress else self._fruitless + 1
        return Budget(fruitless, self._submission.max_attempts)

    def _asked_by_a_person(self) -> bool:
        """Whether the trainer has stopped because of a file in the run directory."""
        return bool(self._record.trainer_status().get("stop_file")) and not self._signals.received

    def _requeue_or_submit(self, decision: Decision) -> None:
        """Let the job run again, unless it was cancelled; wait for a controller that is away.

        Submitting a job anew writes a file, for which there may be no room yet.
        """
        for pause in _pauses():
            try:
                self._try_to_requeue(decision)
                return
            except ControllerAway as away:
                say(f"{away}; trying again in {pause} s")
                self._set_status(reason=f"waiting for Slurm's controller: {away}")
            except OSError as error:
                say(f"{error}; trying again in {pause} s")
            time.sleep(pause)

    def _try_to_requeue(self, decision: Decision) -> None:
        job = scheduler.show_job(self._task.job_name)
        restarted = job is not None and job.restarts > self._task.start.restart and not job.waits
        if self._attempt.superseded or restarted:
            leave(Exit.SUPERSEDED)  # what runs now is a later attempt
        if self._is_cancelled(job):
            self._end("cancelled", "cancelled while it ran", [])
            leave(0)
        self._set_status(state="pending", reason=decision.reason)
        if not self._requeued:
            try:
                self._requeue(job, decision)
            except Refused as refused:
                self._submit_again(str(refused), decision)
                return
            self._requeued = True
        self._delay(self._task.job_name, decision)

    def _delay(self, job_name: str, decision: Decision) -> None:
        if not decision.wait_seconds:
            return
        try:
            scheduler.delay(job_name, decision.wait_seconds, decision.reason)
            say(f"runs again in {decision.wait_seconds} s at the earliest")
        except Refused as refused:
            say(f"cannot let {job_name} wait: {refused}")

    def _requeue(self, job: Job | None, decision: Decision) -> None:
        if job is None:
            raise Refused("Slurm does not know the job any more")
        if not job.waits:
            scheduler.requeue(self._task.job_name)
        self._event("requeued", reason=decision.reason)
        say("requeued")
        if decision.avoid_node is not None:
            try:
                scheduler.exclude_node(self._task.job_name, decision.avoid_node)
            except Refused as refused:
                say(f"cannot keep the job from {decision.avoid_node}: {refused}")

    def _submit_again(self, why: str, decision: Decision) -> None:
        """Where the site does not requeue, submit the same run as a new job."""
        say(f"not requeued ({why}): submitting the run again")
        try:
            job_id = submit([self._supervisor], self._submission.of_one_run())[0]
        except Refused as refused:
            self._end("failed", f"not requeued ({why}) and not submitted again: {refused}", [])
            leave(Exit.CRASHED)
        self._code = Exit.STOPPED  # or who waits for this job would take the run for finished
        self._requeued = True
        try:
            self._record.add_job(job_id)
        except OSError as error:
            say(f"cannot write that job {job_id} has this run now: {error}")
        self._event("submitted again", job_id=job_id, reason=why)
        self._delay(job_id, decision)

    def _end(self, state: str, reason: str, lines: list[str]) -> None:
        self._set_status(state=state, reason=reason, last_lines=lines)
        self._event(state, reason=reason)
        for line in lines:
            say(f"  | {line}")

    def _event(self, event: str, **facts: object) -> None:
        if self._attempt.superseded:
            return
        name, restart = self._task.job_name, self._task.start.restart
        try:
            self._record.add_event(event, job_id=name, restart=restart, **facts)
        except OSError as error:
            say(f"cannot write the event {event}: {error}")

    def _set_status(self, **changes: object) -> None:
        if self._attempt.superseded:
            return
        try:
            self._record.set_status(heartbeat=time.time(), **changes)
        except OSError as error:  # the trainer has a word in that, not this record
            say(f"cannot write the status: {error}")


def deadline(job: Job | None, delay: int) -> dict[str, str]:
    """When trainers stop by themselves: so long before the end that Slurm has set for this job."""
    if job is None or job.end is None:
        return {}
    return {"CRITIC_DEADLINE": f"{job.end - delay:.0f}"}


def _pauses() -> list[int]:
    return [*_PAUSES, *[_PAUSES[-1]] * 1000]  # Slurm's time limit ends it


def _ask(job_name: str) -> Job | None:
    """The controller's answer, or None if it is away: then nothing that depends on it is done."""
    try:
        return scheduler.show_job(job_name)
    except ControllerAway as away:
        say(str(away))
        return None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
