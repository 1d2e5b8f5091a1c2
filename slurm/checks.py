"""What is checked before anything is queued, as far as it can be known from here."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from job.common.errors import Ending, InputError
from job.common.places import free_bytes, read_problem
from job.common.schema import BadRows, CriticConfig, DataConfig, PrefixCacheMode
from job.data.first_rows import first_bad_rows
from job.memory.fit import Fit, fit
from job.memory.footprint import Setting
from job.memory.settings import can_build, once_built, setting_of
from job.model.architecture import TransformerConfig
from job.model.architecture_file import check_window, read_architecture
from job.model.parameters import (
    ParameterCounts,
    checkpoint_bytes,
    count_configured,
    run_bytes,
)
from job.run.committed import still_to_come
from job.run.reader import StoredRun
from slurm import scheduler
from slurm.plan import VARIABLES, Plan, Run, inputs
from slurm.scheduler import ControllerAway, Partition, Refused
from slurm.submission import PROJECT, script

# Folders that each machine has for itself, almost everywhere.
_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")
# Assumed where nothing is measured yet, to say how long a save and a step take.
_WRITE_BYTES_PER_SECOND = 1e9
_FLOPS_PER_GPU = 1e14  # a third of what an A100 does in bfloat16


@dataclass(frozen=True)
class Check:
    """One finding; an error keeps the job from being submitted."""

    name: str
    state: Literal["ok", "warning", "error", "not checked"]
    text: str


def check(plan: Plan, *, asks_slurm: bool = True) -> Iterator[Check]:
    """Every finding; those that hold for all runs of a sweep come once."""
    if plan.site.file is not None:
        yield Check("site", "ok", str(plan.site.file))
    yield from _variables(plan)
    for run in plan.runs[:1]:
        yield from _inputs(plan, run)
    partition = _partition(plan) if asks_slurm else None
    for run in plan.runs:
        yield from _model(plan, run, partition)
    yield from _resources(plan)
    if asks_slurm:
        yield from _scheduler(plan)


def _variables(plan: Plan) -> Iterator[Check]:
    """What the shell's own variables say of jobs: only gaps of the profile are filled by them."""
    profile = plan.submission.profile
    taken = {name: key for key, name in VARIABLES.items() if profile[key] == os.environ.get(name)}
    for name in sorted(scheduler.set_aside(os.environ)):
        said = f"{name}={os.environ[name]}"
        if name in taken:
            yield Check(
                "variables", "ok", f"{taken[name]} {profile[taken[name]]}, as {said} has it"
            )
        else:
            yield Check("variables", "warning", f"{said} is set aside: profile and options hold")


def _inputs(plan: Plan, run: Run) -> Iterator[Check]:
    """Files and image: there, readable, and visible where the job runs."""
    named = inputs(run.config)
    if plan.submission.image is not None:
        named.append(("image", Path(plan.submission.image)))
    missing = [
        f"{plan.site.source(key, path)}{text}"
        for key, path in named
        if (text := _unreadable(key, path, run.config.data))
    ]
    for text in missing:
        yield Check("files", "error", text)
    if not missing:
        yield Check(
            "files",
            "ok",
            ", ".join(dict.fromkeys(key for key, _ in named)) or "none but embedded data",
        )
    used = [*named, ("run.dir", run.folder), ("the working folder", Path.cwd())]
    local = [key for key, path in used if any(path.is_relative_to(one) for one in _LOCAL)]
    if local:
        text = f"{', '.join(local)}: under {' or '.join(_LOCAL)}, which compute nodes do not share"
        yield Check("shared files", "warning", text)
    yield _caches(run)
    if plan.submission.image is not None and not missing:
        yield _image(plan.submission.image)


def _unreadable(key: str, path: Path, data: DataConfig) -> str | None:
    """What keeps a file or folder from being what a configuration's key names."""
    if key not in ("data.train", "data.validation"):
        problem = read_problem(path)
        return None if problem is None else f"{key}: {problem}"
    try:
        bad, looked_at = first_bad_rows(path, data.fields, data.reward_range)
    except Ending as error:  # StorageError too: what does not answer now is not submitted
        return f"{key}: {error}"
    if not bad or (data.bad_rows is BadRows.skip and len(bad) < looked_at):
        return None
    return f"{key}: {bad[0]}; {len(bad)} of the first {looked_at} row(s) cannot be used"


def _image(image: str) -> Check:
    """Whether the image holds what the checkout holds; the supervisor comes from the checkout."""
    try:
        inspected = _output("apptainer", "inspect", "--json", image)
        labels = json.loads(inspected)["data"]["attributes"]["labels"]
        built = labels["org.opencontainers.image.revision"]
        here = _output("git", "-C", str(PROJECT), "rev-parse", "HEAD").strip()
        changed = _output("git", "-C", str(PROJECT), "status", "--porcelain", "--", "job", "slurm")
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        return Check("image", "not checked", f"its commit is not known here: {error}")
    if built == here and not changed:
        return Check("image", "ok", f"built from this commit, {here[:12]}")
    edited = ", edited" if changed else ""
    text = (
        f"built from {built[:12]}, and this checkout is {here[:12]}{edited}: the image's is trained"
    )
    return Check("image", "warning", text)


def _output(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=True
    )
    return done.stdout


def _caches(run: Run) -> Check:
    """Free space for the tokens: four bytes for each, of at least two characters or so."""
    data = [path for key, path in inputs(run.config) if key.startswith("data.")]
    needed = 2 * sum(path.stat().st_size for path in data if path.exists())
    folder = Path(run.config.data.cache_dir).absolute()
    free = free_bytes(folder)
    text = f"{free / 1e9:,.0f} GB free at {folder}, at most {needed / 1e9:.1f} GB needed"
    return Check("disk for caches", "ok" if free > needed else "error", text)


def _model(plan: Plan, run: Run, partition: Partition | None) -> Iterator[Check]:
    """Memory, disk and interruptions, as far as they follow from the architecture."""
    config, name = run.config, f"N={run.config.training.num_unfrozen_layers}"
    if config.model.recipe is not None and not Path(config.model.path, "params.json").exists():
        text = f"the trunk is still to be made, by {config.model.recipe}"
        yield Check(f"memory {name}", "not checked", text)
        return
    try:
        architecture = read_architecture(config.model.path)
        check_window(config.model.path, config.data.max_length)
    except Ending as error:
        yield Check("model", "error", str(error))
        return
    counts = count_configured(config, architecture)
    yield _memory(plan, config, architecture, counts)
    yield _disk(run, counts)
    yield from _interruptions(plan, run, partition, counts)


def memory_setting(plan: Plan, config: CriticConfig) -> Setting | None:
    """What a run of the plan means for the memory of a GPU; None while there is no trunk.

    Raises:
        InputError: the trunk cannot be read, or no micro-batch fits where one is to be chosen.
    """
    if config.model.recipe is not None and not Path(config.model.path, "params.json").exists():
        return None
    return _setting(plan, config, read_architecture(config.model.path))


def _setting(
    plan: Plan,
    config: CriticConfig,
    architecture: TransformerConfig,
    *,
    prefix_cached: bool = False,
) -> Setting:
    return setting_of(
        config,
        architecture,
        world_size=plan.world_size,
        per_node=plan.submission.gpus,
        capacity=plan.gpu_bytes,
        prefix_cached=prefix_cached,
    )


def _memory(
    plan: Plan, config: CriticConfig, architecture: TransformerConfig, counts: ParameterCounts
) -> Check:
    """The predicted peak of a GPU against what it has."""
    name = f"memory N={config.training.num_unfrozen_layers}"
    if not plan.gpu_bytes:
        return Check(name, "not checked", "the profile's GPUs are pretended")
    try:
        setting = _setting(plan, config, architecture)
    except InputError as error:
        return _too_large(plan, config, architecture, name, str(error))
    found = fit(setting, plan.gpu_bytes)
    text = (
        f"{counts.trainable:,} of {counts.total:,} parameters trained; {_needed(found)} of a GPU's "
        f"{plan.gpu_bytes / 1e9:.1f} GB"
    )
    if found.fits:
        return Check(name, "ok", text)
    if found.is_tight:
        return Check(name, "warning", f"{text}: little is left for fragmentation")
    advice = "unfreeze fewer blocks, lower training.micro_batch_tokens, or take more GPUs"
    text = f"{text}: {advice}{once_built(config, setting, plan.gpu_bytes)}"
    return _too_large(plan, config, architecture, name, text)


def _too_large(
    plan: Plan, config: CriticConfig, architecture: TransformerConfig, name: str, text: str
) -> Check:
    """An error, unless the training fits once its states are built, and relies on them.

    Whether they are there is not known before its data are tokenised.
    """
    if not _fits_once_built(plan, config, architecture):
        return Check(name, "error", text)
    if config.training.prefix_cache is PrefixCacheMode.all:
        return Check(name, "warning", f"{text}, as training.prefix_cache=all relies on")
    return Check(name, "error", f"{text}; submit it then with training.prefix_cache=all")


def _fits_once_built(plan: Plan, config: CriticConfig, architecture: TransformerConfig) -> bool:
    if config.training.prefix_cache is PrefixCacheMode.none:
        return False
    try:
        setting = _setting(plan, config, architecture, prefix_cached=True)
    except InputError:
        return False
    fits = fit(setting, plan.gpu_bytes).fits
    return fits and can_build(config, setting, plan.gpu_bytes)


def _needed(found: Fit) -> str:
    return (
        f"{found.needed / 1e9:.1f} GB at the peak ({found.footprint.peak.name}), "
        f"{found.outside / 1e9:.1f} GB of it outside torch's allocator,"
    )


def _disk(run: Run, counts: ParameterCounts) -> Check:
    """Free space where checkpoints go, against what they take."""
    config = run.config
    come = still_to_come(run.folder, config.checkpoint, config.training.max_steps)
    needed, free = run_bytes(counts, come), free_bytes(run.folder)
    one, trained = checkpoint_bytes(counts) / 1e9, run_bytes(counts, 0) / 1e9
    text = (
        f"{free / 1e9:,.0f} GB free at {run.folder.parent}; {come} checkpoints to come of "
        f"{one:.1f} GB, critic.safetensors of {trained:.1f} GB"
    )
    state: Literal["ok", "error"] = "ok" if free > needed else "error"
    return Check(f"disk N={run.config.training.num_unfrozen_layers}", state, text)


def _interruptions(
    plan: Plan, run: Run, partition: Partition | None, counts: ParameterCounts
) -> Iterator[Check]:
    """Whether the time between a warning and the end covers a step and a save."""
    save = checkpoint_bytes(counts) / _WRITE_BYTES_PER_SECOND
    step, source = _step_seconds(plan, run, counts)
    needed = f"a step (~{step:.0f} s, {source}) and a save (~{save:.0f} s at 1 GB/s)"
    lost = f"up to {run.config.checkpoint.every_steps} steps are done again"
    delay, name = plan.submission.signal_delay_seconds, "interruptions"
    if step + save > delay:
        text = f"{needed} take longer than signal_delay_seconds, {delay}: at the time limit {lost}"
        yield Check(name, "warning", text)
    if partition is None or partition.preempt_mode == "OFF":
        return
    if step + save > partition.grace_seconds:
        text = f"partition {partition.name} gives {partition.grace_seconds} s when it preempts"
        yield Check(name, "warning", f"{text}, and {needed} may take longer: then {lost}")
    else:
        text = f"partition {partition.name}: {partition.grace_seconds} s for {needed}"
        yield Check(name, "ok", text)


def _partition(plan: Plan) -> Partition | None:
    """The partition, if Slurm can be asked; if not, that is said elsewhere."""
    try:
        return scheduler.show_partition(plan.submission.profile["partition"])
    except (ControllerAway, Refused):
        return None


def _step_seconds(plan: Plan, run: Run, counts: ParameterCounts) -> tuple[float, str]:
    """Seconds of a training step, and where they come from.

    Forward passes take 2 operations a parameter and token, backward passes 4 a trainable one
    (Kaplan et al., 2020, Scaling Laws for Neural Language Models, section 2.1).
    """
    if plan.resumes:
        measured = StoredRun(run.folder).newest_values("telemetry.jsonl").get("seconds_per_step")
        if measured is not None:
            return float(measured), "measured"
    tokens = run.config.training.batch_size * run.config.data.max_length
    operations = tokens * (2 * counts.total + 4 * counts.trainable)
    return operations / (plan.world_size * _FLOPS_PER_GPU), "at most, by its operations"


def _resources(plan: Plan) -> Iterator[Check]:
    submission, gpu = plan.submission, plan.submission.profile["gpu"]
    hours = f"{plan.gpu_hours:,.1f} GPU-hours at most"
    each = (
        f"{submission.nodes} node(s) of {submission.gpus} GPU(s) for {submission.profile['time']}"
    )
    runs = f"{len(plan.runs)} runs, each " if len(plan.runs) > 1 else ""
    if submission.gpus > gpu["per_node"]:
        text = f"--gpus {submission.gpus}: a node has {gpu['per_node']}; take more --nodes"
        yield Check("resources", "error", text)
    else:
        yield Check("resources", "ok", f"{runs}{each}: {hours}")
    if submission.time_seconds < submission.signal_delay_seconds + 60:
        text = "Slurm may give its warning a minute early: little or no time is left to train"
        yield Check("resources", "warning", text)


def _scheduler(plan: Plan) -> Iterator[Check]:
    """What Slurm says of the very script."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.sh")
        file.write_text(script(plan.submission, len(plan.runs)))
        try:
            yield Check("Slurm", "ok", scheduler.expected_start(file))
        except ControllerAway as away:
            yield Check("Slurm", "not checked", str(away))
        except Refused as refused:
            yield Check("Slurm", "error", str(refused))
