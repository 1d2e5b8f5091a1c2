"""Trunk weights in Meta's layout: a folder with params.json and consolidated.pth."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from job.model.architecture import PARAMS, WEIGHTS, read_architecture, read_named
from job.model.shards import fill
from job.model.transformer import Transformer, Trunk
from job.outcome import InputError, listing
from job.telemetry.progress import progress

# In Meta's files, and no part of a critic: LM head, multi-token heads, a stored RoPE table.
NOT_LOADED = ("output.", "extra_heads.", "rope.")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_log = logging.getLogger(__name__)


def check_trunk(folder: str | Path) -> None:
    """Raise InputError unless the weights fit the architecture; reads no more than their index."""
    with torch.device("meta"):
        trunk = Trunk(read_architecture(folder))
    file = Path(folder) / WEIGHTS
    _check_tensors(dict(trunk.named_parameters()), open_weights(Path(folder)), file)


def load_trunk(
    trunk: Trunk, folder: str | Path, at_boundary: Callable[[], object] = lambda: None
) -> None:
    """Copy weights into a trunk's parameters, whole or sharded: a rank reads only its slices.

    `at_boundary` is called after each tensor, and may raise to end it.

    Raises:
        InputError: a tensor is missing, surplus or of another shape; the file cannot be read.
    """
    stored = open_weights(Path(folder))
    named = dict(trunk.named_parameters())
    _check_tensors(named, stored, Path(folder) / WEIGHTS)
    with progress("loading the trunk", len(named)) as advance:
        for done, (name, parameter) in enumerate(named.items(), 1):
            fill(parameter, stored[name])
            at_boundary()
            advance(done, "tensors")
    _log.info("loaded %d tensors from %s", len(named), folder)


def open_weights(folder: Path) -> Mapping[str, Tensor]:
    """The file's tensors, memory-mapped: bytes are read where they are used."""
    load = partial(torch.load, map_location="cpu", mmap=True, weights_only=True)
    return read_named(folder / WEIGHTS, load, Tensor)


def _check_tensors(
    named: Mapping[str, nn.Parameter], stored: Mapping[str, Tensor], file: Path
) -> None:
    wanted = {name: tuple(p.shape) for name, p in named.items()}
    found = {k: tuple(v.shape) for k, v in stored.items() if not k.startswith(NOT_LOADED)}
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not part of the model" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {found[name]}, {PARAMS} says {shape}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    problems += [
        f"{name} is stored as {stored[name].dtype}, {stored[name].layout}; weights are dense floats"
        for name in wanted.keys() & found.keys()
        if stored[name].dtype not in _DTYPES or stored[name].layout is not torch.strided
    ]
    if problems:
        head = f"{file}: {len(problems)} tensor(s) do not fit the model"
        raise InputError(head + listing(sorted(problems)))


def save_transformer(model: Transformer, folder: Path) -> None:
    """Write a language model in Meta's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    params = {k: v for k, v in sorted(asdict(model.config).items()) if v is not None}
    (folder / PARAMS).write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
    torch.save({k: v.detach().cpu() for k, v in model.state_dict().items()}, folder / WEIGHTS)
