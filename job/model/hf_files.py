"""The tensors of Hugging Face's safetensors files, in one or in shards with an index."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from job.model.base import Base, weight_map
from job.model.layout import is_loaded, is_rotated, meta_name
from job.model.stored import Mappings, StoredTensor, raise_misfits
from job.outcome import InputError


def open_hugging_face(base: Base, head_width: int) -> dict[str, StoredTensor]:
    """Tensors by Meta's names; one that Meta's layout does not have is under another one.

    Raises:
        InputError: a file is missing or damaged, or the index does not agree with the shards.
    """
    found = {file: _tensors(file) for file in base.weight_files()}
    if base.index is not None:
        _check_index(base.index, {file.name: named.keys() for file, named in found.items()})
    mappings, opened = Mappings(), {}
    for file, named in found.items():
        for stored_name, part in named.items():
            if is_loaded(stored_name):
                name = _known_name(stored_name)
                width = head_width if is_rotated(name) else None
                mapped = mappings.hold(part, file)
                opened[name] = StoredTensor(stored_name, (file,), (part,), mapped, head_width=width)
    return opened


def _tensors(file: Path) -> dict[str, Tensor]:
    """What a file holds, memory-mapped."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged file can raise anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{file}: damaged, or no safetensors file: {reason}") from None


def _known_name(stored_name: str) -> str:
    try:
        return meta_name(stored_name)
    except KeyError:
        return f"unknown: {stored_name}"


def _check_index(index: Path, held: Mapping[str, Collection[str]]) -> None:
    """Raise InputError unless each shard holds just what the index says."""
    problems = []
    said = weight_map(index)
    holders: dict[str, list[str]] = {}
    for shard, names in held.items():
        for name in names:
            holders.setdefault(name, []).append(shard)
    for name in sorted(said.keys() | holders.keys()):
        wanted, found = said.get(name), holders.get(name, [])
        if found != [wanted]:
            where = " and ".join(found) or "in no shard"
            problems.append(f"{name} is {where}, the index says {wanted or 'nothing of it'}")
    raise_misfits(index, problems)
