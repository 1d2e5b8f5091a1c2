"""The tensors of Meta's files: one file, or one for each model-parallel rank of a larger model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from job.model.layout import is_loaded
from job.model.pickle_shapes import read_named
from job.model.stored import Mappings, Shapes, StoredTensor, raise_misfits
from job.model.trunk_folder import TrunkFolder

# Of model-parallel files, by the end of a name: dimensions along which they may cut a matrix
# (embeddings by columns, since Llama 3 by rows); all else is in each of them.
_CUT = {
    "tok_embeddings.weight": (1, 0),
    **dict.fromkeys(("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight"), (0,)),
    **dict.fromkeys(("wo.weight", "w2.weight"), (1,)),
    **dict.fromkeys(("wq.bias", "wk.bias", "wv.bias"), (0,)),
}


def open_meta(trunk: TrunkFolder, wanted: Shapes) -> dict[str, StoredTensor]:
    """Tensors by name; those of several files put together as the wanted shapes have it.

    Raises:
        InputError: a file is missing or damaged, or files do not fit together.
    """
    load = partial(torch.load, map_location="cpu", mmap=True, weights_only=True)
    files = trunk.weight_files()
    loaded = [read_named(file, load, Tensor) for file in files]
    mappings = Mappings()
    opened, problems = {}, []
    for name in filter(is_loaded, dict.fromkeys(itertools.chain(*loaded))):
        absent = [f.name for f, named in zip(files, loaded, strict=True) if name not in named]
        if absent:
            problems.append(f"{name} is missing in {', '.join(absent)}")
            continue
        parts = tuple(named[name] for named in loaded)
        mapped = all(map(mappings.hold, parts, files))
        tensor = StoredTensor(name, tuple(files), parts, mapped)
        try:
            opened[name] = tensor if len(files) == 1 else _join(tensor, wanted)
        except ValueError as problem:
            problems.append(f"{name}: {problem}")
    raise_misfits(trunk.folder / "consolidated.*.pth", problems)
    return opened


def _join(tensor: StoredTensor, wanted: Shapes) -> StoredTensor:
    """Say how the parts make up the wanted shape; ValueError if they do not."""
    name, parts = tensor.name, tensor.parts
    cuts = next((cuts for end, cuts in _CUT.items() if name.endswith(end)), None)
    shape = wanted.get(name, tuple(parts[0].shape))
    if len({part.dtype for part in parts}) > 1:
        raise ValueError(f"parts of types {', '.join(str(part.dtype) for part in parts)}")
    if cuts is None:
        _check_replicas(tensor, shape)
        return tensor
    for dim in cuts:
        if _fits(parts, dim, shape):
            return replace(tensor, dim=dim)
    along = " or ".join(map(str, cuts))
    raise ValueError(
        f"parts of shapes {_shapes(parts)} do not make up {shape} along dimension {along}"
    )


def _check_replicas(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    first = tensor.parts[0]
    if any(tuple(part.shape) != shape for part in tensor.parts):
        raise ValueError(f"has shape {_shapes(tensor.parts)} instead of {shape} in each file")
    for file, part in zip(tensor.files, tensor.parts, strict=True):
        if not torch.equal(part, first):
            raise ValueError(f"differs between {tensor.files[0].name} and {file.name}")


def _fits(parts: tuple[Tensor, ...], dim: int, shape: tuple[int, ...]) -> bool:
    """Whether parts along a dimension make up a shape."""
    if any(part.dim() != len(shape) for part in parts):
        return False
    others = all(n == shape[d] for p in parts for d, n in enumerate(p.shape) if d != dim)
    return others and sum(part.shape[dim] for part in parts) == shape[dim]


def _shapes(parts: tuple[Tensor, ...]) -> str:
    return " and ".join(map(str, sorted({tuple(part.shape) for part in parts})))
