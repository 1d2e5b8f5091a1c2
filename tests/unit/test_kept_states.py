"""Scoring reads the states of frozen blocks where a training has kept them."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from launch import run_ranks
from micro_critic import MicroCritics, write_rows
from micro_job import MicroRun
from torch import Tensor

from job.common.errors import StorageError
from job.common.schema import EMBEDDED
from job.model.prefix import Prefix
from job.model.transformer import Trunk
from job.run.trained import TrainedCritic
from job.training import scoring
from job.training.cache_boundary import Boundary
from job.training.kept_states import KeptStates

pytestmark = pytest.mark.slow

NONE = "training.prefix_cache=none"
Row = dict[str, Any]


@pytest.fixture
def states(critics: MicroCritics) -> str:
    return f"training.prefix_cache_dir={critics.folder}/states"


@pytest.fixture
def run(critics: MicroCritics, states: str) -> MicroRun:
    """A run that has kept the states of its validation data."""
    return critics.run("kept", "training.prefix_cache=validation", states)


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "job.score")


def _score(run: MicroRun, out: Path, *overrides: str, source: str = EMBEDDED) -> list[Row]:
    scoring.score(lambda: TrainedCritic.find(run.path, None, overrides), source, out)
    rows: list[Row] = pyarrow.parquet.read_table(out).to_pylist()
    return rows


def _same(found: list[Row], others: list[Row]) -> None:
    """Equal up to rounding: float32 states that lay beside others in a micro-batch."""
    for row, other in zip(found, others, strict=True):
        assert row["tokens"] == other["tokens"]
        assert row["values"] == pytest.approx(other["values"], abs=1e-5)
        assert row["prompt_value"] == pytest.approx(other["prompt_value"], abs=1e-5)


def _computes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many micro-batches have had their frozen blocks run since."""
    found: list[int] = []
    prefix, settle = Trunk.prefix, Prefix.settle

    def computed(self: Trunk, *given: Any) -> Tensor:
        found.append(1)
        return prefix(self, *given)

    def settled(self: Prefix, states: Tensor) -> Tensor:
        found.append(1)
        return settle(self, states)

    monkeypatch.setattr(Trunk, "prefix", computed)
    monkeypatch.setattr(Prefix, "settle", settled)
    return found


@pytest.mark.parametrize("n", [0, 1])
def test_the_validation_data_of_a_training_that_kept_its_states_are_read(
    critics: MicroCritics,
    states: str,
    n: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = ("training.prefix_cache=validation", f"training.num_unfrozen_layers={n}", states)
    run = critics.run("kept", given[0], states) if n else critics.run("kept0", *given)
    plain = _score(run, tmp_path / "plain.parquet", NONE)
    assert "prefix cache" not in caplog.text
    computed, left_out = _computes(monkeypatch), []
    monkeypatch.setattr(Trunk, "leave_out", _noted(Trunk.leave_out, left_out))
    found = _score(run, tmp_path / "read.parquet")
    assert "prefix cache: states of 30 of 30 sequences (100 %) were read: " in caplog.text
    assert (computed, left_out) == ([], [3 - n])
    _same(found, plain)


def _noted(call: Any, noted: list[int]) -> Any:
    def leave_out(self: Trunk, block: int) -> None:
        noted.append(block)
        call(self, block)

    return leave_out


def test_a_critic_of_fewer_blocks_reads_the_states_before_those_of_more(
    critics: MicroCritics,
    run: MicroRun,
    states: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    few = critics.run("few", "training.num_unfrozen_layers=0")
    plain = _score(few, tmp_path / "plain.parquet", NONE)
    there = Path(states.partition("=")[2])
    alone = tmp_path / "states"
    (kept,) = [one for one in there.iterdir() if '"block": 2' in _facts(one)]
    shutil.copytree(kept, alone / kept.name)
    os.utime(alone / kept.name, (0, 0))
    given = ("training.prefix_cache=all", f"training.prefix_cache_dir={alone}")
    _same(_score(few, tmp_path / "read.parquet", *given), plain)
    assert (alone / kept.name).stat().st_mtime > 0  # it is used
    assert "states of 30 of 30 sequences (100 %) were read: " in caplog.text


def _facts(folder: Path) -> str:
    (index, *_) = folder.glob("*.index")
    return index.read_bytes().partition(b"\n")[0].decode()


def test_what_is_not_there_is_computed_in_micro_batches_of_its_own(
    run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    more = "data.arithmetic.validation_examples=45"
    plain = _score(run, tmp_path / "plain.parquet", more, NONE)
    computed = _computes(monkeypatch)
    _same(_score(run, tmp_path / "part.parquet", more), plain)
    assert "prefix cache: states of 30 of 45 sequences (67 %) were read: " in caplog.text
    assert 0 < len(computed) < 45


def test_damaged_states_are_computed_by_the_next_command(
    run: MicroRun, states: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = _score(run, tmp_path / "plain.parquet", NONE)
    copy = tmp_path / "states"
    shutil.copytree(states.partition("=")[2], copy)
    for file in copy.glob("*/*.states"):
        content = bytearray(file.read_bytes())
        content[5] ^= 1
        file.write_bytes(content)
    given = f"training.prefix_cache_dir={copy}"
    with pytest.raises(StorageError, match="the next attempt computes what could be set aside"):
        _score(run, tmp_path / "again.parquet", given)
    _same(_score(run, tmp_path / "again.parquet", given), plain)
    assert "were read" not in caplog.text


@pytest.mark.parametrize("why", ["no folder", "none", "all trained"])
def test_where_nothing_can_be_read_no_key_is_computed(
    critics: MicroCritics, run: MicroRun, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("keys were computed")

    monkeypatch.setattr(Boundary, "stored", never)
    overrides = {
        "no folder": [f"training.prefix_cache_dir={tmp_path}/none"],
        "none": [NONE],
        "all trained": ["training.prefix_cache=all"],
    }[why]
    if why == "all trained":
        run = critics.run("whole", "training.num_unfrozen_layers=3")
    assert len(_score(run, tmp_path / "values.parquet", *overrides)) == 30


def test_other_texts_read_nothing(
    run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[object] = []
    find = KeptStates.find

    def noted(*given: Any) -> KeptStates | None:
        found.append(find(*given))
        return None

    monkeypatch.setattr(KeptStates, "find", noted)
    rows = [{"prompt": "1+1?", "response": "1+1=2;A2", "reward": 1}]
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    _score(run, tmp_path / "values.parquet", source=source)
    assert found == [None]


def test_ranks_read_what_one_process_computes(run: MicroRun, tmp_path: Path) -> None:
    more = "data.arithmetic.validation_examples=45"
    plain = _score(run, tmp_path / "plain.parquet", more, NONE)
    out = tmp_path / "ranks.parquet"
    command = ["-m", "job.score", "--critic", str(run.path), "--data", EMBEDDED, "--out", str(out)]
    run_ranks([*command, "--override", more], 2, tmp_path)
    _same(pyarrow.parquet.read_table(out).to_pylist(), plain)
