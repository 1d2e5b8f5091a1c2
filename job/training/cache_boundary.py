"""Before which block a trunk's states are kept, and by which keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from job.common.schema import CriticConfig
from job.data.packing import Indices, Packer, first_valued
from job.data.state_shards import Shards, Stored, on_disk, sequence_keys
from job.model.architecture import TransformerConfig
from job.model.parameters import count_frozen
from job.training.cache_folders import folder_of

FORMAT = 1  # raise it when states of the same facts become others


@dataclass(frozen=True)
class Boundary:
    """Which states are kept.

    Attributes:
        block: they are those before it, or behind the last one, where all are frozen.
        n_blocks: of the trunk.
        width: d.
        dtype: as the blocks have them.
    """

    block: int
    n_blocks: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: CriticConfig, architecture: TransformerConfig) -> Boundary:
        n = max(stage.num_unfrozen_layers for stage in config.training.all_stages)
        n_blocks = architecture.n_trunk_layers
        mixed = config.distributed.fsdp.mixed_precision
        return cls(
            count_frozen(n, n_blocks),
            n_blocks,
            architecture.dim,
            torch.bfloat16 if mixed else torch.float32,
        )

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def disk_bytes(self, stored: Stored) -> int:
        """What the states of these sequences take on the disk."""
        return int(on_disk(stored.rows * self.row_bytes).sum())

    @property
    def of_read_rows(self) -> bool:
        """Whether only rows are kept at which values are read."""
        return self.block == self.n_blocks

    def facts(self, base: str, device: torch.device) -> dict[str, Any]:
        """All that states depend on, beside their tokens."""
        return {
            "format": FORMAT,
            "base": base,
            "block": self.block,
            "of_read_rows": self.of_read_rows,
            "width": self.width,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": "varlen" if device.type == "cuda" else "spans",
            "torch": torch.__version__.partition("+")[0],
        }

    def shards(self, root: Path, base: str, device: torch.device) -> Shards:
        """What can be read of these states in a folder of caches, once they are taken in."""
        facts = self.facts(base, device)
        return Shards(folder_of(root, facts), facts, self.row_bytes)

    def stored(self, packer: Packer) -> Stored:
        """The keys of all sequences of a set."""
        data = packer.data
        first = np.zeros(len(data), np.int64)
        if self.of_read_rows:
            first = first_valued(data, np.arange(len(data)), packer.prompt_value)
        return Stored(sequence_keys(data.sequences(), first), data.lengths - first)


def chosen_rows(packer: Packer) -> Indices:
    """The sequences of a packer's units, in order."""
    return np.unique(packer.units[packer.units >= 0])


def wanted(packer: Packer) -> Stored:
    """What these need."""
    assert packer.stored is not None
    return packer.stored[chosen_rows(packer)]
