"""Where a run stands: its own records and what Slurm says, combined. Needs no accounting."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from job.common.errors import InputError
from job.run.reader import last_lines
from slurm import scheduler
from slurm.record import Record, attempt_folders
from slurm.scheduler import ControllerAway, Job

SILENT_SECONDS = 60.0  # without a heartbeat
_OF_A_SWEEP = re.compile("n[0-9]+")  # a copy beside it is no run of its own
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
    return standings([run])[0]


def standings(runs: Sequence[Path | str]) -> list[Standing]:
    """Where several runs stand now; Slurm is asked once for those of a sweep.

    Raises:
        InputError: one was not submitted.
    """
    records = [Record.of(run) for run in runs]
    ids = [record.job_id() for record in records]
    away: str | None = None
    jobs: dict[str, Job] = {}
    try:
        jobs = scheduler.show_jobs([job_id for job_id in ids if job_id])
    except ControllerAway as error:
        away = str(error)
    asked = zip(records, ids, strict=True)
    return [_standing(record, job_id, jobs.get(job_id or ""), away) for record, job_id in asked]


def _standing(record: Record, job_id: str | None, job: Job | None, away: str | None) -> Standing:
    status, trainer = record.status(), record.trainer_status()
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
        attempts=len(attempt_folders(record)),
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
    children = (path for path in folder.glob("n*") if _OF_A_SWEEP.fullmatch(path.name))
    runs = sorted(path for path in children if Record(path).submission.exists())
    if not runs:
        raise InputError(f"{folder}: neither a run nor a sweep that submit.py has submitted")
    return runs


def log_file(record: Record, rank: int = 0) -> Path | None:
    """What a rank's trainer has written to its terminal in the newest attempt."""
    folders = attempt_folders(record)
    return folders[-1] / f"rank-{rank:05}.log" if folders else None


def log_tail(record: Record) -> list[str]:
    file = log_file(record)
    return last_lines(file)[-5:] if file is not None else []
