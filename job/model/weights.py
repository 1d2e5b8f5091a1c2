"""Trunk weights in Meta's layout: a folder with params.json and consolidated.pth."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from job.model.transformer import (
    RopeScaling,
    Transformer,
    TransformerConfig,
    Trunk,
    config_field_names,
)
from job.outcome import InputError

PARAMS, WEIGHTS = "params.json", "consolidated.pth"
# In Meta's files, and no part of a critic: LM head, multi-token heads, a stored RoPE table.
NOT_LOADED = ("output.", "extra_heads.", "rope.")
# Keys of params.json that say nothing about the architecture.
_IGNORED_PARAMS = {"use_scaled_rope", "rope_scaling", "max_seq_len", "max_batch_size"}
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
        raise InputError(f"{file}: unknown parameter(s) {', '.join(unknown)}")
    known = {k: v for k, v in params.items() if k in config_field_names()}
    if known.get("vocab_size", -1) == -1:  # Llama 1 and 2 leave it to the tokenizer
        known["vocab_size"] = _open_weights(Path(folder))["tok_embeddings.weight"].shape[0]
    if params.get("use_scaled_rope") and "rope_scaling" not in params:
        known["rope_scaling"] = RopeScaling()
    elif isinstance(params.get("rope_scaling"), dict):
        known["rope_scaling"] = _rope_scaling(file, params["rope_scaling"])
    try:
        return TransformerConfig(**known)
    except (TypeError, ValueError) as error:
        reason = str(error).replace("TransformerConfig.__init__() ", "")
        raise InputError(f"{file}: {reason}") from None


def _read_params(file: Path) -> dict[str, Any]:
    try:
        params = json.loads(file.read_text())
    except OSError as error:
        raise InputError(
            f"{file}: cannot read the architecture: {error.strerror}; "
            "model.path must be a folder with params.json and consolidated.pth"
        ) from None
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(params, dict):
        raise InputError(f"{file}: the architecture is a JSON object")
    return params


def _rope_scaling(file: Path, values: dict[str, Any]) -> RopeScaling:
    try:
        return RopeScaling(**values)
    except TypeError as error:
        raise InputError(f"{file}: rope_scaling: {error}") from None


def load_trunk(
    trunk: Trunk, folder: str | Path, *, frozen_dtype: torch.dtype, device: torch.device
) -> None:
    """Fill a trunk built on the meta device: trainable weights as float32, frozen ones as given.

    Raises:
        InputError: a tensor is missing, surplus or of another shape; the file cannot be read.
    """
    stored = _open_weights(Path(folder))
    _check_tensors(trunk, stored, Path(folder) / WEIGHTS)
    for name, parameter in list(trunk.named_parameters()):
        dtype = torch.float32 if parameter.requires_grad else frozen_dtype
        value = stored[name].to(device=device, dtype=dtype, copy=True)
        _replace(trunk, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    _log.info("loaded %d tensors from %s", sum(1 for _ in trunk.parameters()), folder)


def _replace(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


def _open_weights(folder: Path) -> Mapping[str, Tensor]:
    """The file's tensors, memory-mapped: bytes are read where they are used."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise InputError(f"{file}: no such file; model.path must hold params.json and {WEIGHTS}")
    try:
        stored = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file}: not a readable weight file: {reason}") from None
    if not isinstance(stored, dict) or not all(isinstance(v, Tensor) for v in stored.values()):
        raise InputError(f"{file}: expected a dictionary of tensors")
    return stored


def _check_tensors(trunk: Trunk, stored: Mapping[str, Tensor], file: Path) -> None:
    wanted = {name: tuple(p.shape) for name, p in trunk.named_parameters()}
    found = {k: tuple(v.shape) for k, v in stored.items() if not k.startswith(NOT_LOADED)}
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not part of the model" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {found[name]}, {PARAMS} says {shape}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise InputError(f"{file}: {len(problems)} tensor(s) do not fit the model\n  {shown}")


def save_transformer(model: Transformer, folder: Path) -> None:
    """Write a language model in Meta's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    params = {
        name: getattr(model.config, name)
        for name in sorted(config_field_names())
        if getattr(model.config, name) is not None
    }
    (folder / PARAMS).write_text(json.dumps(params, indent=2) + "\n")
    torch.save({k: v.detach().cpu() for k, v in model.state_dict().items()}, folder / WEIGHTS)
