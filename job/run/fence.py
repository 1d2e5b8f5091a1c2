"""Only the newest attempt of a run may write.

An attempt is a folder `attempts/NNNN` of the run directory. Making it is how an attempt takes its
number: mkdir is atomic, on NFS too, so that of two copies started at once each gets its own. The
one with the higher number goes on, the other sees that and leaves.

On Slurm the supervisor takes the number, and its trainers are given it: so that the two of them
never disagree on who is the newest.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from job import __version__
from job.common.errors import InputError, Superseded
from job.common.files import write_atomic
from job.common.progress import ATTEMPT
from job.common.state_files import read_json
from job.common.version import commit
from job.run.names import (
    ATTEMPT_FACTS,
    MACHINE,
    attempt_name,
    attempt_numbers,
    attempts_seen,
    scratch_files,
    scratch_writer,
)


class Fence:
    """One attempt of a run."""

    def __init__(self, attempts: Path, number: int) -> None:
        self._attempts, self.number = attempts, number

    @classmethod
    def take(cls, run: Path) -> Fence:
        """Start the next attempt of a run; all earlier ones are superseded from here on.

        Raises:
            OSError: the file system does not let it.
        """
        attempts = run / "attempts"
        attempts.mkdir(exist_ok=True)
        while True:
            number = max(attempt_numbers(attempts), default=0) + 1
            try:
                cls(attempts, number).folder.mkdir()
            except FileExistsError:  # another copy was faster
                continue
            _remove_scratch(run, number)
            return cls(attempts, number)

    @classmethod
    def given(cls, run: Path) -> Fence | None:
        """The attempt that a supervisor has taken for this process; None without one.

        Raises:
            Superseded: there is a newer one by now.
        """
        number = os.environ.get(ATTEMPT)
        if number is None:
            return None
        if not number.isdecimal():
            raise InputError(f"{ATTEMPT}={number}: not the number of an attempt")
        fence = cls(run / "attempts", int(number))
        if fence.superseded():
            raise fence.ending()
        return fence

    @property
    def folder(self) -> Path:
        """This attempt's own files: logs of its ranks, stack traces."""
        return self._attempts / attempt_name(self.number)

    def superseded(self) -> bool:
        # a listing, since an NFS client may remember for long that one name was not there
        return max(attempts_seen(self._attempts), default=0) > self.number

    def replace(self, file: Path, text: str) -> None:
        """Replace a file of the run whole; a newer attempt's file is left as it is.

        A process can be asleep at any point of this. If that is before the look at the attempts, it
        sees the newer one; if it is after, the newer one has removed what was to be renamed.
        """
        try:
            write_atomic(file, text, scratch_writer(self.number), lambda: not self.superseded())
        except FileNotFoundError:
            if not self.superseded():
                raise

    def ending(self) -> Superseded:
        return Superseded(f"attempt {self.number}: a newer attempt of this run has taken over")

    def record(self, world_size: int, resumed_step: int) -> None:
        """Note from which step this attempt goes on: later steps of earlier ones do not count."""
        facts = {
            "attempt": self.number,
            "resumed_step": resumed_step,
            "world_size": world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "cwd": str(Path.cwd()),
            "version": __version__,
            "commit": commit(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "time": time.time(),
        }
        write_atomic(self.folder / ATTEMPT_FACTS, json.dumps(facts, indent=2) + "\n")

    def describe(self, machine: Mapping[str, str]) -> None:
        """Note where this attempt runs."""
        write_atomic(self.folder / MACHINE, json.dumps(machine, indent=2) + "\n")

    def includes(self, attempt: int, step: int) -> bool:
        """Whether what `attempt` committed at `step` is part of the run.

        It is not if a later attempt went on from an earlier step: then it came too late.
        """
        return all(
            step <= _resumed_step(self._attempts / attempt_name(later))
            for later in attempts_seen(self._attempts)
            if later > attempt
        )


def _remove_scratch(run: Path, number: int) -> None:
    """Remove what attempts before this one were about to put in place of a file of the run."""
    for scratch in scratch_files(run, number):
        scratch.unlink(missing_ok=True)


def _resumed_step(attempt: Path) -> float:
    """Where an attempt went on; infinity if it ended before that, having committed nothing."""
    facts = read_json(attempt / ATTEMPT_FACTS, dict)
    step = None if facts is None else facts.get("resumed_step")
    return step if isinstance(step, int) else math.inf
