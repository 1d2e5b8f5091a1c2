"""The closed form of memory against torch's own CUDA allocator, with trunks of true size."""

from __future__ import annotations

from typing import Any

import pytest

from fake_cuda.runtime import FakeCuda, Gpu
from job.common.schema import ShardingStrategy

TOLERANCE = 0.005
ABOVE_COMPILED = 0.02  # Inductor orders some things better than the closed form knows
GPUS = {  # of the job; 8 of them on a node
    ShardingStrategy.NO_SHARD: 2,
    ShardingStrategy.HYBRID_SHARD: 16,
}
LARGE = Gpu(memory=1_000_000_000_000)  # so that nothing is left out for its size
STRATEGIES = [s for s in ShardingStrategy if s.name != "auto"]  # which stands for another
FULL = 33  # one more than there are blocks


def _case(strategy: ShardingStrategy, n: int, **fsdp: Any) -> dict[str, Any]:
    fsdp = {"sharding_strategy": strategy.name, **fsdp}
    return {"trunk": "7b", "n": n, "world": GPUS.get(strategy, 4), "fsdp": fsdp}


def _alone(n: int, **changes: Any) -> dict[str, Any]:
    return {"trunk": "7b", "n": n, **changes}


FEW = [
    _alone(4),
    _alone(0, micro_batches=1),
    _alone(4, trunk="8b grouped", fsdp={"sharding_strategy": "REPLICATE_FROZEN"}),
    _case(ShardingStrategy.FULL_SHARD, 4, activation_checkpointing=True),
]


def _check(
    cuda: FakeCuda, cases: list[dict[str, Any]], below: float = TOLERANCE, above: float = TOLERANCE
) -> None:
    """Predictions are at most so far below what is measured, and so far above it."""
    found = cuda.ask("measure_memory.py", cases, LARGE, timeout=600)
    before = [one["measured"]["before"] for one in found]
    assert len(set(before)) == 1, before  # else a case's peak is not its own
    off = []
    for case, one in zip(cases, found, strict=True):
        for what in ("peak", "after_backward"):
            predicted, measured = one["predicted"][what], one["measured"][what]
            share = (predicted - measured) / one["measured"]["peak"]
            if not -below <= share <= above:
                off.append((case, what, predicted, measured))
    assert not off
    assert len(found) == len(cases)


@pytest.mark.slow
def test_predictions_are_what_the_allocator_counts() -> None:
    _check(FakeCuda.of(fetch=False), FEW)


@pytest.mark.all
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_and_depth(cuda: FakeCuda, strategy: ShardingStrategy) -> None:
    cases = [_case(strategy, n) for n in (0, 1, 4, 8, 32, FULL)]
    _check(cuda, cases)


@pytest.mark.all
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recomputation_with_every_strategy(cuda: FakeCuda, strategy: ShardingStrategy) -> None:
    cases = [_case(strategy, n, activation_checkpointing=True) for n in (1, 4, 32, FULL)]
    _check(cuda, cases)


@pytest.mark.all
def test_shared_prompts(cuda: FakeCuda) -> None:
    cases = [_alone(n, solutions=k, tokens=12288) for n in (0, 4) for k in (4, 16)]
    cases += [_alone(4, trunk="8b grouped", solutions=4)]
    cases += [_alone(0, micro_batches=1, solutions=8, sequence=2048, tokens=32768)]
    _check(cuda, cases)


@pytest.mark.all
def test_one_gpu(cuda: FakeCuda) -> None:
    whole = {"sharding_strategy": "REPLICATE_FROZEN"}
    cases = [_alone(n, fsdp=fsdp) for n in (0, 1, 2, 4, 8, 32) for fsdp in ({}, whole)]
    cases += [_alone(n, micro_batches=1) for n in (0, 4, 8)]
    _check(cuda, cases)


@pytest.mark.all
def test_other_trunks_and_micro_batches(cuda: FakeCuda) -> None:
    trunks = ("13b", "70b", "8b grouped")
    cases = [_alone(n, trunk=trunk, world=8) for trunk in trunks for n in (0, 4)]
    cases += [_alone(n, trunk="8b grouped", repeats_keys=True) for n in (0, 4)]
    cases += [_alone(4, tokens=65536, sequence=2048), _alone(4, tokens=2048, sequence=300)]
    cases.append(_alone(4, world=4, fsdp={"cpu_offload": True}))
    _check(cuda, cases)


@pytest.mark.all
def test_compiled_blocks(cuda: FakeCuda) -> None:
    cases = [_alone(n, compiled=True) for n in (0, 4)]
    cases.append(_case(ShardingStrategy.FULL_SHARD, 4) | {"compiled": True})
    cases.append(_alone(4, trunk="8b grouped", compiled=True))
    _check(cuda, cases, above=ABOVE_COMPILED)


@pytest.mark.all
def test_compiled_blocks_that_are_recomputed_sharded_or_share_prompts(cuda: FakeCuda) -> None:
    recomputed, whole = (
        {"activation_checkpointing": True},
        {"sharding_strategy": "REPLICATE_FROZEN"},
    )
    cases = [
        _alone(4, fsdp=recomputed),
        _alone(8, fsdp=whole),
        _case(ShardingStrategy.SHARD_GRAD_OP, 4),
        _case(ShardingStrategy.FULL_SHARD, FULL, **recomputed),
        _alone(4, sequence=2048, solutions=4, tokens=12288),
    ]
    _check(cuda, [case | {"compiled": True} for case in cases])


@pytest.mark.all
def test_compiled_blocks_with_the_other_strategies(cuda: FakeCuda) -> None:
    strategies = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy.NO_SHARD)
    cases = [_case(strategy, n) | {"compiled": True} for strategy in strategies for n in (0, 4)]
    _check(cuda, cases, above=ABOVE_COMPILED)
