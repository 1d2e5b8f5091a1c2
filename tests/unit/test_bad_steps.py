"""Steps whose loss or gradient is not finite are skipped, and a streak goes back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from disturbed_runs import (
    assert_equal,
    assert_same,
    at_steps,
    before_steps,
    checkpoint_of,
    crash_before,
    flip,
    log_of,
    logged_steps,
    make_bad,
    run_training,
    saved_steps,
    stored_tensors,
    weights_of,
)
from torch import Tensor

from job.common.errors import InputError, Stopped, exit_code
from job.data.packing import Batch
from job.run.directory import RunDirectory
from job.training.learner import Learner
from job.training.objective import Counts, Objective

pytestmark = pytest.mark.usefixtures("training_folder")


@pytest.mark.slow
def test_a_bad_step_changes_no_weight_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, whole: RunDirectory
) -> None:
    seen: dict[int, list[Tensor]] = {}

    def copy(step: int, learner: Learner) -> None:
        moments = [learner.moments(p) for p in learner.trainable]
        tensors = [*learner.trainable, *(t for moment in moments for t in moment.values())]
        seen[step] = [tensor.detach().clone() for tensor in tensors]

    before_steps(monkeypatch, copy)
    make_bad(monkeypatch, [5])
    run = run_training("one-bad")
    assert all(a.equal(b) for a, b in zip(seen[5], seen[6], strict=True))
    assert not all(a.equal(b) for a, b in zip(seen[6], seen[7], strict=True))
    records, expected = run.records(), whole.records()
    assert logged_steps(run) == list(range(1, 9))
    assert records[:4] == expected[:4]
    assert records[4]["train/loss"] is None
    assert records[4]["train/skipped_steps"] == 1
    later = [r["train/loss"] for r in records[5:]]
    assert all(math.isfinite(loss) for loss in later)
    assert not any("train/skipped_steps" in r for r in records[5:])
    assert "step 5 is skipped: loss nan" in log_of(run)
    assert run.status()["state"] == "finished"


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_a_bad_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Objective.loss

    def loss(self: Objective, outputs: Tensor, batch: Batch, step: int, whole: Counts) -> Tensor:
        loss = original(self, outputs, batch, step, whole)
        if step + 1 != 5:
            return loss
        return loss + 0 * (outputs - outputs.detach()).abs().sqrt().sum()  # 0, with slope nan

    monkeypatch.setattr(Objective, "loss", loss)
    run = run_training("bad-gradient")
    record = run.records()[4]
    assert record["train/loss"] is not None
    assert record["train/grad_norm"] is None
    assert record["train/skipped_steps"] == 1
    assert all(t.isfinite().all() for t in weights_of(run).values())


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
def test_a_run_with_a_bad_step_goes_on_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    bad = [3, 5]  # the optimizer has made fewer updates than there were steps
    with monkeypatch.context() as patch:
        make_bad(patch, bad)
        expected = run_training(f"bad-whole-{step}")
    name = f"bad-resumed-{step}"
    crash_before(step, name, bad=bad)
    with monkeypatch.context() as patch:
        make_bad(patch, bad)
        assert_same(run_training(name), expected)


@pytest.mark.slow
@pytest.mark.parametrize("max_bad", [1, 2, 3])
def test_too_many_bad_steps_go_back_once_and_are_passed_over(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch, max_bad: int
) -> None:
    bad = list(range(5, 5 + max_bad))
    made: list[int] = []
    before_steps(monkeypatch, lambda step, _: made.append(step))
    make_bad(monkeypatch, bad)
    run = run_training(f"back-{max_bad}", f"training.max_bad_steps={max_bad}")
    rest = list(range(bad[-1] + 1, 9))
    assert made == [*range(1, 5), *bad, *rest]
    assert json.loads(run.file("bad_steps.json").read_text()) == bad
    assert f"{max_bad} bad steps in a row: went back to step 4" in log_of(run)
    records = run.records()
    assert logged_steps(run) == list(range(1, 9))
    assert records[:4] == whole.records()[:4]
    for count, step in enumerate(bad, 1):
        assert records[step - 1]["train/loss"] is None
        assert records[step - 1]["train/skipped_steps"] == count
    assert all(math.isfinite(records[step - 1]["train/loss"]) for step in rest)
    assert run.status()["state"] == "finished"


@pytest.mark.slow
def test_going_back_equals_leaving_the_bad_steps_out(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bad(monkeypatch, [5, 6])
    skipping = run_training("skipping", "training.max_bad_steps=3")
    back = run_training("going-back", "training.max_bad_steps=2")
    losses = [[r["train/loss"] for r in run.records()] for run in (skipping, back)]
    assert losses[0] == losses[1]
    assert_equal(weights_of(back), weights_of(skipping))


@pytest.mark.slow
def test_a_run_that_went_back_and_crashed_goes_on_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting = "training.max_bad_steps=2"
    with monkeypatch.context() as patch:
        make_bad(patch, [5, 6])
        expected = run_training("back-whole", setting)
    crash_before(8, "back-resumed", setting, bad=(5, 6))
    assert_same(run_training("back-resumed", setting), expected)


@pytest.mark.slow
def test_a_second_streak_ends_the_run_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    make_bad(monkeypatch, [3, 4, 7, 8])
    with pytest.raises(InputError, match=r"2 step\(s\) in a row; also after going back") as caught:
        run_training("second", "training.max_bad_steps=2")
    assert exit_code(caught.value) == 78
    assert "step 8: loss nan" in str(caught.value)
    assert "Lower training.learning_rate" in str(caught.value)
    run = RunDirectory("runs/second")
    assert run.status()["state"] == "failed"
    assert str(caught.value) in run.status()["error"]
    assert logged_steps(run) == list(range(1, 8))


@pytest.mark.slow
def test_a_streak_before_the_first_checkpoint_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_bad(monkeypatch, [2, 3])
    settings = ("training.max_bad_steps=2", "checkpoint.every_steps=4")
    with pytest.raises(InputError, match=r"step 3: loss nan.*in 2 step") as caught:
        run_training("early", *settings)
    assert exit_code(caught.value) == 78
    assert "also after" not in str(caught.value)
    assert not RunDirectory("runs/early").file("bad_steps.json").exists()


@pytest.mark.slow
def test_no_checkpoint_is_committed_during_a_streak(monkeypatch: pytest.MonkeyPatch) -> None:
    make_bad(monkeypatch, [4, 5, 6])
    seen: dict[int, list[int]] = {}
    run = RunDirectory("runs/streak")
    before_steps(monkeypatch, lambda step, _: seen.__setitem__(step, saved_steps(run)))
    run_training("streak")
    assert seen[7] == [2]
    assert saved_steps(run) == [2, 7, 8]


@pytest.mark.slow
def test_a_stop_during_a_streak_goes_on_from_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory("runs/stopped-streak")
    make_bad(monkeypatch, [5, 6, 7])
    expected = run_training("whole-streak")
    with monkeypatch.context() as patch:
        at_steps(patch, {6: run.file("stop").touch})
        with pytest.raises(Stopped):
            run_training("stopped-streak")
    assert saved_steps(run) == [2, 4]
    assert_same(run_training("stopped-streak"), expected)


def _spoil_before(patch: pytest.MonkeyPatch, step: int) -> None:
    """Make one trained weight not a number, once, before a step is made for the first time."""
    left = [step]

    def spoil(current: int, learner: Learner) -> None:
        if current in left:
            left.remove(current)
            with torch.no_grad():
                learner.trainable[0].view(-1)[0] = math.nan

    before_steps(patch, spoil)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 5, 6])
def test_weights_damaged_in_memory_are_healed_by_going_back(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    _spoil_before(monkeypatch, step)
    run = run_training(f"healed-{step}", "training.max_bad_steps=2")
    last_good = (step - 1) // 2 * 2
    assert f"2 bad steps in a row: went back to step {last_good}" in log_of(run)
    records = run.records()
    assert logged_steps(run) == list(range(1, 9))
    assert records[: step - 1] == whole.records()[: step - 1]
    lost = [record["step"] for record in records if record["train/loss"] is None]
    assert lost == [step, step + 1]
    assert all(math.isfinite(v) for v in records[-1].values())
    assert "validation/value/mse" in records[-1]
    assert all(tensor.isfinite().all() for tensor in weights_of(run).values())
    assert all(tensor.isfinite().all() for tensor in stored_tensors(checkpoint_of(run, 8)).values())


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 8])
def test_a_run_does_not_finish_with_weights_damaged_shortly_before_its_end(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = RunDirectory(f"runs/end-{step}")
    _spoil_before(monkeypatch, step)
    try:
        run_training(run.path.name)
    except InputError as error:
        assert "finite" in str(error)  # noqa: PT017 - either of two ends is right
        return
    assert all(tensor.isfinite().all() for tensor in weights_of(run).values())


@pytest.mark.slow
def test_a_run_whose_last_step_is_bad_is_saved_and_evaluated_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_bad(monkeypatch, [8])
    run = run_training("bad-end")
    assert run.status()["state"] == "finished"
    assert "validation/value/mse" in run.records()[-1]
    assert saved_steps(run)[-1] == 8


@pytest.mark.slow
def test_going_back_with_every_checkpoint_damaged_ends_with_a_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunDirectory("runs/no-way-back")
    make_bad(monkeypatch, [5, 6])

    def damage() -> None:
        for step in saved_steps(run):
            flip(checkpoint_of(run, step) / "__0_0.distcp")

    at_steps(monkeypatch, {5: damage})
    with pytest.raises(InputError, match="step 6: loss nan"):
        run_training("no-way-back", "training.max_bad_steps=2")


@pytest.mark.slow
def test_going_back_past_a_damaged_checkpoint_takes_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunDirectory("runs/further-back")
    make_bad(monkeypatch, [5, 6])
    at_steps(monkeypatch, {5: lambda: flip(checkpoint_of(run, 4) / "__0_0.distcp")})
    run_training("further-back", "training.max_bad_steps=2")
    assert "went back to step 2" in log_of(run)
    assert logged_steps(run) == list(range(1, 9))
    assert saved_steps(run) == [2, 4, 6, 8]
