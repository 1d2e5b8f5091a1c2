"""Folders of prefix caches: where they are, what is in them, which may go. Free of torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.state_shards import DAMAGED, INDEX, STATES, Shard

LEFT_AFTER = 86_400.0  # seconds, after which a file that nobody has committed is a leftover
# Names of what is a cache's: whatever else lies in its folder, or beside it, is somebody's own. The
# file by which a disk is measured has none.
_FOLDER = re.compile("[0-9a-f]{16}")  # see `folder_of`
_FILE = re.compile(
    r"\.?[0-9a-f]{12}-\d{4,}-\d{5,}-\d{6}"  # of a run or build, attempt, rank, shard
    rf"({re.escape(STATES)}|{re.escape(INDEX)}|{re.escape(DAMAGED)})"
)


@dataclass(frozen=True)
class CacheFolder:
    """The states of one trunk at one boundary.

    Attributes:
        facts: what they are of.
        sequences: whose states can be read.
        bytes: of all its files of states.
        damaged: bytes of those that were set aside or cannot be read, and are of use to nobody.
        used: when a training or a build last began with it, in seconds since 1970.
    """

    path: Path
    facts: dict[str, Any]
    sequences: int
    bytes: int
    damaged: int
    used: float


def may_hold_caches(root: Path) -> bool:
    """Whether a folder is one of caches, which may all be gone, and not somebody's other one."""
    found = list(root.iterdir())
    return not found or any(map(_is_cache, found))


def folder_of(root: Path, facts: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return root / digest[:16]


def used_bytes(root: Path) -> int:
    """Bytes of all states in a folder of caches."""
    return sum(map(_bytes, _caches(root)))


def useless_bytes(root: Path) -> int:
    """How many of these are damaged, or of shards that nobody has committed."""
    found = 0
    for path in _caches(root):
        found += _read(path).damaged
        states = (file for file in _own_files(path) if file.suffix == STATES)
        found += sum(_size(file) for file in states if not _is_committed(file))
    return found


def folders(root: Path) -> list[CacheFolder]:
    """What is in a folder of caches, the last used first."""
    return sorted(map(_read, _caches(root)), key=lambda one: -one.used)


def touch(folder: Path) -> None:
    """Note that a cache is used: what was not for longest is pruned first."""
    with suppress(OSError):
        os.utime(folder)


def prune(root: Path, keep: float) -> int:
    """Remove caches that were not used for longest until `keep` bytes are left; how many went.

    What was damaged, and what killed writers have left, goes in any case. What no cache has written
    stays, and so does the folder that it lies in.

    What a training has opened stays readable for it; the rest it computes, in its next attempt
    where the blocks for that are not loaded.
    """
    before, kept = used_bytes(root), 0.0
    for one in folders(root):
        _remove_damaged(one.path)
        _remove_leftovers(one.path)
        kept += _bytes(one.path)
        if kept > keep:
            # indexes first, so that no half of it is found
            for file in sorted(_own_files(one.path), key=lambda file: file.suffix != INDEX):
                file.unlink(missing_ok=True)
        with suppress(OSError):
            one.path.rmdir()  # where nothing is left
    return before - used_bytes(root)


def _caches(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if _is_cache(path)] if root.is_dir() else []


def _is_cache(path: Path) -> bool:
    return _FOLDER.fullmatch(path.name) is not None and bool(_own_files(path))


def _own_files(folder: Path) -> list[Path]:
    """What caches have written into a folder; nothing where it cannot be looked into."""
    try:
        found = list(folder.iterdir())
    except OSError:
        return []
    return [file for file in found if _FILE.fullmatch(file.name) and file.is_file()]


def _bytes(folder: Path) -> int:
    return sum(_size(file) for file in _own_files(folder) if file.suffix == STATES)


@dataclass(frozen=True)
class _Index:
    """The index of a shard, what it says, and whether its states are of use to nobody."""

    path: Path
    facts: dict[str, Any]
    sequences: int
    is_damaged: bool


def _read(path: Path) -> CacheFolder:
    indexes = sorted(_indexes(path), key=lambda one: one.is_damaged)
    facts: dict[str, Any] = next((one.facts for one in indexes if one.facts), {})
    sequences = sum(one.sequences for one in indexes)
    damaged = sum(_size(one.path.with_suffix(STATES)) for one in indexes if one.is_damaged)
    return CacheFolder(path, facts, sequences, _bytes(path), damaged, path.stat().st_mtime)


def _indexes(folder: Path) -> list[_Index]:
    files = (file for file in _own_files(folder) if not file.name.startswith("."))
    return [_index(file) for file in files if file.suffix in (INDEX, DAMAGED)]


def _index(file: Path) -> _Index:
    facts: dict[str, Any] = {}
    try:
        facts = _facts(file)
        # else a training passes it over: it looks for its own states where `folder_of` says
        if file.suffix == INDEX and folder_of(Path(), facts).name == file.parent.name:
            return _Index(file, facts, len(Shard.read(file, facts).entries), is_damaged=False)
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        pass  # it is not as it was written, or its states are gone
    except OSError:  # it may be whole, and readable another time
        return _Index(file, facts, 0, is_damaged=file.suffix == DAMAGED)
    return _Index(file, facts, 0, is_damaged=True)


def _facts(index: Path) -> dict[str, Any]:
    """What an index says that its states are of."""
    facts = json.loads(index.read_bytes().partition(b"\n")[0])["facts"]
    if not isinstance(facts, dict):
        raise TypeError("no facts")
    return facts


def _is_committed(file: Path) -> bool:
    """Whether a file is of a shard that has an index, or had one before it was set aside."""
    indexes = (file.with_suffix(suffix) for suffix in (INDEX, DAMAGED))
    return not file.name.startswith(".") and any(index.exists() for index in indexes)


def _remove_damaged(folder: Path) -> None:
    for index in _indexes(folder):
        if index.is_damaged:
            index.path.with_suffix(STATES).unlink(missing_ok=True)
            index.path.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    for file in _own_files(folder):
        with suppress(FileNotFoundError):  # whoever writes it has committed it meanwhile
            if not _is_committed(file) and time.time() - file.stat().st_mtime > LEFT_AFTER:
                file.unlink()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
