"""Trunk weights in files of either layout: checked, read by slices, and written."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.common.progress import progress
from job.model import hf_config
from job.model.architecture import TransformerConfig
from job.model.architecture_file import check_window, read_architecture
from job.model.hf_files import open_hugging_face
from job.model.layout import hugging_face_name, to_hugging_face
from job.model.meta_files import open_meta
from job.model.safetensors_file import save_tensors
from job.model.shards import local_shard, shard_rows
from job.model.stored import Shapes, StoredTensor, raise_misfits
from job.model.transformer import Transformer, Trunk
from job.model.trunk_folder import (
    CONFIG,
    PARAMS,
    SAFETENSORS,
    WEIGHTS,
    Layout,
    TrunkFolder,
    find_trunk,
)

_log = logging.getLogger(__name__)


def check_trunk(folder: str | Path, max_length: int) -> None:
    """Raise InputError unless the weights fit the architecture; reads no more than their index.

    Args:
        max_length: tokens of the longest sequence, which a sliding window must not be less than.
    """
    check_window(folder, max_length)
    config = read_architecture(folder)
    _check_tensors(trunk_shapes(config), open_weights(folder, config), find_trunk(folder))


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
    _check_tensors(trunk_shapes(trunk.config), stored, find_trunk(folder))
    in_order = sorted(named, key=lambda name: stored[name].place)  # the disk reads on
    with progress("loading the trunk", len(named)) as advance:
        for done, name in enumerate(in_order, 1):
            _copy(stored[name], named[name])
            at_boundary()
            advance(done, "tensors")
    _log.info("loaded %d tensors from %s", len(named), folder)


def _copy(tensor: StoredTensor, parameter: Tensor) -> None:
    """Copy this rank's rows, with no more than a piece of the file in memory beside them."""
    rows, target = shard_rows(parameter), local_shard(parameter)
    for piece in tensor.pieces(rows):
        place, content = (
            target[piece.start - rows.start : piece.stop - rows.start],
            tensor.rows(piece),
        )
        if content.dtype is torch.float16 and place.dtype is torch.bfloat16:
            # The same bits in a quarter of the time; on its way to a GPU, too, torch converts here.
            content = content.float()
        place.copy_(content)
        tensor.release(piece)


def trunk_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a trunk, by Meta's names."""
    with torch.device("meta"):
        trunk = Trunk(config)
    return {name: tuple(parameter.shape) for name, parameter in trunk.named_parameters()}


def open_weights(folder: str | Path, config: TransformerConfig) -> dict[str, StoredTensor]:
    """The tensors of a trunk that a critic uses, by Meta's names, memory-mapped and unread.

    One that Meta's layout does not have is under a name that no trunk has.

    Raises:
        InputError: a file is missing or damaged, files do not agree, or do not fit together.
    """
    trunk = find_trunk(folder)
    if trunk.layout is Layout.META:
        return open_meta(trunk, trunk_shapes(config))
    return open_hugging_face(trunk, config.head_width)


def _check_tensors(wanted: Shapes, stored: Mapping[str, StoredTensor], trunk: TrunkFolder) -> None:
    stored_name = hugging_face_name if trunk.layout is Layout.HUGGING_FACE else str
    problems = [f"{stored_name(name)} is missing" for name in wanted.keys() - stored.keys()]
    for name, tensor in stored.items():
        found, shape, where = tensor.shape, wanted.get(name), tensor.files[0].name
        if shape is None:
            problems.append(f"{tensor.name} in {where} is not part of the model")
        elif found != shape:
            problems.append(
                f"{tensor.name} in {where} has shape {found}, {trunk.description.name} says {shape}"
            )
        if shape is not None and not tensor.is_dense_floats:
            layout = tensor.parts[0].layout
            problems.append(
                f"{tensor.name} in {where} is stored as {tensor.dtype}, {layout}; "
                "weights are dense floats"
            )
    files = trunk.weight_files()
    raise_misfits(files[0] if len(files) == 1 else trunk.index or trunk.folder, problems)


# Writing


def save_transformer(model: Transformer, folder: Path) -> None:
    """Write a language model in Meta's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    params = {k: v for k, v in sorted(asdict(model.config).items()) if v is not None}
    _write_json(folder / PARAMS, params)
    with (folder / WEIGHTS).open("wb") as stream:  # whose errors are the system's
        torch.save({k: v.detach().cpu() for k, v in model.state_dict().items()}, stream)


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
    save_tensors(tensors, folder / SAFETENSORS)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
