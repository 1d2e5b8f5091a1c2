"""What states are of, which entry is a sequence's, and that it is read before it is asked for."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from waiting import wait_for

from job.data import state_shards
from job.data.state_shards import EVALUATION, Piece, Shards, Stored, Writer, any_step
from job.distributed.world import World
from job.training.cache_boundary import Boundary
from job.training.read_ahead import AHEAD, Known, ReadAhead
from job.training.state_reader import StateReader

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BOUNDARY = Boundary(2, 4, 8, torch.float32)


def _stored(key: int, rows: int) -> Stored:
    return Stored(np.array([[key, key]], np.uint64), np.array([rows]))


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """One entry of three rows, which its reader is still to take in."""
    shards = BOUNDARY.shards(tmp_path, "a", CPU)
    writer = Writer(shards.folder, "w", BOUNDARY.facts("a", CPU), may_take=1e9)
    piece = Piece(np.array([1, 1], np.uint64), 0, 3)
    writer.put([piece], np.ones((3, BOUNDARY.row_bytes), np.uint8), EVALUATION, lambda: None)
    writer.close()
    return shards


def test_states_are_of_a_dtype_a_kind_of_attention_and_a_version_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder(boundary: Boundary = BOUNDARY, device: torch.device = CPU, base: str = "a") -> Path:
        return boundary.shards(tmp_path, base, device).folder

    others = [
        folder(replace(BOUNDARY, dtype=torch.bfloat16)),
        folder(replace(BOUNDARY, block=1)),
        folder(device=GPU),
        folder(base="b"),
    ]
    same = folder()
    monkeypatch.setattr(torch, "__version__", "9.9.0+cpu")
    assert len({same, folder(), *others}) == 6
    monkeypatch.undo()
    assert folder() == same


def test_an_entry_of_other_rows_is_no_sequence_s(shards: Shards) -> None:
    shards.refresh()
    reader = StateReader(BOUNDARY, shards, World())
    assert reader.find(_stored(1, 3), any_step).tolist() == [0]
    assert reader.find(_stored(1, 4), any_step).tolist() == [-1]
    assert reader.find(_stored(2, 3), any_step).tolist() == [-1]


@pytest.mark.parametrize("memory", [1, 1 << 40])
def test_a_cache_of_half_the_memory_gives_its_pages_back(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    given_back: list[tuple[int, int]] = []
    monkeypatch.setattr(state_shards, "_host_bytes", lambda: memory)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, at, size, advice: given_back.append((at, size))
    )
    shards.refresh()
    assert shards.read(0, memoryview(bytearray(3 * BOUNDARY.row_bytes)))
    assert given_back == ([(0, 3 * BOUNDARY.row_bytes)] if memory == 1 else [])


def test_what_is_expected_is_read_before_it_is_asked_for() -> None:
    read: list[int] = []
    lock = threading.Lock()

    def reading(stored: Stored, step: int) -> Known | None:
        with lock:
            read.append(int(stored.rows[0]))
        return None

    ahead = ReadAhead(reading)
    ahead.expect([_stored(k, k) for k in range(AHEAD + 2)], 5)
    wait_for(lambda: sorted(read) == list(range(AHEAD)))
    ahead.get(_stored(0, 0), 5)  # which makes room for one more
    wait_for(lambda: sorted(read) == list(range(AHEAD + 1)))
    ahead.close()
