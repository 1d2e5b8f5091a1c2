"""Ranking solutions of one problem: along the way, and the best of four."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.common.schema import RIGHT
from job.evaluation.bootstrap import ratio, wilson
from job.evaluation.solutions import Problem, Solution

Doubles = NDArray[np.float64]
TENTHS = 10


def pair_accuracy(problems: Sequence[Problem]) -> dict[str, Any]:
    """How often the better of two solutions has the higher value, after each tenth of both.

    Over all pairs of one problem whose rewards differ, equal values counting half: the accuracy of
    Bradley and Terry's model (1952, doi:10.2307/2334029). After k tenths of t tokens, k t / 10
    tokens are read, rounded up.
    """
    won, pairs = zip(*map(_pairs_of, problems), strict=True)
    there = np.array(pairs, np.float64)
    return {
        "pairs": int(there.sum()),
        "accuracy": ratio(np.stack(won), np.repeat(there[:, None], TENTHS, 1)).to_json(),
    }


def _pairs_of(problem: Problem) -> tuple[Doubles, int]:
    values = np.stack([_at_tenths(solution) for solution in problem.solutions])
    better = problem.rewards[:, None] > problem.rewards
    over = values[:, None] > values
    same = values[:, None] == values
    won: Doubles = (over + 0.5 * same)[better].sum(0)
    return won, int(better.sum())


def _at_tenths(solution: Solution) -> Doubles:
    t = len(solution.values)
    read = -(-np.arange(1, TENTHS + 1) * t // TENTHS)  # rounded up
    return np.asarray(solution.values, np.float64)[read - 1]


def best_of_four(problems: Sequence[Problem]) -> dict[str, Any] | None:
    """How often the one right of four solutions has the highest value; ties are drawn by lot.

    As RewardBench 2 counts outside its ties (arXiv 2506.01937): by part, and the mean of its parts.
    A problem is one trial: the interval is Wilson's, which is too wide where many are tied. Other
    problems are left out and counted. None without one of one right solution and three wrong ones.
    """
    parts: dict[str, list[float]] = {}
    sets = [one for problem in problems for one in _sets_of(problem)]
    for one in filter(_one_right_of_four, sets):
        first = one.scores == one.scores.max()
        won = (first & (one.rewards >= RIGHT)).sum() / first.sum()
        parts.setdefault(one.part, []).append(float(won))
    if not parts:
        return None
    shown = {name: _accuracy(np.array(own)) for name, own in parts.items()}
    mean = float(np.mean([np.mean(own) for own in parts.values()]))
    return {"parts": shown, "mean": mean, "left_out": len(sets) - sum(map(len, parts.values()))}


def _sets_of(problem: Problem) -> list[Problem]:
    """The sets to choose from: rows of several solutions each, of which prompts may be equal.

    Where each row has one solution, the problem is one set.
    """
    rows: dict[int, list[Solution]] = {}
    for one in problem.solutions:
        rows.setdefault(one.line, []).append(one)
    if len(rows) == len(problem.solutions):
        return [problem]
    return [replace(problem, solutions=tuple(own)) for own in rows.values()]


def _one_right_of_four(problem: Problem) -> bool:
    right = problem.rewards >= RIGHT
    return len(right) == 4 and int(right.sum()) == 1


def _accuracy(won: Doubles) -> dict[str, Any]:
    value = float(won.mean())
    low, high = wilson(value, len(won))
    return {"problems": len(won), "value": value, "low": low, "high": high}
