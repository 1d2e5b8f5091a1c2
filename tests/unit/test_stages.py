"""Stages of a training: who learns when, at which rates, and where a run goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro_job import write_job

from job.common.config import load_config
from job.common.errors import InputError, Stopped
from job.common.schema import CriticConfig, ObjectiveConfig, StageConfig, TrainingConfig
from job.common.signals import DEADLINE
from job.data.packing import Batch
from job.distributed.world import World
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.packed_layout import PackedLayout
from job.run.directory import RunDirectory
from job.run.metrics_log import Tracker
from job.run.value_metrics import ValueMetrics
from job.training.learner import Learner
from job.training.objective import Objective
from job.training.stages import Stages
from job.training.trainer import train

SMALL = TransformerConfig(dim=16, n_layers=4, n_heads=2, vocab_size=9, multiple_of=8)
STAGES = [StageConfig(0, 3, 1e-3, 2e-2), StageConfig(2, 3), StageConfig(1, 2, 5e-4)]
NAMES = ("value_head", "trunk.norm", *(f"trunk.layers.{i}" for i in range(4)), "trunk.tok")


def config(stages: list[StageConfig], most: int) -> TrainingConfig:
    steps = sum(stage.steps for stage in stages)
    return TrainingConfig(
        num_unfrozen_layers=most,
        stages=stages,
        learning_rate=2e-3,
        lr_decay_factor=0.5,
        max_steps=steps,
        warmup_steps=2,
    )


def learner(training: TrainingConfig) -> Learner:
    torch.manual_seed(0)
    critic = Critic(SMALL)
    critic.initialise_head(0.5, 0)
    unfreeze_last_blocks(critic, training.num_unfrozen_layers)
    return Learner(critic, Objective(ObjectiveConfig()), training, World())


def batch(seed: int) -> Batch:
    rng, lengths = np.random.default_rng(seed), [7, 12]
    n = sum(lengths)
    return Batch(
        tokens=torch.from_numpy(rng.integers(0, 9, n)),
        layout=PackedLayout(lengths),
        positions=torch.arange(n),
        lengths=torch.tensor(lengths),
        response_lengths=torch.tensor(lengths),
        weights=torch.ones(n),
        weight=float(n),
        rewards=torch.tensor([1.0, 0.0]),
        problems=np.zeros(2, np.uint64),
        optimal=None,
        pairs=torch.empty((0, 2), dtype=torch.int64),
    )


def steps(one: Learner, start: int, stop: int) -> list[float]:
    return [one.step(s, [batch(s)], ValueMetrics()).loss for s in range(start, stop)]


def moved(one: Learner, start: int, stop: int) -> set[str]:
    """The parts of a critic that some steps change."""
    before = {name: p.detach().clone() for name, p in one.critic.named_parameters()}
    steps(one, start, stop)
    changed = [n for n, p in one.critic.named_parameters() if not torch.equal(p, before[n])]
    return {part for part in NAMES for name in changed if name.startswith(part)}


def test_each_stage_changes_its_last_blocks_and_nothing_else() -> None:
    one = learner(config([*STAGES, StageConfig(5, 1), StageConfig(0, 1)], 5))
    assert moved(one, 0, 3) == {"value_head"}
    assert moved(one, 3, 6) == {"value_head", "trunk.norm", "trunk.layers.2", "trunk.layers.3"}
    assert moved(one, 6, 8) == {"value_head", "trunk.norm", "trunk.layers.3"}
    assert moved(one, 8, 9) == set(NAMES)
    assert moved(one, 9, 10) == {"value_head"}


def test_a_stage_learns_to_the_bit_what_a_training_of_its_depth_learns() -> None:
    staged, plain = learner(config([StageConfig(0, 4), StageConfig(2, 4)], 2)), None
    plain = learner(config([StageConfig(0, 8)], 0))
    assert steps(staged, 0, 4) == steps(plain, 0, 4)
    for name, parameter in staged.critic.value_head.named_parameters():
        assert torch.equal(parameter, plain.critic.value_head.get_parameter(name))


def test_blocks_that_rest_keep_nothing_for_a_backward_pass() -> None:
    one = learner(config(STAGES, 2))
    one.stages.enter(0)
    hidden = one.critic.trunk.hidden(batch(0).tokens, batch(0).layout)
    assert not hidden.requires_grad
    one.stages.enter(3)
    assert one.critic.trunk.hidden(batch(0).tokens, batch(0).layout).requires_grad


def test_rates_are_each_stage_s_own_in_one_schedule() -> None:
    one = learner(config(STAGES, 2))
    names = {id(p): name for name, p in one.critic.named_parameters()}
    found: list[dict[str, float]] = []
    logged = []
    for step in range(8):
        logged.append(one.step(step, [batch(step)], ValueMetrics()).learning_rate)
        groups = one.optimizer.param_groups
        found.append({names[id(p)]: g["lr"] for g in groups for p in g["params"]})
    block, head = "trunk.layers.3.attention.wq.weight", "value_head.weight"
    assert logged[0] == pytest.approx(1e-3 / 2)  # in warm-up
    assert (found[1][head], found[1][block]) == pytest.approx((2e-2, 1e-3 / 2))
    factor = logged[3] / 2e-3
    assert 0.1 < factor < 1
    assert (found[3][head], found[3][block]) == pytest.approx((2e-3 * factor, 1e-3 * factor))
    assert logged[7] == pytest.approx(5e-4 * 0.1)  # the last step, of all stages
    assert found[7][block] == pytest.approx(5e-4 * 0.1 / 2)


def test_updates_are_counted_where_a_parameter_learned() -> None:
    one = learner(config(STAGES, 2))
    head, third = one.critic.value_head.weight, one.critic.trunk.layers[2].ffn_norm.weight
    counted = Stages(one.critic, one.config)
    assert [counted.updates(head, n, 0, ()) for n in (0, 3, 8)] == [0, 3, 8]
    assert [counted.updates(third, n, 0, ()) for n in (0, 3, 4, 6, 8)] == [0, 0, 1, 3, 3]
    # steps 2, 5 and 7 changed nothing
    assert counted.updates(head, 8, 3, (2, 5, 7)) == 5
    assert counted.updates(third, 8, 3, (2, 5, 7)) == 2
    assert counted.updates(head, 8, 3, (7,)) == 5  # of two it is not known which
    steps(one, 0, 8)
    assert one.optimizer.state[third]["step"] == 3
    one.set_updates(5, 1, (4,))
    assert (one.optimizer.state[third]["step"], one.optimizer.state[head]["step"]) == (1, 4)


# In a run

GIVEN = (
    "data.arithmetic.validation_examples=40",
    "training.max_steps=8",
    "training.batch_size=16",
    "training.micro_batch_tokens=256",
    "training.num_unfrozen_layers=2",
    "evaluation.every_steps=4",
    "logging.every_steps=2",
    "checkpoint.every_steps=1000000",
)
TABLE = (
    "training.stages=[{num_unfrozen_layers: 0, steps: 3, head_learning_rate: 0.02},"
    "{num_unfrozen_layers: 2, steps: 3}, {num_unfrozen_layers: 1, steps: 2}]"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_job(tmp_path, GIVEN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_job(*overrides: str) -> RunDirectory:
    given = load_config(CriticConfig, "critic.yaml", (TABLE, *overrides))
    train(given)
    return RunDirectory(given.run.dir)


@pytest.mark.slow
def test_a_run_goes_on_from_within_a_stage_and_from_its_end_to_the_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_job("run.name=whole")
    run, reached, metrics = RunDirectory("runs/slices"), [0], Tracker.metrics

    def until_the_second_step(tracker: Tracker, step: int, figures: Any) -> None:
        metrics(tracker, step, figures)
        if step == reached[-1] + 2:
            monkeypatch.setenv(DEADLINE, str(time.time()))

    monkeypatch.setattr(Tracker, "metrics", until_the_second_step)
    while reached[-1] < 6:  # the second stage's last
        monkeypatch.setenv(DEADLINE, "inf")
        with pytest.raises(Stopped):
            run_job("run.name=slices")
        reached.append(run.newest_checkpoint())
    monkeypatch.setenv(DEADLINE, "inf")
    monkeypatch.setattr(Tracker, "metrics", metrics)
    run_job("run.name=slices")
    assert run.records() == whole.records()
    files = [one.file("critic.safetensors").read_bytes() for one in (run, whole)]
    assert files[0] == files[1]
    with pytest.raises(InputError, match=r"training.stages"):
        run_job("run.name=slices", "training.stages=[]")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("training.max_steps=9",), "training.stages: 8 steps in all, and training.max_steps is 9"),
        (("training.num_unfrozen_layers=3",), "num_unfrozen_layers: 3, and the most .* is 2"),
        (("training.stages=[{num_unfrozen_layers: -1, steps: 8}]",), r"stages\[0\].num_unfrozen"),
        (("training.stages=[{num_unfrozen_layers: 2, steps: 0}]",), r"stages\[0\].steps: 0"),
        (
            ("training.stages=[{num_unfrozen_layers: 2, steps: 8, learning_rate: -1}]",),
            r"stages\[0\].learning_rate: -1",
        ),
        (("training.stages=[{num_unfrozen_layers: 2}]",), "steps"),
        (("training.stages=[{blocks: 2, steps: 8}]",), "blocks"),
        (("training.stages=[3]",), "training.stages"),
    ],
)
def test_stages_that_cannot_be_are_refused(
    folder: Path, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        load_config(CriticConfig, "critic.yaml", (TABLE, *overrides))
