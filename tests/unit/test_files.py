"""What is put in place appears whole: it is on the disk before it has its name, and that after."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from job.common.files import atomic_folder, sync, write_atomic
from job.common.state_files import read_json, read_yaml


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced and renamed, in order."""
    made: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def synced(descriptor: int) -> None:
        made.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    for name, original in (("rename", rename), ("replace", replace)):

        def renamed(source: str, target: str, *, original: object = original) -> None:
            made.append(("rename", Path(target).name))
            original(source, target)  # type: ignore[operator]

        monkeypatch.setattr(os, name, renamed)
    return made


def test_a_file_is_synced_before_its_rename_and_its_folder_after_it(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    write_atomic(tmp_path / "status.json", "{}")
    (first, scratch), *rest = calls
    assert first == "sync"
    assert scratch.startswith(".status.json.")
    assert rest == [("rename", "status.json"), ("sync", tmp_path.name)]


def test_all_of_a_folder_is_synced_before_its_rename(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    with atomic_folder(tmp_path / "made") as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "b").write_text("b")
        (scratch / "a").write_text("a")
    before = calls[: calls.index(("rename", "made"))]
    assert {name for _, name in before} == {"a", "deep", "b", scratch.name}
    assert calls[-1] == ("sync", tmp_path.name)


def test_a_file_system_that_syncs_no_folder_is_none_to_fail_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, passes in ((errno.EINVAL, True), (errno.EIO, False)):

        def refused(_: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refused)
        if passes:
            sync(tmp_path)
        else:
            with pytest.raises(OSError, match="Input/output error"):
                sync(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0\0\0\0", b"\xff", b'{"a": ', b"[1]", b"[" * 10**5])
def test_a_state_file_that_cannot_be_read_is_absent_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    assert (read_json(tmp_path / "none", dict), read_yaml(tmp_path / "none")) == (None, None)
    assert caplog.text == ""
    for name, read in (("a.json", lambda f: read_json(f, dict)), ("b.yaml", read_yaml)):
        file = tmp_path / name
        file.write_bytes(content)
        assert read(file) is None
        assert read(file) is None
        assert caplog.text.count(f"{file}: not readable, and taken as absent: ") == 1


def test_a_file_system_that_is_away_is_as_if_nothing_were_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_json(tmp_path, dict) is None
    assert "not readable, and taken as absent: Is a directory" in caplog.text


def test_a_folder_appears_at_the_end_with_all_that_was_written(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep/er/made") as scratch:
        (scratch / "file").write_text("text")
        assert not (tmp_path / "deep/er/made").exists()
    assert [p.name for p in (tmp_path / "deep/er").iterdir()] == ["made"]
    assert (tmp_path / "deep/er/made/file").read_text() == "text"


def test_a_folder_is_not_made_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "made") as scratch:
            (scratch / "file").write_text("text")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_folders_stays(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "made") as late:
        (late / "file").write_text("late")
        with atomic_folder(tmp_path / "made") as early:
            (early / "file").write_text("early")
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made/file").read_text() == "early"


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "made").write_text("file")
    with pytest.raises(OSError, match="Not a directory"), atomic_folder(tmp_path / "made"):
        pass
    assert (tmp_path / "made").read_text() == "file"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old ü")
    write_atomic(path, "new ü")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "half of a pair: \ud800")
    assert path.read_bytes() == "new ü".encode()
    assert list(tmp_path.iterdir()) == [path]
