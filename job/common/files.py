"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
            if may_replace():
                scratch.replace(path)
    finally:
        with suppress(OSError):  # it is not in the way
            scratch.unlink()


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
        try:
            scratch.rename(folder)
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


def try_for(seconds: float, work: Callable[[], object]) -> None:
    """Do work on files that must not keep a process from ending, whatever becomes of it."""
    thread = threading.Thread(target=work, name="last words", daemon=True)
    thread.start()
    thread.join(seconds)
