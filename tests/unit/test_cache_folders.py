"""Folders of caches: what is in them is counted, and what is of no use goes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from job import cache as job_cache
from job.data.state_shards import PAGE, Piece, Shards, Writer
from job.training.cache_folders import folders, prune, used_bytes

FACTS = {"base": "abc", "block": 2, "dtype": "bfloat16"}
ROW = 16  # bytes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache of three shards of one sequence each."""
    folder = tmp_path / "0123456789abcdef"
    writer = Writer(folder, "a", FACTS, may_take=1e9, shard_bytes=PAGE)
    for key in range(3):
        piece = Piece(np.array([key, key], np.uint64), 0, 5)
        writer.put([piece], np.full((5, ROW), key, np.uint8), 0, lambda: None)
    writer.close()
    return tmp_path


def _set_aside(folder: Path, *keys: int) -> None:
    shards = Shards(folder, FACTS, ROW)
    shards.refresh()
    found = shards.find(np.array([[k, k] for k in keys], np.uint64), lambda steps: steps < 0)
    for entry in found:
        shards.set_aside(int(entry))


def test_what_was_set_aside_is_counted_and_goes_whatever_is_to_be_kept(root: Path) -> None:
    (whole,) = folders(root)
    assert (whole.sequences, whole.bytes, whole.damaged) == (3, 3 * PAGE, 0)
    _set_aside(whole.path, 1)
    (part,) = folders(root)
    assert (part.sequences, part.bytes, part.damaged) == (2, 3 * PAGE, PAGE)
    assert part.facts == FACTS
    assert prune(root, 1e9) == PAGE
    assert sorted(path.name for path in whole.path.iterdir()) == [
        f"a-{n:06}.{kind}" for n in (0, 2) for kind in ("index", "states")
    ]


def test_a_cache_all_of_which_was_set_aside_is_seen_and_removed(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (whole,) = folders(root)
    _set_aside(whole.path, 0, 1, 2)
    (none,) = folders(root)
    assert (none.sequences, none.damaged, none.facts) == (0, 3 * PAGE, FACTS)
    for words in (["status"], ["prune", "--keep-gb", "1"]):
        monkeypatch.setattr(sys, "argv", ["job.cache", *words, "--dir", str(root)])
        job_cache.main()
        assert "0.000 GB" in capsys.readouterr().out
    assert not whole.path.exists()
    assert used_bytes(root) == 0


def test_what_killed_writers_have_left_is_seen_though_nothing_was_committed(root: Path) -> None:
    folder = root / "fedcba9876543210"
    folder.mkdir()
    for name in (".b-000000.states", "b-000001.states"):
        (folder / name).write_bytes(b"x" * PAGE)
        os.utime(folder / name, (0, 0))
    assert sorted(one.sequences for one in folders(root)) == [0, 3]
    assert prune(root, 1e9) == 2 * PAGE
    assert not folder.exists()
    assert len(folders(root)) == 1


def test_what_is_no_cache_is_left_alone(root: Path) -> None:
    other = root / "notes"
    other.mkdir()
    (other / "states.txt").touch()
    (root / "states.txt").touch()
    prune(root, 0)
    assert sorted(path.name for path in root.iterdir()) == ["notes", "states.txt"]


def test_a_damaged_shards_name_is_not_given_again(root: Path) -> None:
    (whole,) = folders(root)
    _set_aside(whole.path, 0, 1, 2)
    writer = Writer(whole.path, "a", FACTS, may_take=1e9)
    writer.put([Piece(np.array([7, 7], np.uint64), 0, 5)], np.ones((5, ROW), np.uint8), 0, int)
    writer.close()
    assert prune(root, 1e9) == 3 * PAGE
    (left,) = folders(root)
    assert (left.sequences, left.bytes) == (1, PAGE)
