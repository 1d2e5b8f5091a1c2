"""Folders of caches: what is in them is counted, and what is of no use goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from job import cache as job_cache
from job.common.errors import InputError
from job.data.state_shards import PAGE, Piece, Shards, Writer
from job.training.cache_folders import folder_of, folders, prune, used_bytes, useless_bytes

FACTS = {"base": "abc", "block": 2, "dtype": "bfloat16"}
ROW = 16  # bytes
NAME = "0a1b2c3d4e5f-0000-00000"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache of three shards of one sequence each."""
    _write(folder_of(tmp_path, FACTS), 0, 1, 2)
    return tmp_path


def _write(folder: Path, *keys: int) -> None:
    writer = Writer(folder, NAME, FACTS, may_take=1e9, shard_bytes=PAGE)
    for key in keys:
        piece = Piece(np.array([key, key], np.uint64), 0, 5)
        writer.put([piece], np.full((5, ROW), key, np.uint8), 0, lambda: None)
    writer.close()


def _set_aside(folder: Path, *keys: int) -> None:
    """Damage the shards of these keys, which whoever reads them sets aside."""
    shards = Shards(folder, FACTS, ROW)
    shards.refresh()
    for key in keys:
        states = folder / f"{NAME}-{key:06}.states"
        states.write_bytes(bytes([key + 1]) + states.read_bytes()[1:])
        (entry,) = shards.find(np.array([[key, key]], np.uint64))
        assert not shards.read(int(entry), memoryview(bytearray(5 * ROW)))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _shards(*numbers: int) -> list[str]:
    return [f"{NAME}-{n:06}.{kind}" for n in numbers for kind in ("index", "states")]


def _left_long_ago(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * PAGE)
    os.utime(file, (0, 0))


def _command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["job.cache", *words])
    job_cache.main()


def test_what_was_set_aside_is_counted_and_goes_whatever_is_to_be_kept(root: Path) -> None:
    (whole,) = folders(root)
    assert (whole.sequences, whole.bytes, whole.damaged) == (3, 3 * PAGE, 0)
    _set_aside(whole.path, 1)
    (part,) = folders(root)
    assert (part.sequences, part.bytes, part.damaged) == (2, 3 * PAGE, PAGE)
    assert part.facts == FACTS
    assert prune(root, 1e9) == PAGE
    assert _names(whole.path) == _shards(0, 2)


def test_a_cache_all_of_which_was_set_aside_is_seen_and_removed(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (whole,) = folders(root)
    _set_aside(whole.path, 0, 1, 2)
    (none,) = folders(root)
    assert (none.sequences, none.damaged, none.facts) == (0, 3 * PAGE, FACTS)
    for words in (["status"], ["prune", "--keep-gb", "1"]):
        _command(monkeypatch, *words, "--dir", str(root))
        assert "0.000 GB" in capsys.readouterr().out
    assert not whole.path.exists()
    assert used_bytes(root) == 0


def _replaced(before: bytes, after: bytes) -> Callable[[Path], object]:
    return lambda index: index.write_bytes(index.read_bytes().replace(before, after))


_DAMAGES: dict[str, Callable[[Path], object]] = {
    "another key": _replaced(b'"facts"', b'"gacts"'),
    "no size": _replaced(b'"bytes"', b'"gytes"'),
    "no facts": lambda index: index.write_bytes(b'{"sha256": "", "bytes": 0, "facts": 7}\n'),
    "other facts": _replaced(b'"block": 2', b'"block": 3'),
    "a list": lambda index: index.write_bytes(b"[1, 2]\n"),
    "deep": lambda index: index.write_bytes(b"[" * 100_000),
    "no JSON": lambda index: index.write_bytes(b"\xff\0"),
    "empty": lambda index: index.write_bytes(b""),
    "an entry": lambda index: index.write_bytes(index.read_bytes()[:-1]),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_an_index_that_is_not_as_it_was_written_is_damaged(
    root: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(root, FACTS)
    _DAMAGES[damage](folder / f"{NAME}-000001.index")
    (part,) = folders(root)
    assert (part.sequences, part.bytes, part.damaged) == (2, 3 * PAGE, PAGE)
    assert part.facts == FACTS
    assert useless_bytes(root) == PAGE
    for words in (["status"], ["prune", "--keep-gb", "1"]):
        _command(monkeypatch, *words, "--dir", str(root))
    assert "block 2" in capsys.readouterr().out
    assert _names(folder) == _shards(0, 2)


def test_an_index_whose_states_are_gone_or_cut_is_damaged(root: Path) -> None:
    folder = folder_of(root, FACTS)
    (folder / f"{NAME}-000000.states").unlink()
    os.truncate(folder / f"{NAME}-000001.states", 100)
    (part,) = folders(root)
    assert (part.sequences, part.bytes, part.damaged) == (1, PAGE + 100, 100)
    assert prune(root, 1e9) == 100
    assert _names(folder) == _shards(2)


def test_an_index_that_cannot_be_read_now_stays(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        (one,) = folders(root)
        assert (one.sequences, one.damaged) == (0, 0)
        assert prune(root, 1e9) == 0
    assert folders(root)[0].sequences == 3


def test_what_killed_writers_have_left_is_seen_though_nothing_was_committed(root: Path) -> None:
    folder = root / "fedcba9876543210"
    for name in (f".{NAME}-000000.states", f"{NAME}-000001.states", f".{NAME}-000002.index"):
        _left_long_ago(folder / name)
    new = folder_of(root, FACTS) / f".{NAME}-000003.states"
    new.write_bytes(b"x")  # somebody is at it
    assert sorted(one.sequences for one in folders(root)) == [0, 3]
    assert useless_bytes(root) == 2 * PAGE + 1
    assert prune(root, 1e9) == 2 * PAGE
    assert not folder.exists()
    assert len(folders(root)) == 1
    assert new.exists()


def test_what_is_no_cache_is_left_alone(root: Path) -> None:
    """Whatever it is called, and however old."""
    cache = folder_of(root, FACTS)
    others = [
        root / "notes/states.txt",
        root / "states.txt",
        root / f"{NAME}-000000.states",
        root / f"models/{NAME}-000000.states",
        root / "models/x.index",
        root / "faiss/docs.index",
        root / "0123456789abcdef/params.json",
        root / "0123456789abcdef/x.index",
        cache / "mine/docs.damaged",
        cache / "mine.index",
        cache / "notes.txt",
    ]
    for file in others:
        _left_long_ago(file)
    (cache / f"{NAME}-000009.states").mkdir()
    assert [one.path for one in folders(root)] == [cache]
    assert used_bytes(root) == 3 * PAGE
    assert prune(root, 0) == 3 * PAGE
    assert all(file.exists() for file in others)
    assert _names(cache) == [f"{NAME}-000009.states", "mine", "mine.index", "notes.txt"]


def test_a_folder_of_other_indexes_holds_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("models/x.index", "models/params.json", "models/old/y", "faiss/docs.index"):
        _left_long_ago(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="there is no cache here"):
        _command(monkeypatch, "prune", "--dir", str(tmp_path), "--keep-gb", "1000")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_shards_name_is_not_given_again(root: Path) -> None:
    (whole,) = folders(root)
    _set_aside(whole.path, 0, 1, 2)
    _write(whole.path, 7)
    assert prune(root, 1e9) == 3 * PAGE
    (left,) = folders(root)
    assert (left.sequences, left.bytes) == (1, PAGE)
