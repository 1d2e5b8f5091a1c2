"""Trunk weights in Meta's layout: a folder with params.json and consolidated.pth."""

from __future__ import annotations

import json
import logging
import math
import pickle
import reprlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from job.model.shards import fill
from job.model.transformer import (
    RopeScaling,
    Transformer,
    TransformerConfig,
    Trunk,
    config_field_names,
)
from job.outcome import InputError, listing
from job.telemetry.progress import progress

PARAMS, WEIGHTS = "params.json", "consolidated.pth"
# In Meta's files, and no part of a critic: LM head, multi-token heads, a stored RoPE table.
NOT_LOADED = ("output.", "extra_heads.", "rope.")
# Keys of params.json that say nothing about the architecture.
_IGNORED_PARAMS = {"use_scaled_rope", "rope_scaling", "max_seq_len", "max_batch_size"}
_EMBEDDING = "tok_embeddings.weight"
_LARGEST_SIZE = 10**7  # far above any model's, and nothing overflows
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_log = logging.getLogger(__name__)


def read_architecture(folder: str | Path) -> TransformerConfig:
    """The architecture in a folder's params.json.

    Raises:
        InputError: no such file, or it lacks, misspells or contradicts something.
    """
    file = Path(folder) / PARAMS
    params = _read_params(file)
    unknown = sorted(params.keys() - config_field_names() - _IGNORED_PARAMS)
    if unknown:
        raise InputError(f"{file}: unknown parameter(s) {', '.join(unknown[:10])}")
    known = {k: v for k, v in params.items() if k in config_field_names()}
    if known.get("vocab_size", -1) == -1:  # Llama 1 and 2 leave it to the tokenizer
        known["vocab_size"] = _stored_vocabulary(Path(folder))
    known["rope_scaling"] = _rope_scaling(file, params)
    _check_values(file, known, TransformerConfig)
    required = {f.name for f in fields(TransformerConfig) if f.default is MISSING}
    if missing := sorted(required - known.keys()):
        raise InputError(f"{file}: no value for {', '.join(missing)}")
    try:
        return TransformerConfig(**known)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None


def _read_params(file: Path) -> dict[str, Any]:
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file}: cannot read the architecture: {error.strerror}; "
            "model.path must be a folder with params.json and consolidated.pth"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(params, dict):
        raise InputError(f"{file}: the architecture is a JSON object")
    return params


def _check_values(file: Path, values: Mapping[str, Any], schema: type) -> None:
    """Raise InputError unless each value has its field's type, and each number a possible size."""
    types = {f.name: str(f.type).partition(" | ") for f in fields(schema)}
    for name, value in values.items():
        kind, _, optional = types[name]
        if optional and value is None:
            continue
        found = reprlib.repr(value)
        if kind == "bool" and not isinstance(value, bool):
            raise InputError(f"{file}: {name} must be true or false, not {found}")
        if kind == "int" and not (type(value) is int and 0 < value <= _LARGEST_SIZE):
            raise InputError(
                f"{file}: {name} must be an integer from 1 to {_LARGEST_SIZE}, not {found}"
            )
        if kind == "float" and not (type(value) in (int, float) and 0 < value < math.inf):
            raise InputError(f"{file}: {name} must be a positive number, not {found}")


def _rope_scaling(file: Path, params: dict[str, Any]) -> RopeScaling | None:
    scaled, values = params.get("use_scaled_rope", False), params.get("rope_scaling")
    if not isinstance(scaled, bool):
        raise InputError(f"{file}: use_scaled_rope must be true or false, not {scaled!r}")
    if values is None:
        return RopeScaling() if scaled and "rope_scaling" not in params else None
    known = [f.name for f in fields(RopeScaling)]
    if not isinstance(values, dict) or not values.keys() <= set(known):
        found = reprlib.repr(values)
        raise InputError(f"{file}: rope_scaling must hold {', '.join(known)}; not {found}")
    _check_values(file, values, RopeScaling)
    scaling = RopeScaling(**values)
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise InputError(f"{file}: rope_scaling: high_freq_factor must exceed low_freq_factor")
    return scaling


def _stored_vocabulary(folder: Path) -> int:
    embedding = open_weights(folder).get(_EMBEDDING)
    if embedding is None or embedding.dim() != 2:
        raise InputError(f"{folder / WEIGHTS}: no matrix {_EMBEDDING} to read vocab_size from")
    return embedding.shape[0]


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
    file = folder / WEIGHTS
    try:
        with file.open("rb") as stream:
            zipped = zipfile.is_zipfile(stream)
    except OSError as error:
        raise InputError(
            f"{file}: cannot read the weights: {error.strerror}; "
            f"model.path must hold {PARAMS} and {WEIGHTS}"
        ) from None
    if not zipped:
        raise InputError(f"{file}: truncated, or no zip file as torch.save writes it")
    try:
        stored = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{file}: damaged, or holds more than tensors; code in a weight file is never run"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{file}: not a readable weight file: {reason}") from None
    if not isinstance(stored, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in stored.items()
    ):
        raise InputError(f"{file}: expected a dictionary of named tensors")
    return stored


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
