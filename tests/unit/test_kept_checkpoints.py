"""Which checkpoints are kept, and that clearing up costs no good one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from disturbed_runs import (
    DAMAGES,
    assert_same,
    at_steps,
    checkpoint_of,
    checkpoints_of,
    content_of,
    copy_run,
    flip,
    identity_of,
    intact_steps,
    log_of,
    run_training,
    saved_steps,
    steps_of,
)

from job.common.schema import CheckpointConfig
from job.run.checkpoint_store import best, retained
from job.run.committed import still_to_come
from job.run.directory import RunDirectory
from job.run.manifest import DamagedError
from job.training import checkpoint as checkpoint_module
from job.training.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("training_folder")


def _evaluated(folder: Path, values: Mapping[int, Mapping[str, float]]) -> list[Path]:
    """Checkpoint folders with nothing but the figures of their evaluations."""
    for step, evaluation in values.items():
        path = folder / f"step-{step:08}"
        path.mkdir()
        (path / "facts.json").write_text(json.dumps({"evaluation": dict(evaluation)}))
    return sorted(folder.glob("step-*"))


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    folders = _evaluated(tmp_path, {step: {} for step in range(1, 8)})
    for n in (1, 2, 7, 99):
        assert steps_of(retained(folders, CheckpointConfig(keep_last=n))) == list(range(1, 8))[-n:]
    assert retained([], CheckpointConfig()) == []


def test_at_once_are_those_that_stay_and_one_that_is_written() -> None:
    config = CheckpointConfig(
        every_steps=50, keep_last=2, keep_best="validation/value/mse", keep_every=100
    )
    assert CheckpointConfig(keep_last=1).at_once(10_000) == 2
    assert config.at_once(250) == 2 + 1 + 1 + 2
    config.every_steps = 150  # of which every other one is a multiple of 100
    assert config.at_once(650) == 2 + 1 + 1 + 2


def test_those_that_are_there_are_not_still_to_come(tmp_path: Path) -> None:
    config = CheckpointConfig(every_steps=10, keep_last=1, keep_every=10)
    assert still_to_come(tmp_path, config, 50) == 7
    for step in range(10, 50, 10):
        (tmp_path / f"checkpoints/step-{step:08}").mkdir(parents=True)
    assert still_to_come(tmp_path, config, 50) == 3
    assert still_to_come(tmp_path, CheckpointConfig(keep_last=1), 50) == 1


def test_multiples_of_keep_every_are_kept(tmp_path: Path) -> None:
    folders = _evaluated(tmp_path, {step: {} for step in (50, 100, 150, 200, 250)})
    assert steps_of(retained(folders, CheckpointConfig(keep_last=1, keep_every=100))) == [
        *(100, 200, 250)
    ]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("validation/value/mse", 3),
        ("validation/value/last_token_mse", 3),
        ("validation/value/ece", 3),
        ("validation/value/r2", 2),
        ("validation/value/pairwise_accuracy", 2),
    ],
)
def test_the_best_is_the_smallest_error_or_the_largest_score(
    tmp_path: Path, metric: str, expected: int
) -> None:
    values = {1: 0.2, 2: 0.3, 3: 0.1, 4: 0.2}
    folders = _evaluated(tmp_path, {step: {metric: value} for step, value in values.items()})
    assert steps_of(best(folders, metric)) == [expected]
    kept = retained(folders, CheckpointConfig(keep_last=1, keep_best=metric))
    assert steps_of(kept) == [expected, 4]


def test_checkpoints_without_an_evaluation_are_not_the_best(tmp_path: Path) -> None:
    folders = _evaluated(tmp_path, {1: {}, 2: {"r2": -0.5}, 3: {}, 4: {"r2": -0.75}})
    assert steps_of(best(folders, "r2")) == [2]
    assert best(folders, "mse") == []
    assert steps_of(retained(folders, CheckpointConfig(keep_last=1, keep_best="mse"))) == [4]


def test_an_evaluation_of_one_label_makes_no_checkpoint_the_best(tmp_path: Path) -> None:
    mse, constant = "validation/value/mse", "validation/value/mse_constant"
    values = {1: {mse: 0.0, constant: 0.0}, 2: {mse: 0.1, constant: 0.2}, 3: {mse: 0.15}}
    folders = _evaluated(tmp_path, values)
    assert steps_of(best(folders, mse)) == [2]
    assert best(folders[:1], mse) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "choose"), [("validation/value/mse", min), ("validation/value/r2", max)]
)
def test_a_whole_run_keeps_the_last_the_multiples_and_the_best(
    metric: str, choose: Callable[..., int]
) -> None:
    name = metric.rpartition("/")[2]
    run = run_training(
        f"kept-{name}",
        "training.max_steps=16",
        "training.learning_rate=0.05",  # so that the best lies somewhere in between
        "evaluation.every_steps=2",
        "checkpoint.keep_last=1",
        "checkpoint.keep_every=6",
        f"checkpoint.keep_best={metric}",
    )
    values = {r["step"]: r[metric] for r in run.records() if metric in r}
    assert list(values) == list(range(2, 17, 2))
    assert saved_steps(run) == sorted({6, 12, 16, choose(values, key=values.__getitem__)})
    for step in saved_steps(run):
        facts = json.loads((checkpoint_of(run, step) / "facts.json").read_text())
        assert facts["evaluation"][metric] == values[step]
    assert list(run.file("checkpoints").glob(".*")) == []


@pytest.mark.slow
def test_nothing_is_deleted_if_the_newest_does_not_verify(halted: RunDirectory) -> None:
    run = copy_run(halted, "no-clean-up")
    flip(checkpoint_of(run, 6) / "__0_0.distcp")
    before = sorted(content_of(run.file("checkpoints")).values())
    with checkpoints_of(run, identity_of(run), keep_last=1) as checkpoints:
        with pytest.raises(DamagedError, match="__0_0"):
            checkpoints._clean_up(checkpoint_of(run, 6))
        assert sorted(content_of(run.file("checkpoints")).values()) == before
        assert saved_steps(run)[:2] == [2, 4]
    run = copy_run(halted, "clean-up")
    with checkpoints_of(run, identity_of(run), keep_last=1) as checkpoints:
        checkpoints._clean_up(checkpoint_of(run, 6))
        assert intact_steps(run.file("checkpoints")) == [6]


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 8])
def test_a_checkpoint_damaged_between_commit_and_clean_up_costs_no_other(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = RunDirectory(f"runs/unlucky-{step}")
    monkeypatch.setattr("job.training.loop.LAST_SAVE_PAUSES", (0,))
    flush, report = checkpoint_module.sync, Checkpoints._report
    seen: list[list[int]] = []

    def damage(path: Path) -> None:
        flush(path)
        if path.name == "checkpoints" and saved_steps(run)[-1] == step and not seen:
            flip(checkpoint_of(run, step) / "__0_0.distcp")
            seen.append(saved_steps(run))

    def look(self: Checkpoints) -> None:
        report(self)
        if len(seen) == 1:
            seen.append(saved_steps(run))

    monkeypatch.setattr(checkpoint_module, "sync", damage)
    monkeypatch.setattr(Checkpoints, "_report", look)
    run_training(run.path.name, "checkpoint.keep_last=1")
    assert seen[0] == [step - 2, step]  # before the clean-up
    assert seen[1][0] == step - 2  # and after it
    assert "saving a checkpoint failed" in log_of(run)
    assert "__0_0.distcp was changed" in log_of(run)
    assert intact_steps(run.file("checkpoints")) == [8]
    assert run.status()["checkpoint_error"] is None
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["emptied", "missing"])
def test_an_older_checkpoint_that_is_damaged_does_not_hinder_saving(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    run = RunDirectory(f"runs/older-{damage}")
    monkeypatch.setattr("job.training.loop.LAST_SAVE_PAUSES", ())
    at_steps(monkeypatch, {4: lambda: DAMAGES[damage](checkpoint_of(run, 2) / "facts.json")})
    run_training(run.path.name, "checkpoint.keep_best=validation/value/mse")
    assert "failed" not in log_of(run)
    assert run.status()["checkpoint"] == 8
    assert_same(run, whole)


@pytest.mark.slow
def test_an_old_checkpoint_that_cannot_be_removed_does_not_hinder_saving(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/not-removed")
    monkeypatch.setattr("job.training.loop.LAST_SAVE_PAUSES", ())

    def refuse(folder: Path) -> None:
        raise OSError(39, "Directory not empty", str(folder))  # a file that NFS keeps open

    monkeypatch.setattr(checkpoint_module, "remove", refuse)
    run_training("not-removed", "checkpoint.keep_last=1")
    assert run.status()["checkpoint"] == 8
    assert run.status()["checkpoint_error"] is None
    assert_same(run, whole)
