"""Input or output that failed is no wrong input: its own exit code, and a message with the disk."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from job.common.config import load_config
from job.common.data_file import check_readable
from job.common.errors import (
    Exit,
    InputError,
    StorageError,
    exit_code,
    file_error,
    run_command,
)
from job.common.files import atomic_folder, named, write_atomic
from job.common.places import disk
from job.common.schema import CriticConfig
from job.data.tiktoken import as_tokenizer_json
from job.model.json_values import read_object
from job.run.reader import StoredRun

# Reading its first bytes is an input/output error, as it is of a disk that is damaged.
UNREADABLE = Path("/proc/self/mem")
FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(
    not (UNREADABLE.exists() and FULL.exists()), reason="no files here that always fail"
)
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EIO, errno.EROFS, errno.ENOTCONN)


def test_what_may_pass_has_an_exit_code_of_its_own() -> None:
    assert {exit_code(OSError(number, "text")) for number in PASSING} == {Exit.IO_FAILED}
    for other in (OSError(errno.EACCES, "text"), OSError(errno.EISDIR, "text"), ValueError()):
        assert exit_code(other) is Exit.CRASHED


def test_a_file_is_wrong_or_its_disk_is_in_trouble() -> None:
    stale = OSError(errno.ESTALE, "Stale file handle", "/some/where")
    ending = file_error(stale, "/some/where: cannot read")
    assert isinstance(ending, StorageError)
    assert str(ending).startswith("/some/where: cannot read (disk /: ")
    for error in (FileNotFoundError(errno.ENOENT, "none"), PermissionError(errno.EACCES, "no")):
        assert isinstance(file_error(error, "text"), InputError)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "data": ("train.jsonl", check_readable),
    "configuration": ("critic.yaml", lambda file: load_config(CriticConfig, file, [])),
    "JSON": ("params.json", lambda file: read_object(file, "parameters")),
    "tokenizer": ("tokenizer.model", as_tokenizer_json),
    "run": ("config.yaml", lambda file: StoredRun(file.parent).config()),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_cannot_be_read_now_is_not_called_wrong(kind: str, tmp_path: Path) -> None:
    name, read = READERS[kind]
    file = tmp_path / name
    file.symlink_to(UNREADABLE)
    with pytest.raises(StorageError, match=str(tmp_path)):
        read(file)
    file.unlink()
    with pytest.raises(InputError):
        read(file)


def test_errors_of_writing_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full") as caught, named(FULL):
        FULL.write_text("text")
    assert caught.value.filename == str(FULL)
    with pytest.raises(OSError, match="made") as caught, atomic_folder(tmp_path / "made"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No such file") as caught:
        write_atomic(tmp_path / "no/file", "text")
    assert caught.value.filename == str(tmp_path / "no/file")  # not the scratch file's


def test_a_disk_is_named_by_its_mount_also_for_a_path_that_is_gone() -> None:
    assert disk(Path("/proc/no/such/file")).startswith("disk /proc: 0.000 of 0.000 GB free")


def test_a_command_says_path_and_disk_and_leaves_with_the_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "/proc/some/run")

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == Exit.IO_FAILED
    said = capsys.readouterr().err
    assert said.startswith("error: [Errno 122] Disk quota exceeded: '/proc/some/run' (disk /proc: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("what", "code"),
    [("Stopped('saved')", 75), ("OSError(28, 'full', '/')", 74), ("ValueError('x')", 1)],
)
def test_a_log_on_a_full_disk_changes_no_exit_code(what: str, code: int) -> None:
    text = (
        "from job.common.errors import Stopped, run_and_leave\n"
        f"def main():\n    raise {what}\nrun_and_leave(main)"
    )
    with FULL.open("w") as full:
        done = subprocess.run([sys.executable, "-c", text], stdout=full, stderr=full, check=False)
    assert done.returncode == code
