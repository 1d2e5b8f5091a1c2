"""Shards of hidden states: what is committed is read as it was written, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from job.data import state_shards
from job.data.state_shards import (
    EVALUATION,
    GIVEN,
    PAGE,
    Piece,
    Shards,
    Stored,
    Writer,
    remove_leftovers,
    sequence_keys,
)

FACTS = {"base": "abc", "width": 4}
ROW = 16  # bytes
Bytes = NDArray[np.uint8]


def _rows(n: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (n, ROW), np.uint8)


def _key(n: int) -> NDArray[np.uint64]:
    return np.array([n, n + 1], np.uint64)


def _all(steps: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.ones(len(steps), np.bool_)


def _ready() -> None:
    pass


def _refused(number: int) -> Callable[..., Any]:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _written(folder: Path, name: str, *entries: tuple[int, int, int], **settings: float) -> Writer:
    """A writer of entries (key, rows, step), which has ended."""
    writer = Writer(folder, name, FACTS, may_take=settings.get("may_take", 1e9), shard_bytes=PAGE)
    for key, n, step in entries:
        writer.put([Piece(_key(key), 1, 1 + n)], _rows(n + 2, key), step, _ready)
    writer.close()
    return writer


def _opened(folder: Path, own: str = "", given: list[str] | None = None) -> Shards:
    shards = Shards(folder, FACTS, ROW)
    shards.refresh(own, given)
    return shards


def _read(shards: Shards, key: int, n: int) -> Bytes | None:
    (entry,) = shards.find(_key(key)[None], _all)
    into = np.zeros((n, ROW), np.uint8)
    if entry < 0 or not shards.read(int(entry), into.reshape(-1).data):
        return None
    return into


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "states"
    assert not list((tmp_path / "states").glob(".*"))


def test_entries_are_read_as_they_were_written(folder: Path) -> None:
    sizes = {3: 5, 1: 300, 2: 1}
    _written(folder, "a", *((key, n, key) for key, n in sizes.items()))
    shards = _opened(folder)
    assert (len(shards), len(shards.names), shards.bytes) == (3, 3, 306 * ROW)
    for key, n in sizes.items():
        read = _read(shards, key, n)
        assert read is not None
        assert (read == _rows(n + 2, key)[1 : 1 + n]).all()
    assert _read(shards, 4, 1) is None


def test_each_entry_begins_on_a_page_of_the_disk(folder: Path) -> None:
    writer = Writer(folder, "a", FACTS, may_take=1e9)
    writer.put([Piece(_key(1), 0, 2), Piece(_key(2), 2, 3)], _rows(3, 0), 0, _ready)
    writer.put([Piece(_key(3), 0, 257)], _rows(257, 0), 0, _ready)
    writer.close()
    (states,) = folder.glob("*.states")
    assert states.stat().st_size == 4 * PAGE
    assert states.read_bytes()[PAGE : PAGE + ROW] == _rows(3, 0)[2].tobytes()


def test_what_is_not_committed_is_not_there(folder: Path) -> None:
    writer = Writer(folder, "a", FACTS, may_take=1e9)
    writer.put([Piece(_key(1), 0, 2)], _rows(2, 1), 0, _ready)
    shards = _opened(folder)
    assert len(shards) == 0
    writer.commit()
    shards.refresh()
    assert len(shards) == 1
    writer.close()


def test_a_writer_that_has_ended_has_nothing_to_commit(folder: Path) -> None:
    writer = _written(folder, "a", (1, 2, 0))
    writer.commit()
    assert len(_opened(folder)) == 1


def test_an_entry_is_written_once(folder: Path) -> None:
    _written(folder, "a", (1, 2, 0), (1, 2, 7))
    assert len(_opened(folder)) == 1


def test_what_an_evaluation_has_written_a_training_step_writes_for_itself(folder: Path) -> None:
    _written(folder, "a", (1, 2, EVALUATION), (1, 2, 7), (1, 2, EVALUATION), (1, 2, 8))
    assert sorted(_opened(folder, "a")._entries["step"].tolist()) == [EVALUATION, 7]


def test_of_entries_of_one_key_the_first_step_that_is_seen_counts(folder: Path) -> None:
    for name, step in (("a", 9), ("b", 4), ("c", 6)):
        _written(folder, name, (1, 2, step))
    shards = Shards(folder, FACTS, ROW)
    for name in ("a", "b", "c"):
        shards.refresh(name, [])
    steps = {}
    for least in (0, 5, 9):
        (entry,) = shards.find(_key(1)[None], lambda s, least=least: s >= least)  # type: ignore[misc]
        steps[least] = int(shards._entries[entry]["step"])
    assert steps == {0: 4, 5: 6, 9: 9}
    assert shards.find(_key(1)[None], lambda s: s > 9).tolist() == [-1]


def test_what_was_found_stays_what_it_is_when_more_is_taken_in(folder: Path) -> None:
    _written(folder, "b", (5, 3, 0))
    shards = _opened(folder)
    (entry,) = shards.find(_key(5)[None])
    _written(folder, "a", (1, 2, 0), (5, 3, 0))  # before it by name and key
    shards.refresh()
    assert shards.rows(np.array([entry])).tolist() == [3]
    into = np.zeros((3, ROW), np.uint8)
    assert shards.read(int(entry), into.reshape(-1).data)
    assert (into == _rows(5, 5)[1:4]).all()


def test_shards_of_others_count_as_given_and_only_the_named_ones(folder: Path) -> None:
    _written(folder, "own-1", (1, 2, 3))
    _written(folder, "other", (2, 2, 3))
    _written(folder, "later", (3, 2, 3))
    shards = _opened(folder, "own-", ["other-000000"])
    assert sorted(shards._entries["step"].tolist()) == [GIVEN, 3]
    assert [_read(shards, key, 2) is not None for key in (1, 2, 3)] == [True, True, False]


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_is_noticed_and_the_shard_set_aside(
    folder: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    _written(folder, "a", (1, 5, 0))
    (states,) = folder.glob("*.states")
    content = bytearray(states.read_bytes())
    content[0 if where == "first" else 5 * ROW - 1] ^= 4
    states.write_bytes(content)
    shards = _opened(folder)
    assert _read(shards, 1, 5) is None
    assert f"{states}: states are not as they were written" in caplog.text
    assert [file.suffix for file in sorted(folder.iterdir())] == [".damaged", ".states"]
    assert len(_opened(folder)) == 0


def test_a_damaged_shard_of_a_folder_that_takes_no_changes_says_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _written(folder, "a", (1, 5, 0))
    (states,) = folder.glob("*.states")
    states.write_bytes(states.read_bytes()[::-1])
    monkeypatch.setattr(Path, "rename", _refused(errno.EROFS))
    assert _read(_opened(folder), 1, 5) is None
    assert "cannot be set aside (Read-only file system)" in caplog.text
    assert "training.prefix_cache=none" in caplog.text


def test_what_the_machine_cannot_read_just_now_is_not_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _written(folder, "a", (1, 5, 0))
    shards = _opened(folder)
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", _refused(errno.EMFILE))
        assert _read(shards, 1, 5) is None
    assert "Too many open files" in caplog.text
    assert _read(shards, 1, 5) is not None
    monkeypatch.setattr(os, "preadv", _refused(errno.EIO))
    assert _read(shards, 1, 5) is None
    assert len(_opened(folder)) == 0


def test_files_of_many_shards_are_not_all_kept_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_shards, "_STAY_OPEN", 2)
    _written(folder, "a", *((key, 200, 0) for key in range(5)))  # a shard for each
    before, shards = _open_files(), _opened(folder)
    for _ in range(2):
        assert all(_read(shards, key, 200) is not None for key in range(5))
    assert _open_files() == before + 2
    shards.close()
    assert _open_files() == before


def test_entries_are_read_and_written_in_as_many_parts_as_the_system_makes_of_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda f, to, at: pread(f, [to[0][:100]], at))
    monkeypatch.setattr(os, "pwrite", lambda f, content, at: pwrite(f, content[:100], at))
    _written(folder, "a", (1, 50, 0))
    read = _read(_opened(folder), 1, 50)
    assert read is not None
    assert (read == _rows(52, 1)[1:51]).all()


@pytest.mark.parametrize("damage", ["cut", "index", "head", "no size", "foreign", "gone"])
def test_a_shard_that_is_not_whole_is_not_used(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    _written(folder, "a", (1, 5, 0))
    _written(folder, "b", (2, 5, 0))
    states, index = folder / "a-000000.states", folder / "a-000000.index"
    if damage == "cut":
        os.truncate(states, 40)
    elif damage == "gone":
        states.unlink()
    elif damage == "index":
        index.write_bytes(index.read_bytes()[:-1] + b"x")
    elif damage == "head":
        index.write_bytes(b"{" + index.read_bytes())
    elif damage == "no size":
        index.write_bytes(index.read_bytes().replace(b"bytes", b"cytes"))
    else:
        index.write_bytes(index.read_bytes().replace(b"abc", b"abd"))
    shards = _opened(folder)
    assert shards.names == ["b-000000"]
    assert f"{index} is not used: " in caplog.text
    assert index.with_suffix(".damaged").exists() == (damage != "gone")
    assert _read(shards, 2, 5) is not None


def test_a_full_budget_ends_the_writing_and_loses_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = _written(folder, "a", (1, 5, 0), (2, 5, 1), (3, 5, 2), may_take=3 * PAGE - 1)
    assert writer.error is not None
    assert "training.prefix_cache_gb is used up" in writer.error
    assert caplog.text.count("not written any more") == 1
    shards = _opened(folder)
    assert [_read(shards, key, 5) is not None for key in (1, 2, 3)] == [True, True, False]


def test_a_disk_that_refuses_ends_the_writing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert _written(folder, "a", (1, 5, 0), (2, 5, 0)).error is not None
    assert "No space left on device" in caplog.text
    assert not list(folder.iterdir())


def test_a_disk_that_takes_a_part_keeps_no_half_of_an_entry(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, room = os.pwrite, 7 * ROW

    def nearly_full(file: int, content: memoryview, at: int) -> int:
        if at >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, content[: room - at], at)

    monkeypatch.setattr(os, "pwrite", nearly_full)
    writer = Writer(folder, "a", FACTS, may_take=1e9)
    writer.put([Piece(_key(1), 0, 5)], _rows(5, 1), 0, _ready)
    monkeypatch.setattr(state_shards, "on_disk", lambda size: size)
    writer.put([Piece(_key(2), 0, 5)], _rows(5, 2), 0, _ready)
    writer.close()
    assert writer.error is not None
    shards = _opened(folder)
    assert len(shards) == 1
    assert _read(shards, 1, 5) is not None


def test_states_without_an_index_do_not_take_up_a_full_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_bytes", _refused(errno.ENOSPC))
    assert _written(folder, "a", (1, 5, 0)).error is not None
    assert not list(folder.iterdir())


def test_the_rest_of_the_disk_is_left_to_checkpoints(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([1000 + 5 * ROW, 1000 + 5 * ROW - 1])
    monkeypatch.setattr(state_shards, "free_bytes", lambda _: next(free))
    writer = Writer(folder, "a", FACTS, may_take=1e9, leave_free=1000)
    for key in (1, 2):
        writer.put([Piece(_key(key), 0, 5)], _rows(5, key), 0, _ready)
    writer.close()
    assert writer.error is not None
    assert "what is left of the disk is for checkpoints" in writer.error
    assert len(_opened(folder)) == 1


def test_only_leftovers_of_the_writer_are_removed(folder: Path) -> None:
    _written(folder, "a", (1, 5, 0))
    for name in (".a-000001.states", "a-000002.states", "b-000001.states", ".ab.states"):
        (folder / name).write_bytes(b"x")
    remove_leftovers(folder, "a")
    there = sorted(file.name for file in folder.iterdir())
    assert there == [".ab.states", "a-000000.index", "a-000000.states", "b-000001.states"]
    (folder / ".ab.states").unlink()


def test_keys_are_of_tokens_first_row_and_place_among_equals() -> None:
    tokens = np.array([1, 2, 1, 2, 1, 3, 1, 2], np.uint32)
    keys = sequence_keys(np.split(tokens, 4), np.array([0, 0, 0, 1]))
    plain = hashlib.blake2b(tokens[:2].tobytes(), digest_size=16, salt=bytes(8)).digest()
    assert keys[0].tobytes() == plain
    assert (keys[1] - keys[0]).tolist() == [0, 1]
    assert len({key.tobytes() for key in keys}) == 4
    assert sequence_keys([], np.array([], np.int64)).shape == (0, 2)
    chosen = Stored(keys, np.array([2, 2, 2, 1]))[np.array([3, 0])]
    assert (len(chosen), chosen.rows.tolist()) == (2, [1, 2])
    assert (chosen.keys == keys[[3, 0]]).all()
