"""The same training on any number of processes and with any sharding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import run_ranks
from micro_job import write_job
from safetensors.torch import load_file

from job.run.directory import RunDirectory

pytestmark = pytest.mark.slow
ALSO = pytest.mark.all  # another variant of the same behaviour


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharding")
    write_job(path, ["training.num_unfrozen_layers=2"], ["architecture.n_layers=5"])
    return path


def _run(
    folder: Path, name: str, world: int, *overrides: str, per_node: int | None = None
) -> RunDirectory:
    run = RunDirectory(folder / "runs" / name)
    if not run.path.exists():
        command = ["-m", "job.train", "--config", "critic.yaml", "--override"]
        run_ranks([*command, f"run.name={name}", *overrides], world, folder, per_node=per_node)
    return run


def _same(run: RunDirectory, reference: RunDirectory, tolerance: float = 1e-5) -> None:
    """Every loss, norm and metric agrees, and so do the trained weights."""
    for ours, theirs in zip(run.records(), reference.records(), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
    weights, expected = (load_file(r.file("critic.safetensors")) for r in (run, reference))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("world", [pytest.param(2, marks=ALSO), 4])
def test_losses_do_not_depend_on_the_number_of_ranks(folder: Path, world: int) -> None:
    _same(_run(folder, f"world-{world}", world), _run(folder, "reference", 1))


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("SHARD_GRAD_OP", marks=ALSO),
        pytest.param("NO_SHARD", marks=ALSO),
        "REPLICATE_FROZEN",
    ],
)
def test_losses_do_not_depend_on_the_strategy(folder: Path, strategy: str) -> None:
    override = f"distributed.fsdp.sharding_strategy={strategy}"
    _same(_run(folder, strategy, 2, override), _run(folder, "reference", 1))


def test_hybrid_sharding_over_two_nodes_of_two(folder: Path) -> None:
    override = "distributed.fsdp.sharding_strategy=HYBRID_SHARD"
    _same(_run(folder, "hybrid", 4, override, per_node=2), _run(folder, "reference", 1))


@pytest.mark.parametrize("n", [0, pytest.param(4, marks=ALSO), 5])
def test_losses_do_not_depend_on_ranks_at_any_depth(folder: Path, n: int) -> None:
    override = f"training.num_unfrozen_layers={n}"
    _same(_run(folder, f"n{n}-2", 2, override), _run(folder, f"n{n}-1", 1, override))


def test_ranks_without_sequences_take_part(folder: Path) -> None:
    few = ("training.batch_size=3", "training.max_steps=5")
    _same(_run(folder, "few-4", 4, *few), _run(folder, "few-1", 1, *few))


@pytest.mark.parametrize("option", ["activation_checkpointing", "cpu_offload"])
def test_options_that_save_memory_change_nothing(folder: Path, option: str) -> None:
    override = f"distributed.fsdp.{option}=true"
    _same(_run(folder, option, 2, override), _run(folder, "reference", 1))


def test_bad_data_ends_every_rank_with_the_same_error(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"nowhere.jsonl: cannot read the data"):
        _run(folder, "bad", 2, "data.train=nowhere.jsonl", "data.validation=nowhere.jsonl")
