"""The checkpoint benchmark's own logic: what it adds up, and that its saves are real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from job.common.schema import DistributedConfig
from job.distributed.world import joined_world
from job.model.architecture import TransformerConfig
from job.run.manifest import Manifest

TINY = TransformerConfig(dim=32, n_layers=5, n_heads=4, vocab_size=64, multiple_of=8)


@pytest.fixture(scope="module")
def checkpoint(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("checkpoint")


def test_the_slow_down_is_what_steps_take_longer(checkpoint: ModuleType) -> None:
    taken = checkpoint.Round([1.0, 9.0, 1.0], 0.1, [1.5, 2.0], 4.0, 5.0, 0.0)
    assert taken.slow_down == pytest.approx(1.5)


def test_the_summary_is_medians_and_their_ratios(checkpoint: ModuleType) -> None:
    calls = (0.1, 0.4, 9.0)
    rounds = [checkpoint.Round([1.0], call, [1.5], 2.0, 3.0, 0.0) for call in calls]
    sizes = checkpoint.Sizes(1_000_000, 12_000_000)
    summary = checkpoint.summarise(rounds, sizes, checkpoint.Sizes(10, 500), 36_000_000)
    assert summary["ratios"] == {
        "call_to_synchronous": pytest.approx(0.2),
        "call_and_slow_down_to_synchronous": pytest.approx(0.45),
        "step_during_a_save_to_undisturbed": pytest.approx(1.5),
        "full_state_to_synchronous_seconds": pytest.approx(1.5),
        "full_state_to_checkpoint_bytes": pytest.approx(3.0),
    }
    assert summary["claims"] == {
        "call_under_15%_of_synchronous": False,
        "n4_bytes_as_expected": True,
        "n0_bytes_as_expected": True,
    }


@pytest.mark.parametrize(
    ("trainable", "bytes_", "expected"),
    [
        (0, 262_144, True),
        (0, 262_145, False),
        (10**7, 120_000_000 + 2_400_000 + 262_144, True),
        (10**7, 120_000_000 + 2_400_000 + 262_145, False),
        (10**7, 80_000_000, False),  # without one of the moments
    ],
)
def test_sizes_are_held_against_parameters_and_moments(
    checkpoint: ModuleType, trainable: int, bytes_: int, expected: bool
) -> None:
    assert checkpoint.Sizes(trainable, bytes_).is_as_expected is expected


@pytest.mark.slow
def test_all_ways_save_what_they_claim_to(checkpoint: ModuleType, tmp_path: Path) -> None:
    with joined_world(DistributedConfig()) as world:
        results = checkpoint.compare(tmp_path, TINY, 2, world, 0)
        loop = checkpoint.Loop(tmp_path / "other", TINY, 4, world, 0)
        every = sum(p.numel() for p in loop.learner.critic.parameters())
    trained = results["bytes"]["n4"]["trainable_parameters"]
    assert 0 < trained < every
    assert results["bytes"]["full_state"] > 4 * every + 8 * trained
    assert results["bytes"]["n0"]["trainable_parameters"] == TINY.dim + 1
    assert all(taken["disturbed_steps"] for taken in results["rounds"])
    folders = sorted((tmp_path / "run-4/checkpoints").glob("step-*"))
    assert [folder.name for folder in folders] == ["step-00005000", "step-00006000"]
    for folder in folders:
        Manifest.read(folder).verify(folder)
    assert "asynchronous: the call" in checkpoint.show(results)
