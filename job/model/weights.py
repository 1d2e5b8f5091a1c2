"""Trunk weights in files of either layout: checked, read by slices, and written."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from job.model import hf_config
from job.model.architecture import TransformerConfig, check_window, read_architecture
from job.model.base import CONFIG, PARAMS, SAFETENSORS, WEIGHTS, Base, Layout, find_base, weight_map
from job.model.layout import (
    hugging_face_name,
    is_loaded,
    is_rotated,
    meta_name,
    to_hugging_face,
)
from job.model.pickle_shapes import read_named
from job.model.shards import own, own_rows
from job.model.stored import StoredTensor, shapes
from job.model.transformer import Transformer, Trunk
from job.outcome import InputError, listing
from job.telemetry.progress import progress

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Of model-parallel files, by the end of a name: dimensions along which they may cut a matrix
# (embeddings by columns, since Llama 3 by rows); all else is in each of them.
_CUT = {
    "tok_embeddings.weight": (1, 0),
    **dict.fromkeys(("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight"), (0,)),
    **dict.fromkeys(("wo.weight", "w2.weight"), (1,)),
    **dict.fromkeys(("wq.bias", "wk.bias", "wv.bias"), (0,)),
}
Shapes = Mapping[str, tuple[int, ...]]
_log = logging.getLogger(__name__)


def check_trunk(folder: str | Path, max_length: int) -> None:
    """Raise InputError unless the weights fit the architecture; reads no more than their index.

    Args:
        max_length: tokens of the longest sequence, which a sliding window must not be less than.
    """
    check_window(folder, max_length)
    config = read_architecture(folder)
    _check_tensors(trunk_shapes(config), open_weights(folder, config), find_base(folder))


def load_trunk(
    trunk: Trunk, folder: str | Path, at_boundary: Callable[[], object] = lambda: None
) -> None:
    """Copy weights into a trunk's parameters, whole or sharded: a rank reads only its slices.

    `at_boundary` is called after each tensor, and may raise to end it.

    Raises:
        InputError: a tensor is missing, surplus or of another shape; a file cannot be read.
    """
    stored = open_weights(folder, trunk.config)
    named = dict(trunk.named_parameters())
    _check_tensors({n: tuple(p.shape) for n, p in named.items()}, stored, find_base(folder))
    with progress("loading the trunk", len(named)) as advance:
        for done, (name, parameter) in enumerate(named.items(), 1):
            rows = own_rows(parameter)
            own(parameter).copy_(stored[name].rows(rows))
            stored[name].release(rows)
            at_boundary()
            advance(done, "tensors")
    _log.info("loaded %d tensors from %s", len(named), folder)


def trunk_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a trunk, by Meta's names."""
    with torch.device("meta"):
        trunk = Trunk(config)
    return {name: tuple(parameter.shape) for name, parameter in trunk.named_parameters()}


def open_weights(folder: str | Path, config: TransformerConfig) -> dict[str, StoredTensor]:
    """The tensors of a base that a critic uses, by Meta's names, memory-mapped and unread.

    A tensor that Meta's layout does not have keeps its name.

    Raises:
        InputError: a file is missing or damaged, files do not agree, or do not fit together.
    """
    base = find_base(folder)
    if base.layout is Layout.META:
        return _open_meta(base, config)
    return _open_hugging_face(base, config)


# Meta's layout


def _open_meta(base: Base, config: TransformerConfig) -> dict[str, StoredTensor]:
    load = partial(torch.load, map_location="cpu", mmap=True, weights_only=True)
    files = base.weight_files()
    loaded = [read_named(file, load, Tensor) for file in files]
    used = [{k: v for k, v in named.items() if is_loaded(k)} for named in loaded]
    if len(files) == 1:
        return {k: StoredTensor(k, (files[0],), (v,)) for k, v in used[0].items()}
    return _join(files, used, trunk_shapes(config), base.description)


def _join(
    files: list[Path], loaded: list[dict[str, Tensor]], wanted: Shapes, description: Path
) -> dict[str, StoredTensor]:
    """Tensors cut into several files, put together as the architecture's shapes have it."""
    joined, problems = {}, []
    for name in dict.fromkeys(name for named in loaded for name in named):
        absent = [f.name for f, named in zip(files, loaded, strict=True) if name not in named]
        if absent:
            problems.append(f"{name} is missing in {', '.join(absent)}")
            continue
        parts = tuple(named[name] for named in loaded)
        shape = wanted.get(name, tuple(parts[0].shape))
        cut = next((pattern for pattern in _CUT if name.endswith(pattern)), None)
        if cut is None and _all_equal(parts, shape):
            joined[name] = StoredTensor(name, tuple(files), parts)
        elif fitting := [d for d in _CUT.get(cut or "", ()) if _fits(parts, d, shape)]:
            joined[name] = StoredTensor(name, tuple(files), parts, fitting[0])
        else:
            problems.append(
                f"{name} has shape {shapes(parts)} in {len(files)} files, {description.name} "
                f"says {shape}" + ("" if cut else ", the same in each file")
            )
    _raise_if(problems, files[0].with_name("consolidated.*.pth"))
    return joined


def _all_equal(parts: tuple[Tensor, ...], shape: tuple[int, ...]) -> bool:
    return all(tuple(p.shape) == shape and p.dtype == parts[0].dtype for p in parts) and all(
        torch.equal(part, parts[0]) for part in parts[1:]
    )


def _fits(parts: tuple[Tensor, ...], dim: int, shape: tuple[int, ...]) -> bool:
    """Whether parts of one dtype along a dimension make up a shape."""
    if any(p.dim() != len(shape) or p.dtype != parts[0].dtype for p in parts):
        return False
    others = all(n == shape[d] for p in parts for d, n in enumerate(p.shape) if d != dim)
    return others and sum(part.shape[dim] for part in parts) == shape[dim]


# Hugging Face's layout


def _open_hugging_face(base: Base, config: TransformerConfig) -> dict[str, StoredTensor]:
    found = [(file, _mapped(file)) for file in base.weight_files()]
    if base.index is not None:
        _check_index(base.index, {file.name: named.keys() for file, named in found})
    opened = {}
    for file, named in found:
        for stored_name, tensor in named.items():
            if not is_loaded(stored_name):
                continue
            name = _known_name(stored_name)
            width = config.head_width if is_rotated(name) else None
            opened[name] = StoredTensor(stored_name, (file,), (tensor,), head_width=width)
    return opened


def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped."""
    from safetensors import safe_open

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
        return stored_name


def _check_index(index: Path, held: Mapping[str, Any]) -> None:
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
    _raise_if(problems, index)


# Both


def _check_tensors(wanted: Shapes, stored: Mapping[str, StoredTensor], base: Base) -> None:
    stored_name = hugging_face_name if base.layout is Layout.HUGGING_FACE else str
    problems = [f"{stored_name(name)} is missing" for name in wanted.keys() - stored.keys()]
    for name, tensor in stored.items():
        found, shape, where = tensor.shape, wanted.get(name), tensor.files[0].name
        if shape is None:
            problems.append(f"{tensor.name} in {where} is not part of the model")
        elif found != shape:
            problems.append(
                f"{tensor.name} in {where} has shape {found}, {base.description.name} says {shape}"
            )
        layout = tensor.parts[0].layout
        if shape is not None and (tensor.dtype not in _DTYPES or layout is not torch.strided):
            problems.append(
                f"{tensor.name} in {where} is stored as {tensor.dtype}, {layout}; "
                "weights are dense floats"
            )
    files = base.weight_files()
    _raise_if(problems, files[0] if len(files) == 1 else base.index or base.folder)


def _raise_if(problems: list[str], file: Path) -> None:
    if problems:
        head = f"{file}: {len(problems)} tensor(s) do not fit the model"
        raise InputError(head + listing(sorted(problems)))


# Writing


def save_transformer(model: Transformer, folder: Path) -> None:
    """Write a language model in Meta's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    params = {k: v for k, v in sorted(asdict(model.config).items()) if v is not None}
    _write_json(folder / PARAMS, params)
    torch.save({k: v.detach().cpu() for k, v in model.state_dict().items()}, folder / WEIGHTS)


def save_hugging_face(model: Transformer, folder: Path, max_positions: int) -> None:
    """Write the next-token path of a language model in Hugging Face's layout.

    Multi-token heads have no place in it. `max_positions` is the longest sequence's tokens.

    Raises:
        ValueError: no Hugging Face architecture has these biases and norms.
    """
    named = {k: v.detach().cpu() for k, v in model.state_dict().items() if "extra_heads" not in k}
    dtype = str(model.output.weight.dtype).removeprefix("torch.")
    config = hf_config.write(model.config, dtype, max_positions)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, config)
    tensors = to_hugging_face(named, model.config.head_width)
    save_file(tensors, folder / SAFETENSORS, metadata={"format": "pt"})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
