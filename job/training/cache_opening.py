"""What is settled about a training's prefix cache before it is read or written."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from job.common.errors import InputError, file_error
from job.common.places import free_bytes, on_one_disk, write_problem
from job.common.schema import CriticConfig, PrefixCacheMode
from job.data.packing import Packer
from job.data.state_shards import Shards, Stored, Writer, remove_leftovers
from job.distributed.world import World
from job.model.architecture_file import read_architecture
from job.model.parameters import count_configured, run_bytes
from job.run.committed import still_to_come
from job.run.directory import RunDirectory
from job.training.cache_boundary import Boundary, wanted
from job.training.cache_folders import touch, used_bytes, useless_bytes
from job.training.cache_record import RECORD, Record
from job.training.data import CriticData
from job.training.earlier_states import EarlierStates
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
        InputError: it is to keep more than its disk or `training.prefix_cache_gb` takes, or its
            folder takes nothing.
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
        may_take=opening.room(),  # where all ranks' states together were found to fit
        leave_free=opening.reserve(),
    )
    record.take_in(shards)
    earlier = _earlier_states(opening, boundary, record)
    with closing(PrefixCache(boundary, shards, writer, record, world, run, earlier)) as cache:
        yield cache


def _earlier_states(opening: Opening, boundary: Boundary, record: Record) -> EarlierStates | None:
    """Those that the run began with, while they are all there; every rank must take part."""
    opening.name_sequences(boundary)
    if record.earlier is None:
        return None
    before, packers = replace(boundary, block=record.earlier), opening.packers.values()
    shards = opening.shards(before)
    shards.refresh(given=record.earlier_given)
    for packer, stored in zip(packers, opening.stored(before).values(), strict=True):
        assert packer.stored is not None
        packer.stored = replace(packer.stored, earlier=stored)
    states = EarlierStates(before, shards, opening.world)
    lacking = any(states.lacks(wanted(packer)) for packer in packers)
    if not opening.world.sum([lacking])[0]:
        return states
    states.close()
    opening.name_sequences(boundary)
    if opening.world.is_main:
        text = "prefix cache: states before block %d that this run began with are gone (%s): "
        _log.warning(text + "all frozen blocks are run from now on", before.block, shards.folder)
    return None


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
        return boundary.shards(Path(self.config.prefix_cache_folder), self.base, self.world.device)

    def stored(self, boundary: Boundary) -> dict[str, Stored]:
        """The keys of each set."""
        kind, packers = boundary.of_read_rows, self.packers
        if kind not in self._stored:
            self._stored[kind] = {name: boundary.stored(p) for name, p in packers.items()}
        return self._stored[kind]

    def name_sequences(self, boundary: Boundary) -> None:
        """Let the sets know by which keys their states are kept."""
        for name, packer in self.packers.items():
            packer.stored = self.stored(boundary)[name]

    def missing_bytes(self, boundary: Boundary, record: Record | None = None) -> dict[str, int]:
        """How much of each set's states is not there yet, on the disk.

        Args:
            record: of the run that is to read the rest; without one, whoever has written it counts.
        """
        shards = self.shards(boundary)
        if record is None:
            shards.refresh()
        else:
            record.take_in(shards)
        self.name_sequences(boundary)
        return {n: _missing_bytes(p, boundary, shards) for n, p in self.packers.items()}

    def room(self) -> float:
        """Bytes that may still be written."""
        root, given = Path(self.config.prefix_cache_folder), self.config.training.prefix_cache_gb
        there = free_bytes(root)
        free = min(FREE_SHARE * there, there - self.reserve())
        if given is not None:
            free = min(free, given * 1e9 - used_bytes(root))
        return max(0.0, free)

    def told(self, room: float) -> str:
        """What is said of the room that is left, and of what could make some."""
        root = Path(self.config.prefix_cache_folder)
        text = f"there is room for {room / 1e9:,.3f} GB "
        text += "(training.prefix_cache_dir, training.prefix_cache_gb)"
        if reserve := self.reserve():
            text += f", beside {reserve / 1e9:,.3f} GB that are left to checkpoints"
        if useless := useless_bytes(root):
            text += (
                f"; {useless / 1e9:,.3f} GB there are damaged, or were not committed by who began "
                f"to write them: `python -m job.cache prune --dir {root} --keep-gb GB` removes the "
                "former, and the latter a day after they were written last"
            )
        return text

    def reserve(self) -> int:
        """Bytes of the caches' disk that are the checkpoints', where these lie there too."""
        config = self.config
        if not on_one_disk(Path(config.prefix_cache_folder), Path(config.run.dir)):
            return 0
        counts = count_configured(config, read_architecture(config.model.path))
        come = still_to_come(Path(config.run.dir), config.checkpoint, config.training.max_steps)
        return run_bytes(counts, come)


def _settle(opening: Opening, boundary: Boundary, run: RunDirectory) -> Record:
    """What the run has settled, or settles now, on rank 0."""
    mode, before = opening.config.training.prefix_cache, Record.read(run, boundary.block)
    record = before or _new_record(opening, boundary)
    if record.mode != mode.value:  # else what did not fit once is not kept later either
        record.mode = mode.value
        if mode is not PrefixCacheMode.auto:
            record.validation, record.training = True, mode is PrefixCacheMode.all
    boundary = replace(boundary, block=record.block)
    remove_leftovers(opening.shards(boundary).folder, record.name)
    _keep_what_fits(opening, boundary, record, or_raise=before is None and not record.earlier)
    for block in filter(None, (record.block, record.earlier)):
        touch(opening.shards(replace(boundary, block=block)).folder)
    run.write_json(RECORD, vars(record))
    return record


def _new_record(opening: Opening, boundary: Boundary) -> Record:
    record = Record(uuid.uuid4().hex[:12], _names(opening, boundary), boundary.block, None, None)
    earlier = _earlier(opening, boundary)
    if earlier is not None:
        record.earlier, record.earlier_given = earlier.block, _names(opening, earlier)
    return record


def _names(opening: Opening, boundary: Boundary) -> list[str]:
    """Of the shards that are there."""
    there = opening.shards(boundary)
    there.refresh()
    return there.names


def _earlier(opening: Opening, boundary: Boundary) -> Boundary | None:
    """A boundary before this one at which all states are there, as they are in a sweep.

    The blocks between are run then, where this one's states are not there.
    """
    if any(opening.missing_bytes(boundary).values()):
        for block in range(boundary.block - 1, 0, -1):
            other = replace(boundary, block=block)
            there = opening.shards(other).folder.exists()
            if there and not any(opening.missing_bytes(other).values()):
                return other
    return None


def _keep_what_fits(
    opening: Opening, boundary: Boundary, record: Record, *, or_raise: bool
) -> None:
    """Hold each set's states against the room that those before it leave; evaluations come first.

    Args:
        or_raise: whether the run is new, and its user may be told to make room. `auto` goes on.
    """
    mode, room = opening.config.training.prefix_cache, opening.room()
    or_raise = or_raise and mode is not PrefixCacheMode.auto
    for name, size in opening.missing_bytes(boundary, record).items():
        if getattr(record, name) is False:
            continue
        if size <= room:
            if size and or_raise:
                refuse_unwritable(opening.shards(boundary).folder)
            room -= size
            continue
        text = (
            f"the states of the {name} data take {size / 1e9:,.3f} GB in "
            f"{opening.shards(boundary).folder}, and {opening.told(room)}"
        )
        if or_raise:
            raise InputError(f"training.prefix_cache={mode.value}: {text}")
        _log.info("prefix cache: not kept: %s", text)
        setattr(record, name, False)


def refuse_unwritable(folder: Path) -> None:
    """Raise InputError if a cache's folder, made where it is missing, takes no file."""
    if error := write_problem(folder):
        raise file_error(
            error, f"training.prefix_cache_dir: cannot write {folder}: {error.strerror}"
        )


def _missing_bytes(packer: Packer, boundary: Boundary, shards: Shards) -> int:
    chosen = wanted(packer)
    lacking = np.flatnonzero(shards.find(chosen.keys) < 0)
    return boundary.disk_bytes(chosen[lacking])
