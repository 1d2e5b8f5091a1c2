"""Locks of files, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from job.common import files
from job.common.files import lock_file
from job.run.mlflow_sync import database_lock


def test_a_lock_is_held_until_its_file_is_closed(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        lock_file(first, wait=True)
        with pytest.raises(BlockingIOError):
            lock_file(second, wait=False)
        first.close()
        lock_file(second, wait=False)


@pytest.fixture
def lockless(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """A file system that refuses each lock, as the kernel says it."""

    def refuse(_file: object, _operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    files._warn_of_no_locks.cache_clear()
    return request.param


@pytest.mark.parametrize("lockless", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP], indirect=True)
def test_where_there_are_no_locks_a_warning_is_enough(
    tmp_path: Path, lockless: int, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with (tmp_path / "lock").open("w") as file:
            lock_file(file, wait=False)
        with database_lock(f"sqlite:///{tmp_path}/mlflow.db"):
            pass
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path}: no file can be locked here ({os.strerror(lockless)})")


@pytest.mark.parametrize("lockless", [errno.EIO, errno.ESTALE], indirect=True)
def test_a_file_system_that_fails_is_no_file_system_without_locks(
    tmp_path: Path, lockless: int
) -> None:
    said = os.strerror(lockless)
    with (tmp_path / "lock").open("w") as file, pytest.raises(OSError, match=said):
        lock_file(file, wait=False)
