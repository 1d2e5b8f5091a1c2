"""How far values are from chances, as they are and after a temperature."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.evaluation.solutions import Solution, labelled

Doubles = NDArray[np.float64]
_EDGE = 1e-4  # values are held so far from 0 and 1, where a logit has no end
_BINS = 15
_LOG_RANGE = (-5.0, 5.0)  # of the temperature's logarithm


def chances(scores: Doubles, *, logits: bool) -> Doubles:
    """Scores as chances: of a critic that only ranks by the sigmoid, of others as they are."""
    if logits:
        return 1 / (1 + np.exp(-scores))
    return np.clip(scores, 0, 1)


def calibration(solutions: Sequence[Solution], *, logits: bool) -> dict[str, Any] | None:
    """Errors of the last value as a chance of being right, before and after a temperature.

    The temperature (Guo et al. 2017, arXiv 1706.04599) that divides the logits is fitted by its
    likelihood on one half of the problems and used on the other, and the other way round; the one
    reported is fitted on all. None without solutions of different reward.
    """
    own = list(labelled(solutions))
    rewards = np.array([one.reward for one in own])
    if not len(own) or np.ptp(rewards) == 0:
        return None
    before = chances(np.array([one.score for one in own]), logits=logits)
    x = _logits(before)
    half = np.array([zlib.crc32(one.problem.encode()) % 2 == 1 for one in own])
    after = before.copy()
    for side in (half, ~half):
        if side.any() and (~side).any():
            after[side] = _sigmoid(x[side] / temperature(x[~side], rewards[~side]))
    return {
        "solutions": len(own),
        "temperature": temperature(x, rewards),
        "before": errors(before, rewards),
        "after": errors(after, rewards),
    }


def temperature(logits: Doubles, rewards: Doubles) -> float:
    """The temperature of the greatest likelihood, between e^-5 and e^5."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return _log_loss(logits / np.exp(log_temperature), rewards)

    found = minimize_scalar(loss, bounds=_LOG_RANGE, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def errors(predicted: Doubles, rewards: Doubles) -> dict[str, Any]:
    """Expected calibration error (15 equal bins), Brier's score, log loss, and the bins."""
    bins = np.minimum(predicted * _BINS, _BINS - 1).astype(np.int64)
    count = np.bincount(bins, minlength=_BINS)
    sums = [np.bincount(bins, x, _BINS) for x in (predicted, rewards)]
    means = [[float(s / c) if c else None for s, c in zip(x, count, strict=True)] for x in sums]
    return {
        "ece": float(np.abs(sums[0] - sums[1]).sum() / len(predicted)),
        "brier": float(np.square(predicted - rewards).mean()),
        "log_loss": _log_loss(_logits(predicted), rewards),
        "bins": {"predicted": means[0], "observed": means[1], "count": count.tolist()},
    }


def _log_loss(logits: Doubles, rewards: Doubles) -> float:
    return float((np.logaddexp(0, logits) - rewards * logits).mean())


def _sigmoid(x: Doubles) -> Doubles:
    return np.asarray(1 / (1 + np.exp(-x)), np.float64)


def _logits(p: Doubles) -> Doubles:
    held = np.clip(p, _EDGE, 1 - _EDGE)
    return np.asarray(np.log(held / (1 - held)), np.float64)
