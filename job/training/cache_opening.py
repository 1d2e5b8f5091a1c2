"""What is settled about a training's prefix cache before it is read or written."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from job.common.errors import InputError
from job.common.places import free_bytes
from job.common.schema import CriticConfig, PrefixCacheMode
from job.data.packing import Packer
from job.data.state_shards import Shards, Stored, Writer, remove_leftovers
from job.distributed.world import World
from job.model.architecture_file import read_architecture
from job.run.directory import RunDirectory
from job.training.cache_boundary import Boundary, wanted
from job.training.cache_folders import cache_folder, folder_of, used_bytes
from job.training.cache_record import RECORD, Record
from job.training.data import CriticData
from job.training.prefix_cache import PrefixCache

FREE_SHARE = 0.8  # of what is free, where no size is given
_log = logging.getLogger("job.train")


@contextmanager
def opened_cache(
    config: CriticConfig,
    data: CriticData,
    base: str,
    run: RunDirectory,
    world: World,
    attempt: int,
) -> Iterator[PrefixCache | None]:
    """The cache of a run as it is configured; None where there is to be none.

    Every rank must take part. The sets know afterwards by which keys their states are kept.

    Args:
        base: the fingerprint of the trunk.

    Raises:
        InputError: it is to keep more than its disk or `training.prefix_cache_gb` takes.
    """
    boundary = Boundary.of(config, read_architecture(config.model.path))
    if config.training.prefix_cache is PrefixCacheMode.none or boundary.block == 0:
        yield None
        return
    opening = Opening(config, data, base, world)
    record = world.main_decides(lambda: _settle(opening, boundary, run))
    boundary = replace(boundary, block=record.block)
    shards = opening.shards(boundary)
    writer = Writer(
        shards.folder,
        f"{record.name}-{attempt:04}-{world.rank:05}",
        boundary.facts(base, world.device),
        may_take=opening.room() / world.size,
    )
    opening.name_sequences(boundary)
    with closing(PrefixCache(boundary, shards, writer, record, world, run)) as cache:
        yield cache


@dataclass(frozen=True)
class Opening:
    """What the caches of one training at any boundary share."""

    config: CriticConfig
    data: CriticData
    base: str
    world: World
    # by whether only read rows are kept: all tokens are gone through for it
    _stored: dict[bool, dict[str, Stored]] = field(default_factory=dict)

    @property
    def packers(self) -> dict[str, Packer]:
        return {"validation": self.data.validation, "training": self.data.train}

    def shards(self, boundary: Boundary) -> Shards:
        facts = boundary.facts(self.base, self.world.device)
        return Shards(folder_of(cache_folder(self.config), facts), facts, boundary.row_bytes)

    def name_sequences(self, boundary: Boundary) -> None:
        """Let the sets know by which keys their states are kept."""
        kind, packers = boundary.of_read_rows, self.packers
        if kind not in self._stored:
            self._stored[kind] = {name: boundary.stored(p) for name, p in packers.items()}
        for name, packer in packers.items():
            packer.stored = self._stored[kind][name]

    def missing_bytes(self, boundary: Boundary) -> dict[str, int]:
        """How much of each set's states is not there yet, whoever has written the rest."""
        shards = self.shards(boundary)
        shards.refresh()
        self.name_sequences(boundary)
        return {n: _missing_bytes(p, boundary, shards) for n, p in self.packers.items()}

    def room(self) -> float:
        """Bytes that may still be written."""
        root, given = cache_folder(self.config), self.config.training.prefix_cache_gb
        free = FREE_SHARE * free_bytes(root)
        return free if given is None else min(free, given * 1e9 - used_bytes(root))


def _settle(opening: Opening, boundary: Boundary, run: RunDirectory) -> Record:
    """What the run has settled, or settles now, on rank 0."""
    mode, record = opening.config.training.prefix_cache, Record.read(run)
    if record is None:
        missing, boundary = _best(opening, boundary)
        names = opening.shards(boundary)
        names.refresh()
        record = Record(uuid.uuid4().hex[:12], names.names, boundary.block, None, None)
    else:
        missing = opening.missing_bytes(replace(boundary, block=record.block))
    if mode is not PrefixCacheMode.auto:
        record.validation, record.training = True, mode is PrefixCacheMode.all
    folder = opening.shards(replace(boundary, block=record.block)).folder
    room = opening.room()
    for name, size in missing.items():
        if getattr(record, name) is not False and size > room:
            _refuse(mode, name, size, room, folder)
            setattr(record, name, False)
    remove_leftovers(folder, record.name)
    with suppress(OSError):
        os.utime(folder)  # it is used
    run.write_json(RECORD, vars(record))
    return record


def _best(opening: Opening, boundary: Boundary) -> tuple[dict[str, int], Boundary]:
    """This boundary, or one before it at which all states are there, as they are in a sweep.

    The blocks between are run then.
    """
    missing = opening.missing_bytes(boundary)
    if any(missing.values()):
        for block in range(boundary.block - 1, 0, -1):
            other = replace(boundary, block=block)
            if opening.shards(other).folder.exists():
                theirs = opening.missing_bytes(other)
                if not any(theirs.values()):
                    return theirs, other
    return missing, boundary


def _missing_bytes(packer: Packer, boundary: Boundary, shards: Shards) -> int:
    chosen = wanted(packer)
    lacking = shards.find(chosen.keys, lambda steps: steps > -np.inf) < 0
    return int(chosen.rows[lacking].sum()) * boundary.row_bytes


def _refuse(mode: PrefixCacheMode, name: str, size: int, room: float, folder: Path) -> None:
    text = (
        f"the states of the {name} data take {size / 1e9:,.3f} GB in {folder}, and there is room "
        f"for {room / 1e9:,.3f} GB (training.prefix_cache_dir, training.prefix_cache_gb)"
    )
    if mode is not PrefixCacheMode.auto:
        raise InputError(f"training.prefix_cache={mode.value}: {text}")
    _log.info("prefix cache: none, for %s", text)
