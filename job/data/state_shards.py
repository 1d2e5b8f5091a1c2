"""Hidden states of sequences on disk, in shards that are there as a whole or not at all.

    FOLDER/NAME.states   entries end to end, each from a multiple of 4 KiB on
    FOLDER/NAME.index    a line of JSON with a checksum, and an `ENTRY` for each of them

The rename of its index commits a shard. An entry holds the rows of one sequence, whose tokens its
key stands for, and has a checksum that is looked at whenever it is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import queue
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from job.common.files import put_in_place
from job.common.places import free_bytes

ENTRY = np.dtype(
    [
        ("key", np.uint64, 2),
        ("step", np.int64),  # in which it was computed
        ("offset", np.int64),  # bytes
        ("rows", np.int32),
        ("sum", np.uint32),
    ]
)
EVALUATION = -1  # in place of the step, of entries that evaluations have written
GIVEN = -2  # the same, of entries that others have written
PAGE = 4096  # bytes, of disks
STATES, INDEX = ".states", ".index"
DAMAGED = ".damaged"  # the index of a shard that was set aside
SHARD_BYTES = 2 * 2**30
_WAITING = 8  # micro-batches that may wait to be written
_STAY_OPEN = 64  # files of shards; each others' are opened when they are read
_log = logging.getLogger(__name__)

Keys = NDArray[np.uint64]  # [n, 2]
Bytes = NDArray[np.uint8]
Seen = Callable[[NDArray[np.int64]], NDArray[np.bool_]]  # which of the given steps are


def any_step(steps: NDArray[np.int64]) -> NDArray[np.bool_]:
    """See entries of whatever step."""
    return np.ones(len(steps), np.bool_)


def sequence_keys(sequences: Iterable[NDArray[np.uint32]], first_rows: NDArray[np.int64]) -> Keys:
    """A key for each sequence of tokens, of which rows from the given on are kept: by its tokens
    and that row, and by how many of them are the same before it.

    Each has states of its own, since they differ in their last bits with the packing.
    """
    digests = bytearray(16 * len(first_rows))
    for at, (tokens, row) in enumerate(zip(sequences, first_rows, strict=True)):
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=16, salt=int(row).to_bytes(8))
        digests[16 * at : 16 * at + 16] = digest.digest()
    keys = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    is_first = np.r_[True, (ordered[1:] != ordered[:-1]).any(1)][: len(keys)]
    place = np.arange(len(keys))
    before = place - np.maximum.accumulate(np.where(is_first, place, 0))
    keys[order, 1] += before.astype(np.uint64)
    return keys


@dataclass(frozen=True)
class Stored:
    """By which keys n sequences' states are kept [n, 2], and how many rows of each, int64 [n].

    Attributes:
        earlier: the same of their states before an earlier block, where those are there.
    """

    keys: Keys
    rows: NDArray[np.int64]
    earlier: Stored | None = None

    def __getitem__(self, chosen: NDArray[np.int64]) -> Stored:
        earlier = None if self.earlier is None else self.earlier[chosen]
        return Stored(self.keys[chosen], self.rows[chosen], earlier)

    def __len__(self) -> int:
        return len(self.rows)


class DamagedShardError(ValueError):
    """A shard's index is not as it was written, or its file is not as long as it says."""


@dataclass(frozen=True)
class Shard:
    """The committed entries of one file, and what their states are of."""

    states: Path
    entries: NDArray[Any]

    @classmethod
    def read(cls, index: Path, facts: dict[str, Any]) -> Shard:
        """The shard of an index.

        Raises:
            DamagedShardError: it cannot be used.
            OSError: it cannot be read.
        """
        head, _, content = index.read_bytes().partition(b"\n")
        try:
            said = json.loads(head)
            if said["sha256"] != hashlib.sha256(content).hexdigest():
                raise ValueError("the checksum differs")
            if said["facts"] != facts:
                raise ValueError("it is of other states")
            entries, size = np.frombuffer(content, ENTRY).copy(), int(said["bytes"])
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedShardError(str(error)) from None
        states = index.with_suffix(STATES)
        if states.stat().st_size != size:
            raise DamagedShardError(f"{states.name} has not the {size} bytes it had")
        return cls(states, entries)


class Shards:
    """What can be read in a folder.

    Args:
        facts: what the states are of; shards that say otherwise are passed over.
        row_bytes: of one row.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], row_bytes: int) -> None:
        self.folder, self._facts, self._row_bytes = folder, facts, row_bytes
        self._shards: dict[str, Shard] = {}
        self._unusable: set[str] = set()
        self._files: dict[int, int] = {}  # shard -> descriptor
        # in the order in which they were taken in: a place stays, for who reads meanwhile
        self._entries = _entries([])
        self._order = _order(self._entries)
        self._lock = threading.Lock()
        self._gives_up_pages = False

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> list[str]:
        return list(self._shards)

    @property
    def bytes(self) -> int:
        return int(self._entries["rows"].sum()) * self._row_bytes

    def refresh(self, own: str = "", given: Collection[str] | None = None) -> None:
        """Take in what has been committed since.

        Args:
            own: what the names of shards begin with whose entries keep their steps.
            given: the names of others that are wanted; default: all.
        """
        before = len(self._shards)
        for index in sorted(self.folder.glob(f"[!.]*{INDEX}")):
            name, is_own = index.stem, own != "" and index.stem.startswith(own)
            is_wanted = is_own or given is None or name in given
            if is_wanted and name not in self._shards and name not in self._unusable:
                self._take_in(index, is_own=is_own)
        if len(self._shards) == before:
            return
        self._entries = _entries([shard.entries for shard in self._shards.values()])
        self._order = _order(self._entries)
        # so that a cache larger than memory drives out nothing else
        self._gives_up_pages = self.bytes > _host_bytes() / 2

    def _take_in(self, index: Path, *, is_own: bool) -> None:
        try:
            shard = Shard.read(index, self._facts)
        except (DamagedShardError, OSError) as error:
            self._unusable.add(index.stem)
            _log.warning("%s is not used: %s", index, error)
            if isinstance(error, DamagedShardError):
                _set_aside(index)
            return
        if not is_own:
            shard.entries["step"] = GIVEN
        self._shards[index.stem] = shard

    def find(self, keys: Keys, seen: Seen = any_step) -> NDArray[np.int64]:
        """The first entry of each key, of those whose steps are seen, int64 [n]; -1 without."""
        order, found = self._order, np.full(len(keys), -1)
        at = np.searchsorted(order["high"], keys[:, 0])
        open_ = np.arange(len(keys))
        while len(open_ := open_[at[open_] < len(order)]):
            there = order[at[open_]]
            open_, there = _where(there["high"] == keys[open_, 0], open_, there)
            fits = (there["low"] == keys[open_, 1]) & seen(there["step"])
            found[open_[fits]] = there["place"][fits]
            open_ = open_[~fits]
            at[open_] += 1
        return found

    def rows(self, found: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many rows each of these entries has, int64 [n]."""
        return self._entries["rows"][found].astype(np.int64)

    def read(self, entry: int, into: memoryview) -> bool:
        """Read one entry whole; False where it is not what was written, or cannot be read.

        A shard that is damaged is none from then on, for everybody.
        """
        one = self._entries[entry]
        offset = int(one["offset"])
        try:
            with self._opened(int(one["shard"])) as file:
                done = _read_whole(file, into, offset)
                if self._gives_up_pages:
                    os.posix_fadvise(file, offset, len(into), os.POSIX_FADV_DONTNEED)
        except OSError as error:  # of the machine, but for a disk that has lost what it held
            self._tell(entry, error.strerror, is_damaged=error.errno == errno.EIO)
            return False
        if done == len(into) and zlib.crc32(into) == one["sum"]:
            return True
        self._tell(entry, "states are not as they were written", is_damaged=True)
        return False

    def _tell(self, entry: int, why: str | None, *, is_damaged: bool) -> None:
        states = self._states(int(self._entries[entry]["shard"]))
        _log.warning("%s: %s", states, why)
        if is_damaged:
            _set_aside(states.with_suffix(INDEX))

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _states(self, shard: int) -> Path:
        return list(self._shards.values())[shard].states

    @contextmanager
    def _opened(self, shard: int) -> Iterator[int]:
        """A descriptor of its file; the first few shards' stay open."""
        with self._lock:
            if shard not in self._files and len(self._files) < _STAY_OPEN:
                self._files[shard] = os.open(self._states(shard), os.O_RDONLY)
            kept = self._files.get(shard)
        if kept is not None:
            yield kept
            return
        file = os.open(self._states(shard), os.O_RDONLY)
        try:
            yield file
        finally:
            os.close(file)


def _read_whole(file: int, into: memoryview, offset: int) -> int:
    """Fill `into` from there on, as far as the file goes; how many bytes came.

    The kernel gives no more than 2 GiB at once.
    """
    done = 0
    while done < len(into) and (came := os.preadv(file, [into[done:]], offset + done)):
        done += came
    return done


def _write_whole(file: int, content: memoryview, offset: int) -> None:
    """Write all of it; a disk that is nearly full takes a part first, and then none."""
    done = 0
    while done < len(content):
        done += os.pwrite(file, content[done:], offset + done)


def _set_aside(index: Path) -> None:
    """Let the shard of an index be none, for everybody."""
    try:
        index.rename(index.with_suffix(DAMAGED))
    except FileNotFoundError:  # another has done it
        pass
    except OSError as error:
        _log.warning(
            "%s cannot be set aside (%s): %s",
            index,
            error.strerror,
            "training.prefix_cache_dir with another folder, or training.prefix_cache=none, goes on "
            "without it",
        )


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _where(mask: NDArray[np.bool_], *arrays: Any) -> tuple[Any, ...]:
    return tuple(array[mask] for array in arrays)


def _entries(shards: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """All entries, each with the number of its shard."""
    entries = np.concatenate([np.empty(0, ENTRY), *shards])
    numbered = np.empty(len(entries), np.dtype([*ENTRY.descr, ("shard", np.int32)]))
    for name in ENTRY.names or ():
        numbered[name] = entries[name]
    numbered["shard"] = np.repeat(np.arange(len(shards)), [len(s) for s in shards])
    return numbered


def _order(entries: NDArray[Any]) -> NDArray[Any]:
    """Where the entries are, by key; those of one key by step and then in the order of shards."""
    kind = [("high", np.uint64), ("low", np.uint64), ("step", np.int64), ("place", np.int64)]
    order = np.empty(len(entries), np.dtype(kind))
    order["high"], order["low"] = entries["key"].T
    order["step"], order["place"] = entries["step"], np.arange(len(entries))
    return order[np.lexsort((order["place"], order["step"], order["low"], order["high"]))]


Count = TypeVar("Count", int, NDArray[np.int64])


def on_disk(size: Count) -> Count:
    """Bytes that an entry of so many takes, since each begins a page."""
    return -(-size // PAGE) * PAGE


@dataclass(frozen=True)
class Piece:
    """Rows start to stop of a micro-batch, which are the entry of `key`."""

    key: Keys  # [2]
    start: int
    stop: int


@dataclass
class _Open:
    """A shard that is being written."""

    name: str
    scratch: Path
    file: int
    size: int = 0
    entries: bytearray = field(default_factory=bytearray)  # each an ENTRY


class Writer:
    """Writes entries into shards of its own, in a thread that no step waits for.

    Args:
        name: what the names of its shards begin with; nobody else's may.
        facts: as in `Shards`.
        may_take: bytes that all its shards together may have.
        leave_free: bytes of the disk that are others'.

    Attributes:
        error: why nothing is written any more; None as long as it is.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        facts: dict[str, Any],
        *,
        may_take: float,
        leave_free: int = 0,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._folder, self._name, self._facts = folder, name, facts
        self._left, self._leave_free, self._shard_bytes = may_take, leave_free, shard_bytes
        self._shard: _Open | None = None
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING)
        self._stored: set[bytes] = set()
        self.error: str | None = None
        self._closed, self._closing = False, threading.Lock()
        self._thread = threading.Thread(target=self._work, name="prefix cache", daemon=True)
        self._thread.start()

    def put(
        self, pieces: Iterable[Piece], rows: Bytes, step: int, ready: Callable[[], object]
    ) -> None:
        """Write pieces of rows, uint8 [t, bytes of a row], once `ready` has returned.

        What this writer has written is not written again; evaluations and the training do not
        see each other's.
        """
        of = bytes([step == EVALUATION])
        new = [piece for piece in pieces if piece.key.tobytes() + of not in self._stored]
        self._stored |= {piece.key.tobytes() + of for piece in new}
        if new and self.error is None:
            self._queue.put(lambda: self._write(new, rows, step, ready))

    def commit(self) -> None:
        """Return when everything that was put is committed, or `error` says why not."""
        done = threading.Event()

        def committed() -> None:
            try:
                self._commit()
            finally:
                done.set()

        with self._closing:  # a checkpoint's thread may come when the training has ended
            if self._closed:
                return
            self._queue.put(committed)
        done.wait()

    def close(self) -> None:
        """Commit, and end the thread."""
        self.commit()
        with self._closing:
            self._closed = True
            self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except OSError as error:
                self._give_up(error)

    def _write(
        self, pieces: list[Piece], rows: Bytes, step: int, ready: Callable[[], object]
    ) -> None:
        ready()
        if self.error is not None:
            return
        size = sum(piece.stop - piece.start for piece in pieces) * rows.shape[1]
        if free_bytes(self._folder) < self._leave_free + size:
            raise OSError(errno.ENOSPC, "what is left of the disk is for checkpoints")
        for piece in pieces:
            content = np.ascontiguousarray(rows[piece.start : piece.stop]).reshape(-1).data
            shard = self._room_for(len(content))
            _write_whole(shard.file, content, shard.size)
            entry = np.zeros(1, ENTRY)
            entry[0] = (piece.key, step, shard.size, piece.stop - piece.start, zlib.crc32(content))
            shard.entries += entry.tobytes()
            shard.size += on_disk(len(content))

    def _room_for(self, size: int) -> _Open:
        """The open shard, or a new one where that is full."""
        if on_disk(size) > self._left:
            raise OSError(errno.EDQUOT, "training.prefix_cache_gb is used up")
        self._left -= on_disk(size)
        if self._shard is not None and self._shard.size + size > self._shard_bytes:
            self._commit()
        if self._shard is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            n = next(n for n in range(10**6) if not self._path(n).exists())
            scratch = self._folder / f".{self._path(n).name}"
            file = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            self._shard = _Open(self._path(n).stem, scratch, file)
        return self._shard

    def _path(self, n: int) -> Path:
        return self._folder / f"{self._name}-{n:06}{STATES}"

    def _commit(self) -> None:
        shard, self._shard = self._shard, None
        if shard is None:
            return
        try:
            if shard.entries:
                os.ftruncate(shard.file, shard.size)
                put_in_place(shard.scratch, self._folder / f"{shard.name}{STATES}")
                os.posix_fadvise(shard.file, 0, 0, os.POSIX_FADV_DONTNEED)
                self._write_index(shard)
        except OSError:  # without an index nobody can read it, and it takes up a full disk
            (self._folder / f"{shard.name}{STATES}").unlink(missing_ok=True)
            raise
        finally:
            os.close(shard.file)
            shard.scratch.unlink(missing_ok=True)

    def _write_index(self, shard: _Open) -> None:
        content = bytes(shard.entries)
        digest = hashlib.sha256(content).hexdigest()
        head = {"sha256": digest, "bytes": shard.size, "facts": self._facts}
        scratch = self._folder / f".{shard.name}{INDEX}"
        try:
            scratch.write_bytes(json.dumps(head).encode() + b"\n" + content)
            put_in_place(scratch, self._folder / f"{shard.name}{INDEX}")
        finally:
            scratch.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        self.error = f"{self._folder}: {error.strerror}"
        _log.warning("the prefix cache is not written any more: %s", self.error)
        with suppress(OSError):
            self._commit()  # what is there already


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what a writer of this name had not committed when it was killed."""
    for scratch in folder.glob(f".{name}-*"):
        with suppress(OSError):
            scratch.unlink()
    for states in folder.glob(f"{name}-*{STATES}"):
        if not states.with_suffix(INDEX).exists():
            with suppress(OSError):
                states.unlink()
