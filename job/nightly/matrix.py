"""A matrix: the entries of a night, each of them an ordinary job with overrides. Free of torch."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from job.common.config import merge_config
from job.common.errors import InputError, first_line, listing
from job.nightly.table import FIGURES, QUALITY

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
        wrong = [*_wrong_numbers(entry), *_wrong_floors(entry), *_wrong_same_as(name, entries)]
        if entry.kind is not Kind.train:
            wrong += _of_trainings(entry)
        yield from (f"{name}: {problem}" for problem in wrong)


def _wrong_numbers(entry: Entry) -> Iterator[str]:
    blocks, seeds = entry.unfreeze, entry.seeds
    if (entry.kind is not Kind.memory and len(blocks) != 1) or not blocks:
        yield "unfreeze: one number of blocks, or several if kind is memory"
    if any(number < 0 for number in blocks):
        yield f"unfreeze: {min(blocks)} blocks: 0 or more"
    if entry.gpus < 1 or entry.nodes < 1:
        yield "gpus and nodes: at least one"
    if entry.stop_at is not None and entry.stop_at < 1:
        yield f"stop_at: {entry.stop_at}: steps are counted from 1"
    if len(set(seeds)) < len(seeds) or len(seeds) in (0, 2):
        yield "seeds: one, or three or more different ones"


def _wrong_floors(entry: Entry) -> Iterator[str]:
    """Floors that would hold nothing."""
    better = [name for name in QUALITY if FIGURES[name].better]
    for name, floor in entry.floor.items():
        if name not in better:
            yield f"floor: {name}: only of what has a better side: {', '.join(better)}"
        if not math.isfinite(floor):
            yield f"floor: {name}: {floor} is no number"


def _wrong_same_as(name: str, entries: dict[str, Entry]) -> Iterator[str]:
    entry, other = entries[name], entries[name].same_as
    if other is None:
        return
    if other == name or other not in entries:
        others = [one for one in entries if one != name]
        yield f"same_as: no other entry {other}; there are {', '.join(others)}"
    elif entries[other].kind is not Kind.train or len({*entry.seeds, *entries[other].seeds}) > 1:
        yield f"same_as: {other}: both must be trainings of one seed, the same one"


def _of_trainings(entry: Entry) -> Iterator[str]:
    """Keys of another kind of entry that would do nothing."""
    given = {"stop_at": entry.stop_at is not None, "same_as": entry.same_as is not None}
    given |= {"floor": bool(entry.floor), "seeds": len(entry.seeds) > 1}
    if named := [key for key, is_given in given.items() if is_given]:
        yield f"{' and '.join(named)}: of trainings, and this is {entry.kind.value}"
