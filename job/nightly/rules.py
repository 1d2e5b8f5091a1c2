"""Rules for one figure of one night: functions on numbers alone.

Each returns what is wrong as a text, or None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from job.nightly.figures import memory_parted

FALSE_DISCOVERIES_OF_QUALITY = 0.005

# What each rule names as its rate of false alarms (docs/nightly.md has where it comes from).
EXACT = "exact: false alarms only where the same code gives other bits on the same kind of machine"
MEMORY = (
    "within 3 % of the prediction, and exact against the baseline (but for trainings that are not "
    "deterministic): as `exact`"
)
SAME = "exact against another entry of this night: as `exact`"
HOLDS = (
    "what the command itself found, by bounds of its own: false alarms only where the same code "
    "and node are found otherwise"
)
FLOOR = "hard floor: false alarms never, while the figure is above it"
QUALITY = (
    "t-test of the seeds' mean against the accepted mean and spread, false-discovery rate 0.005 "
    "over a night's noisy qualities: 0.5 false alarms a quarter"
)
SERIES = (
    "last 5 and last 10 nights against up to 100 before (Mann and Whitney, t-test, at least "
    "3.4 %, false-discovery rate 0.1 over a night's series): about one false alarm a quarter at "
    "most, for all figures together"
)


def different(value: Any, accepted: Any) -> str | None:
    """How a figure that must be the same differs: a number, a text, or one number a step."""
    if isinstance(value, list) and isinstance(accepted, list):
        return _different_steps(value, accepted)
    if value == accepted:
        return None
    if is_number(value) and is_number(accepted):
        return f"{value!r} instead of {accepted!r}{relative(value, accepted)}"
    return f"{str(value)[:12]} instead of {str(accepted)[:12]}"


def _different_steps(values: Sequence[float], accepted: Sequence[float]) -> str | None:
    if len(values) != len(accepted):
        return f"{len(values)} steps instead of {len(accepted)}"
    steps = [k for k, (a, b) in enumerate(zip(values, accepted, strict=True), 1) if a != b]
    if not steps:
        return None
    first = steps[0]
    a, b = values[first - 1], accepted[first - 1]
    others = f"; {len(steps)} of {len(values)} steps differ" if len(steps) > 1 else ""
    return f"step {first}: {a!r} instead of {b!r}{relative(a, b)}{others}"


def relative(value: float, before: float) -> str:
    """By how much, as ` (+1.2 %)`; empty where it cannot be said."""
    if not before or not math.isfinite(value / before):
        return ""
    share = 100 * (value / before - 1)
    return f" ({share:+.2g} %)" if abs(share) < 1 else f" ({share:+.1f} %)"


def parted(predicted: float, measured: float) -> str | None:
    """Whether memory is not what was predicted, on a GPU; bytes."""
    if not memory_parted(predicted, measured):
        return None
    return f"{measured / 1e9:.3f} GB instead of {predicted / 1e9:.3f} GB as predicted" + relative(
        measured, predicted
    )


def beyond_floor(mean: float, floor: float, better: int) -> str | None:
    if better * (mean - floor) >= 0:
        return None
    return f"{mean:.4g}, {'below' if better > 0 else 'above'} the hard floor of {floor:g}"


def worse_p(
    values: Sequence[float], mean: float, count: int, spread: float, of_spread: int, better: int
) -> float:
    """The probability that seeds with the accepted mean and spread do as badly by chance, or lie as
    far away where neither side is the better one (`better` is 0).

    The mean is of `count` values and the spread of `of_spread`, so that the mean of k others is
    distributed as t.
    """
    away = mean - float(np.mean(values))
    lower = better * away if better else abs(away)
    error = spread * math.sqrt(1 / len(values) + 1 / count)
    if error == 0:
        return 0.0 if lower > 0 else 1.0
    return float(stats.t.sf(lower / error, of_spread - 1)) * (1 if better else 2)


def worse(probabilities: Mapping[str, float]) -> set[str]:
    """Which noisy qualities of a night are worse, when all are looked at together."""
    if not probabilities:
        return set()
    p: NDArray[np.float64] = np.array([*probabilities.values()])
    adjusted = stats.false_discovery_control(p)
    found = zip(probabilities, adjusted, strict=True)
    return {name for name, one in found if one <= FALSE_DISCOVERIES_OF_QUALITY}


def spreads(values: Sequence[float], mean: float, spread: float) -> str:
    """Where the seeds' mean lies, for people."""
    now = float(np.mean(values))
    away = f", {abs(now - mean) / spread:.1f} spreads away" if spread else ""
    return f"{now:.4g} instead of {mean:.4g}{relative(now, mean)}{away}"


def unjudgeable(value: Any) -> str | None:
    """Why a figure cannot be held against anything: it is no number, or has some that is none."""
    several = value if isinstance(value, list) else [value]
    bad = [one for one in several if one is None or (is_number(one) and not math.isfinite(one))]
    return f"it is {bad[0]}, and no number" if bad else None


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
