"""A head of one label that stands on the trunk in its files: a classifier's, or a value head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from job.common.errors import InputError
from job.model.hf_files import file_tensors
from job.model.trunk_folder import Layout, find_trunk

_BESIDE = "value_head.safetensors"  # of our own exports in Meta's layout
# (weight, bias): Hugging Face's classifiers, TRL's value head.
_NAMES = (("score.weight", "score.bias"), ("v_head.summary.weight", "v_head.summary.bias"))


@dataclass(frozen=True)
class StoredHead:
    """weight: float32 [1, d]; bias: float32 [1], or None."""

    weight: Tensor
    bias: Tensor | None


def head_names(folder: str | Path) -> list[str]:
    """The tensors of heads beside the trunk's own, as they are called in its files."""
    trunk = find_trunk(folder)
    if trunk.layout is Layout.META:
        return []
    known = {name for names in _NAMES for name in names}
    held = {name for file in trunk.weight_files() for name in file_tensors(file)}
    return sorted(name for name in held if name in known)


def read_head(folder: str | Path, dim: int) -> StoredHead:
    """The head of one label in a trunk's folder.

    Raises:
        InputError: there is none, or it has several labels or another width than `dim`.
    """
    trunk = find_trunk(folder)
    if trunk.layout is Layout.META:
        beside = trunk.folder / _BESIDE
        held = file_tensors(beside) if beside.exists() else {}
        return _head(trunk.folder, dim, held, "weight", "bias")
    held = {}
    for file in trunk.weight_files():
        held |= file_tensors(file)
    weight, bias = next((names for names in _NAMES if names[0] in held), _NAMES[0])
    return _head(trunk.folder, dim, held, weight, bias)


def _head(folder: Path, dim: int, held: dict[str, Tensor], weight: str, bias: str) -> StoredHead:
    if weight not in held:
        raise InputError(
            f"{folder}: model.keep_head, but no head lies there: no {_BESIDE}, and none of "
            f"{', '.join(names[0] for names in _NAMES)} among its tensors"
        )
    found = held[weight].to(torch.float32, copy=True)
    if found.shape != (1, dim):
        raise InputError(
            f"{folder}: {weight} has shape {tuple(found.shape)}; a head of one label on this trunk "
            f"has (1, {dim})"
        )
    stored_bias = held.get(bias)
    return StoredHead(
        found, None if stored_bias is None else stored_bias.float().reshape(1).clone()
    )
