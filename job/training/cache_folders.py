"""Folders of prefix caches: where they are, what is in them, which may go. Free of torch."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.common.schema import CriticConfig
from job.data.state_shards import ENTRY

_NAME = re.compile("[0-9a-f]{16}")  # of a cache
LEFT_AFTER = 86_400.0  # seconds, after which a file that nobody has committed is a leftover


@dataclass(frozen=True)
class CacheFolder:
    """The states of one trunk at one boundary.

    Attributes:
        facts: what they are of.
        used: when a training or a build last began with it, in seconds since 1970.
    """

    path: Path
    facts: dict[str, Any]
    sequences: int
    bytes: int
    used: float


def cache_folder(config: CriticConfig) -> Path:
    """Where the caches of all trunks and boundaries are."""
    given = config.training.prefix_cache_dir
    return Path(given) if given is not None else Path(config.data.cache_dir) / "prefix"


def may_hold_caches(root: Path) -> bool:
    """Whether a folder is one of caches, which may all be gone, and not somebody's other one."""
    names = [path.name for path in root.iterdir()]
    return not names or any(map(_NAME.fullmatch, names))


def folder_of(root: Path, facts: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return root / digest[:16]


def used_bytes(folder: Path) -> int:
    """Bytes of all states below a folder."""
    return sum(_size(file) for file in folder.rglob("*.states"))


def folders(root: Path) -> list[CacheFolder]:
    """What is in a folder of caches, the last used first."""
    found = [_read(path) for path in root.iterdir() if any(path.glob("*.index"))]
    return sorted(found, key=lambda one: -one.used)


def prune(root: Path, keep: float) -> int:
    """Remove caches that were not used for longest until `keep` bytes are left; how many went.

    A training that reads one of them goes on: what it has opened stays readable, and the rest it
    computes.
    """
    before, kept = used_bytes(root), 0.0
    for one in folders(root):
        _remove_leftovers(one.path)
        kept += one.bytes
        if kept > keep:
            for index in one.path.glob("*.index"):  # first, so that no half of it is found
                index.unlink(missing_ok=True)
            shutil.rmtree(one.path, ignore_errors=True)
    return before - used_bytes(root)


def _read(path: Path) -> CacheFolder:
    facts: dict[str, Any] = {}
    sequences = 0
    for index in path.glob("*.index"):
        with suppress(OSError, ValueError):
            head, _, content = index.read_bytes().partition(b"\n")
            facts = json.loads(head)["facts"]
            sequences += len(content) // ENTRY.itemsize
    return CacheFolder(path, facts, sequences, used_bytes(path), path.stat().st_mtime)


def _remove_leftovers(folder: Path) -> None:
    for file in folder.iterdir():
        committed = file.with_suffix(".index").exists() and not file.name.startswith(".")
        if not committed and time.time() - file.stat().st_mtime > LEFT_AFTER:
            file.unlink(missing_ok=True)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
