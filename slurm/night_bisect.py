"""A night's finding for `git bisect run`: its entry once more, here, with this checkout's code."""

from __future__ import annotations

import statistics
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from job.common.errors import InputError
from job.nightly.figures import memory_parted, result
from job.nightly.matrix import load_matrix
from job.nightly.record import Finding, NightFolder, Plan, Result
from job.nightly.table import FIGURES, Rule
from slurm.night import find_night
from slurm.night_local import run_here
from slurm.night_plan import plan_runs, prepare

_MACHINE = ("device", "instructions", "torch")  # of a result's key; the image is not run here


def side(options: Namespace) -> int:
    """1 if a figure is here as in the night that regressed, 0 if it is as before.

    Raises:
        InputError: that cannot be told; git then leaves the commit out, and blames none of its own.
    """
    night = find_night(options.folder, options.night).night()
    entry, _, figure = options.bisect.partition("/")
    named = (one for one in night.findings if one.name == options.bisect)
    found = next((one for one in named if one.before is not None), None)
    if found is None:
        raise InputError(f"night {night.number} holds nothing against {options.bisect}")
    with tempfile.TemporaryDirectory() as scratch:
        here = _again(options, night.plan, entry, Path(scratch))
    if not here.complete or figure not in here.figures:
        raise InputError(here.reason or f"{entry} has no {figure} here")
    _refuse_another_machine(night.results[entry], here)
    return _nearer(found, night.results[entry], here)


def _refuse_another_machine(there: Result, here: Result) -> None:
    """Bits, memory and speeds of two kinds of machine differ, whichever the commit."""
    night, now = there.key or {}, here.key or {}
    differ = [
        f"{k} {night.get(k)}, here {now.get(k)}" for k in _MACHINE if night.get(k) != now.get(k)
    ]
    if differ:
        advice = "bisect on a machine like the night's, in an environment like its own"
        raise InputError(f"the night had {'; '.join(differ)}: {advice}")


def _again(options: Namespace, plan: Plan, entry: str, scratch: Path) -> Result:
    """What an entry leaves that is run as its night ran it."""
    asked = {"local": True, "image": "none"}  # the checkout's code, not an image's
    asked |= {"site": options.site or plan.site, "cluster": options.cluster or plan.cluster}
    place = NightFolder(scratch / "night-000001")
    place.path.mkdir()
    matrix, _ = load_matrix(plan.matrix_file or plan.matrix)
    wanted = {entry: plan.entries[entry]}
    again = Namespace(**vars(options) | asked)
    runs = plan_runs(again, matrix, wanted, place, asks_slurm=False)
    prepare(runs)
    for run in runs:
        run_here(run)
    return result(replace(plan, runs=[run.planned() for run in runs]), entry)


def _nearer(found: Finding, there: Result, here: Result) -> int:
    """1 if a figure is as in the night that regressed (`there`), 0 if it is as before."""
    value, rule = here.figures[found.figure], FIGURES[found.figure].rule
    if rule is Rule.MEMORY and not here.on_gpu:
        raise InputError(f"{found.name} is a GPU's, and there is none here")
    if rule is Rule.MEMORY and _parted(there):
        return int(_parted(here))
    if rule is Rule.SERIES or (rule is Rule.QUALITY and isinstance(value, list)):
        now, bad = _mean(value), _mean(found.value)
        return int(abs(now - bad) < abs(now - _mean(found.before)))
    if value not in (found.before, found.value):
        raise InputError(
            f"{found.name} is neither as it was nor as in that night: several commits may have "
            "moved it, or this machine computes otherwise"
        )
    return int(value != found.before)


def _parted(one: Result) -> bool:
    """Whether memory was not as predicted, whatever it was held against."""
    return memory_parted(one.figures["memory_predicted"], one.figures["memory_measured"])


def _mean(value: Any) -> float:
    """Of seeds their mean."""
    return float(statistics.mean(value) if isinstance(value, list) else value)
