"""What the Slurm side keeps of a run, in the folder `slurm` of its run directory.

config.yaml      the configuration that the trainer is given
jobs             the ids of its jobs, one a line; the last one has the run
lock             held while the run is submitted
submission.json  what was asked of Slurm, for another submission of the same run
status.json      the job's own state, with a heartbeat
events.jsonl     what happened, one object a line: submitted, started, signal, ended, requeued
cancelled        made by `submit.py cancel`: the run is not to come back
attempts/        NNNN/: where ranks meet, how each ended, what each wrote to its terminal
*_log.out        the supervisors' logs, beside the script and pickle of submitit
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from job.common.errors import InputError
from job.common.files import lock_file, sync, write_atomic
from job.common.state_files import read_json, read_yaml
from job.run.fence import Fence
from job.run.names import attempt_name, attempt_numbers, attempts_seen
from job.run.reader import StoredRun, complete_records

_JOB = re.compile("[0-9]+(_[0-9]+)?")
_BEFORE = re.compile("([0-9]+)-([0-9]+)")  # attempts of 0.1.0: job and restart
_OUTCOME = re.compile("outcome-[0-9]{5}[.]json")
_MEETING = "meeting.json"
_LOOKED_AT = 10  # newest attempts: later jobs may have begun some since a task's own


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
        return read_json(self.folder / "status.json", dict) or {}

    def set_status(self, **changes: Any) -> None:
        """Change some entries of the job's own state.

        Raises:
            OSError: the file system is away, and the rest would be lost.
        """
        file = self.folder / "status.json"
        if file.exists():
            file.read_bytes()  # whose error is not taken for an empty file
        self.start_status(**self.status() | changes)

    def start_status(self, **entries: Any) -> None:
        """The job's own state from now on."""
        write_atomic(self.folder / "status.json", json.dumps(entries, indent=2) + "\n")

    def readable_config(self) -> Path:
        """The configuration that the trainer is given, or another copy where that is damaged."""
        files = (self.config, *self.stored.config_files())
        return next((file for file in files if read_yaml(file)), self.config)

    def job_id(self) -> str | None:
        """The run's newest job; None before Slurm has given it an id."""
        file = self.folder / "jobs"
        lines = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        ids = [word for word in lines.split() if _JOB.fullmatch(word)]
        return ids[-1] if ids else None

    def add_job(self, job_id: str) -> None:
        """Note that this job has the run now."""
        if self.job_id() != job_id:
            _append(self.folder / "jobs", job_id)

    @contextmanager
    def being_submitted(self) -> Iterator[None]:
        """Keep other submissions of the run away for the length of the body.

        Raises:
            InputError: one is under way.
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as file:
            try:
                lock_file(file, wait=False)
            except BlockingIOError:
                problem = "another submission of this run is under way; see `submit.py status`"
                raise InputError(f"{self.run}: {problem}") from None
            yield

    def add_event(self, event: str, **facts: Any) -> None:
        line = json.dumps({"time": time.time(), "event": event} | facts)
        _append(self.folder / "events.jsonl", line)

    def events(self) -> list[dict[str, Any]]:
        return complete_records(self.folder / "events.jsonl")

    def trainer_status(self) -> dict[str, Any]:
        """What the trainer says of the run; empty before it has begun."""
        return self.stored.status()


class Start(NamedTuple):
    """A start of a job's tasks: the job, how often it was requeued, and the step of srun."""

    job: int
    restart: int
    step: int


class Attempt:
    """One start of the run; attempts are in the order of their numbers, which Slurm's ids are not.

    The number is the one that its trainers have in the run directory.
    """

    def __init__(self, record: Record, number: int) -> None:
        self.record = record
        self._set(number)

    def _set(self, number: int) -> None:
        self.number = number
        self.fence = Fence(self.record.run / "attempts", number)
        self.folder = self.record.folder / "attempts" / attempt_name(number)

    @classmethod
    def next(cls, record: Record) -> Attempt:
        """The attempt that is about to begin; its number is sure once it has."""
        return cls(record, max(attempts_seen(record.run / "attempts"), default=0) + 1)

    def begin(self) -> None:
        """Take the run over: all earlier attempts are superseded from here on.

        Raises:
            OSError: the file system does not let it, or the run's folder was renamed.
        """
        self._set(Fence.take(self.record.run).number)
        for folder in (self.record.folder, self.folder.parent, self.folder):
            folder.mkdir(exist_ok=True)

    @classmethod
    def of(cls, record: Record, start: Start) -> Attempt | None:
        """The attempt that task 0 of this start has begun; None until it has said so."""
        numbers = attempts_seen(record.folder / "attempts")
        newest_first = (cls(record, number) for number in reversed(numbers[-_LOOKED_AT:]))
        said = (one for one in newest_first if one.meeting().get("start") == list(start))
        return next(said, None)

    @property
    def superseded(self) -> bool:
        """Whether a later attempt has begun: a node that was taken for dead may be alive."""
        return self.fence.superseded()

    def log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05}.log"

    def set_meeting(self, start: Start, **facts: Any) -> None:
        write_atomic(self.folder / _MEETING, json.dumps({"start": start} | facts) + "\n")

    def meeting(self) -> dict[str, Any]:
        """What task 0 has told the others; empty until then."""
        # a listing, since an NFS client may remember for long that a name was not there
        there = any(path.name == _MEETING for path in _found(self.folder))
        return (read_json(self.folder / _MEETING, dict) or {}) if there else {}

    def set_outcome(self, outcome: Outcome) -> None:
        file = self.folder / f"outcome-{outcome.rank:05}.json"
        write_atomic(file, json.dumps(asdict(outcome)) + "\n")

    def outcomes(self) -> list[Outcome]:
        files = sorted(f for f in _found(self.folder) if _OUTCOME.fullmatch(f.name))
        return [outcome for file in files if (outcome := _outcome(file))]


def attempt_folders(record: Record) -> list[Path]:
    """The folders of all attempts, in their order."""
    folder = record.folder / "attempts"
    matches = ((_BEFORE.fullmatch(path.name), path) for path in folder.glob("*"))
    before = sorted((int(m[1]), int(m[2]), path) for m, path in matches if m)
    numbered = (folder / attempt_name(number) for number in attempt_numbers(folder))
    return [*(path for _, _, path in before), *numbered]


def _append(file: Path, line: str) -> None:
    """Add a line, one of its own even after one that was torn."""
    with file.open("ab+") as stream:
        stream.seek(-min(1, stream.seek(0, os.SEEK_END)), os.SEEK_END)
        begin = "\n" if stream.read(1) not in (b"\n", b"") else ""
        stream.write(f"{begin}{line}\n".encode())
    sync(file)


def _found(folder: Path) -> list[Path]:
    try:
        return list(folder.glob("*"))
    except OSError:  # a file system that is away for a moment tells nothing
        return []


def _outcome(file: Path) -> Outcome | None:
    try:
        return Outcome(**read_json(file, dict) or {})
    except TypeError:  # nothing, or not these names
        return None
