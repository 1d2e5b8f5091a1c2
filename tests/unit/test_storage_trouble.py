"""A file system that is slow, away or full costs a checkpoint, never the training."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from disturbed_runs import (
    after_saves,
    assert_same,
    at_steps,
    before_steps,
    checkpoint_of,
    intact_steps,
    log_of,
    metrics_of,
    run_training,
    saved_steps,
)

from job.common.errors import Exit, exit_code
from job.run.directory import RunDirectory
from job.run.manifest import MANIFEST
from job.training import checkpoint as checkpoint_module
from job.training.checkpoint import SaveError
from job.training.learner import Learner

pytestmark = pytest.mark.usefixtures("training_folder")


@pytest.mark.slow
@pytest.mark.usefixtures("saved_in_background")
def test_training_goes_on_while_a_slow_file_system_takes_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    length = "training.max_steps=40"
    expected = run_training("fast", length, "checkpoint.every_steps=1000")
    current = 0
    spans: list[tuple[int, int]] = []
    under_way = threading.Lock()
    save = checkpoint_module.save

    def slow(*arguments: Any, **options: Any) -> None:
        assert under_way.acquire(blocking=False), "two saves at once"
        began = current
        limit = time.monotonic() + 10
        while current < min(began + 5, 39) and time.monotonic() < limit:
            time.sleep(0.005)
        save(*arguments, **options)
        spans.append((began, current))
        under_way.release()

    def count(step: int, _: Learner) -> None:
        nonlocal current
        current = step

    monkeypatch.setattr(checkpoint_module, "save", slow)
    before_steps(monkeypatch, count)
    run = run_training("slow", length)
    assert len(spans) >= 2
    assert all(later[0] >= earlier[1] for earlier, later in itertools.pairwise(spans))
    assert max(end - began for began, end in spans) >= 5
    assert "failed" not in log_of(run)
    assert saved_steps(run)[-1] == 40
    assert_same(run, expected)
    saved = intact_steps(run.file("checkpoints"))
    between = saved[len(saved) // 2]
    for later in saved:
        if later > between:
            shutil.rmtree(checkpoint_of(run, later))
    run.set_status(state="failed")
    run_training("slow", length)  # what was copied while training went on is of one step
    assert_same(run, expected)


def _aside(run: RunDirectory) -> Path:
    return run.path.with_name(f"{run.path.name}.away")


def _take_away(run: RunDirectory) -> None:
    run.file("checkpoints").rename(_aside(run))


def _block(run: RunDirectory) -> None:
    """A file where the folder was: nobody, root neither, can write below it."""
    _take_away(run)
    run.file("checkpoints").write_text("")


def _put_back(run: RunDirectory) -> None:
    run.file("checkpoints").unlink()
    _aside(run).rename(run.file("checkpoints"))


@pytest.mark.slow
def test_a_checkpoints_folder_that_cannot_be_written_for_a_while_costs_nothing(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/blocked")
    errors: dict[int, str | None] = {}
    actions = {5: lambda: _block(run), 8: lambda: _put_back(run)}

    def act(step: int, _: Learner) -> None:
        errors[step] = run.status()["checkpoint_error"]
        if step in actions:
            actions[step]()

    before_steps(monkeypatch, act)
    run_training("blocked")
    assert errors[6] is None
    assert "checkpoints" in cast(str, errors[8])
    assert log_of(run).count("the last good one is step 4") == 2  # tried at 6 and 7
    assert run.status()["checkpoint_error"] is None
    assert saved_steps(run) == [2, 4, 8]
    assert_same(run, whole)


@pytest.mark.slow
def test_a_checkpoints_folder_that_vanishes_while_it_is_written_is_made_anew(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/vanishing")

    def vanish() -> None:
        if saved_steps(run) == [2, 4]:
            _take_away(run)

    after_saves(monkeypatch, vanish)
    run_training("vanishing")
    # the save of step 6 is reported after step 7, which is saved in its place
    assert "No such file" in log_of(run)
    assert "the last good one is step 4" in log_of(run)
    assert saved_steps(run) == [7, 8]
    assert intact_steps(_aside(run)) == [2, 4]
    assert run.status()["checkpoint_error"] is None
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.usefixtures("saved_in_background")
def test_an_error_of_the_disk_inside_the_background_thread_ends_nothing(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/background")
    at_steps(monkeypatch, {4: lambda: _block(run), 7: lambda: _put_back(run)})
    run_training("background")
    assert saved_steps(run)[-1] == 8
    assert run.status()["checkpoint_error"] is None
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["rank-00000.state", "facts.json", "config.yaml", MANIFEST])
def test_a_disk_that_fills_up_at_any_file_of_a_checkpoint_costs_only_this_one(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run = RunDirectory(f"runs/full-{place}")
    flush = checkpoint_module.sync
    left = [place]

    def full(path: Path) -> None:
        if path.name in left and "step-00000006" in path.parent.name:
            left.remove(path.name)
            raise OSError(28, "No space left on device", str(path))
        flush(path)

    monkeypatch.setattr(checkpoint_module, "sync", full)
    run_training(run.path.name)
    assert left == []
    assert "saving a checkpoint failed: rank 0: [Errno 28] No space left on device" in log_of(run)
    assert saved_steps(run) == [2, 4, 7, 8]
    assert list(run.file("checkpoints").glob(".*")) == []
    assert_same(run, whole)


def test_a_status_that_a_full_disk_did_not_take_is_written_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    run.set_status(state="running", step=1)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("job.run.directory.write_atomic", full)
        run.set_status(checkpoint_error="no space")
    run.set_status(step=2)
    status = run.status()
    assert (status["state"], status["step"]) == ("running", 2)
    assert status["checkpoint_error"] == "no space"


@pytest.mark.slow
def test_metrics_that_cannot_be_written_keep_no_checkpoint_from_being_saved(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/metrics-lost")
    dead = os.open("/dev/full", os.O_WRONLY)  # like a handle that has become stale

    def die(step: int, _: Learner) -> None:
        if step == 3:
            for file in _opened(run.file("metrics.jsonl")):
                os.dup2(dead, file)

    before_steps(monkeypatch, die)
    run_training("metrics-lost")
    assert saved_steps(run) == [2, 4, 6, 8]
    assert "metrics.jsonl: No space left on device; lines are kept in memory" in log_of(run)
    assert "metrics.jsonl: No space left on device; making it anew" in log_of(run)
    assert_same(run, whole)


def _opened(path: Path) -> list[int]:
    """This process's descriptors of a file."""
    numbers = [int(link.name) for link in Path("/proc/self/fd").iterdir()]
    places = {n: Path(f"/proc/self/fd/{n}") for n in numbers}
    return [n for n, link in places.items() if link.exists() and link.samefile(path)]


@pytest.mark.slow
def test_a_last_save_that_fails_for_good_ends_the_run_and_loses_no_other_checkpoint(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/last")
    monkeypatch.setattr("job.training.loop.LAST_SAVE_PAUSES", (0, 0, 0))
    with monkeypatch.context() as patch:
        at_steps(patch, {7: lambda: _block(run)})
        with pytest.raises(SaveError, match="step 8 could not be saved") as caught:
            run_training("last")
    assert exit_code(caught.value) == Exit.IO_FAILED
    assert "runs/last/checkpoints" in str(caught.value)
    assert "(disk /" in str(caught.value)
    assert log_of(run).count("trying again in 0 s") == 3
    assert run.status()["state"] == "failed"
    assert "could not be saved" in run.status()["error"]
    assert "checkpoints" in run.status()["checkpoint_error"]
    assert metrics_of(run) == metrics_of(whole)
    assert not run.file("critic.safetensors").exists()
    assert intact_steps(_aside(run)) == [2, 4, 6]
    _put_back(run)
    run_training("last")
    assert "going on from step 6" in log_of(run)
    assert run.status()["state"] == "finished"
    assert_same(run, whole)


@pytest.mark.slow
def test_a_last_save_that_fails_once_is_tried_again(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/last-but-one")
    at_steps(monkeypatch, {8: lambda: _block(run)})
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            _put_back(run)

    clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)  # other threads sleep as ever
    monkeypatch.setattr("job.training.loop.time", clock)
    run_training("last-but-one")
    assert pauses == [1, 10]
    assert run.status()["checkpoint_error"] is None
    assert saved_steps(run) == [2, 4, 6, 8]
    assert_same(run, whole)
