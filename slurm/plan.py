"""What a command line asks for, worked out: configurations, run directories, resources."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from job.config import CriticConfig, load_config, to_dict
from job.outcome import InputError
from slurm.cluster import load_profile, time_limit_seconds
from slurm.record import Record
from slurm.submission import PROJECT, Submission, load

CONFIGS = PROJECT / "configs" / "critic"


@dataclass(frozen=True)
class Run:
    """One run to be submitted."""

    folder: Path
    config: CriticConfig


@dataclass(frozen=True)
class Plan:
    """One run, or the runs of a sweep, which become a job array."""

    submission: Submission
    runs: list[Run]
    resumes: bool

    @property
    def folder(self) -> Path:
        """The run directory, or the sweep's."""
        return self.runs[0].folder if len(self.runs) == 1 else self.runs[0].folder.parent

    @property
    def world_size(self) -> int:
        return self.submission.gpus * self.submission.nodes

    @property
    def gpu_hours(self) -> float:
        return len(self.runs) * self.world_size * self.submission.time_seconds / 3600


def make_plan(options: argparse.Namespace) -> Plan:
    """What the options ask for; nothing is written.

    Raises:
        InputError: an option, a configuration or a profile is wrong.
    """
    if options.resume is not None:
        return _plan_to_resume(options)
    gpus, nodes = options.gpus or 1, options.nodes or 1
    standard = CONFIGS / f"critic_{'1' if gpus * nodes == 1 else '4'}gpu.yaml"
    file = Path(options.config or standard)
    runs = _planned_runs(file, options)
    folder = runs[0].folder if len(runs) == 1 else runs[0].folder.parent
    profile = load_profile(options.cluster or "a100-80gb")
    asked = {"time": options.time} if options.time else {}
    submission = Submission(
        cluster=options.cluster or "a100-80gb",
        profile=asdict(profile) | asked,
        gpus=gpus,
        nodes=nodes,
        name=folder.name,
        folder=str(folder / "slurm"),
        cwd=str(Path.cwd()),
        image=_image(options.image, profile.image),
        binds=_binds(runs, profile.binds),
        after=_after(options.after),
    )
    return Plan(_checked(submission), runs, resumes=False)


def _planned_runs(file: Path, options: argparse.Namespace) -> list[Run]:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    unfreeze: list[int | None] = options.unfreeze or [None]
    if len(set(unfreeze)) < len(unfreeze):
        raise InputError(f"--unfreeze {' '.join(map(str, unfreeze))}: one run for each value")
    if len(unfreeze) == 1:
        return [_planned_run(file, options, unfreeze[0], stamp)]
    return [_planned_run(file, options, n, stamp, sweep=options.name or "sweep") for n in unfreeze]


def _planned_run(
    file: Path, options: argparse.Namespace, n: int | None, stamp: str, sweep: str | None = None
) -> Run:
    """A run with a name of its own, unless its directory is named by hand."""
    asked = [*options.override, *([] if n is None else [f"training.num_unfrozen_layers={n}"])]
    config = load_config(CriticConfig, file, asked)
    by_hand = any(override.startswith("run.dir=") for override in options.override)
    if by_hand and sweep is not None:
        raise InputError("--override run.dir=...: a sweep's runs need one each; use --name")
    if by_hand:
        return Run(Path(config.run.dir).absolute(), config)
    parent, name = Path(config.run.dir).absolute().parent, options.name or config.run.name
    folder = _unused(parent / f"{sweep or name}-{stamp}")
    run = folder / f"n{n}" if sweep else folder
    unique = f"{folder.name}-n{n}" if sweep else folder.name
    names = [f"run.name={unique}", f"run.dir={run}"]
    return Run(run, load_config(CriticConfig, file, [*asked, *names]))


def _unused(folder: Path) -> Path:
    tries = (folder, *(folder.with_name(f"{folder.name}-{k}") for k in range(2, 1000)))
    return next(one for one in tries if not one.exists())


def _plan_to_resume(options: argparse.Namespace) -> Plan:
    """The same run again, with the same resources unless others are asked for."""
    record = Record.of(Path(options.resume).absolute())
    refused = [f"--{name}" for name in ("config", "name", "unfreeze") if getattr(options, name)]
    if refused:
        raise InputError(f"--resume goes on with the run's own configuration, not {refused[0]}")
    before = load(record)
    run = Run(record.run, load_config(CriticConfig, record.config, options.override))
    asked = {"time": options.time} if options.time else {}
    cluster = options.cluster or before.cluster
    profile = asdict(load_profile(cluster)) if options.cluster else before.profile
    submission = Submission(
        cluster=cluster,
        profile=profile | asked,
        gpus=options.gpus or before.gpus,
        nodes=options.nodes or before.nodes,
        name=record.run.name,
        folder=str(record.folder),
        cwd=before.cwd,
        image=_image(options.image, before.image),
        binds=_binds([run], profile["binds"]),
        after=_after(options.after),
    )
    return Plan(_checked(submission), [run], resumes=True)


def _checked(submission: Submission) -> Submission:
    if submission.gpus < 1 or submission.nodes < 1:
        raise InputError("--gpus and --nodes: at least one")
    seconds, delay = submission.time_seconds, submission.signal_delay_seconds
    if seconds != seconds or time_limit_seconds(submission.profile["time"]) == float("inf"):
        raise InputError(f"--time {submission.profile['time']}: no time as sbatch reads it")
    if seconds <= delay:
        raise InputError(
            f"--time {submission.profile['time']}: Slurm's warning comes {delay} s before the end "
            "(signal_delay_seconds of the profile), so that no time is left to train"
        )
    return submission


def _image(asked: str | None, of_profile: str | None) -> str | None:
    image = asked or of_profile
    return None if image in (None, "none") else str(Path(image).absolute())


def _after(asked: str | None) -> str | None:
    """A job id, given as such or as the run that has it."""
    if asked is None or asked.replace("_", "").isdigit():
        return asked
    job_id = Record.of(Path(asked).absolute()).job_id()
    if job_id is None:
        raise InputError(f"--after {asked}: no job is known for this run")
    return job_id


def _binds(runs: list[Run], of_profile: list[str]) -> list[str]:
    """Folders that a container must see: the profile's, and those of the configuration's files."""
    needed = {Path.cwd(), *(run.folder.parent for run in runs)}
    for run in runs:
        needed |= {path if path.is_dir() else path.parent for _, path in inputs(run.config)}
    needed |= {Path(run.config.data.cache_dir).absolute().parent for run in runs}
    given = {Path(path) for path in of_profile}
    roots = [path for path in sorted(needed) if not any(path.is_relative_to(g) for g in given)]
    outer = [p for p in roots if not any(p != q and p.is_relative_to(q) for q in roots)]
    return [*of_profile, *map(str, outer)]


def inputs(config: CriticConfig) -> list[tuple[str, Path]]:
    """The files and folders that a configuration names, with their keys."""
    named = {
        "model.path": config.model.path if config.model.recipe is None else None,
        "model.recipe": config.model.recipe,
        "model.init_from": config.model.init_from,
        "tokenizer.path": config.tokenizer.path,
        "data.train": config.data.train if config.data.train != "embedded" else None,
        "data.validation": config.data.validation if config.data.train != "embedded" else None,
    }
    return [(key, Path(path).absolute()) for key, path in named.items() if path is not None]


def write_config(run: Run) -> None:
    """Write what the trainer is given."""
    record = Record(run.folder)
    record.folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_dict(run.config), sort_keys=False)
    record.config.write_text(text, encoding="utf-8")


def describe(plan: Plan) -> dict[str, Any]:
    """The plan's figures, for people and scripts."""
    submission = plan.submission
    return {
        "run": str(plan.folder),
        "runs": [str(run.folder) for run in plan.runs],
        "cluster": submission.cluster,
        "nodes": submission.nodes,
        "gpus_per_node": submission.gpus,
        "time": submission.profile["time"],
        "gpu_hours": plan.gpu_hours,
        "image": submission.image,
        "unfrozen_layers": [run.config.training.num_unfrozen_layers for run in plan.runs],
    }
