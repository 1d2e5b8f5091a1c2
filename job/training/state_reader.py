"""Frozen blocks' states as they come from the disk into a micro-batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from job.common.errors import StorageError
from job.data.packing import Batch
from job.data.state_shards import Seen, Shards, Stored, any_step
from job.distributed.world import World
from job.model.packed_layout import Reads, to_device
from job.model.prefix import Prefix
from job.training.cache_boundary import Boundary
from job.training.cache_rows import Rows
from job.training.read_ahead import Known


class StateReader:
    """Finds and reads the states of sequences.

    Attributes:
        left_out: whether the blocks are not there that could compute what cannot be read.
    """

    def __init__(self, boundary: Boundary, shards: Shards, world: World) -> None:
        self._boundary, self._shards, self._world = boundary, shards, world
        self.left_out = False

    def find(self, stored: Stored, seen: Seen) -> NDArray[np.int64]:
        """The entry of each sequence, of those whose steps are seen, or -1."""
        found = self._shards.find(stored.keys, seen)
        there = found >= 0
        there[there] = self._shards.rows(found[there]) == stored.rows[there]
        return np.where(there, found, -1)

    def read(self, stored: Stored, found: NDArray[np.int64]) -> Known | None:
        """States of these sequences, end to end, and which of their rows are known; or nothing.

        What cannot be read is not known.
        """
        if (found < 0).all():
            return None
        n_rows = int(stored.rows.sum())
        states = torch.zeros(
            n_rows,
            self._boundary.width,
            dtype=self._boundary.dtype,
            pin_memory=self._world.device.type == "cuda",
        )
        content = states.view(torch.uint8).numpy()
        which = np.zeros(n_rows, np.bool_)
        ends = np.cumsum(stored.rows)
        for entry, start, stop in zip(found, ends - stored.rows, ends, strict=True):
            if entry >= 0:
                into = content[start:stop].reshape(-1).data
                which[start:stop] = self._shards.read(int(entry), into)
        return states, torch.from_numpy(which)

    def read_all(self, stored: Stored, _: int) -> Known | None:
        """As `read`, of whatever entries there are, as `ReadAhead` asks."""
        return self.read(stored, self.find(stored, any_step))

    def prefix(self, batch: Batch, reads: Reads, known: Known | None, *, compute: bool) -> Prefix:
        """What is known of a micro-batch's states.

        Args:
            reads: what of it is read.
            known: what `read` gave of it.
            compute: whether the frozen blocks are run, since some rank lacks some of its states.

        Raises:
            StorageError: states cannot be read that all ranks relied on.
        """
        prefix, device = Prefix(self._boundary.block), batch.tokens.device
        if batch.stored is None:  # nothing that counts
            prefix.states = None if compute and not self.left_out else self._no_states(batch)
            return prefix
        is_whole = known is not None and bool(known[1].all())
        if not is_whole and (self.left_out or (not compute and self._world.size > 1)):
            raise StorageError(
                f"{self._shards.folder}: states that are relied on cannot be read, as the lines "
                "above say; the next attempt computes what could be set aside"
            )
        if known is None:
            return prefix
        rows = Rows.of(batch, reads, of_read_rows=self._boundary.of_read_rows)
        states, which = (rows.in_stream(to_device(part, device)) for part in known)
        if is_whole and not compute:
            prefix.states = states
        else:
            prefix.known = states, which
        return prefix

    def _no_states(self, batch: Batch) -> Tensor:
        rows = 1 if self._boundary.of_read_rows else len(batch.tokens)
        shape = (rows, self._boundary.width)
        return torch.zeros(shape, dtype=self._boundary.dtype, device=batch.tokens.device)
