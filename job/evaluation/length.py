"""A choice by length alone, as long as the critic's choices are: what length explains of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from job.evaluation.subsets import Doubles

TENTHS = 10


def tenth_of(lengths: Doubles) -> NDArray[np.int64]:
    """In which tenth of a problem's solutions each lies by length: [m], equal lengths together."""
    _, group, size = np.unique(lengths, return_inverse=True, return_counts=True)
    middle = np.cumsum(size) - size / 2
    return np.asarray(middle[group] / len(lengths) * TENTHS, np.int64)


def length_matched(chosen: Sequence[Doubles], lengths: Sequence[Doubles]) -> list[Doubles]:
    """Chances of each problem's solutions to be chosen for their length: [N, m] each.

    A tenth is as likely as the critic chooses in it in all other problems with n solutions, and
    within a tenth all solutions are alike. So no problem's own rewards have a part in it; where
    lengths do not differ, or no other problem has n solutions, it is random choice.

    Args:
        chosen: the critic's chances, [N, m] of each problem.
        lengths: [m] of each.
    """
    tenths = [np.eye(TENTHS)[tenth_of(own)] for own in lengths]
    taken = [own @ tenth for own, tenth in zip(chosen, tenths, strict=True)]
    total = np.zeros((max(map(len, chosen)), TENTHS))
    for own in taken:
        total[: len(own)] += own
    return [
        _alike(total[: len(own)] - own, tenth) for own, tenth in zip(taken, tenths, strict=True)
    ]


def _alike(others: Doubles, tenth: Doubles) -> Doubles:
    """Chances of solutions from weights of tenths, of which not every one has a solution."""
    size = tenth.sum(0)
    weights = (np.maximum(others, 0) / np.maximum(size, 1)) @ tenth.T
    sums = weights.sum(1, keepdims=True)
    known = sums > 1e-9  # less is rounding
    uniform = np.full_like(weights, 1 / tenth.shape[0])
    chances: Doubles = np.where(known, weights / np.where(known, sums, 1), uniform)
    return chances
