"""Folders of prefix caches: where they are, what is in them, which may go. Free of torch."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.state_shards import DAMAGED, ENTRY, INDEX, STATES

LEFT_AFTER = 86_400.0  # seconds, after which a file that nobody has committed is a leftover


@dataclass(frozen=True)
class CacheFolder:
    """The states of one trunk at one boundary.

    Attributes:
        facts: what they are of.
        sequences: whose states can be read.
        bytes: of all its files of states.
        damaged: bytes of those that were set aside, and are of use to nobody.
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


def used_bytes(folder: Path) -> int:
    """Bytes of all states below a folder."""
    return sum(_size(file) for file in folder.rglob(f"*{STATES}"))


def folders(root: Path) -> list[CacheFolder]:
    """What is in a folder of caches, the last used first."""
    found = [_read(path) for path in root.iterdir() if _is_cache(path)]
    return sorted(found, key=lambda one: -one.used)


def prune(root: Path, keep: float) -> int:
    """Remove caches that were not used for longest until `keep` bytes are left; how many went.

    What was damaged, and what killed writers have left, goes in any case.

    What a training has opened stays readable for it; the rest it computes, in its next attempt
    where the blocks for that are not loaded.
    """
    before, kept = used_bytes(root), 0.0
    for one in folders(root):
        _remove_damaged(one.path)
        _remove_leftovers(one.path)
        kept += used_bytes(one.path)
        if kept > keep:
            for index in one.path.glob(f"*{INDEX}"):  # first, so that no half of it is found
                index.unlink(missing_ok=True)
            shutil.rmtree(one.path, ignore_errors=True)
        with suppress(OSError):
            one.path.rmdir()  # where nothing is left
    return before - used_bytes(root)


def _is_cache(path: Path) -> bool:
    return any(any(path.glob(f"*{suffix}")) for suffix in (INDEX, DAMAGED, STATES))


def _read(path: Path) -> CacheFolder:
    facts: dict[str, Any] = {}
    sequences = damaged = 0
    for index in (*path.glob(f"*{DAMAGED}"), *path.glob(f"*{INDEX}")):
        is_damaged = index.suffix == DAMAGED
        damaged += _size(index.with_suffix(STATES)) if is_damaged else 0
        with suppress(OSError, ValueError):
            head, _, content = index.read_bytes().partition(b"\n")
            facts = json.loads(head)["facts"]
            sequences += 0 if is_damaged else len(content) // ENTRY.itemsize
    return CacheFolder(path, facts, sequences, used_bytes(path), damaged, path.stat().st_mtime)


def _remove_damaged(folder: Path) -> None:
    for index in folder.glob(f"*{DAMAGED}"):
        index.with_suffix(STATES).unlink(missing_ok=True)
        index.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    for file in folder.iterdir():
        committed = file.with_suffix(INDEX).exists() and not file.name.startswith(".")
        if not committed and time.time() - file.stat().st_mtime > LEFT_AFTER:
            file.unlink(missing_ok=True)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
