"""The frozen blocks' states, kept on disk: computed once, and read from then on.

What is written first is the truth for a run, so that it gives the same bits however often it is
interrupted. Which entries a step sees does therefore not depend on when they came onto the disk:

- those that were there when the run began (`given`), whoever wrote them;
- the run's own of earlier epochs, all of which are committed when an epoch begins;
- its own of the very step, which it is to compute again after an interruption;
- an evaluation sees its own of evaluations, in which sequences always lie in the same packing.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from job.common.errors import InputError, StorageError
from job.common.places import free_bytes
from job.common.schema import CriticConfig, PrefixCacheMode
from job.common.state_files import read_json
from job.data.packing import Batch, Packer, first_valued
from job.data.state_shards import (
    GIVEN,
    Piece,
    Shards,
    Stored,
    Writer,
    remove_leftovers,
    sequence_keys,
)
from job.distributed.world import World
from job.model.architecture import TransformerConfig
from job.model.architecture_file import read_architecture
from job.model.parameters import select_trainable
from job.model.prefix import Prefix
from job.model.transformer import Reads, to_device
from job.run.directory import RunDirectory
from job.training.cache_choice import (
    LEAST_SECONDS,
    DiskRates,
    Work,
    training_share,
    work_left,
)
from job.training.cache_folders import cache_folder, folder_of, used_bytes
from job.training.data import CriticData

FORMAT = 1  # raise it when states of the same facts become others
RECORD = "prefix_cache.json"
EVALUATION = -1  # in place of a step
READERS = 4
AHEAD = 4  # micro-batches that are read ahead
CHOSEN_AFTER = 60.0  # seconds, so that steps have their usual time
FREE_SHARE = 0.8  # of what is free, where no size is given
_log = logging.getLogger("job.train")


Known = tuple[Tensor, Tensor]  # states of which some are known, and bool [rows], which


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
            n_blocks - select_trainable(n, n_blocks).blocks,
            n_blocks,
            architecture.dim,
            torch.bfloat16 if mixed else torch.float32,
        )

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

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

    def stored(self, packer: Packer) -> Stored:
        """The keys of all sequences of a set."""
        data = packer.data
        first = np.zeros(len(data), np.int64)
        if self.of_read_rows:
            first = first_valued(data, np.arange(len(data)), packer.prompt_value)
        tokens = np.asarray(data.tokens)
        return Stored(sequence_keys(tokens, data.offsets, first), data.lengths - first)


@dataclass
class Record:
    """What a run has settled about its cache, for all its attempts.

    Attributes:
        name: what the names of its shards begin with.
        given: the names of the shards that were there when it began.
        block: the boundary; see `Boundary`.
        validation, training: whether states are kept; None where that is still to be decided.
    """

    name: str
    given: list[str]
    block: int
    validation: bool | None
    training: bool | None

    @classmethod
    def read(cls, run: RunDirectory) -> Record | None:
        found = read_json(run.file(RECORD), dict)
        try:
            return None if found is None else cls(**found)
        except TypeError:  # of another version
            return None


class ReadAhead:
    """Reads states in threads, some micro-batches before they are asked for."""

    def __init__(self, read: Callable[[Stored, int], Known | None]) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(READERS, "prefix cache")
        self._coming: deque[tuple[Stored, int]] = deque()
        self._begun: dict[tuple[int, bytes], Future[Known | None]] = {}

    def expect(self, coming: Iterable[Stored | None], step: int) -> None:
        """Have the states of these micro-batches read after those that are expected already."""
        self._coming.extend((stored, step) for stored in coming if stored is not None)
        self._read_on()

    def get(self, stored: Stored, step: int) -> Known | None:
        future = self._begun.pop((step, stored.keys.tobytes()), None)
        self._read_on()
        return self._read(stored, step) if future is None else future.result()

    def forget(self) -> None:
        """Expect nothing any more."""
        self._coming.clear()
        for future in self._begun.values():
            future.cancel()
        self._begun.clear()

    def close(self) -> None:
        self.forget()
        self._pool.shutdown()

    def _read_on(self) -> None:
        while self._coming and len(self._begun) < AHEAD:
            stored, step = self._coming.popleft()
            future = self._pool.submit(self._read, stored, step)
            self._begun[step, stored.keys.tobytes()] = future


class PrefixCache:
    """The states of one run's sequences, as one of its ranks reads and writes them."""

    def __init__(
        self,
        boundary: Boundary,
        shards: Shards,
        writer: Writer,
        record: Record,
        world: World,
        run: RunDirectory,
    ) -> None:
        self._boundary, self._shards, self._writer = boundary, shards, writer
        self.record, self._world, self._run = record, world, run
        self._began = time.monotonic()
        self._ahead, self._ahead_of_evaluation = ReadAhead(self._read), ReadAhead(self._read)
        self._epoch_from, self._foreseen = -1, -1  # steps; see `enter`
        self._rows = self._rows_read = 0  # since they were last asked for
        self._left_out = False
        self._refresh()

    def _refresh(self) -> None:
        self._shards.refresh(f"{self.record.name}-", self.record.given)
        self._shards.gives_up_pages = self._shards.bytes > _host_bytes() / 2

    def enter(self, step: int, packer: Packer, sequences: int, seed: int) -> None:
        """Begin a training step; what it and the next one need is read from now on.

        Every rank must take part.
        """
        epoch_from = packer.steps_before_epoch(step, sequences)
        if epoch_from != self._epoch_from:
            self._ahead.forget()
            self._writer.commit()
            self._world.gather(None)  # all are committed
            self._refresh()
            self._epoch_from, self._foreseen = epoch_from, step - 1
        for coming in (step, step + 1):
            in_epoch = packer.steps_before_epoch(coming, sequences) == epoch_from
            if coming == self._foreseen + 1 and in_epoch:
                plan = packer.plan(coming, sequences, seed)
                self._ahead.expect(map(packer.stored_of, plan), coming)
                self._foreseen = coming

    def evaluate(self, packer: Packer) -> list[bool]:
        """Begin an evaluation: which of its micro-batches some rank must compute."""
        coming = [packer.stored_of(units) for units in packer.everything]
        self._ahead_of_evaluation.forget()
        self._writer.commit()
        self._refresh()
        self._ahead_of_evaluation.expect(coming, EVALUATION)
        return [n > 0 for n in self._world.sum([self.lacks(one, EVALUATION) for one in coming])]

    def leave_out(self, data: CriticData, step: int, sequences: int) -> int:
        """How many blocks, and the embeddings, a training from `step` on can do without.

        All of those before the boundary, where the states of all sequences are there, or none.
        Every rank must take part.
        """
        self._epoch_from = data.train.steps_before_epoch(step, sequences)
        sets = ((data.train, step), (data.validation, EVALUATION))
        lacking = any(self.lacks(wanted(packer), at) for packer, at in sets)
        if not self._world.sum([lacking])[0]:
            self._left_out = True
            if self._world.is_main:
                text = "prefix cache: all states are there: the trunk's first %d blocks and its "
                _log.info(text + "embeddings are not loaded", self._boundary.block)
        self._epoch_from = -1
        return self._boundary.block if self._left_out else 0

    def rewind(self) -> None:
        """Begin anew from an earlier step."""
        self._epoch_from = -1

    def commit(self) -> None:
        """Return when everything that was kept is on the disk."""
        self._writer.commit()

    def close(self) -> None:
        self._ahead.close()
        self._ahead_of_evaluation.close()
        self._writer.close()
        self._shards.close()

    def share(self) -> float:
        """Which share of rows was read since this was last asked; NaN without any."""
        rows, read = self._world.sum([self._rows, self._rows_read])
        self._rows = self._rows_read = 0
        return read / rows if rows else float("nan")

    # Choosing

    def choose_evaluations(self, seconds: float, left: int) -> None:
        """Settle whether the states of evaluations are kept, where that is still open.

        Every rank must take part.

        Args:
            seconds: that an evaluation has taken, with everything computed.
            left: how many will come.
        """
        if self.record.validation is None:
            saved = left * seconds * self._boundary.block / self._boundary.n_blocks
            self.record.validation = self._world.main_decides(lambda: saved > LEAST_SECONDS)
            self._settled(
                "states of evaluations",
                self.record.validation,
                f"{seconds:.1f} s an evaluation, {left} to come, {saved:,.0f} s saved",
            )

    def choose_training(
        self, packer: Packer, sequences: int, *, step: int, last: int, seconds: float
    ) -> None:
        """The same for training data, after some minutes: `step` of `last` steps are done.

        Args:
            seconds: of a step that computes everything.
        """
        if self.record.training is not None:
            return
        late = self._world.main_decides(lambda: time.monotonic() - self._began > CHOSEN_AFTER)
        if not late:
            return
        assert packer.stored is not None
        rows = sequences * float(packer.stored.rows.mean()) / self._world.size
        frozen = self._boundary.block
        work = work_left(
            step=step,
            last=last,
            epoch=-(-int(np.count_nonzero(packer.units >= 0)) // sequences),
            seconds=seconds,
            prefix_share=training_share(frozen, self._boundary.n_blocks - frozen),
            step_bytes=rows * self._boundary.row_bytes,
        )
        self.record.training, why = self._world.main_decides(lambda: self._weigh(work))
        self._settled("states of training data", self.record.training, why)

    def _weigh(self, work: Work) -> tuple[bool, str]:
        if work.reads <= 0:
            return False, "no epoch comes after this one"
        try:
            disk = DiskRates.measured(self._shards.folder, self._world.size)
        except OSError as error:
            return False, f"{self._shards.folder}: {error.strerror}"
        return work.saved(disk) > 0, work.told(disk)

    def _settled(self, what: str, kept: bool, why: str) -> None:
        self._run.write_json(RECORD, vars(self.record))
        if self._world.is_main:
            _log.info("prefix cache: %s are %s: %s", what, "kept" if kept else "not kept", why)

    # Reading

    def lacks(self, stored: Stored | None, step: int) -> bool:
        """Whether the states of some of these sequences must be computed."""
        return stored is not None and bool((self._find(stored, step) < 0).any())

    def take(self, batch: Batch, reads: Reads, step: int, *, compute: bool) -> Prefix:
        """What is known of a micro-batch's states.

        Args:
            reads: what of it is read.
            compute: whether the frozen blocks are run, since some rank lacks some of its states.

        Raises:
            StorageError: states cannot be read that all ranks relied on.
        """
        prefix, device = Prefix(self._boundary.block), batch.tokens.device
        if batch.stored is None:  # nothing that counts
            prefix.states = None if compute and not self._left_out else self._no_states(batch)
            return prefix
        ahead = self._ahead_of_evaluation if step == EVALUATION else self._ahead
        known = ahead.get(batch.stored, step)
        self._count(known, batch.stored, step)
        is_whole = known is not None and bool(known[1].all())
        if not is_whole and (self._left_out or (not compute and self._world.size > 1)):
            raise StorageError(
                f"{self._shards.folder}: states that this training relies on cannot be read; what "
                "is damaged was set aside, and the next attempt computes it"
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

    def _count(self, known: Known | None, stored: Stored, step: int) -> None:
        if step != EVALUATION:
            self._rows += int(stored.rows.sum())
            self._rows_read += 0 if known is None else int(known[1].sum())

    def _find(self, stored: Stored, step: int) -> NDArray[np.int64]:
        found = self._shards.find(stored.keys, self._sees(step))
        there = found >= 0
        there[there] = self._shards.rows(found[there]) == stored.rows[there]
        return np.where(there, found, -1)

    def _sees(self, step: int) -> Callable[[NDArray[np.int64]], NDArray[np.bool_]]:
        epoch_from = self._epoch_from
        if step == EVALUATION:
            return lambda steps: (steps == GIVEN) | (steps == EVALUATION)
        return lambda steps: (
            (steps == GIVEN) | (steps == step) | ((steps >= 0) & (steps < epoch_from))
        )

    def _read(self, stored: Stored, step: int) -> Known | None:
        """States of these sequences, end to end, and which of their rows are known; or nothing."""
        found = self._find(stored, step)
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
                which[start:stop] = self._read_one(int(entry), content[start:stop])
        return states, torch.from_numpy(which)

    def _read_one(self, entry: int, into: NDArray[np.uint8]) -> bool:
        whole = self._shards.read(entry, into.reshape(-1).data)
        if not whole:
            self._shards.set_aside(entry)
        return whole

    # Writing

    def keep(self, batch: Batch, reads: Reads, prefix: Prefix, step: int) -> None:
        """Write the states that had to be computed, where they are to be kept."""
        is_kept = self.record.validation if step == EVALUATION else self.record.training
        if not is_kept or batch.stored is None or prefix.states is None or not prefix.computed:
            return
        rows = Rows.of(batch, reads, of_read_rows=self._boundary.of_read_rows)
        states, found = rows.of_sequences(prefix.states), self._find(batch.stored, step)
        put_states(self._writer, batch.stored, states, step, found)


@dataclass(frozen=True)
class Rows:
    """Where a micro-batch's rows are among those of its sequences, which may share some.

    Attributes:
        places: of each row of the stream among those of all sequences, end to end; None if they
            are the same.
        sources: of each row of the sequences, in the stream.
    """

    places: Tensor | None
    sources: Tensor | None

    @classmethod
    def of(cls, batch: Batch, reads: Reads, *, of_read_rows: bool) -> Rows:
        """Those of all tokens, or of what is read."""
        keys = batch.layout.keys
        if not of_read_rows:
            return cls(None, None) if keys is None else cls(keys.places, keys.rows)
        if reads.at is None:
            return cls(None, None)
        places = torch.empty_like(reads.rows)
        places[reads.at] = torch.arange(len(reads.at), device=places.device)
        return cls(places, reads.at)

    def in_stream(self, rows: Tensor) -> Tensor:
        return rows if self.places is None else rows[self.places]

    def of_sequences(self, rows: Tensor) -> Tensor:
        return rows if self.sources is None else rows[self.sources]


def put_states(
    writer: Writer, stored: Stored, states: Tensor, step: int, found: NDArray[np.int64]
) -> None:
    """Write the states [rows, d] of those sequences that were not found."""
    ends = np.cumsum(stored.rows)
    spans = zip(stored.keys, ends - stored.rows, ends, found, strict=True)
    pieces = [Piece(key, int(a), int(b)) for key, a, b, entry in spans if entry < 0]
    host, ready = _to_host(states)
    writer.put(pieces, host.view(torch.uint8).numpy(), step, ready)


def _to_host(states: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """A copy in host memory, and what to wait for until it is there."""
    if not states.is_cuda:
        return states.detach().contiguous(), lambda: None
    host = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
    host.copy_(states.detach(), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event.synchronize


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Opening


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


def wanted(packer: Packer) -> Stored:
    """What a packer's units need."""
    assert packer.stored is not None
    return packer.stored[np.unique(packer.units[packer.units >= 0])]


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
