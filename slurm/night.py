"""The nights of a folder: one at a time, each with a number and a folder of its own."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from job.common.errors import Ending, Exit, InputError
from job.nightly.record import NightFolder, nights
from slurm import scheduler


class Occupied(Ending):
    """Another night goes on; this one is left out, and nothing is wrong."""

    code = Exit.FINISHED


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder of nights for the length of the body; the system releases it in any case.

    Raises:
        Occupied: a night is being submitted, or goes on.
        ControllerAway: whether one goes on cannot be known.
        InputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / "lock").open("a")
    except OSError as error:
        raise InputError(f"--folder {folder}: cannot write: {error.strerror}") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Occupied(f"{folder}: another night is at work here; left out") from None
        _refuse_if_one_goes_on(folder)
        yield


def _refuse_if_one_goes_on(folder: Path) -> None:
    """The last night goes on while its collector, which waits for all its jobs, is in the queue."""
    last = next(reversed(nights(folder)), None)
    if last is None or last.record_file.exists() or not last.plan_file.exists():
        return
    collector = last.plan().collector
    job = scheduler.show_job(collector) if collector is not None else None
    if job is not None and (job.active or job.completing):
        state = job.state.lower()
        raise Occupied(f"{last.path}: still goes on (job {collector}, {state}); left out")


def new_night(folder: Path) -> NightFolder:
    """The next night's folder, which is made."""
    number = max((one.number for one in nights(folder)), default=0) + 1
    night = NightFolder(folder / f"night-{number:06}")
    night.path.mkdir()
    return night


def find_night(folder: Path, asked: str | None) -> NightFolder:
    """A judged night by its folder or number, or the last one.

    Raises:
        InputError: there is none.
    """
    if asked is not None:
        named = folder / f"night-{int(asked):06}" if asked.isdigit() else Path(asked).absolute()
        return NightFolder(named)
    done = [one for one in nights(folder) if one.record_file.exists()]
    if not done:
        raise InputError(f"{folder}: no night has been judged here")
    return done[-1]
