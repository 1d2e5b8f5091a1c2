"""Folders of files that can be made anew: their sizes and checksums are kept with them.

Storage that crashes leaves zeros, scratch that is purged takes file after file, and a set that is
not whole trains a critic on something else. So such a folder is looked at before it is used: that
each file has its size and, at some places, its content; or all of its content, where that is asked
for. What is not whole is made anew.

A folder of 0.1.0 has no sums, and nobody can say that it is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.common.files import atomic_folder

SUMS = "sums.json"
_BLOCK = 64 * 1024  # bytes of a sample, which is read at each start, on every rank
_BLOCKS = 16  # of a file; those up to a MiB are read whole
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sum:
    """Size, digest of a sample and digest of the whole of one file."""

    bytes: int
    sample: str
    sha256: str

    @classmethod
    def of(cls, file: Path) -> _Sum:
        with file.open("rb") as stream:
            whole = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(file.stat().st_size, _sample(file), whole)

    def defect(self, file: Path, *, verify: bool) -> str | None:
        if not file.is_file():
            return "is missing"
        if (size := file.stat().st_size) != self.bytes:
            return f"has {size} bytes instead of {self.bytes}"
        there = _Sum.of(file) if verify else _Sum(size, _sample(file), self.sha256)
        return None if there == self else "was changed: its checksum differs"


def _sample(file: Path) -> str:
    """The digest of blocks all over a file, its first and its last among them."""
    last = max(0, file.stat().st_size - _BLOCK)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for k in range(_BLOCKS):
            stream.seek(last * k // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Note sizes and checksums of a folder's files; what is in folders in it may go away."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    sums = {path.name: asdict(_Sum.of(path)) for path in files}
    (folder / SUMS).write_text(sealed_text(sums), encoding="utf-8")


def defect(folder: Path, *, verify: bool = False) -> str | None:
    """What is not as it was when the folder was sealed; None if nothing is.

    Args:
        verify: look at all of the content.
    """
    try:
        sums = sealed_value((folder / SUMS).read_bytes())
        for name, one in sums.items():
            if problem := _Sum(**one).defect(folder / name, verify=verify):
                return f"{folder / name} {problem}"
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    except (ValueError, TypeError, AttributeError):
        return f"{folder / SUMS} is damaged"
    return None


def find_or_make(
    folder: Path,
    make: Callable[[Path], None],
    discard: Callable[[Path], object],
    *,
    verify: bool = False,
) -> None:
    """See that a folder is there and whole: where it is not, `make` fills another one.

    Several processes may do so at once. The first one's folder stays, and the others' work is
    dropped.

    Args:
        discard: gets a folder that is not whole out of the way, as late as possible.
    """
    if folder.exists():
        problem = defect(folder, verify=verify)
        if problem is None:
            return
        _log.warning("%s; made anew", problem)
    with atomic_folder(folder) as scratch:
        make(scratch)
        seal(scratch)
        if folder.exists() and defect(folder, verify=verify) is not None:
            discard(folder)


def remove(folder: Path) -> None:
    """Remove a folder so that no half of it is found."""
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    shutil.rmtree(folder.rename(hidden), ignore_errors=True)


def sealed_text(value: Any) -> str:
    """A JSON value with its own checksum, as a file's whole text."""
    return json.dumps({"sha256": _digest(value), "value": value}, indent=2) + "\n"


def sealed_value(text: bytes) -> Any:
    """The value in such a text.

    Raises:
        ValueError: it is not as it was written.
    """
    try:
        content = json.loads(text)
        value, digest = content["value"], content["sha256"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if digest != _digest(value):
        raise ValueError("the checksum differs")
    return value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
