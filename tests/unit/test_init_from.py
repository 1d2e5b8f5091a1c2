"""A new run begins with the trained weights of another."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from disturbed_runs import (
    assert_equal,
    assert_same,
    checkpoint_of,
    content_of,
    copy_run,
    crash_before,
    flip,
    identity_of,
    log_of,
    other_trunk,
    run_training,
    stored_weights,
    weights_of,
)

import job.train
from job.common.errors import Exit, InputError, exit_code
from job.common.schema import ObjectiveConfig
from job.run.directory import RunDirectory
from job.run.fence import Fence
from job.run.trained import find_weights

pytestmark = pytest.mark.usefixtures("training_folder")

FROZEN_RATES = ("training.learning_rate=0", "training.max_steps=1")  # ends as it began


def _begun_with(source: Path, name: str, *settings: str) -> RunDirectory:
    return run_training(name, f"model.init_from={source}", *settings, *FROZEN_RATES)


@pytest.mark.slow
def test_a_new_run_begins_with_exactly_the_trained_weights_of_a_run(whole: RunDirectory) -> None:
    run = _begun_with(whole.path, "from-run")
    assert_equal(weights_of(run), weights_of(whole))
    fresh = run_training("from-nothing", *FROZEN_RATES)
    assert not weights_of(fresh)["value_head.weight"].equal(weights_of(whole)["value_head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6])
def test_a_new_run_begins_with_exactly_the_trained_weights_of_a_checkpoint(
    whole: RunDirectory, step: int
) -> None:
    checkpoint = checkpoint_of(whole, step)
    run = _begun_with(checkpoint, f"from-{step}")
    assert_equal(weights_of(run), stored_weights(checkpoint))
    assert (run.status()["step"], len(run.records())) == (1, 1)  # it counts from 1 again


@pytest.mark.slow
def test_weights_go_on_under_other_settings_and_with_more_blocks(whole: RunDirectory) -> None:
    run = _begun_with(whole.path, "deeper", "training.num_unfrozen_layers=2")
    weights, given = weights_of(run), weights_of(whole)
    assert weights.keys() > given.keys()
    assert_equal({name: weights[name] for name in given}, given)
    base = torch.load("trunk/consolidated.pth", weights_only=True)
    added = {name.removeprefix("trunk."): weights[name] for name in weights.keys() - given.keys()}
    assert_equal(added, {name: base[name] for name in added})
    source = f"model.init_from={whole.path}"
    other = run_training("faster", source, "training.learning_rate=0.01", "objective.loss=bce")
    assert len(other.records()) == 8


@pytest.mark.slow
def test_the_command_line_names_the_run_to_begin_with(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--init-from", str(whole.path), "--override", "run.name=from-cli", *FROZEN_RATES]
    monkeypatch.setattr(sys, "argv", ["train", "--config", "critic.yaml", *options])
    monkeypatch.setattr(job.train, "set_up_logging", lambda: None)  # of the test's process
    job.train.main()
    run = RunDirectory("runs/from-cli")
    assert_equal(weights_of(run), weights_of(whole))
    assert run.config()["model"]["init_from"] == str(whole.path)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume", "never"])
    with pytest.raises(InputError, match="there is a run already"):
        job.train.main()


@pytest.mark.slow
def test_weights_of_another_base_are_refused(whole: RunDirectory) -> None:
    other = other_trunk("init-trunk")
    ours = identity_of(whole)["base"][:8]
    with pytest.raises(InputError, match=rf"the weights of the trunk differ \({ours} -> "):
        run_training(
            "init-base",
            f"model.path={other}",
            "model.recipe=null",
            f"model.init_from={whole.path}",
        )


@pytest.mark.slow
def test_weights_of_blocks_that_would_be_frozen_are_refused() -> None:
    run_training("two-blocks", "training.num_unfrozen_layers=2", "training.max_steps=2")
    with pytest.raises(InputError, match=r"(?s)frozen here; raise .*trunk\.layers\.1\.") as caught:
        run_training("one-block", "model.init_from=runs/two-blocks")
    assert exit_code(caught.value) == Exit.BAD_INPUT
    assert not RunDirectory("runs/one-block").records()


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_beginning_with_nothing_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=f"{place}: no intact checkpoint here"):
        find_weights(tmp_path / place, torch.nn.Module(), {}, ObjectiveConfig())


@pytest.mark.slow
def test_weights_come_from_the_newest_intact_checkpoint_which_is_left_alone(
    halted: RunDirectory,
) -> None:
    source = copy_run(halted, "half-damaged")
    flip(checkpoint_of(source, 6) / "__0_0.distcp")
    before = content_of(source.path)
    run = _begun_with(source.path, "from-intact")
    assert_equal(weights_of(run), stored_weights(checkpoint_of(source, 4)))
    assert content_of(source.path) == before
    for step in (2, 4):
        flip(checkpoint_of(source, step) / "__0_0.distcp")
    for place in (source.path, checkpoint_of(source, 6)):
        with pytest.raises(InputError, match="no intact checkpoint here"):
            run_training("from-damaged", f"model.init_from={place}")
        shutil.rmtree("runs/from-damaged")


@pytest.mark.slow
def test_weights_of_a_run_are_not_those_that_a_superseded_attempt_committed_too_late(
    halted: RunDirectory,
) -> None:
    source = copy_run(halted, "late-source")
    Fence.take(source.path).record(1, resumed_step=4)  # so that step 6 of attempt 1 came too late
    run = _begun_with(source.path, "from-late")
    assert_equal(weights_of(run), stored_weights(checkpoint_of(source, 4)))


@pytest.mark.slow
def test_a_resumed_run_does_not_begin_again_with_the_other_ones_weights(
    whole: RunDirectory,
) -> None:
    source = copy_run(whole, "source")
    setting = f"model.init_from={source.path}"
    expected = run_training("init-whole", setting)
    crash_before(5, "init-resumed", setting)
    shutil.rmtree(source.path)
    assert_same(run_training("init-resumed", setting), expected)
    assert log_of(RunDirectory("runs/init-resumed")).count("trained tensors from") == 1
