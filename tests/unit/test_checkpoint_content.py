"""A checkpoint holds what is trained and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from disturbed_runs import (
    TRUNK,
    assert_equal,
    checkpoint_of,
    run_training,
    stored_weights,
    weights_of,
)
from micro_job import write_recipe
from torch.distributed.checkpoint.filesystem import FileSystemReader

from job.model.architecture_file import read_architecture
from job.model.critic import Critic, unfreeze_last_blocks

pytestmark = pytest.mark.usefixtures("training_folder")


def _trainable(n: int) -> dict[str, int]:
    """Size by name of what is trained when the last n blocks are."""
    with torch.device("meta"):
        critic = Critic(read_architecture("trunk"))
    unfreeze_last_blocks(critic, n)
    return {name: p.numel() for name, p in critic.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("n", [0, 1, 2, 4, 99])
def test_a_checkpoint_holds_what_is_trained_and_nothing_frozen(n: int) -> None:
    settings = (f"training.num_unfrozen_layers={n}", "training.max_steps=2")
    run = run_training(f"content-{n}", *settings)
    checkpoint = checkpoint_of(run, 2)
    names = _trainable(n)
    assert FileSystemReader(checkpoint).read_metadata().state_dict_metadata.keys() == {
        *(f"model.{name}" for name in names),
        *(f"optimizer.{name}.exp_avg" for name in names),
        *(f"optimizer.{name}.exp_avg_sq" for name in names),
    }
    assert_equal(stored_weights(checkpoint), weights_of(run))
    if n == 0:
        assert all(name.startswith("value_head.") for name in names)


@pytest.mark.slow
def test_a_checkpoint_of_the_head_alone_is_small() -> None:
    run = run_training("head", "training.num_unfrozen_layers=0", "training.max_steps=2")
    assert sum(file.stat().st_size for file in checkpoint_of(run, 2).iterdir()) < 64 << 10


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "n"), [(32, 1), (128, 2), (128, 4)])
def test_a_checkpoint_takes_twelve_bytes_a_trained_parameter(dim: int, n: int) -> None:
    changes = (*TRUNK, f"out=wide-{dim}", f"architecture.dim={dim}")
    write_recipe(Path(f"wide-{dim}.yaml"), changes)
    run = run_training(
        f"bytes-{dim}-{n}",
        f"model.path=wide-{dim}",
        f"model.recipe=wide-{dim}.yaml",
        f"training.num_unfrozen_layers={n}",
        "training.max_steps=1",
    )
    count = json.loads(run.file("parameters.json").read_text())["model_trainable_params"]
    size = sum(file.stat().st_size for file in checkpoint_of(run, 1).glob("*.distcp"))
    assert 12 * count <= size <= 1.02 * 12 * count + (256 << 10)
