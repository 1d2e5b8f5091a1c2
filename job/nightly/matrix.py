"""A matrix: the entries of a night, each of them an ordinary job with overrides. Free of torch."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from job.common.config import merge_config
from job.common.errors import InputError, first_line, listing

MATRICES = Path(__file__).parents[2] / "configs" / "nightly"


class Kind(enum.Enum):
    train = "train"
    memory = "memory"  # job.memory validate
    preflight = "preflight"


@dataclass
class Entry:
    """One entry. Figures that must be the same bits each night are those of a single seed."""

    kind: Kind = Kind.train
    config: str | None = None  # default: the matrix's
    unfreeze: list[int] = field(default_factory=lambda: [4])  # one, or of `memory` several
    gpus: int = 1
    nodes: int = 1
    time: str | None = None  # of one attempt, as sbatch reads it; default: the matrix's
    override: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])  # three or more: quality with its noise
    stop_at: int | None = None  # step at which it is told to stop, to go on after that
    same_as: str | None = None  # entry whose losses and parameters it must have, to the bit
    floor: dict[str, float] = field(default_factory=dict)  # of a quality, whatever the noise


@dataclass
class Matrix:
    """What configs/nightly/NAME.yaml says; the entries' own values go before the matrix's."""

    config: str = "configs/critic/critic_1gpu.yaml"
    time: str = "2:00:00"
    nice: int = 1000  # of the jobs' priority
    deadline_hours: float = 20  # what has not started in time to end by then is given up
    override: list[str] = field(default_factory=list)  # of every entry; {night}: its folder
    entries: dict[str, Any] = field(default_factory=dict)


def load_matrix(name: str) -> tuple[Matrix, dict[str, Entry]]:
    """configs/nightly/NAME.yaml, or a file of one's own.

    Raises:
        InputError: there is none, or it is wrong; keys are named.
    """
    own = Path(name)
    file = own if own.suffix == ".yaml" else MATRICES / f"{name}.yaml"
    if not file.exists():
        there = ", ".join(sorted(path.stem for path in MATRICES.glob("*.yaml")))
        raise InputError(f"--matrix {name}: no file {file}; there are {there}")
    matrix = merge_config(Matrix, file)
    entries = {key: _entry(file, key, value) for key, value in matrix.entries.items()}
    if problems := list(_impossible(entries)):
        raise InputError(f"{file}: impossible matrix" + listing(problems))
    return matrix, entries


def _entry(file: Path, name: str, given: Any) -> Entry:
    valid = [one.name for one in fields(Entry)]
    if not isinstance(given, dict):
        raise InputError(f"{file}: entries.{name}: a section with {', '.join(valid)}")
    if unknown := [key for key in given if key not in valid]:
        problem = f"unknown key {unknown[0]} (valid here: {', '.join(valid)})"
        raise InputError(f"{file}: entries.{name}: {problem}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Entry), given)
        return cast(Entry, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        where = f".{error.full_key}" if error.full_key else ""
        raise InputError(f"{file}: entries.{name}{where}: {first_line(error)}") from None


def _impossible(entries: dict[str, Entry]) -> Iterator[str]:
    """One line per entry that cannot work."""
    if not entries:
        yield "entries: none"
    for name, entry in entries.items():
        if not name.replace("-", "").replace("_", "").isalnum():
            yield f"{name}: letters, digits, - and _ only: it names a folder"
        if entry.kind is not Kind.memory and len(entry.unfreeze) != 1:
            yield f"{name}: unfreeze: one number of blocks, unless kind is memory"
        if entry.gpus < 1 or entry.nodes < 1:
            yield f"{name}: gpus and nodes: at least one"
        if entry.kind is not Kind.train and (entry.stop_at or entry.same_as or entry.floor):
            yield f"{name}: stop_at, same_as and floor are of trainings"
        if len(set(entry.seeds)) < len(entry.seeds) or len(entry.seeds) in (0, 2):
            yield f"{name}: seeds: one, or three or more different ones"
        if entry.same_as is not None and entry.same_as not in entries:
            yield f"{name}: same_as: no entry {entry.same_as}; there are {', '.join(entries)}"
