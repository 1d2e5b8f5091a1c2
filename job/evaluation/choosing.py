"""Choosing one of n solutions: by the critic, by votes, and by rules that know less or all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.common.progress import progress
from job.common.schema import RIGHT
from job.common.signals import stop_if_asked
from job.evaluation import subsets
from job.evaluation.bootstrap import Estimate, ratio
from job.evaluation.length import length_matched
from job.evaluation.solutions import Problem

Doubles = NDArray[np.float64]
MOST = 64  # solutions of a problem that are looked at together
CRITIC, ORACLE = "best_of_n", "oracle"
_VOTES = ("majority", "weighted_majority")


def choosing(
    problems: Sequence[Problem],
    errors: Sequence[float],
    weight: Callable[[Doubles], Doubles],
) -> dict[str, Any]:
    """The curves of every rule, how far the critic leads, and how many solutions it needs.

    A point of a curve is a mean over the problems with n solutions or more; the others are left out
    and counted.

    Args:
        errors: for each, the least n at which a rule's reward is 1 minus that or more.
        weight: makes votes of scores.
    """
    with_answers = all(any(a is not None for a in p.answers) for p in problems)
    chosen = [subsets.best_of(problem.scores, MOST) for problem in problems]
    by_length = length_matched(chosen, [problem.lengths for problem in problems])
    per_problem = []
    with progress("choosing", len(problems)) as advance:
        for number, problem in enumerate(problems):
            stop_if_asked()
            curves = _rewards(problem, number, weight, with_answers)
            curves[CRITIC] = chosen[number] @ problem.rewards
            curves["length_matched"] = by_length[number] @ problem.rewards
            per_problem.append(curves)
            advance(number + 1, "problems")
    most = max(curves[CRITIC].size for curves in per_problem)
    stacked = {
        rule: np.stack([_padded(curves[rule], most) for curves in per_problem])
        for rule in per_problem[0]
    }
    there = ~np.isnan(stacked[CRITIC])
    estimates = {rule: _mean(curve) for rule, curve in stacked.items()}
    leads = {rule: _mean(stacked[CRITIC] - c) for rule, c in stacked.items() if rule != CRITIC}
    return {
        "n": list(range(1, most + 1)),
        "problems": there.sum(0).tolist(),
        "left_out": (~there).sum(0).tolist(),
        "rules": {rule: estimate.to_json() for rule, estimate in estimates.items()},
        "lead": {rule: estimate.to_json() for rule, estimate in leads.items()},
        "needed": needed({rule: e.value for rule, e in estimates.items()}, errors),
    }


def _rewards(
    problem: Problem, seed: int, weight: Callable[[Doubles], Doubles], with_answers: bool
) -> dict[str, Doubles]:
    """The expected reward by n of each rule that looks at one problem only: [N] each."""
    scores, rewards, lengths = problem.scores, problem.rewards, problem.lengths
    curves: dict[str, Doubles] = {}
    if with_answers:
        votes = subsets.majority(problem.answers, rewards, MOST)
        weighted = subsets.weighted_majority(problem.answers, weight(scores), rewards, MOST, seed)
        curves |= dict(zip(_VOTES, (votes, weighted), strict=True))
    return curves | {
        "least_value": subsets.best_of(problem.least_values, MOST) @ rewards,
        "mean_value": subsets.best_of(problem.mean_values, MOST) @ rewards,
        "shortest": subsets.best_of(-lengths, MOST) @ rewards,
        "random": np.full(min(MOST, len(rewards)), rewards.mean()),
        ORACLE: subsets.best_of(rewards, MOST) @ rewards,
        "pass": subsets.pass_at(rewards >= RIGHT, MOST),
    }


def _padded(curve: Doubles, length: int) -> Doubles:
    return np.pad(curve, (0, length - curve.size), constant_values=np.nan)


def _mean(curves: Doubles) -> Estimate:
    """Mean over the problems that have a value: [N] from [problems, N]."""
    there = ~np.isnan(curves)
    return ratio(np.where(there, curves, 0.0), there.astype(np.float64))


def needed(curves: Mapping[str, Doubles], errors: Sequence[float]) -> dict[str, list[int | None]]:
    """By rule: the least n from which on its reward is 1 - error, for each error; None for none."""
    return {rule: [_least(curve, 1 - error) for error in errors] for rule, curve in curves.items()}


def _least(curve: Doubles, reward: float) -> int | None:
    reached = np.flatnonzero(curve >= reward - 1e-12)
    return int(reached[0]) + 1 if reached.size else None
