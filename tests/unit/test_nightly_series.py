"""Series over nights: what is found, how soon, and how often it is found in vain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from job.nightly import series

SERIES, NIGHTS, STEP = 48, 200, 120
QUARTER = 91
CORRELATION = 0.4
FIRST = series.LEAST_BEFORE + series.WINDOWS[0][0] - 1  # the first night that can be judged
Nights = NDArray[np.float64]


def _nights(seed: int, shape: tuple[int, ...], variation: float) -> Nights:
    """Nights that resemble their neighbours, of which 2 % are 10 % slow."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(shape)
    for night in range(1, shape[-1]):
        fresh = np.sqrt(1 - CORRELATION**2) * noise[..., night]
        noise[..., night] = CORRELATION * noise[..., night - 1] + fresh
    return (1 + variation * noise) * np.where(rng.random(shape) < 0.02, 0.9, 1)


def _each_night(nights: Nights, first: int = FIRST) -> Nights:
    """p as of each night from the first on, of an array [..., nights]."""
    longest = series.MOST_BEFORE + series.MOST_NEWEST
    lack = np.full((*nights.shape[:-1], max(longest - 1 - first, 0)), np.nan)
    padded = np.concatenate([lack, nights], -1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, longest, axis=-1)
    return np.stack([series.fall(rows).p for rows in windows])


def _episodes(alarms: NDArray[np.bool_]) -> int:
    """Alarms that were none in the night before; the last axis are nights."""
    return int(alarms[..., 0].sum() + (alarms[..., 1:] & ~alarms[..., :-1]).sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("simulations", "variation", "within", "found_at_least", "alarms_at_most"),
    [
        (10, 0.01, 5, 0.97, 0.5),
        (10, 0.02, 10, 0.93, 1.4),  # of ten simulations; sixty give 0.95 and 1.0
        pytest.param(60, 0.01, 5, 0.98, 0.3, marks=pytest.mark.all),
        pytest.param(60, 0.02, 10, 0.945, 1.05, marks=pytest.mark.all),
    ],
)
def test_a_slow_down_is_found_and_little_else(
    simulations: int, variation: float, within: int, found_at_least: float, alarms_at_most: float
) -> None:
    quiet = _nights(1, (simulations, SERIES, NIGHTS), variation)
    p = np.moveaxis(_each_night(quiet), 1, -1)
    alarms = np.moveaxis(series.discovered(p), -1, 1)
    quarters = simulations * (NIGHTS - FIRST) / QUARTER
    assert _episodes(alarms) / quarters <= alarms_at_most
    slow = _nights(2, (20, 5 * simulations, STEP + within), variation)
    slow[..., STEP:] *= 0.95
    # one of 48 that moves by itself: what the false-discovery rate then asks of it
    found = _each_night(slow)[..., -within:] <= series.FALSE_DISCOVERIES / SERIES
    assert found.any(-1).mean() >= found_at_least


def test_nothing_is_said_of_few_nights() -> None:
    nights = np.r_[np.full(20, 100.0), np.full(4, 50.0)]
    assert series.fall(nights).p == 1
    assert series.fall(np.r_[nights, 50.0]).p < 1e-6


def test_a_figure_that_never_varies_may_still_vary_a_little() -> None:
    nights = np.full(60, 7.0)
    assert series.fall(nights).p == 1
    nights[-5:] *= 0.98
    assert series.fall(nights).p == 1
    nights[-5:] *= 0.95
    assert series.fall(nights).p < 1e-6


def test_one_bad_night_is_no_fall() -> None:
    nights = _nights(3, (80,), 0.005)
    nights[-1] *= 0.5
    assert series.fall(nights).p == 1


def test_missing_nights_are_left_out() -> None:
    nights = _nights(4, (90,), 0.005)
    nights[-5:] *= 0.9
    with_gaps = np.insert(nights, [10, 20, 40], np.nan)
    assert series.fall(with_gaps).p == pytest.approx(series.fall(nights).p, rel=0.2)


def test_the_rank_test_is_scipys() -> None:
    rng = np.random.default_rng(0)
    before, newest = rng.normal(size=(6, 20)).round(1), rng.normal(-0.5, size=(6, 5)).round(1)
    known: Any = stats.mannwhitneyu(
        before, newest, alternative="greater", axis=-1, method="asymptotic"
    )
    ours = series._rank_p(before, newest)
    np.testing.assert_allclose(ours, known.pvalue, rtol=0.05)  # scipy's is corrected for ties


@pytest.mark.parametrize("newest", [1, 4, 9])
def test_the_step_is_where_it_is(newest: int) -> None:
    nights = _nights(5, (60,), 0.01)
    nights[-newest:] *= 0.9
    assert series.step(nights) == newest


def test_the_false_discovery_rate_looks_at_all_series_together() -> None:
    p = np.full(SERIES, 1.0)
    p[0] = 0.9 * series.FALSE_DISCOVERIES / SERIES
    assert series.discovered(p).tolist() == [True] + [False] * (SERIES - 1)
    p[0] = 1.1 * series.FALSE_DISCOVERIES / SERIES
    assert not series.discovered(p).any()
