"""The nights of a folder: one at a time, each with a number and a folder of its own."""

from __future__ import annotations

import fcntl
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from job.common.errors import Ending, Exit, InputError
from job.nightly.record import NightFolder, Plan, nights
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
    last = next(reversed(nights(folder)), None)
    if last is None or last.record_file.exists() or not last.plan_file.exists():
        return
    for job in scheduler.show_jobs(_waited_for(last)).values():
        if job.active or job.completing:
            state = job.state.lower()
            raise Occupied(f"{last.path}: still goes on (job {job.id}, {state}); left out")


def _waited_for(night: NightFolder) -> list[str]:
    try:
        return _jobs(night.plan())
    except InputError as error:
        print(f"not waited for: {error}", file=sys.stderr)
        return []


def _jobs(plan: Plan) -> list[str]:
    """The jobs with which a night ends: its collector, which waits for all others, if it has one.

    It has none if what submitted it was killed meanwhile.
    """
    of_runs = [run.job_id for run in plan.runs if run.job_id is not None]
    return of_runs if plan.collector is None else [plan.collector]


@contextmanager
def new_night(folder: Path) -> Iterator[NightFolder]:
    """The next night's folder, which is made, and removed again if the body fails."""
    number = max((one.number for one in nights(folder)), default=0) + 1
    night = NightFolder(folder / f"night-{number:06}")
    night.path.mkdir()
    try:
        yield night
    except BaseException:
        shutil.rmtree(night.path, ignore_errors=True)
        raise


def is_number(asked: str) -> bool:
    """Whether a night is asked for by its number, not by its folder."""
    return asked.isascii() and asked.isdecimal()


def find_night(folder: Path, asked: str | None, *, judged: bool = True) -> NightFolder:
    """A night by its folder or number; or the last one that was judged, or at least submitted.

    Raises:
        InputError: there is none.
    """
    if asked is not None:
        number = f"night-{asked.lstrip('0'):0>6}"
        found = NightFolder(folder / number if is_number(asked) else Path(asked).absolute())
        if not found.path.is_dir():
            raise InputError(f"--night {asked}: {found.path} is not there; {_those_of(folder)}")
        return found
    for one in reversed(nights(folder)):
        if one.record_file.exists() or (one.plan_file.exists() and not judged):
            return one
    raise InputError(f"{folder}: no night has been {'judged' if judged else 'submitted'} here")


def _those_of(folder: Path) -> str:
    numbers = [str(one.number) for one in nights(folder)]
    if not numbers:
        return f"{folder} has no night"
    return f"the nights of {folder} are {', '.join(numbers[-10:])}"


def without_record(night: NightFolder) -> str:
    """What is known, without Slurm, of a night that has no record, and what to do."""
    try:
        plan = night.plan()
    except InputError as error:
        return f"{night.path.name} was not judged, and cannot be: {error}"
    why = "it was ended on its way"
    if plan.collector is not None:
        why = f"job {plan.collector} has left no record (its log: {night.path}/slurm/collector)"
    if time.time() < (plan.deadline or 0) and _jobs(plan):
        until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(plan.deadline))
        if plan.collector is not None:
            return f"{night.path.name} is not judged yet: job {plan.collector} does so by {until}"
        why = f"its jobs may go on until {until}, and none of them does so"
    elif _is_held(night.path.parent):
        return f"{night.path.name} is not judged yet: it goes on"
    command = shlex.join([plan.python, "-m", "job.nightly", str(night.path)])
    return f"{night.path.name} was not judged: {why}; judge it: {command}"


def _is_held(folder: Path) -> bool:
    """Whether a night is being submitted, or run without Slurm."""
    try:
        with (folder / "lock").open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
