"""What a night will run: each entry of its matrix as a plan of slurm/plan.py."""

from __future__ import annotations

import contextlib
import os
import re
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from job.common.errors import Ending, Exit, InputError, listing
from job.nightly.matrix import Entry, Matrix
from job.nightly.record import NightFolder, PlannedRun
from slurm import scheduler
from slurm.checks import Check, check
from slurm.plan import Plan, make_plan, write_config
from slurm.record import Record
from slurm.scheduler import ControllerAway, Refused
from slurm.site import find_site
from slurm.submission import PROJECT, require_clients, store

# The job is an ordinary one; MLflow has it from the collector, where no node writes a database.
_ALWAYS = ("logging.product_rate=true", "mlflow.enabled=false", "report.enabled=false")
_EXPERIMENT = "mlflow.experiment=critic-nightly"
FULL = re.compile(
    "Resource temporarily unavailable|temporarily unable to accept|MaxSubmit|MaxJobCount|"
    "job submit limit|submit limit|too many jobs",
    re.IGNORECASE,
)


class QueueFull(Ending):
    """Slurm takes no more jobs now."""

    code = Exit.STOPPED  # 75, which sysexits calls a temporary failure


@dataclass(frozen=True)
class NightRun:
    """One run of an entry; `refused` says why it cannot be submitted."""

    name: str
    entry: Entry
    seed: int
    path: Path
    plan: Plan | None
    refused: str | None = None

    @property
    def size(self) -> tuple[int, int, str]:
        """What jobs of one array share."""
        assert self.plan is not None
        return self.entry.nodes, self.entry.gpus, self.plan.submission.profile["time"]

    def planned(self, job_id: str | None = None) -> PlannedRun:
        config = str(Record(self.path).config)
        return PlannedRun(self.name, str(self.path), self.seed, config, self.refused, job_id)


def plan_runs(
    options: Namespace,
    matrix: Matrix,
    entries: dict[str, Entry],
    night: NightFolder,
    *,
    asks_slurm: bool,
) -> list[NightRun]:
    """Every run of the matrix, checked as submit.py checks a run; nothing is written.

    Raises:
        ControllerAway: Slurm was to be asked, and does not answer.
        InputError: none of them can be submitted.
        QueueFull: Slurm takes no more jobs.
    """
    if asks_slurm:
        _ask_once()
    runs = [
        _planned(options, matrix, name, entry, seed, night, asks_slurm)
        for name, entry in entries.items()
        for seed in entry.seeds
    ]
    if all(run.refused is not None for run in runs):
        raise InputError("nothing can be submitted" + listing(reasons(runs)))
    return runs


def _ask_once() -> None:
    """See that a controller answers: each question to an absent one takes many seconds."""
    require_clients()
    with contextlib.suppress(Refused):
        scheduler.show_partition(None)


def reasons(runs: Sequence[NightRun]) -> list[str]:
    """Why some runs were refused, each reason once, after their names."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run.refused is not None:
            names.setdefault(run.refused, []).append(run.path.name)
    return [f"{', '.join(of_reason)}: {reason}" for reason, of_reason in names.items()]


def prepare(runs: Sequence[NightRun]) -> None:
    """Write what the jobs of runs find: configurations and records."""
    for run in runs:
        if run.plan is not None and run.refused is None:
            write_config(run.plan.runs[0])
            record = Record(run.path)
            store(run.plan.submission, record)
            record.start_status(state="pending", submitted=time.time())


def _planned(
    options: Namespace,
    matrix: Matrix,
    name: str,
    entry: Entry,
    seed: int,
    night: NightFolder,
    asks_slurm: bool,
) -> NightRun:
    path = night.run(name, seed, len(entry.seeds))
    asked = Namespace(
        resume=None,
        gpus=entry.gpus,
        nodes=entry.nodes,
        unfreeze=None,
        config=str(PROJECT / (entry.config or matrix.config)),
        override=list(_overrides(options, matrix, entry, seed, path)),
        site=options.site,
        cluster=options.cluster,
        name=None,
        time=entry.time or matrix.time,
        image=options.image,
        after=None,
        verify=False,
    )
    try:
        plan = make_plan(asked)
        problems = [] if options.local else _problems(plan, asks_slurm)
    except InputError as error:
        return NightRun(name, entry, seed, path, None, str(error))
    if full := [one.text for one in problems if one.name == "Slurm" and FULL.search(one.text)]:
        raise QueueFull(f"the queue is full, and nothing was submitted: {full[0]}")
    refused = "; ".join(f"{one.name}: {one.text}" for one in problems) or None
    return NightRun(name, entry, seed, path, plan, refused)


def _problems(plan: Plan, asks_slurm: bool) -> list[Check]:
    """What keeps a run from being submitted.

    Raises:
        ControllerAway: it has gone meanwhile.
    """
    found = list(check(plan, asks_slurm=asks_slurm))
    if away := [one.text for one in found if (one.name, one.state) == ("Slurm", "not checked")]:
        raise ControllerAway(away[0])
    return [one for one in found if one.state == "error"]


def _overrides(
    options: Namespace, matrix: Matrix, entry: Entry, seed: int, path: Path
) -> Iterator[str]:
    yield from _ALWAYS
    yield _EXPERIMENT
    if not (_named_by_site(options.site) or os.environ.get("MLFLOW_TRACKING_URI")):
        yield f"mlflow.tracking_uri=sqlite:///{path.parents[2]}/mlflow.db"
    yield f"data.cache_dir={path.parents[2]}/cache"
    for override in (*matrix.override, *entry.override):
        yield override.replace("{night}", str(path.parents[1]))
    yield f"training.num_unfrozen_layers={entry.unfreeze[0]}"
    yield f"training.seed={seed}"
    yield f"run.name={path.name}"
    yield f"run.dir={path}"


def _named_by_site(site: str | None) -> bool:
    return find_site(site).values.mlflow.tracking_uri is not None


def by_size(runs: Sequence[NightRun]) -> list[list[NightRun]]:
    """The runs that can be submitted, those of one size together."""
    groups: dict[tuple[int, int, str], list[NightRun]] = {}
    for run in runs:
        if run.refused is None:
            groups.setdefault(run.size, []).append(run)
    return list(groups.values())


def gpu_hours(runs: Sequence[NightRun]) -> float:
    """At most: all of them until their time limits."""
    return sum(run.plan.gpu_hours for run in runs if run.plan is not None and run.refused is None)


def binds(runs: Sequence[NightRun]) -> list[str]:
    """What a container of any of the runs must see."""
    plans = [run.plan for run in runs if run.plan is not None]
    return sorted({bind for plan in plans for bind in plan.submission.binds})
