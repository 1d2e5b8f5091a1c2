"""Where a run stands: its own records and what Slurm says, combined. Needs no accounting."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from job.common.errors import InputError
from job.run.reader import last_lines
from slurm import scheduler
from slurm.record import Record, newest_attempt
from slurm.scheduler import ControllerAway, Job

SILENT_SECONDS = 60.0  # without a heartbeat
FINAL = ("finished", "failed", "stopped", "cancelled")


@dataclass(frozen=True)
class Standing:
    """Where a run stands."""

    run: str
    state: str  # pending, running, finished, failed, stopped, cancelled or lost
    reason: str | None
    job_id: str | None
    attempts: int
    nodes: str | None = None
    expected_start: float | None = None  # seconds since 1970
    step: int = 0
    max_steps: int | None = None
    checkpoint: int = 0
    loss: float | None = None
    r2: float | None = None
    memory_gb: float | None = None  # of rank 0's device
    alarm: str | None = None
    last_lines: list[str] = field(default_factory=list)

    @property
    def is_final(self) -> bool:
        return self.state in (*FINAL, "lost")

    @property
    def is_bad(self) -> bool:
        return self.state in ("failed", "cancelled", "lost")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def standing(run: Path | str) -> Standing:
    """Where a run stands now.

    Raises:
        InputError: it was not submitted.
    """
    record = Record.of(run)
    status, trainer = record.status(), record.trainer_status()
    job_id = record.job_id()
    away: str | None = None
    job = None
    try:
        job = scheduler.show_job(job_id) if job_id else None
    except ControllerAway as error:
        away = str(error)
    reason: str | None
    state, reason = str(status.get("state", "pending")), "Slurm has not given it an id yet"
    if job_id is not None:
        state, reason = combine(status, job, away, time.time())
    if state == "lost" and record.cancelled.exists():
        state, reason = "cancelled", "cancelled by submit.py"
    stored = record.stored
    metrics, telemetry = map(stored.newest_values, ("metrics.jsonl", "telemetry.jsonl"))
    memory = telemetry.get("memory_bytes")
    return Standing(
        run=str(record.run),
        state=state,
        reason=reason,
        job_id=job_id,
        attempts=len(list((record.folder / "attempts").glob("*-*"))),
        nodes=job.nodes if job and not job.waits else None,
        expected_start=job.start if job and job.waits else None,
        step=int(metrics.get("step", trainer.get("step", 0))),
        max_steps=trainer.get("max_steps"),
        checkpoint=stored.newest_checkpoint(),
        loss=metrics.get("train/loss"),
        r2=metrics.get("value/r2"),
        memory_gb=None if memory is None else memory / 1e9,
        alarm=trainer.get("alarm"),
        last_lines=status.get("last_lines") or log_tail(record),
    )


def combine(
    status: Mapping[str, Any], job: Job | None, away: str | None, now: float
) -> tuple[str, str | None]:
    """State and reason from the run's own status and from what Slurm knows of its job.

    The run's own word is final where it is one, since Slurm forgets; else Slurm is right, since
    who died or was cancelled before it ran has written nothing.
    """
    own, reason = str(status.get("state", "pending")), status.get("reason")
    if own in FINAL and not (job is not None and job.waits):
        return own, reason
    if away is not None:
        return own, f"{reason + '; ' if reason else ''}Slurm does not answer: {away}"
    if job is None:
        return "lost", (
            "Slurm does not know its job any more, and it has left no word: cancelled before it "
            "ran, or its node died. Go on with submit.py --resume"
        )
    if job.waits:
        said = job.comment if job.reason == "BeginTime" and job.comment else reason
        return "pending", f"{_why_waiting(job)}{'; ' + said if said else ''}"
    if job.active:
        return "running", _silence(status, job, now)
    if job.completing:
        return "running", "ending"
    if job.state == "CANCELLED":
        unmet = job.reason == "DependencyNeverSatisfied"
        why = "the job before it, --after, has not ended well" if unmet else "cancelled by scancel"
        return "cancelled", why
    return "failed", f"its job has ended as {job.state} without a word: see the logs"


def _why_waiting(job: Job) -> str:
    return f"waits in the queue ({job.reason})"


def _silence(status: Mapping[str, Any], job: Job, now: float) -> str | None:
    """A warning where the job should have been heard of."""
    if job.state != "RUNNING":
        return job.state.lower()
    heard = float(status.get("heartbeat") or job.start or now)
    if now - max(heard, job.start or 0) > SILENT_SECONDS:
        return f"not heard of for {now - heard:.0f} s: its node may be dead"
    return status.get("reason")


def runs_of(folder: Path) -> list[Path]:
    """A run, or all runs of a sweep.

    Raises:
        InputError: the folder is neither.
    """
    if Record(folder).submission.exists():
        return [folder]
    runs = sorted(path.parents[1] for path in folder.glob("*/slurm/submission.json"))
    if not runs:
        raise InputError(f"{folder}: neither a run nor a sweep that submit.py has submitted")
    return runs


def log_file(record: Record, rank: int = 0) -> Path | None:
    """What a rank's trainer has written to its terminal in the newest attempt."""
    folder = newest_attempt(record)
    return None if folder is None else folder / f"rank-{rank:05}.log"


def log_tail(record: Record) -> list[str]:
    file = log_file(record)
    return last_lines(file)[-5:] if file is not None else []
