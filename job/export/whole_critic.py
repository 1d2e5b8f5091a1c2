"""A critic's parameters, frozen and trained, one at a time; its trunk in files of either layout.

Nothing here holds a whole model in memory: frozen tensors are views of the trunk's files, and
trained ones are read where they are written.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from job.model.architecture import TransformerConfig
from job.model.layout import to_hugging_face
from job.model.parameters import MASTER_BYTES
from job.model.safetensors_file import save_tensors
from job.model.stored import StoredTensor
from job.model.trunk_folder import CONFIG, INDEX, PARAMS, SAFETENSORS, WEIGHTS
from job.model.weights import open_weights, trunk_shapes

SHARD_BYTES = 2 * 10**9  # of a file, unless one tensor is larger
_TRUNK, _HEAD = "trunk.", "value_head."


class Trained(Protocol):
    """Trained parameters by the critic's names."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> Tensor: ...


class WholeCritic:
    """The parameters of a critic: its trunk's, and in their place those that were trained.

    Args:
        trunk: the folder of its trunk.
        at_boundary: called after each tensor that is written, with its name; may raise.
    """

    def __init__(
        self,
        trunk: str | Path,
        config: TransformerConfig,
        trained: Trained,
        at_boundary: Callable[[str], object] = lambda name: None,
    ) -> None:
        self.config, self._trained, self._at_boundary = config, trained, at_boundary
        self._stored: dict[str, StoredTensor] = open_weights(trunk, config)
        self.names = list(trunk_shapes(config))  # of the trunk, in Meta's layout

    def head(self) -> dict[str, Tensor]:
        """The value head: `weight` [1, d], and `bias` [1] if it has one."""
        named = (name for name in self._trained.shapes if name.startswith(_HEAD))
        return {name.removeprefix(_HEAD): self._trained.read(name) for name in named}

    def trunk(self, name: str) -> Tensor:
        """One tensor of the trunk."""
        if self.is_trained(name):
            return self._trained.read(_TRUNK + name)
        stored = self._stored[name]
        return stored.rows(slice(0, stored.shape[0]))

    def is_trained(self, name: str) -> bool:
        return _TRUNK + name in self._trained.shapes

    def trunk_bytes(self, name: str) -> int:
        stored = self._stored[name]
        itemsize = MASTER_BYTES if self.is_trained(name) else stored.dtype.itemsize
        return math.prod(stored.shape) * itemsize

    def lies_alone(self, name: str) -> bool:
        """Whether a tensor is all of a mapped storage: of another, torch would save the whole."""
        stored = self._stored[name]
        part = stored.parts[0]
        as_it_is = stored.mapped and len(stored.parts) == 1 and stored.head_width is None
        alone = part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
        return as_it_is and alone and not self.is_trained(name)

    def written(self, name: str) -> None:
        """Give the memory of a tensor that has been written back to the system."""
        stored = self._stored[name]
        stored.release(slice(0, stored.shape[0]))
        self._at_boundary(name)


def write_hugging_face(
    critic: WholeCritic, config: Mapping[str, Any], head: Mapping[str, Tensor], folder: Path
) -> None:
    """Write config.json and safetensors files, `head` under the names it is given with."""
    text = json.dumps(dict(config), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    shards: dict[Path, list[str]] = {}
    total = 0
    for names in _grouped(critic):
        named = {name: critic.trunk(name) for name in names}
        tensors = to_hugging_face(named, critic.config.head_width)
        if not shards:
            tensors |= head
        file = folder / f"{len(shards)}"
        save_tensors(tensors, file)
        shards[file] = list(tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())
        for name in names:
            critic.written(name)
    _name_shards(folder, shards, total)


def _grouped(critic: WholeCritic) -> Iterator[list[str]]:
    """The trunk's names in groups of at most SHARD_BYTES."""
    group: list[str] = []
    room = SHARD_BYTES
    for name in critic.names:
        nbytes = critic.trunk_bytes(name)
        if group and nbytes > room:
            yield group
            group, room = [], SHARD_BYTES
        group.append(name)
        room -= nbytes
    yield group


def _name_shards(folder: Path, shards: Mapping[Path, list[str]], total: int) -> None:
    if len(shards) == 1:
        (file,) = shards
        file.rename(folder / SAFETENSORS)
        return
    stem = SAFETENSORS.removesuffix(".safetensors")
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(shards.items(), 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        file.rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_meta(critic: WholeCritic, folder: Path) -> None:
    """Write params.json and consolidated.pth of the trunk; it has no language-model head."""
    n = critic.config.n_trunk_layers
    params = asdict(replace(critic.config, n_layers=n, n_future_tokens=1))
    params = {name: value for name, value in sorted(params.items()) if value is not None}
    (folder / PARAMS).write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
    with Spill(folder / ".spill") as spill:
        tensors = {}
        for name in critic.names:
            tensor = critic.trunk(name)
            tensors[name] = tensor if critic.lies_alone(name) else spill(tensor)
            critic.written(name)
        with (folder / WEIGHTS).open("wb") as stream:  # whose errors are the system's
            torch.save(tensors, stream)


class Spill:
    """Tensors that wait in files, memory-mapped, until they are written all together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def __enter__(self) -> Spill:
        self._folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder)

    def __call__(self, tensor: Tensor) -> Tensor:
        """The same tensor, in a file of its own."""
        self._count += 1
        file = self._folder / f"{self._count}"
        # as bytes, since numpy has no bfloat16
        file.write_bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        mapped = torch.from_file(str(file), size=tensor.numel(), dtype=tensor.dtype)
        return mapped.reshape(tensor.shape)
