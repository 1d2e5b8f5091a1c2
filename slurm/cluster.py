"""Cluster profiles: what a site has, and what it wants to be told with each job."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from job.common.config import merge_config
from job.common.errors import InputError, listing

PROFILES = Path(__file__).parents[1] / "configs" / "cluster"
# minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on, as sbatch reads them
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?$")


@dataclass
class GpuProfile:
    """The GPUs of a node."""

    memory_gb: float = MISSING  # of one GPU, 1e9 bytes; 0: there are none, it is pretended
    per_node: int = MISSING
    type: str | None = None  # Slurm's name for it, a100 for instance; default: any


@dataclass
class ClusterProfile:
    """One site. Times are as sbatch writes them unless in seconds."""

    gpu: GpuProfile = field(default_factory=GpuProfile)
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str = "24:00:00"
    cpus_per_gpu: int = 8
    memory_per_gpu_gb: int = 100  # of the host, in Slurm's G: 2**30 bytes
    image: str | None = None  # critic.sif; without one the trainer runs in this environment
    binds: list[str] = field(default_factory=list)  # what every container sees: for --bind
    scratch: str | None = None  # node-local folder for caches
    setup: list[str] = field(default_factory=list)  # shell lines before the job: modules
    environment: dict[str, str] = field(default_factory=dict)  # NCCL's settings for instance
    signal_delay_seconds: int = 120  # between Slurm's warning and the time limit
    max_attempts: int = 10  # in a row without progress
    preflight: bool = True  # look at nodes, GPUs and links before each attempt, some seconds


def load_profile(name: str, source: str = "--cluster") -> ClusterProfile:
    """The profile in configs/cluster/NAME.yaml, or in a file of one's own; `source` names it.

    Raises:
        InputError: there is none, or it is wrong; what there is is listed.
    """
    own = Path(name)
    file = own if own.suffix == ".yaml" else PROFILES / f"{name}.yaml"
    if not file.exists():
        there = ", ".join(sorted(path.stem for path in PROFILES.glob("*.yaml")))
        raise InputError(f"{source} {name}: no file {file}; there are {there}")
    profile = merge_config(ClusterProfile, file)
    if problems := list(_impossible(profile)):
        raise InputError(f"{file}: impossible profile" + listing(problems))
    return profile


def time_limit_seconds(text: str) -> float:
    """Seconds of a time limit as sbatch writes it; infinity where it is none."""
    match = _TIME.match(text)
    if match is None:
        return math.inf
    days, *parts = (None if part is None else int(part) for part in match.groups())
    first, second, third = parts
    assert first is not None
    if days is not None:
        return days * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return first * 3600 + (second or 0) * 60 + third
    return first * 60 + (second or 0)


def _impossible(profile: ClusterProfile) -> Iterator[str]:
    counts = ("cpus_per_gpu", "memory_per_gpu_gb", "signal_delay_seconds", "max_attempts")
    for name in counts:
        if getattr(profile, name) < 1:
            yield f"{name}: {getattr(profile, name)} is below 1"
    if profile.gpu.per_node < 1:
        yield f"gpu.per_node: {profile.gpu.per_node} is below 1"
    if profile.gpu.memory_gb < 0:
        yield f"gpu.memory_gb: {profile.gpu.memory_gb:g} is below 0"
    if not _TIME.match(profile.time):
        yield f"time: {profile.time!r} is no time as sbatch reads it, 24:00:00 for instance"
