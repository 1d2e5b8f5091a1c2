"""The closed form against the real model, sharding and optimizer on tensors without content."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from job.common.schema import FsdpConfig, ShardingStrategy
from job.memory.footprint import COMPONENTS, Moment, Setting, footprint
from job.memory.settings import SHAPES
from job.model.architecture import TransformerConfig
from job.training.simulation import simulate

pytestmark = pytest.mark.slow

# Proportions of models that exist, with few blocks; in a grid of its own bench/memory_grid.py
# takes models of true size.
TRUNKS = {
    "plain": TransformerConfig(dim=512, n_layers=4, n_heads=8, vocab_size=2000),
    "grouped heads": TransformerConfig(
        dim=512, n_layers=4, n_heads=8, n_kv_heads=2, vocab_size=9000, qkv_bias=True
    ),
    "wide heads": TransformerConfig(
        dim=512, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=128, vocab_size=9000, ffn_hidden=1536
    ),
    "norms of heads": TransformerConfig(
        dim=512, n_layers=4, n_heads=8, n_kv_heads=4, vocab_size=2000, qk_norm=True
    ),
    "large vocabulary": TransformerConfig(dim=512, n_layers=2, n_heads=8, vocab_size=60_000),
    "extra heads": TransformerConfig(
        dim=512, n_layers=6, n_heads=8, vocab_size=2000, n_future_tokens=3
    ),
}
TOTAL, COMPONENT, LARGE = 0.005, 0.05, 0.02  # relative; of the peak, to be compared by itself


def _setting(trunk: str, n: int, gpus: int = 4, **changes: Any) -> Setting:
    """4096 tokens in sequences of 512, 8 GPUs a node."""
    fsdp = FsdpConfig(**{key: changes.pop(key) for key in changes.keys() & vars(FsdpConfig())})
    setting = Setting(TRUNKS[trunk], n, fsdp, 4096, world_size=gpus, per_node=min(gpus, 8))
    return replace(setting, **changes)


def _joined(components: dict[str, int]) -> dict[str, int]:
    """The working set among the activations, from which the simulation cannot tell it."""
    found = {name: components.get(name, 0) for name in COMPONENTS if name != "working_set"}
    return found | {"activations": found["activations"] + components.get("working_set", 0)}


def _check(setting: Setting, total: float = TOTAL) -> None:
    predicted, simulated = footprint(setting), simulate(setting)
    assert predicted.peak.total == pytest.approx(simulated.peak.total, rel=total)
    after = simulated.after_backward.total
    assert predicted.after_backward.total == pytest.approx(after, rel=total)
    near = [m for m in predicted.moments if m.total >= (1 - total) * predicted.peak.total]
    assert any(_agree(moment, simulated.peak) for moment in near), (near, simulated.peak)


def _agree(predicted: Moment, simulated: Moment) -> bool:
    ours, theirs = _joined(predicted.components), _joined(simulated.components)
    large = [n for n in ours if max(ours[n], theirs[n]) > LARGE * simulated.total]
    return all(ours[name] == pytest.approx(theirs[name], rel=COMPONENT) for name in large)


def test_two_blocks_on_four_gpus() -> None:
    _check(_setting("plain", 2))


def test_one_process_in_full_precision_on_cpu() -> None:
    """Without FSDP, whose tracker would not do."""
    _check(_setting("plain", 1, 1, mixed_precision=False, cuda=False))


@pytest.mark.grid
@pytest.mark.parametrize("n", [0, 1, 3, 5])
@pytest.mark.parametrize("strategy", ShardingStrategy)
def test_every_strategy(strategy: ShardingStrategy, n: int) -> None:
    _check(_setting("plain", n, sharding_strategy=strategy))


@pytest.mark.grid
@pytest.mark.parametrize("n", [0, 2, 5])
@pytest.mark.parametrize("trunk", [name for name in TRUNKS if name != "plain"])
def test_every_architecture(trunk: str, n: int) -> None:
    _check(_setting(trunk, n))


@pytest.mark.grid
@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("strategy", ShardingStrategy)
def test_embeddings_that_outweigh_blocks(strategy: ShardingStrategy, gpus: int) -> None:
    setting = _setting("large vocabulary", 3, gpus, sharding_strategy=strategy)
    _check(replace(setting, micro_batch_tokens=64))


@pytest.mark.grid
@pytest.mark.parametrize("gpus", [1, 2, 8, 64])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "HYBRID_SHARD"])
def test_every_number_of_gpus(strategy: str, gpus: int) -> None:
    setting = _setting("plain", 2, gpus, sharding_strategy=ShardingStrategy[strategy])
    _check(setting, total=0.01)  # 64 parts of a row of the value head come to be something


@pytest.mark.grid
@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": False},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "mixed_precision": False},
        {"prefix_cached": True},
        {"prefix_cached": True, "mixed_precision": False},
        {"prefix_cached": True, "activation_checkpointing": True},
        {"prefix_cached": True, "between": 1},
        {"prefix_cached": True, "between": 2},
        {"prefix_cached": True, "between": 1, "mixed_precision": False},
        {"prefix_cached": True, "between": 1, "activation_checkpointing": True},
        {"accumulates": False},
        {"response_tokens": 700},
        {"micro_batch_tokens": 64, "sequence_tokens": 64},
        {"micro_batch_tokens": 300},
        {"micro_batch_tokens": 300, "activation_checkpointing": True},
        {"micro_batch_tokens": 800},
        {"head_bias": False},
        {"head_outputs": 51},
    ],
    ids=lambda changes: ", ".join(f"{key}={value}" for key, value in changes.items()),
)
@pytest.mark.parametrize("n", [0, 2])
def test_every_other_setting(n: int, changes: dict[str, Any]) -> None:
    _check(_setting("plain", n, **changes), total=0.01)


@pytest.mark.grid(together=2)
@pytest.mark.parametrize("sequence_tokens", [32, 512])
@pytest.mark.parametrize("trunk", ["plain", "grouped heads", "norms of heads"])
@pytest.mark.parametrize("n", [0, 2, 5])
def test_one_process_with_a_cpus_kernels(n: int, trunk: str, sequence_tokens: int) -> None:
    setting = _setting(trunk, n, 1, mixed_precision=False, cuda=False)
    _check(replace(setting, micro_batch_tokens=1024, sequence_tokens=sequence_tokens))


def test_several_processes_with_a_cpus_kernels() -> None:
    _check(_setting("plain", 2, 2, cuda=False))


@pytest.mark.parametrize(("n", "gpus"), [(4, 4), (0, 1)])
def test_a_trunk_of_true_size(n: int, gpus: int) -> None:
    setting = Setting(SHAPES["7b"], n, FsdpConfig(), 8192, world_size=gpus, per_node=gpus)
    _check(setting, total=0.001)


def test_weights_in_host_memory_are_not_simulated() -> None:
    with pytest.raises(ValueError, match="cpu_offload cannot be simulated"):
        simulate(_setting("plain", 2, cpu_offload=True))
