"""A training that ends anywhere and is started again ends as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from disturbed_runs import assert_same, copy_run, crash_before, run_training, saved_steps

from job.common.errors import Stopped
from job.run.directory import RunDirectory
from job.training.learner import Learner

pytestmark = pytest.mark.usefixtures("training_folder")


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 5, 8])
def test_a_run_that_crashed_at_any_step_ends_as_if_it_had_not(
    whole: RunDirectory, step: int
) -> None:
    run = crash_before(step, f"crashed-{step}")
    assert saved_steps(run) == [s for s in (2, 4, 6) if s < step]
    assert run.status()["state"] == "failed"
    run_training(f"crashed-{step}")
    assert_same(run, whole)
    assert saved_steps(run) == [2, 4, 6, 8]
    assert run.status()["state"] == "finished"


@pytest.mark.slow
def test_a_run_that_crashed_in_every_step_ends_as_if_it_had_not(whole: RunDirectory) -> None:
    for step in range(1, 9):
        run = crash_before(step, "often", "checkpoint.every_steps=1")
    run_training("often", "checkpoint.every_steps=1")
    assert_same(run, whole)
    records = [run.file(f"attempts/{n:04}/attempt.json") for n in range(1, 10)]
    assert [json.loads(r.read_text())["resumed_step"] for r in records] == [0, *range(8)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["distributed.fsdp.mixed_precision=true"],
        ["training.num_unfrozen_layers=0"],
        ["training.num_unfrozen_layers=4", "training.lr_decay_factor=0.8"],
        ["objective.target=lambda_return", "objective.lambda_steps=6", "objective.lambda_end=0.5"],
    ],
    ids=" ".join,
)
def test_every_kind_of_training_goes_on_to_the_bit(settings: list[str]) -> None:
    name = settings[0]
    expected = run_training(f"{name}-whole", *settings)
    crash_before(6, name, *settings)
    assert_same(run_training(name, *settings), expected)


@pytest.mark.slow
def test_a_run_stopped_inside_an_evaluation_finishes_it_later(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Path("runs/stopped/stop")
    original = Learner.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(
            Learner, "evaluate", lambda *arguments: (stop.touch(), original(*arguments))[1]
        )
        with pytest.raises(Stopped):
            run_training("stopped")
    run = RunDirectory("runs/stopped")
    assert not stop.exists()
    assert run.status()["state"] == "stopped"
    assert [record["step"] for record in run.records()] == [1, 2, 3]
    assert saved_steps(run) == [2, 4]
    assert_same(run_training("stopped"), whole)


@pytest.mark.slow
def test_a_longer_run_goes_on_from_the_end_of_a_finished_one(whole: RunDirectory) -> None:
    run = copy_run(whole, "longer")
    before = run.records()
    run_training("longer", "training.max_steps=11")
    records = run.records()
    assert [record["step"] for record in records] == list(range(1, 12))
    assert records[:8] == before
    assert run.status()["step"] == 11
    assert saved_steps(run)[-1] == 11
