"""Intervals of 95 % from resampling problems: solutions of one problem are not independent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
_DRAWS = 1000
_Z = 1.959964  # of a normal distribution's middle 95 %
_TAIL = 2.5  # per cent on either side
_ROUNDING = 1e-12
_CHUNK = 1 << 22  # counts at a time


@dataclass(frozen=True)
class Estimate:
    """A figure, or a curve of k points, with the ends of its interval; NaN where nothing is."""

    value: Doubles
    low: Doubles
    high: Doubles

    def to_json(self) -> dict[str, Any]:
        return {name: _plain(getattr(self, name)) for name in ("value", "low", "high")}


def _plain(x: Doubles) -> Any:
    if x.ndim:
        return [_plain(one) for one in x]
    return None if np.isnan(x) else float(x)


def ratio(over: Doubles, under: Doubles) -> Estimate:
    """The sum of `over` by the sum of `under`, each [problems] or [problems, k].

    A mean over problems has ones for `under`, and 0 in both for a problem that is left out. The
    interval has the percentiles of Efron's bootstrap (1979, doi:10.1214/aos/1176344552).
    """
    stacked = np.concatenate([_columns(over), _columns(under)], axis=1)
    sums = resampled_sums(stacked)
    width = stacked.shape[1] // 2
    with np.errstate(invalid="ignore", divide="ignore"):
        value = _columns(over).sum(0) / _columns(under).sum(0)
        draws = sums[:, :width] / sums[:, width:]
    shape = over.shape[1:]
    low, high = interval(draws)
    return Estimate(value.reshape(shape), low.reshape(shape), high.reshape(shape))


def wilson(won: float, n: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a share `won` of n trials, also of few, and of 0 and 1.

    Wilson 1927 (doi:10.1080/01621459.1927.10502953): the shares that are not rejected by theirs.
    """
    z2 = _Z**2 / n
    middle = (won + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(won * (1 - won) / n + z2 / (4 * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def interval(draws: Doubles) -> tuple[Doubles, Doubles]:
    """Ends of the middle 95 % of each column; NaN where no draw has a value, or all have one.

    Where problems are all alike, draws of them are too: that tells nothing of how few they are.
    """
    draws = draws.copy()
    empty = np.isnan(draws).all(0)
    draws[:, empty] = 0
    low, high = np.nanpercentile(draws, (_TAIL, 100 - _TAIL), axis=0)
    empty |= high - low <= _ROUNDING
    low[empty] = high[empty] = np.nan
    return low, high


def resampled_sums(per_problem: Doubles) -> Doubles:
    """Sums over problems drawn with repetition, as many as there are: [1000, k] from [problems, k].

    The draws are the same in every call with as many problems, so that sums belong together.
    """
    problems = len(per_problem)
    rng = np.random.default_rng(0)
    at_once = max(1, _CHUNK // problems)
    parts = []
    for start in range(0, _DRAWS, at_once):
        rows = min(at_once, _DRAWS - start)
        counts = rng.multinomial(problems, np.full(problems, 1 / problems), rows)
        parts.append(counts.astype(np.float64) @ per_problem)
    return np.concatenate(parts)


def _columns(x: Doubles) -> Doubles:
    return x.reshape(len(x), -1)
