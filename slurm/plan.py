"""What a command line asks for, worked out: configurations, run directories, resources."""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.common.config import NoValueError, load_config
from job.common.data_file import data_files
from job.common.errors import Ending, InputError
from job.common.files import write_atomic
from job.common.nested import to_dict
from job.common.schema import EMBEDDED, CriticConfig
from job.common.text_values import dump, is_utf8
from job.run.directory import refuse_inside_another
from slurm.cluster import ClusterProfile, load_profile
from slurm.record import Record
from slurm.site import Site, advice, can_give, find_site
from slurm.submission import PROJECT, Submission, load

CONFIGS = PROJECT / "configs" / "critic"
STANDARD_CLUSTER = "a100-80gb"
# What a profile may leave to sbatch's own variables.
VARIABLES = {key: f"SBATCH_{key.upper()}" for key in ("partition", "account", "qos", "constraint")}


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
    site: Site

    @property
    def folder(self) -> Path:
        """The run directory, or the sweep's."""
        return self.runs[0].folder if len(self.runs) == 1 else self.runs[0].folder.parent

    @property
    def world_size(self) -> int:
        return self.submission.gpus * self.submission.nodes

    @property
    def gpu_bytes(self) -> int:
        """Memory of one GPU; 0 where GPUs are pretended."""
        return int(self.submission.profile["gpu"]["memory_gb"] * 1e9)

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
    gpus, nodes = _asked(options.gpus, 1), _asked(options.nodes, 1)
    standard = CONFIGS / f"critic_{'1' if gpus * nodes == 1 else '4'}gpu.yaml"
    file = Path(options.config or standard)
    site = find_site(options.site)
    runs = _planned_runs(file, options, site)
    for run in runs:
        if not Record(run.folder).submission.exists():
            refuse_inside_another(run.folder)
    folder = runs[0].folder if len(runs) == 1 else runs[0].folder.parent
    cluster, profile = _cluster(options.cluster, site)
    asked = {"time": options.time} if options.time else {}
    submission = Submission(
        cluster=cluster,
        profile=_with_variables(asdict(profile)) | asked,
        gpus=gpus,
        nodes=nodes,
        name=folder.name,
        folder=str(folder / "slurm"),
        cwd=str(Path.cwd()),
        image=_image(options.image or site.values.image, profile.image),
        binds=_binds(runs, profile.binds),
        after=_after(options.after),
        verify=options.verify,
    )
    return Plan(_checked(submission), runs, resumes=False, site=site)


def _cluster(asked: str | None, site: Site) -> tuple[str, ClusterProfile]:
    """The profile's name, and what it says."""
    if asked is None and site.values.cluster is not None:
        return site.values.cluster, load_profile(site.values.cluster, f"{site.file}: cluster")
    name = asked or STANDARD_CLUSTER
    return name, load_profile(name)


def _with_variables(profile: dict[str, Any]) -> dict[str, Any]:
    """A profile whose gaps are filled by what site or user have set for sbatch."""
    given = {key: os.environ.get(variable) for key, variable in VARIABLES.items()}
    return profile | {k: v for k, v in given.items() if v and profile[k] is None}


def _planned_runs(file: Path, options: argparse.Namespace, site: Site) -> list[Run]:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    unfreeze: list[int | None] = options.unfreeze or [None]
    if len(set(unfreeze)) < len(unfreeze):
        raise InputError(f"--unfreeze {' '.join(map(str, unfreeze))}: one run for each value")
    if options.name is not None and (
        Path(options.name).name != options.name or options.name == ".."
    ):
        raise InputError(f"--name {options.name}: a name, not a path; run.dir says where runs lie")
    sweep = None if len(unfreeze) == 1 else options.name or "sweep"
    configs = [_config(file, options, site, n) for n in unfreeze]
    return [_planned_run(config, options, stamp, sweep) for config in configs]


def _planned_run(
    config: CriticConfig, options: argparse.Namespace, stamp: str, sweep: str | None
) -> Run:
    """A run with a name of its own, unless its directory is named by hand."""
    by_hand = any(override.startswith("run.dir=") for override in options.override)
    if by_hand and sweep is not None:
        raise InputError("--override run.dir=...: a sweep's runs need one each; use --name")
    if by_hand:
        return Run(Path(config.run.dir).absolute(), _with_whole_paths(config))
    parent, name = Path(config.run.dir).absolute().parent, options.name or config.run.name
    folder = _unused(parent / f"{sweep or name}-{stamp}")
    n = config.training.num_unfrozen_layers
    run = folder / f"n{n}" if sweep else folder
    config.run.name = f"{folder.name}-n{n}" if sweep else folder.name
    config.run.dir = str(run)
    return Run(run, _with_whole_paths(config))


def _config(file: Path, options: argparse.Namespace, site: Site, n: int | None) -> CriticConfig:
    asked = [*options.override, *([] if n is None else [f"training.num_unfrozen_layers={n}"])]
    try:
        return load_config(CriticConfig, file, asked, site.fill if site.file else None)
    except NoValueError as error:
        if can_give(error.keys):
            raise InputError(f"{error}\n{advice(options.site)}") from None
        raise


def _with_whole_paths(config: CriticConfig) -> CriticConfig:
    """Paths that mean the same from everywhere: on a node, in a container, when resumed."""
    for section, key in (*_INPUTS, ("data", "cache_dir"), ("run", "dir")):
        value = getattr(getattr(config, section), key)
        if isinstance(value, list):
            whole: Any = [str(Path(one).absolute()) for one in value]
        elif isinstance(value, str) and value != EMBEDDED:
            whole = str(Path(value).absolute())
        else:
            continue
        setattr(getattr(config, section), key, whole)
    return config


def _unused(folder: Path) -> Path:
    tries = (folder, *(folder.with_name(f"{folder.name}-{k}") for k in range(2, 1000)))
    return next(one for one in tries if not one.exists())


def _plan_to_resume(options: argparse.Namespace) -> Plan:
    """The same run again, with the same resources unless others are asked for."""
    record = Record.of(Path(options.resume).absolute())
    own = ("config", "name", "unfreeze", "site")
    refused = [f"--{name}" for name in own if getattr(options, name)]
    if refused:
        raise InputError(f"--resume goes on with the run's own configuration, not {refused[0]}")
    before = load(record)
    config = load_config(CriticConfig, record.readable_config(), options.override)
    run = Run(record.run, _with_whole_paths(config))
    asked = {"time": options.time} if options.time else {}
    cluster = options.cluster or before.cluster
    profile = asdict(load_profile(cluster)) if options.cluster else before.profile
    submission = Submission(
        cluster=cluster,
        profile=_with_variables(profile) | asked,
        gpus=_asked(options.gpus, before.gpus),
        nodes=_asked(options.nodes, before.nodes),
        name=record.run.name,
        folder=str(record.folder),
        cwd=before.cwd,
        image=_image(options.image, _image_before(before, profile)),
        binds=_binds([run], profile["binds"]),
        after=_after(options.after),
        verify=options.verify,
    )
    return Plan(_checked(submission), [run], resumes=True, site=Site())


def _image_before(before: Submission, profile: dict[str, Any]) -> str | None:
    """The image that a run was submitted with; another profile's, where it was the profile's."""
    of_profile = _image(None, before.profile["image"])
    return before.image if before.image != of_profile else profile["image"]


def _asked(number: int | None, default: int) -> int:
    return default if number is None else number


def _checked(submission: Submission) -> Submission:
    if submission.gpus < 1 or submission.nodes < 1:
        raise InputError("--gpus and --nodes: at least one")
    _check_folder(submission.folder)
    seconds, delay = submission.time_seconds, submission.signal_delay_seconds
    if math.isinf(seconds):
        raise InputError(f"--time {submission.profile['time']}: write hours:minutes:seconds")
    if seconds <= delay:
        raise InputError(
            f"--time {submission.profile['time']}: Slurm's warning comes {delay} s before the end "
            "(signal_delay_seconds of the profile), so that no time is left to train"
        )
    return submission


def _check_folder(folder: str) -> None:
    """Refuse a folder in which Slurm would write the job's log elsewhere, or not at all."""
    run = Path(folder).parent
    if not is_utf8(folder):
        raise InputError(f"run.dir: {str(run)!a}: not UTF-8 text; choose another folder")
    if sign := next((sign for sign in "%\\" if sign in folder), None):
        raise InputError(
            f"run.dir: {run}: Slurm reads {sign} in the names of log files as a pattern; choose "
            "another run.dir, run.name or --name"
        )


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
        named = [path for _, path in inputs(run.config)]
        for path in (*named, *(path.resolve() for path in named)):  # links and what they lead to
            needed.add(path if path.is_dir() else path.parent)
        needed |= {Path(run.config.data.cache_dir).parent}
        if run.config.model.recipe is not None:
            needed.add(Path(run.config.model.path).parent)
    given = {Path(path) for path in of_profile}
    roots = [path for path in sorted(needed) if not any(path.is_relative_to(g) for g in given)]
    outer = [p for p in roots if not any(p != q and p.is_relative_to(q) for q in roots)]
    return [*of_profile, *map(str, outer)]


_INPUTS = (
    *(("model", key) for key in ("path", "recipe", "init_from")),
    ("tokenizer", "path"),
    *(("data", key) for key in ("train", "validation")),
)


def inputs(config: CriticConfig) -> list[tuple[str, Path]]:
    """The files and folders that a configuration names, with their keys."""
    named = {f"{s}.{key}": getattr(getattr(config, s), key) for s, key in _INPUTS}
    if config.model.recipe is not None:
        named.pop("model.path")  # it is made
    there = {k: path for k, path in named.items() if path not in (None, EMBEDDED)}
    return [(key, path) for key, named in there.items() for path in _paths(key, named)]


def _paths(key: str, named: Any) -> list[Path]:
    """What a key names; of data the single files, where they can be told."""
    if not key.startswith("data."):
        return [Path(named)]
    if isinstance(named, float):
        return []  # a share of the training data
    try:
        return data_files(named)
    except Ending:  # which the checks will say
        return [Path(one) for one in ([named] if isinstance(named, str) else named)]


def write_config(run: Run) -> None:
    """Write what the trainer is given."""
    record = Record(run.folder)
    record.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(record.config, dump(to_dict(run.config)))


def describe(plan: Plan) -> dict[str, Any]:
    """The plan's figures, for people and scripts."""
    submission = plan.submission
    return {
        "run": str(plan.folder),
        "runs": [str(run.folder) for run in plan.runs],
        "site": None if plan.site.file is None else str(plan.site.file),
        "cluster": submission.cluster,
        "nodes": submission.nodes,
        "gpus_per_node": submission.gpus,
        "time": submission.profile["time"],
        "gpu_hours": plan.gpu_hours,
        "image": submission.image,
        "unfrozen_layers": [run.config.training.num_unfrozen_layers for run in plan.runs],
    }
