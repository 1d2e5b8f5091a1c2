"""The tensors of Hugging Face's safetensors files, in one or in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from job.common.errors import file_error, first_line
from job.model.layout import is_loaded, is_rotated, meta_name
from job.model.stored import Mappings, StoredTensor, raise_misfits
from job.model.trunk_folder import TrunkFolder, weight_map

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_hugging_face(trunk: TrunkFolder, head_width: int) -> dict[str, StoredTensor]:
    """Tensors by Meta's names; one that Meta's layout does not have is under another one.

    Raises:
        InputError: a file is missing or damaged, or the index does not agree with the shards.
    """
    found = {file: file_tensors(file) for file in trunk.weight_files()}
    if trunk.index is not None:
        _check_index(trunk.index, {file.name: named.keys() for file, named in found.items()})
    mappings, opened = Mappings(), {}
    for file, named in found.items():
        for stored_name, part in named.items():
            if is_loaded(stored_name):
                name = _known_name(stored_name)
                if name in opened:  # as `model.norm.weight` and as `norm.weight`
                    name = f"twice: {stored_name}"
                width = head_width if is_rotated(name) else None
                mapped = mappings.hold(part, file)
                opened[name] = StoredTensor(stored_name, (file,), (part,), mapped, head_width=width)
    return opened


def file_tensors(file: Path) -> dict[str, Tensor]:
    """What a file holds, memory-mapped.

    Nothing of it is read: safetensors' own `get_tensor` touches each tensor, which on a cold file
    makes the system read megabytes around it before the next one is opened.
    """
    try:
        with safe_open(file, framework="pt"):  # checks the index against the file's size
            index, start = _read_index(file)
        content = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
    except Exception as error:  # a damaged file can raise anything
        reason = first_line(error, named=True)
        raise file_error(error, f"{file}: damaged, or no safetensors file: {reason}") from None
    strange = {name for name, entry in index.items() if entry["dtype"] not in _DTYPES}
    raise_misfits(file, [f"{name} is stored as {index[name]['dtype']}" for name in strange])
    mapped = content.untyped_storage()
    return {name: _view(mapped, start, entry) for name, entry in index.items()}


def _read_index(file: Path) -> tuple[dict[str, Any], int]:
    """dtype, shape and offsets of each tensor; the byte of the file that offsets count from."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        index = json.loads(stream.read(length))
    index.pop("__metadata__", None)
    return index, 8 + length


def _view(mapped: torch.UntypedStorage, start: int, entry: dict[str, Any]) -> Tensor:
    """One tensor in a file's mapping, which may lie at any byte of it."""
    first, end = entry["data_offsets"]
    as_bytes = torch.empty(0, dtype=torch.uint8).set_(mapped[start + first : start + end])
    return as_bytes.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


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
