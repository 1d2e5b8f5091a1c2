"""Solutions with the values that a critic gave them, and the problems that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Solution:
    """One response of t tokens.

    Attributes:
        problem: the same for solutions of one problem, with the data and without.
        values: [t], after each token.
        reward: in [0, 1]; NaN without a label.
        answer: what it answers; None where that is not known.
        part: the part of the data that it belongs to.
        prompt_value: the value before the first token; NaN where that is not known.
        step_values: the value at the end of each step; empty where steps are not known.
        first_error: the first wrong step, counted from 0; -1 without error, None without label.
        line: where its row stands in the data, which may have several solutions.
    """

    problem: str
    values: Floats
    reward: float
    answer: str | None = None
    part: str = ""
    prompt_value: float = float("nan")
    step_values: tuple[float, ...] = ()
    first_error: int | None = None
    line: int = 0

    @property
    def score(self) -> float:
        """What solutions are ranked by: the value once all is read."""
        return float(self.values[-1])


@dataclass(frozen=True)
class Problem:
    """The labelled solutions of one problem; arrays are [m]."""

    name: str
    part: str
    solutions: tuple[Solution, ...]

    @property
    def scores(self) -> NDArray[np.float64]:
        return np.array([solution.score for solution in self.solutions])

    @property
    def least_values(self) -> NDArray[np.float64]:
        return np.array([float(solution.values.min()) for solution in self.solutions])

    @property
    def mean_values(self) -> NDArray[np.float64]:
        return np.array([float(solution.values.mean()) for solution in self.solutions])

    @property
    def rewards(self) -> NDArray[np.float64]:
        return np.array([solution.reward for solution in self.solutions])

    @property
    def lengths(self) -> NDArray[np.float64]:
        return np.array([float(len(solution.values)) for solution in self.solutions])

    @property
    def answers(self) -> list[str | None]:
        return [solution.answer for solution in self.solutions]


def problems_of(solutions: Sequence[Solution]) -> list[Problem]:
    """The problems of labelled solutions, in the order of their first."""
    found: dict[tuple[str, str], list[Solution]] = {}
    for one in labelled(solutions):
        found.setdefault((one.part, one.problem), []).append(one)
    return [Problem(name, part, tuple(own)) for (part, name), own in found.items()]


def labelled(solutions: Sequence[Solution]) -> Iterator[Solution]:
    return (one for one in solutions if not np.isnan(one.reward))
