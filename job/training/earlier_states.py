"""States before an earlier block, from which a run's own are computed by the blocks between.

A sweep over how many blocks are trained has them: the run that trains most has kept those of all
sequences, and the blocks between are frozen in a run that trains fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from job.data.packing import Batch
from job.data.state_shards import Shards, Stored, any_step
from job.distributed.world import World
from job.model.packed_layout import Reads
from job.model.prefix import Prefix
from job.training.cache_boundary import Boundary
from job.training.read_ahead import ReadAhead
from job.training.state_reader import StateReader


class EarlierStates:
    """Those of all sequences of a training before one block: nothing before it is run."""

    def __init__(self, boundary: Boundary, shards: Shards, world: World) -> None:
        self.block, self._shards = boundary.block, shards
        self._reader = StateReader(boundary, shards, world)
        self._reader.left_out = True
        self._ahead = ReadAhead(self._reader.read_all)

    def lacks(self, stored: Stored) -> bool:
        return bool((self._reader.find(_earlier(stored), any_step) < 0).any())

    def expect(self, coming: Sequence[Stored], step: int) -> None:
        """Read the states of these micro-batches from now on."""
        self._ahead.expect(map(_earlier, coming), step)

    def take(self, batch: Batch, reads: Reads, step: int) -> Prefix:
        """A micro-batch's states.

        Raises:
            StorageError: some cannot be read, and nothing here could compute them.
        """
        if batch.stored is None:
            return self._reader.prefix(batch, reads, None, compute=False)
        stored = _earlier(batch.stored)
        known = self._ahead.get(stored, step)
        return self._reader.prefix(replace(batch, stored=stored), reads, known, compute=False)

    def forget(self, step: int) -> None:
        """See `ReadAhead.forget`."""
        self._ahead.forget(step)

    def close(self) -> None:
        self._ahead.close()
        self._shards.close()


def _earlier(stored: Stored) -> Stored:
    assert stored.earlier is not None
    return stored.earlier
