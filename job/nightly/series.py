"""Whether a noisy figure has moved over the nights: functions on numbers alone.

The newest nights are held against those before them, twice: the last 5, which finds a step of a
quiet figure at once, and the last 10, which finds it in a noisy one. Nights far from the median of
their window are left out. A figure has moved if

* its mean has by SHIFT at least,
* Mann and Whitney's test says so, p < RANK_P,
* and so does a t-test of the two means whose errors are those of nights that resemble their
  neighbours (CORRELATION), under a false-discovery rate over all figures of a night (`discovered`).

docs/nightly.md has what is found, how soon, and how often it is found in vain.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

# Newest nights, and how much less their p counts: the longer window has almost all of the rate.
WINDOWS = ((5, 200.0), (10, 1.005))
MOST_NEWEST = WINDOWS[-1][0]
LEAST_BEFORE, MOST_BEFORE = 20, 100
SHIFT = 0.0343
RANK_P = 0.01
CORRELATION = 0.4  # of a night with the next one, on one kind of node
FALSE_DISCOVERIES = 0.1
_FAR = 3.5  # spreads from the median
_LEAST_SPREAD = 1e-3  # of the mean: a figure that hardly varies is still not held to be constant
_SPREAD_OF_MAD = 1.4826  # of a normal distribution


class Fall(NamedTuple):
    """How far the newest nights lie below those before; arrays over series.

    Attributes:
        p: the probability of this by chance; 1 where the shift is too small, or nights too few.
        shift: relative.
    """

    p: Array
    shift: Array


def fall(nights: Array, least_shift: float = SHIFT) -> Fall:
    """Whether a series has fallen, as of its last night.

    Args:
        nights: [..., nights], oldest first, NaN where a night has no value.
    """
    p, shift = np.ones(nights.shape[:-1]), np.zeros(nights.shape[:-1])
    for newest, weight in WINDOWS:
        if nights.shape[-1] >= newest + LEAST_BEFORE:
            before = nights[..., -newest - MOST_BEFORE : -newest]
            seen = _fall(before, nights[..., -newest:], least_shift)
            shift = np.where(weight * seen.p < p, seen.shift, shift)
            p = np.minimum(p, weight * seen.p)
    return Fall(p, shift)


def discovered(p: Array) -> NDArray[np.bool_]:
    """Which of a night's series have moved, when all are looked at together; p: [..., series]."""
    adjusted: Array = stats.false_discovery_control(p, axis=-1)
    return adjusted <= FALSE_DISCOVERIES


def step(nights: Array) -> int:
    """How many of the newest nights lie on the other side of a step; nights: [nights], no NaN."""
    errors = [
        np.square(part - part.mean()).sum()
        for newest in range(1, min(MOST_NEWEST, len(nights) - 1) + 1)
        for part in (nights[:-newest], nights[-newest:])
    ]
    return 1 + int(np.argmin(np.add(errors[::2], errors[1::2])))


def _fall(before: Array, newest: Array, least_shift: float) -> Fall:
    known = _count(before)
    before, spread = _without_outliers(before)
    newest = _near(newest, _median(newest), spread)
    mean, now = _mean(before), _mean(newest)
    shift = 1 - now / np.where(mean == 0, 1, mean)
    of_before, of_newest = _alike(MOST_BEFORE), _alike(newest.shape[-1])
    left = _count(before)
    error = spread * np.sqrt(
        of_before / np.maximum(left, 1) + of_newest / np.maximum(_count(newest), 1)
    )
    p = stats.t.sf((mean - now) / error, np.maximum(left / of_before - 1, 1))
    large = (known >= LEAST_BEFORE) & (shift >= least_shift)
    return Fall(np.where(large & (_rank_p(before, newest) < RANK_P), p, 1.0), shift)


def _alike(nights: int) -> float:
    """How many times its variance the mean of nights has when each resembles the next."""
    lags = np.arange(1, nights)
    return float(1 + 2 * np.sum((1 - lags / nights) * CORRELATION**lags))


def _without_outliers(values: Array) -> tuple[Array, Array]:
    """Values near their median, NaN for others; and their standard deviation."""
    center = _median(values)
    near = _near(values, center, _SPREAD_OF_MAD * _median(np.abs(values - center[..., None])))
    mean = _mean(near)
    squares = np.nansum(np.square(near - mean[..., None]), -1)
    spread = np.sqrt(squares / np.maximum(_count(near) - 1, 1))
    return near, np.maximum(spread, _LEAST_SPREAD * np.abs(mean))


def _near(values: Array, center: Array, spread: Array) -> Array:
    far = np.abs(values - center[..., None]) > _FAR * spread[..., None]
    return np.where(far, np.nan, values)


def _median(values: Array) -> Array:
    """Along the last axis, without NaN; much faster than numpy's own for many short rows."""
    ordered, count = np.sort(values, -1), _count(values)
    middle = [np.maximum(count - 1, 0) // 2, np.minimum(count // 2, values.shape[-1] - 1)]
    both = [np.take_along_axis(ordered, place[..., None], -1)[..., 0] for place in middle]
    return (both[0] + both[1]) / 2


def _count(values: Array) -> NDArray[np.int64]:
    return values.shape[-1] - np.isnan(values).sum(-1)


def _mean(values: Array) -> Array:
    return np.nansum(values, -1) / np.maximum(_count(values), 1)


def _rank_p(before: Array, newest: Array) -> Array:
    """Mann and Whitney's test, one-sided, by its normal approximation; no values where NaN."""
    above = np.zeros(before.shape[:-1])
    for k in range(newest.shape[-1]):
        value = newest[..., k, None]
        above += (before > value).sum(-1) + 0.5 * (before == value).sum(-1)
    m, n = _count(before), _count(newest)
    error = np.sqrt(np.maximum(m * n, 1) * (m + n + 1) / 12)
    p: Array = stats.norm.sf((above - m * n / 2 - 0.5) / error)
    return p
