"""Files and folders that a job is told of, as they are seen from here."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

SCRATCH_BYTES = 1 << 30  # that caches need of a node's own folder
_PROBE_BYTES = 1 << 20


def read_problem(path: str | Path) -> str | None:
    """What is wrong where a path cannot be read; None where it can."""
    return None if os.access(path, os.R_OK) else f"cannot read {path}"


def write_problem(folder: Path) -> OSError | None:
    """Why a folder, made where it is missing, takes no file; None if it takes one.

    A full disk or a quota shows only when something is written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error
    return None


def place_problem(folder: Path) -> str | None:
    """Why nothing may be written into a folder, there or still to be made, without making it."""
    there = _nearest(folder)
    if not there.is_dir():
        return f"{there} is a file, where a folder should be"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written into"


def free_bytes(path: Path) -> int:
    """Free space where a path is, or will be."""
    return shutil.disk_usage(_nearest(path)).free


def on_one_disk(a: Path, b: Path) -> bool:
    """Whether two paths, there or still to be made, take their space from one file system."""
    return _nearest(a).stat().st_dev == _nearest(b).stat().st_dev


def disk(path: Path) -> str:
    """The file system of a path that may be gone, for a message: where it begins, what is free."""
    try:
        there = _nearest(path.absolute())
        mount = next(parent for parent in (there, *there.parents) if parent.is_mount())
        usage = shutil.disk_usage(there)
    except OSError as error:
        return f"its disk does not answer: {error.strerror}"
    return f"disk {mount}: {usage.free / 1e9:,.3f} of {usage.total / 1e9:,.3f} GB free"


def _nearest(path: Path) -> Path:
    """A path, or the nearest folder above it that is there."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
