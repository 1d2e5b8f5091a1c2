"""What the Slurm side keeps of a run, in the folder `slurm` of its run directory.

config.yaml      the configuration that the trainer is given
jobs             the ids of its jobs, one a line, the newest last
submission.json  what was asked of Slurm, for another submission of the same run
status.json      the job's own state, with a heartbeat
events.jsonl     what happened, one object a line: submitted, started, signal, ended, requeued
cancelled        made by `submit.py cancel`: the run is not to come back
attempts/        JOB-RESTART/: where ranks meet, how each ended, what each wrote to its terminal
*_log.out        the supervisors' logs, beside the script and pickle of submitit
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.common.errors import InputError
from job.common.files import write_atomic
from job.run.reader import StoredRun

_ATTEMPT = re.compile(r"(\d+)-(\d+)$")


@dataclass(frozen=True)
class Outcome:
    """How one rank's trainer ended."""

    rank: int
    node: str
    code: int  # as subprocess gives it: -n for signal n
    time: float  # seconds since 1970
    reason: str  # for people
    last_lines: list[str]


class Record:
    """The Slurm side's files of one run."""

    def __init__(self, run: Path | str) -> None:
        self.run = Path(run)
        self.stored = StoredRun(run)  # what the trainer writes
        self.folder = self.run / "slurm"
        self.config = self.folder / "config.yaml"
        self.submission = self.folder / "submission.json"
        self.cancelled = self.folder / "cancelled"

    @classmethod
    def of(cls, run: Path | str) -> Record:
        """The record of a run that was submitted.

        Raises:
            InputError: there is none.
        """
        record = cls(run)
        if not record.submission.exists():
            raise InputError(f"{run}: no run that submit.py has submitted: no {record.submission}")
        return record

    @property
    def prepared(self) -> tuple[Path, ...]:
        """What a submission writes, and takes back if it fails."""
        names = ("status.json", "events.jsonl")
        return self.config, self.submission, self.cancelled, *(self.folder / n for n in names)

    def status(self) -> dict[str, Any]:
        """The job's own state; empty if there is none."""
        return _read(self.folder / "status.json")

    def set_status(self, **changes: Any) -> None:
        """Change some entries of the job's own state.

        Raises:
            OSError: the rest cannot be read, and would be lost.
        """
        file = self.folder / "status.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.start_status(**before | changes)

    def start_status(self, **entries: Any) -> None:
        """The job's own state from now on."""
        write_atomic(self.folder / "status.json", json.dumps(entries, indent=2) + "\n")

    def job_id(self) -> str | None:
        """The run's newest job; None before Slurm has given it an id."""
        file = self.folder / "jobs"
        ids = file.read_text(encoding="utf-8").split() if file.exists() else []
        return ids[-1] if ids else None

    def add_job(self, job_id: str) -> None:
        with (self.folder / "jobs").open("a", encoding="utf-8") as stream:
            stream.write(f"{job_id}\n")

    def add_event(self, event: str, **facts: Any) -> None:
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": time.time(), "event": event} | facts) + "\n")

    def events(self) -> list[dict[str, Any]]:
        file = self.folder / "events.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def trainer_status(self) -> dict[str, Any]:
        """What the trainer says of the run; empty before it has begun."""
        try:
            return self.stored.status()
        except InputError:  # damaged, or on a file system that is away for a moment
            return {}


class Attempt:
    """One start of the job; `number` orders them: job ids grow, and so do restarts of one."""

    def __init__(self, record: Record, job: int, restart: int) -> None:
        self.record, self.number = record, (job, restart)
        self._attempts = record.folder / "attempts"
        self.folder = self._attempts / f"{job}-{restart}"

    @property
    def superseded(self) -> bool:
        """Whether a later attempt has begun: a node that was taken for dead may be alive."""
        matches = (_ATTEMPT.match(p.name) for p in _found(self._attempts, "*"))
        return any((int(m[1]), int(m[2])) > self.number for m in matches if m)

    def begin(self) -> None:
        # not the run's, which may have been renamed
        for folder in (self.record.folder, self._attempts, self.folder):
            folder.mkdir(exist_ok=True)
        for file in self.folder.glob("*.json"):  # of a step that was ended and is begun again
            file.unlink()

    def log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05}.log"

    def set_meeting(self, **facts: Any) -> None:
        write_atomic(self.folder / "meeting.json", json.dumps(facts) + "\n")

    def meeting(self) -> dict[str, Any]:
        """What task 0 has told the others; empty until then."""
        # a listing, since an NFS client may remember for long that a name was not there
        there = any(path.name == "meeting.json" for path in _found(self.folder, "*"))
        return _read(self.folder / "meeting.json") if there else {}

    def set_outcome(self, outcome: Outcome) -> None:
        file = self.folder / f"outcome-{outcome.rank:05}.json"
        write_atomic(file, json.dumps(asdict(outcome)) + "\n")

    def outcomes(self) -> list[Outcome]:
        files = sorted(_found(self.folder, "outcome-*.json"))
        return [Outcome(**content) for file in files if (content := _read(file))]


def newest_attempt(record: Record) -> Path | None:
    """The folder of the newest attempt."""
    folders = (record.folder / "attempts").glob("*")
    numbered = [(int(m[1]), int(m[2]), f) for f in folders if (m := _ATTEMPT.match(f.name))]
    return max(numbered)[2] if numbered else None


def _found(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.glob(pattern))
    except OSError:  # a file system that is away for a moment tells nothing
        return []


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or on a file system that is away for a moment
        return {}
    return content if isinstance(content, dict) else {}
