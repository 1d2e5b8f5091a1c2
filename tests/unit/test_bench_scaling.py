"""The model of many GPUs, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from job.common.schema import ShardingStrategy as Strategy
from job.model.architecture import TransformerConfig
from job.model.parameters import block_parameters

# a block of 8 * 8 * 4 + 3 * 8 * 16 + 16 = 656 parameters, embeddings of 80
TINY = TransformerConfig(dim=8, n_layers=5, n_heads=2, vocab_size=10, ffn_hidden=16)
P = 656


@pytest.fixture(scope="module")
def model(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("scaling_model")


@pytest.fixture(scope="module")
def scaling(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("scaling")


def _job(model: ModuleType, strategy: Strategy, gpus: int = 16, **changes: Any) -> Any:
    return replace(model.Job(TINY, 2, 100, gpus, strategy), **changes)


def test_the_block_is_as_large_as_these_tests_have_it() -> None:
    assert block_parameters(TINY) == P


@pytest.mark.parametrize(
    ("strategy", "forward", "backward", "reduced", "added"),
    [
        # 3 frozen and 2 trained blocks forward, one again; w = 16
        (Strategy.FULL_SHARD, 15 / 16 * 2 * (5 * P + 80), 15 / 16 * 2 * P, 15 / 16 * 8 * P, 0),
        (Strategy.SHARD_GRAD_OP, 15 / 16 * 2 * (5 * P + 80), 0, 15 / 16 * 8 * P, 0),
        (Strategy.REPLICATE_FROZEN, 15 / 16 * 4 * P, 15 / 16 * 2 * P, 15 / 16 * 8 * P, 0),
        # w = 8, two copies: 2 * 1/2 * 4 P / 8 of each of two blocks
        (Strategy.HYBRID_SHARD, 7 / 8 * 2 * (5 * P + 80), 7 / 8 * 2 * P, 7 / 8 * 8 * P, P),
        # 16 copies: 2 * 15/16 * 4 P of each of two blocks
        (Strategy.NO_SHARD, 0, 0, 0, 15 * P),
    ],
)
def test_bytes_of_a_step(
    model: ModuleType,
    strategy: Strategy,
    forward: float,
    backward: float,
    reduced: float,
    added: float,
) -> None:
    found = model.traffic(_job(model, strategy))
    assert found == model.Traffic(forward, backward, reduced, added)
    assert found.total == forward + backward + reduced + added


def test_with_a_cache_only_trained_blocks_are_gathered(model: ModuleType) -> None:
    found = model.traffic(_job(model, Strategy.FULL_SHARD, cached=True))
    assert found.gathered_forward == 15 / 16 * 2 * 2 * P
    same = model.traffic(_job(model, Strategy.REPLICATE_FROZEN, cached=True))
    assert found == same


def test_one_gpu_sends_nothing(model: ModuleType) -> None:
    for strategy in model.STRATEGIES:
        assert model.traffic(_job(model, strategy, gpus=1)).total == 0


def _cluster(model: ModuleType, **changes: float) -> Any:
    given = model.Cluster(
        *(100.0, 200.0),
        memory=1e9,
        memory_rate=1e30,
        inside=1000.0,
        between=100.0,
        hop_inside=0.0,
        hop_between=0.0,
    )
    return replace(given, **changes)


def test_a_ring_is_as_fast_as_its_slowest_link(model: ModuleType) -> None:
    cluster = _cluster(model, hop_inside=0.5, hop_between=2.0)
    assert model.ring_seconds(3000, 1, 8, cluster) == 0
    assert model.ring_seconds(3000, 8, 8, cluster) == 3 + 7 * 0.5
    # 15 steps, two of them between nodes
    assert model.ring_seconds(3000, 16, 8, cluster) == 30 + 13 * 0.5 + 2 * 2.0


def test_chains_hide_what_is_shorter(model: ModuleType) -> None:
    # wait 2, then max(3, 5), max(3, 1), and the last block alone
    assert model.forward_chain([3, 3, 3], [2, 5, 1]) == 2 + 5 + 3 + 3
    # nothing to gather first; max(6, 2 + 0), max(6, 2 + 5), max(6, 0 + 5), then 5
    assert model.backward_chain([6, 6, 6], [0, 2, 2], [5, 5, 5]) == 6 + 7 + 6 + 5
    assert model.forward_chain([], []) == model.backward_chain([], [], []) == 0


def test_seconds_of_a_step_by_hand(model: ModuleType) -> None:
    job = _job(model, Strategy.REPLICATE_FROZEN)
    gather, reduce = 15 / 16 * 2 * P / 100, 15 / 16 * 4 * P / 100
    c, back = 2 * P * 100 / 100, 4 * P * 100 / 200
    found = model.step_seconds(job, _cluster(model))
    assert found.forward == pytest.approx(5 * c)  # gathering is shorter than a block
    assert found.backward == pytest.approx(2 * back + reduce)
    assert found.compute == pytest.approx(5 * c + 2 * back)
    alone = model.step_seconds(job, _cluster(model), overlap=False)
    assert alone.step == pytest.approx(5 * c + 2 * back + 3 * gather + 2 * reduce)


def test_with_slow_links_their_time_is_the_step_s(model: ModuleType) -> None:
    slow = _cluster(model, between=1e-3)
    found = model.step_seconds(_job(model, Strategy.FULL_SHARD), slow)
    moved = model.traffic(_job(model, Strategy.FULL_SHARD))
    forward = moved.gathered_forward / 1e-3
    assert found.forward == pytest.approx(forward, rel=1e-3)
    assert found.backward == pytest.approx(
        (moved.gathered_backward + moved.reduced) / 1e-3, rel=1e-2
    )


def test_hybrid_shards_add_over_the_node_s_one_link(model: ModuleType) -> None:
    job = _job(model, Strategy.HYBRID_SHARD)
    # each of 8 GPUs has P / 2 bytes to add, all over 100 bytes a second
    assert model._adding_seconds(job, P, _cluster(model)) == pytest.approx(8 * P / 2 / 100)


def test_whole_copies_are_added_around_the_ring_and_gathered(model: ModuleType) -> None:
    job = _job(model, Strategy.NO_SHARD)
    cluster = _cluster(model, hop_between=2.0)
    # 16 on nodes of 8: 30 steps with a sixteenth of 4P bytes, and four hops between nodes
    expected = 30 / 16 * 4 * P / 100 + 4 * 2.0
    assert model._adding_seconds(job, P, cluster) == pytest.approx(expected)


def test_rates_from_the_times_of_two_depths(model: ModuleType) -> None:
    # a block forward takes 2 s, and back 5 s
    forward, backward = model.rates(TINY, 100, {0: 10.0, 4: 30.0})
    assert forward == 2 * P * 100 / 2
    assert backward == 4 * P * 100 / 5
    with pytest.raises(ValueError, match="N = 0"):
        model.rates(TINY, 100, {4: 30.0})


def test_rates_come_from_a_gpu_s_record(scaling: ModuleType) -> None:
    speeds = {"0": 16384.0, "4": 8192.0}
    sections = {
        f"training, N={n}, compiled": {"found": {"tokens_per_second": rate}}
        for n, rate in speeds.items()
    }
    forward, backward = scaling.measured_rates({"shape": "7b", "sections": sections})
    block = 202_383_360
    assert forward == pytest.approx(2 * block * 8192 * 32 / 0.5)
    assert backward == pytest.approx(4 * block * 8192 * 4 / 0.5)


def test_the_fastest_that_fits_is_best(scaling: ModuleType) -> None:
    ways = [
        {"strategy": "NO_SHARD", "fits": False, "seconds": 1.0},
        {"strategy": "REPLICATE_FROZEN", "fits": True, "seconds": 2.0},
        {"strategy": "FULL_SHARD", "fits": True, "seconds": 2.0},
    ]
    assert scaling.best(ways)["strategy"] == "FULL_SHARD"
    assert scaling.best(ways[:1]) is None
    ways = [way | {"gpus": 8, "efficiency": 0.5} for way in ways]
    kept = scaling.recorded({"shape": "7b", "ways": ways})
    assert kept.keys() == {"shape", "gpus", "efficiency"}
    assert list(kept["efficiency"]) == [way["strategy"] for way in ways if way["fits"]]


def test_a_70b_does_not_fit_whole_and_frozen_blocks_in_a_cache_are_not_there(
    model: ModuleType, scaling: ModuleType
) -> None:
    job = scaling._job("70b", 4, 8, Strategy.REPLICATE_FROZEN, False)
    assert not model.fits(job, 80e9)
    assert model.fits(replace(job, cached=True), 80e9)
