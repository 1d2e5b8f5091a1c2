"""The most that fits a GPU fits, and one more does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from job.common.schema import FsdpConfig, ShardingStrategy
from job.memory.fit import (
    CONTEXT_BYTES,
    MARGIN,
    NCCL_BYTES,
    Fit,
    fit,
    largest_micro_batch,
    largest_unfrozen,
    outside_bytes,
    prediction,
)
from job.memory.footprint import Setting, footprint
from job.memory.settings import SHAPES
from job.model.architecture import TransformerConfig

A100_40GB, A100_80GB = 42_300_000_000, 85_000_000_000


def _setting(n: int = 4, gpus: int = 1, tokens: int = 8192) -> Setting:
    return Setting(SHAPES["7b"], n, FsdpConfig(), tokens, world_size=gpus, per_node=gpus)


def _fits(setting: Setting, capacity: int) -> bool:
    return fit(setting, capacity).fits


def test_a_margin_of_the_gpu_stays_free() -> None:
    predicted = footprint(_setting())
    reserved = 32 * 10**9
    needed = reserved + CONTEXT_BYTES
    roomy = Fit(predicted, reserved, CONTEXT_BYTES, int(needed / (1 - MARGIN)) + 1)
    assert roomy.needed == needed
    assert (roomy.fits, roomy.is_tight) == (True, False)
    for capacity in (int(needed / (1 - MARGIN)) - 1, needed):
        tight = replace(roomy, capacity=capacity)
        assert (tight.fits, tight.is_tight) == (False, True)
    small = replace(roomy, capacity=needed - 1)
    assert (small.fits, small.is_tight) == (False, False)


def test_what_lies_outside_of_the_allocator() -> None:
    assert outside_bytes(_setting()) == CONTEXT_BYTES
    assert outside_bytes(_setting(gpus=4)) == CONTEXT_BYTES + NCCL_BYTES
    assert outside_bytes(replace(_setting(gpus=4), cuda=False)) == 0
    found = fit(_setting(gpus=4), A100_40GB)
    assert found.outside == found.needed - found.reserved == 1_600_000_000


@pytest.mark.parametrize(
    ("gpus", "grow", "share"),
    [(1, True, 0.035), (4, True, 0.06), (1, False, 0.17), (4, False, 0.55)],
)
def test_room_is_left_for_what_the_allocator_reserves(gpus: int, grow: bool, share: float) -> None:
    setting = replace(_setting(gpus=gpus), segments_grow=grow)
    given = footprint(setting).peak.total + 33_554_432
    assert fit(setting, A100_80GB).reserved == pytest.approx(given * (1 + share))
    assert prediction(setting)["reserved_bytes"] == fit(setting, A100_80GB).reserved
    on_cpu = replace(setting, cuda=False)
    assert fit(on_cpu, A100_80GB).reserved == footprint(on_cpu).peak.total


@pytest.mark.parametrize("cuda", [True, False])
def test_what_cublas_works_in_is_predicted_as_it_is_measured(cuda: bool) -> None:
    shape = TransformerConfig(dim=64, n_layers=2, n_heads=2, vocab_size=100)
    small = Setting(shape, 1, FsdpConfig(), 256, cuda=cuda)
    found = prediction(small)
    assert found["peak_bytes"] - footprint(small).peak.total == (33_554_432 if cuda else 0)
    assert found["peak_bytes"] == sum(found["peak"].values())


@pytest.mark.parametrize(
    ("gpus", "capacity", "n"),
    [(1, A100_40GB, 5), (1, A100_80GB, 15), (4, A100_40GB, 16), (2, A100_80GB, 24)],
)
def test_the_largest_n_fits_and_one_more_does_not(gpus: int, capacity: int, n: int) -> None:
    assert largest_unfrozen(_setting(gpus=gpus), capacity) == n
    assert _fits(_setting(n, gpus), capacity)
    assert not _fits(_setting(n + 1, gpus), capacity)


def test_a_larger_n_may_fit_where_a_smaller_one_does_not() -> None:
    """Frozen weights whole on every GPU, trained ones in 64 parts."""
    setting = _setting(gpus=64, tokens=256)
    fsdp = FsdpConfig(sharding_strategy=ShardingStrategy.REPLICATE_FROZEN)
    replicated = replace(setting, fsdp=fsdp)
    capacity = 12_000_000_000
    assert not _fits(replace(replicated, num_unfrozen_layers=0), capacity)
    assert _fits(replace(replicated, num_unfrozen_layers=32), capacity)
    assert largest_unfrozen(replicated, capacity) == 32


def test_no_more_blocks_than_there_are() -> None:
    assert largest_unfrozen(_setting(gpus=8), 10**12) == 32


def test_where_not_even_the_head_fits_there_is_no_n() -> None:
    assert largest_unfrozen(_setting(), 15_000_000_000) is None
    assert largest_unfrozen(_setting(), 17_000_000_000) == 0


@pytest.mark.parametrize(("n", "gpus"), [(0, 1), (4, 1), (4, 4), (8, 4), (32, 8)])
def test_the_largest_micro_batch_fits_and_one_step_more_does_not(n: int, gpus: int) -> None:
    setting = _setting(n, gpus)
    found = largest_micro_batch(setting, A100_40GB, most=10**6, least=256)
    assert found is not None
    assert found % 256 == 0
    for tokens, fits in [(found, True), (found + 256, False)]:
        larger = replace(setting, micro_batch_tokens=tokens, evaluation_tokens=tokens)
        assert _fits(larger, A100_40GB) is fits


def test_a_micro_batch_stays_within_its_bounds() -> None:
    assert largest_micro_batch(_setting(), A100_80GB, most=5000, least=300) == 5000
    found = largest_micro_batch(_setting(0), 16_000_000_000, most=10**6, least=300)
    assert found is not None
    assert 300 < found < 10_000
    just = fit(replace(_setting(4), micro_batch_tokens=300, evaluation_tokens=300), 0).needed
    capacity = int(just / (1 - MARGIN)) + 1
    assert largest_micro_batch(_setting(4), capacity, most=10**6, least=300) == 300


def test_where_not_even_the_least_fits_there_is_no_micro_batch() -> None:
    assert largest_micro_batch(_setting(16), A100_40GB, most=8192, least=256) is None
