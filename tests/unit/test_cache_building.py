"""What fills a cache ahead of a training: how it plans, and what ends it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from micro_critic import write_rows
from micro_job import write_job

from job.common import signals
from job.common.config import load_config
from job.common.errors import InputError, Stopped, StorageError
from job.common.schema import CriticConfig
from job.data.packing import Batch, Indices, Packer
from job.distributed.world import World
from job.training import cache_building, cache_opening
from job.training.cache_building import build
from job.training.cache_folders import folders, useless_bytes
from job.training.cache_opening import Opening

pytestmark = pytest.mark.slow

TRAINING, VALIDATION = 60, 12
ALL = TRAINING + VALIDATION
SETTINGS = (
    f"data.arithmetic.train_examples={TRAINING}",
    f"data.arithmetic.validation_examples={VALIDATION}",
    "training.micro_batch_tokens=128",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("building")
    write_job(folder, SETTINGS)
    return folder


@pytest.fixture
def states(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of caches, which is still to be made."""
    monkeypatch.chdir(folder)
    return tmp_path / "states"


def _config(states: Path, *settings: str) -> CriticConfig:
    there = f"training.prefix_cache_dir={states}"
    given = ("run.name=none", "training.prefix_cache=all", there, *settings)
    return load_config(CriticConfig, "critic.yaml", given)


def _sequences(states: Path) -> int:
    return sum(one.sequences for one in folders(states))


def _after_each(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], object]) -> list[int]:
    """Commit each micro-batch before the next one, and see how many there were."""
    done: list[int] = []
    put = cache_building.put_states

    def noted(writer: Any, *given: Any) -> None:
        put(writer, *given)
        writer.commit()
        done.append(_sequences(writer._folder.parent))
        then(len(done))

    monkeypatch.setattr(cache_building, "put_states", noted)
    return done


def test_a_set_is_laid_out_in_parts(states: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[float] = []
    split = Packer.split

    def noted(self: Packer, units: Indices) -> list[Indices]:
        parts.append(int(self.data.lengths[units].sum()) / self.budget)
        return split(self, units)

    monkeypatch.setattr(cache_building, "_PART", 2, raising=False)
    monkeypatch.setattr(Packer, "split", noted)
    build(_config(states))
    assert max(parts) <= 2
    assert _sequences(states) == ALL


def test_parts_do_not_come_between_solutions_of_a_problem_that_lie_apart(
    states: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [f"{a}+{b}+{a}+{b}+{a}+{b}?" for a in range(1, 5) for b in range(1, 5)]
    rows = [
        {"prompt": problem, "response": f"A{n}", "reward": n % 2, "problem_id": problem}
        for n in range(4)
        for problem in problems
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    computed: list[int] = []
    assemble = Packer.assemble

    def noted(self: Packer, units: Indices) -> Batch:
        computed.append(self.size(units).tokens)
        return assemble(self, units)

    monkeypatch.setattr(Packer, "assemble", noted)
    given = (f"data.train={data}", f"data.validation={data}", "data.group_by_problem=true")
    build(_config(states / "whole", *given))
    whole = sum(computed)
    computed.clear()
    monkeypatch.setattr(cache_building, "_PART", 1)
    build(_config(states / "parts", *given))
    assert sum(computed) < 1.1 * whole


def test_what_is_there_is_not_computed_again_and_counts_as_used(states: Path) -> None:
    folder = build(_config(states))
    os.utime(folder, (0, 0))
    before = sorted(folder.iterdir())
    assert build(_config(states)) == folder
    assert sorted(folder.iterdir()) == before
    assert folder.stat().st_mtime > 0


def test_what_another_rank_does_not_see_is_computed(
    states: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = folders(build(_config(states)).parent)

    def gather(world: World, item: Any) -> list[Any]:
        if not isinstance(item, dict):
            return [item, item]
        return [item, {name: np.arange(len(there)) % 3 > 0 for name, there in item.items()}]

    monkeypatch.setattr(World, "gather", gather)
    with pytest.raises(InputError, match="the states that are not there yet take"):
        build(_config(states, f"training.prefix_cache_gb={one.bytes / 1e9:.10f}"))
    build(_config(states))
    assert _sequences(states) == ALL + ALL // 3


def test_a_stop_is_heeded_and_what_is_computed_is_kept(
    states: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "_received", None)
    with monkeypatch.context() as patch:
        done = _after_each(patch, lambda n: n < 3 or setattr(signals, "_received", "SIGTERM"))
        with pytest.raises(Stopped, match="stopped by SIGTERM; what is computed is kept"):
            build(_config(states))
    assert len(done) == 3
    assert _sequences(states) == done[-1] < ALL
    monkeypatch.setattr(signals, "_received", None)
    build(_config(states))
    assert _sequences(states) == ALL


def test_where_nothing_can_be_written_any_more_nothing_is_computed(
    states: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    done = _after_each(monkeypatch, lambda n: n < 2 or monkeypatch.setattr(os, "pwrite", full))
    with pytest.raises(StorageError, match="No space left on device; what was written before is"):
        build(_config(states))
    assert len(done) == 3
    assert _sequences(states) == done[1] == done[2] > 0


def test_what_does_not_fit_is_refused_before_it_is_computed(states: Path) -> None:
    words = r"yet take 0\.\d+ GB, and there is room for 0\.000 GB \(training\.prefix_cache_dir, tr"
    with pytest.raises(InputError, match=words) as refused:
        build(_config(states, "training.prefix_cache_gb=0.00001"))
    assert "prune" not in str(refused.value)
    assert not states.exists()


def test_what_a_killed_build_has_left_is_named_where_it_takes_the_room(states: Path) -> None:
    left = states / "0123456789abcdef/.0a1b2c3d4e5f-0000-00000-000000.states"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(2_000_000))
    words = (
        "0.002 GB there are damaged, or were not committed by who began to write them: "
        f"`python -m job.cache prune --dir {states} --keep-gb GB` removes"
    )
    with pytest.raises(InputError) as refused:
        build(_config(states, "training.prefix_cache_gb=0.001"))
    assert "room for 0.000 GB" in str(refused.value)
    assert " GB that are left to checkpoints; " in str(refused.value)
    assert words in str(refused.value)
    assert useless_bytes(states) == 2_000_000


def test_room_is_four_fifths_of_what_is_free_and_never_below_nothing(
    states: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def room(*settings: str) -> float:
        return Opening(_config(states, *settings), None, "", World()).room()  # type: ignore[arg-type]

    monkeypatch.setattr(cache_opening, "free_bytes", lambda path: 5000)
    assert room() == 0  # which checkpoints need
    monkeypatch.setattr(cache_opening, "on_one_disk", lambda *_: False)
    assert room() == 4000
    there = states / "0123456789abcdef/0a1b2c3d4e5f-0000-00000-000000.states"
    there.parent.mkdir(parents=True)
    there.write_bytes(bytes(100))
    assert room("training.prefix_cache_gb=1") == 4000
    assert room("training.prefix_cache_gb=0.000001") == 900
    assert room("training.prefix_cache_gb=0.00000001") == 0
