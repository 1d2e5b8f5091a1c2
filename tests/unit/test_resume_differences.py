"""What may differ between two attempts at a run, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from disturbed_runs import (
    TRUNK,
    assert_same,
    checkpoint_of,
    checkpoints_of,
    content_of,
    copy_run,
    crash_before,
    identity_of,
    log_of,
    other_trunk,
    run_training,
)
from micro_job import write_recipe

from job.common.config import load_config
from job.common.errors import Exit, InputError, exit_code
from job.common.nested import to_dict
from job.common.schema import CriticConfig
from job.run.directory import RunDirectory
from job.run.fence import Fence

pytestmark = pytest.mark.usefixtures("training_folder")


@pytest.mark.slow
def test_a_new_run_inside_of_another_is_refused_and_writes_nothing(halted: RunDirectory) -> None:
    run = copy_run(halted, "outer")
    before = content_of(run.path)
    with pytest.raises(InputError, match=r"lies inside another run, .*/runs/outer; choose another"):
        run_training("outer/inner")
    assert content_of(run.path) == before


def _claimed(folder: Path, *overrides: str) -> RunDirectory:
    """A run that has begun: its configuration and its first attempt."""
    run = RunDirectory(folder / "run")
    run.claim(to_dict(load_config(CriticConfig, "critic.yaml", overrides)))
    Fence.take(run.path).record(world_size=1, resumed_step=0)
    return run


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("training.learning_rate=0.002", "training.learning_rate: 0.001 -> 0.002"),
        ("training.value_head.learning_rate=1", "training.value_head.learning_rate: None -> 1.0"),
        ("training.num_unfrozen_layers=2", "training.num_unfrozen_layers: 1 -> 2"),
        ("training.seed=1", "training.seed: 0 -> 1"),
        ("training.batch_size=16", "training.batch_size: 8 -> 16"),
        ("training.warmup_steps=3", "training.warmup_steps: 2 -> 3"),
        ("training.betas=[0.9,0.99]", "training.betas: [0.9, 0.95] -> [0.9, 0.99]"),
        ("objective.loss=bce", "objective.loss: mse -> bce"),
        ("objective.gamma=0.5", "objective.gamma: 1.0 -> 0.5"),
        ("objective.target=lambda_return", "objective.target: monte_carlo -> lambda_return"),
        ("evaluation.every_steps=5", "evaluation.every_steps: 4 -> 5"),
        ("data.max_length=32", "data.max_length: 64 -> 32"),
        ("data.arithmetic.seed=7", "data.arithmetic.seed: 0 -> 7"),
        ("model.init_from=elsewhere", "model.init_from: None -> elsewhere"),
    ],
)
def test_what_changes_the_training_is_refused_with_both_values_and_nothing_changes(
    tmp_path: Path, override: str, difference: str
) -> None:
    run = _claimed(tmp_path)
    before = content_of(run.path)
    with pytest.raises(InputError) as caught:
        _claimed(tmp_path, override)
    assert difference in str(caught.value)
    assert str(caught.value).count(" -> ") == 2  # this one, and the sentence before it
    assert content_of(run.path) == before


def test_every_difference_is_listed(tmp_path: Path) -> None:
    _claimed(tmp_path)
    with pytest.raises(InputError, match=r"(?s)gamma: 1\.0 -> 0\.5.*seed: 0 -> 1"):
        _claimed(tmp_path, "training.seed=1", "objective.gamma=0.5", "logging.every_steps=1")


@pytest.mark.slow
def test_another_n_is_refused_before_anything_is_touched(halted: RunDirectory) -> None:
    run = copy_run(halted, "other-n")
    before = content_of(run.path)
    with pytest.raises(InputError, match="num_unfrozen_layers: 1 -> 2") as caught:
        run_training("other-n", "training.num_unfrozen_layers=2")
    assert exit_code(caught.value) == 78
    assert content_of(run.path) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"num_unfrozen_layers": 2}, "num_unfrozen_layers: 1 -> 2"),
        ({"base": "f" * 64}, " -> ffffffff)"),
        ({"train_data": "other"}, "-> other"),
        ({"validation_data": "other"}, "-> other"),
        ({"architecture": {"dim": 64}}, "architecture.dim: 32 -> 64"),
        ({"something_new": 1}, "something_new: None -> 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value[:30],
)
def test_a_checkpoint_of_something_else_is_refused_and_left_alone(
    halted: RunDirectory, change: dict[str, Any], difference: str
) -> None:
    run = copy_run(halted, f"identity-{next(iter(change))}")
    before = content_of(run.file("checkpoints"))
    identity = identity_of(run) | change
    with (
        checkpoints_of(run, identity) as checkpoints,
        pytest.raises(InputError, match="a checkpoint of something else") as caught,
    ):
        checkpoints.newest_good()
    assert difference in str(caught.value)
    assert str(checkpoint_of(run, 6)) in str(caught.value)
    assert content_of(run.file("checkpoints")) == before


KEPT_ON_REFUSAL = ("checkpoints", "metrics.jsonl", "telemetry.jsonl", "parameters.json")


def _refused(run: RunDirectory, difference: str, *overrides: str) -> None:
    """Going on is refused with both values; what the run has is as it was."""
    before = content_of(run.path)
    with pytest.raises(InputError) as caught:
        run_training(run.path.name, *overrides)
    assert difference in str(caught.value)
    assert exit_code(caught.value) == Exit.BAD_INPUT
    kept = {name: text for name, text in before.items() if name.startswith(KEPT_ON_REFUSAL)}
    after = content_of(run.path)
    assert {name: after[name] for name in kept} == kept
    assert set(after) - set(before) <= {"attempts/0002/attempt.json"}
    assert run.status()["state"] == "failed"


@pytest.mark.slow
def test_another_base_is_refused_and_the_right_one_goes_on(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = copy_run(halted, "other-base")
    other = other_trunk("other-trunk")
    ours = identity_of(run)["base"]
    _refused(
        run,
        f"the weights of the trunk differ ({ours[:8]} -> ",
        f"model.path={other}",
        "model.recipe=null",
    )
    run_training("other-base")
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.usefixtures("whole")  # which makes the trunk
def test_another_base_put_in_place_of_the_first_is_refused() -> None:
    shutil.copytree("trunk", "in-place")
    here = ("model.path=in-place", "model.recipe=null")
    run = crash_before(7, "base-in-place", *here)
    ours = identity_of(run)["base"]
    shutil.rmtree("in-place")
    other_trunk("in-place")
    _refused(run, f"the weights of the trunk differ ({ours[:8]} -> ", *here)


@pytest.mark.slow
def test_another_architecture_is_refused(halted: RunDirectory) -> None:
    run = copy_run(halted, "other-architecture")
    write_recipe(Path("deeper.yaml"), [*TRUNK, "out=deeper", "architecture.n_layers=5"])
    changed = ("model.path=deeper", "model.recipe=deeper.yaml")
    _refused(run, "architecture.n_layers: 4 -> 5", *changed)


def _write_rows(path: Path, n: int, shift: int = 0) -> None:
    rows = [
        {"prompt": f"{i}+{j}?", "response": f"A{i + j + shift}", "reward": (i + j) % 2}
        for i in range(n)
        for j in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_other_data_at_the_same_path_is_refused_and_a_copy_elsewhere_is_not() -> None:
    paths = ("data.train=train.jsonl", "data.validation=validation.jsonl")
    _write_rows(Path("train.jsonl"), 6)
    _write_rows(Path("validation.jsonl"), 2)
    expected = run_training("data-whole", *paths)
    run = crash_before(7, "data", *paths)
    for split in ("train", "validation"):
        shutil.copy(f"{split}.jsonl", f"copy.{split}.jsonl")
        ours = identity_of(run)[f"{split}_data"]
        _write_rows(Path(f"{split}.jsonl"), 3, shift=1)
        text = (
            f"the rows of data.{split}, or their fields, template or tokens, differ ({ours[:8]} -> "
        )
        _refused(copy_run(run, f"data-{split}"), text, *paths)
        shutil.copy(f"copy.{split}.jsonl", f"{split}.jsonl")
    elsewhere = ("data.train=copy.train.jsonl", "data.validation=copy.validation.jsonl")
    run_training("data", *elsewhere)
    assert "going on from step 6" in log_of(run)
    assert_same(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=1",
        "checkpoint.keep_every=4",
        "checkpoint.keep_best=validation/value/mse",
        "distributed.fsdp.sharding_strategy=SHARD_GRAD_OP",
        "distributed.timeout_seconds=300",
        "training.max_bad_steps=7",
        "training.deterministic=false",
        "model.path=copied-trunk",
    ],
)
def test_what_does_not_change_the_training_may_change_on_resume(
    whole: RunDirectory, halted: RunDirectory, override: str
) -> None:
    if not Path("copied-trunk").exists():
        shutil.copytree("trunk", "copied-trunk")
    run = copy_run(halted, override.replace("/", "-"))  # a copy: run.name and run.dir differ, too
    run_training(run.path.name, override, *(["model.recipe=null"] * ("model" in override)))
    assert "going on from step 6" in log_of(run)
    assert_same(run, whole)


@pytest.mark.slow
def test_cadence_of_the_log_micro_batches_and_length_may_change_on_resume(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    expected = [record["train/loss"] for record in whole.records()]
    run = run_training(copy_run(halted, "log").path.name, "logging.every_steps=1")
    assert [record["train/loss"] for record in run.records()] == expected
    assert all("value/mse" in record for record in run.records()[6:])
    run = run_training(copy_run(halted, "micro").path.name, "training.micro_batch_tokens=64")
    assert [r["train/loss"] for r in run.records()] == pytest.approx(expected, rel=1e-4)
    run = run_training(copy_run(halted, "length").path.name, "training.max_steps=10")
    assert [r["train/loss"] for r in run.records()][:6] == expected[:6]
    assert run.status()["step"] == len(run.records()) == 10
