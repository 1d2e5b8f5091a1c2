"""How much each position of a sequence weighs in the loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from job.common.errors import InputError
from job.common.schema import RIGHT, Weighting

Weights = NDArray[np.float64]


def position_weights(
    weighting: Weighting,
    balance_labels: bool,
    *,
    positions: NDArray[np.int64] | Weights,
    rewards: NDArray[np.float64],
    problems: NDArray[np.uint64],
) -> Weights:
    """The weight of each position of each sequence of a training set, float64 [n].

    Over the whole set, and so whatever step or rank a sequence comes to, all positions weigh the
    same, or all sequences do, or all problems, whose sequences share their weight. With
    `balance_labels` right and wrong ones are then scaled to weigh alike in sum.

    Args:
        positions: [n], how many each sequence has, or what its targets weigh together.
        rewards: [n]; from 0.5 on a sequence is right.

    Raises:
        InputError: labels are to weigh alike, and all are right, or all wrong.
    """
    weights = np.ones(len(positions))
    if weighting is not Weighting.token:
        weights = np.divide(weights, positions, out=np.zeros(len(positions)), where=positions > 0)
    if weighting is Weighting.problem:
        _, problem, solutions = np.unique(problems, return_inverse=True, return_counts=True)
        weights /= solutions[problem]
    if balance_labels:
        right = rewards >= RIGHT
        if right.all() or not right.any():
            kind = "right" if right.all() else "wrong"
            raise InputError(f"objective.balance_labels: all {len(right)} solutions are {kind}")
        of_right, of_wrong = (float(weights[c] @ positions[c]) for c in (right, ~right))
        weights *= np.where(right, 1 / of_right, 1 / of_wrong) * (of_right + of_wrong) / 2
    return weights
