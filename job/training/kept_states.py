"""States that scoring reads where a training, or `job.cache build`, has kept them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from job.common.schema import PrefixCacheMode
from job.data.packing import Batch, Indices, Packer
from job.data.state_shards import Shards, Stored, any_step
from job.distributed.world import World
from job.model.packed_layout import Reads
from job.model.prefix import Prefix
from job.run.trained import TrainedCritic
from job.training.agreement import Mask, seen_by_all
from job.training.cache_boundary import Boundary
from job.training.cache_folders import touch
from job.training.read_ahead import ReadAhead
from job.training.state_reader import StateReader

_log = logging.getLogger("job.score")


@dataclass(frozen=True)
class _Place:
    """Where states of a set are, at one boundary."""

    boundary: Boundary
    shards: Shards
    stored: Stored
    there: Mask  # of which of the set's sequences


class KeptStates:
    """What is there of a set's states; on every rank the same.

    Attributes:
        there: bool [n], of which sequences.
    """

    def __init__(self, place: _Place, packer: Packer, world: World) -> None:
        self._place, self._packer, self._world = place, packer, world
        self.there, self._read_whole = place.there, 0
        self._reader = StateReader(place.boundary, place.shards, world)
        self._ahead = ReadAhead(self._reader.read_all)
        packer.stored = place.stored

    @classmethod
    def find(
        cls, trained: TrainedCritic, packer: Packer, start: int, world: World
    ) -> KeptStates | None:
        """Those of the sequences from `start` on, at the boundary where most are.

        None where there are none: then not even their keys are computed. Every rank must take part.
        """
        places = _places(trained, packer, world)
        there = seen_by_all(world, {place.boundary.block: place.there for place in places})
        places = [replace(place, there=there[place.boundary.block]) for place in places]
        best = max(places, key=lambda place: int(place.there[start:].sum()), default=None)
        if best is None or not best.there[start:].any():
            return None
        touch(best.shards.folder)
        return cls(best, packer, world)

    def leave_out(self, start: int) -> int:
        """How many blocks, and the embeddings, scoring from `start` on can do without."""
        self._reader.left_out = bool(self.there[start:].all())
        return self._place.boundary.block if self._reader.left_out else 0

    def expect(self, plan: Sequence[Indices]) -> None:
        """Read the states of these micro-batches from now on."""
        self._ahead.expect(map(self._packer.stored_of, plan), 0)

    def take(self, batch: Batch, reads: Reads) -> Prefix:
        """A micro-batch's states, which are all there.

        Raises:
            StorageError: some cannot be read, and nothing here could compute them.
        """
        known = None if batch.stored is None else self._ahead.get(batch.stored, 0)
        if known is not None and bool(known[1].all()):
            self._read_whole += len(batch.lengths)
        return self._reader.prefix(batch, reads, known, compute=False)

    def tell(self, n: int) -> None:
        """Log how many of `n` sequences' states were read; every rank must take part."""
        (read,) = self._world.sum([self._read_whole])
        if self._world.is_main:
            text = "prefix cache: states of %d of %d sequences (%.0f %%) were read: %s"
            _log.info(text, read, n, 100 * read / n, self._place.shards.folder)

    def close(self) -> None:
        self._ahead.close()
        self._place.shards.close()


def _places(trained: TrainedCritic, packer: Packer, world: World) -> list[_Place]:
    """Where states of the packer's set are as this rank sees it, the deepest boundary first.

    Blocks between an earlier one and that of the critic are run.
    """
    deepest = Boundary.of(trained.config, trained.architecture)
    if trained.config.training.prefix_cache is PrefixCacheMode.none:
        return []
    root, base = Path(trained.config.prefix_cache_folder), trained.facts["identity"]["base"]
    found: list[_Place] = []
    keys: dict[bool, Stored] = {}
    for block in range(deepest.block, 0, -1):
        boundary = replace(deepest, block=block)
        shards = boundary.shards(root, base, world.device)
        if not shards.folder.is_dir():
            continue
        shards.refresh()
        kind = boundary.of_read_rows
        stored = keys[kind] = keys.get(kind) or boundary.stored(packer)
        there = StateReader(boundary, shards, world).find(stored, any_step) >= 0
        found.append(_Place(boundary, shards, stored, there))
    return found
