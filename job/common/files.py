"""Files and folders that appear whole or not at all, also where power is lost."""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from job.common.errors import InputError
from job.common.places import place_problem

# How file systems say that they have no locks: NFS, Lustre, FUSE.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_log = logging.getLogger(__name__)


@contextmanager
def named(path: Path, scratch: Path | None = None) -> Iterator[None]:
    """Let errors of the system name a file: those of writing do not, or name its `scratch`."""
    try:
        yield
    except OSError as error:
        known = error.filename
        if known is None or (scratch is not None and str(known).startswith(str(scratch))):
            error.filename = str(path)
        raise


def write_atomic(
    path: Path, text: str, writer: str = "", may_replace: Callable[[], bool] = lambda: True
) -> None:
    """Replace a file's content so that a reader sees the old or the new one, never a part.

    `writer` is part of the scratch file's name, and `may_replace` is asked when that is written.
    """
    scratch = path.with_name(f".{path.name}.{writer}{uuid.uuid4().hex}")
    try:
        with named(path, scratch):
            scratch.write_text(text, encoding="utf-8")
            put_in_place(scratch, path, may_replace)
    finally:
        with suppress(OSError):  # it is not in the way
            scratch.unlink()


def put_in_place(scratch: Path, path: Path, may_replace: Callable[[], bool] = lambda: True) -> None:
    """Let a scratch file become `path` once it is on the disk itself.

    Without that a file system may keep the new name and lose the content, old and new.
    """
    sync(scratch)
    if may_replace():
        scratch.replace(path)
        sync(path.parent)


def check_place(folder: Path, option: str) -> None:
    """Raise InputError unless a folder is there, or can be made, to write into; before the work."""
    if problem := place_problem(folder):
        raise InputError(f"{option} {folder}: {problem}")


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file system that has nothing to be synced
            raise
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder that is renamed to `folder` at the end, or removed on an error.

    Several processes may make the same folder at once: the first rename wins, and the others'
    work is dropped.
    """
    folder = folder.resolve()  # `.` has no name, and a link is no folder to rename onto
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        with named(folder, scratch):
            scratch.mkdir(parents=True)
            yield scratch
            _sync_tree(scratch)
        try:
            scratch.rename(folder)
            sync(folder.parent)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def let_others_read(file: Path) -> None:
    """Give a file the permissions that a new one has."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def lock_file(file: IO[Any], *, wait: bool) -> None:
    """Lock an open file until it is closed, whichever way this process ends.

    A file system that has no locks gets a warning, once.

    Raises:
        BlockingIOError: another process has locked it, and this one does not wait.
        OSError: the file system fails.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn_of_no_locks(Path(file.name).parent, str(error.strerror))


@functools.cache
def _warn_of_no_locks(folder: Path, reason: str) -> None:
    text = "%s: no file can be locked here (%s): see that no second process writes the same"
    _log.warning(text, folder, reason)


def try_for(seconds: float, work: Callable[[], object]) -> None:
    """Do work on files that must not keep a process from ending, whatever becomes of it."""
    thread = threading.Thread(target=work, name="last words", daemon=True)
    thread.start()
    thread.join(seconds)
