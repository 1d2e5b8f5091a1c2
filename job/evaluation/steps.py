"""The first wrong step of a solution, told from its values at the ends of the steps.

Two rules with a threshold: the value falls by so much at the step, or lies below so much after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.evaluation.bootstrap import interval, resampled_sums
from job.evaluation.solutions import Solution

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
NAMES = ("accuracy_error", "accuracy_correct", "f1", "precision", "recall")


def drops(solution: Solution) -> Doubles:
    """By how much the value falls at each step: [steps].

    The first step falls from the value of the prompt, or where that is not known from that after
    the first token.
    """
    first = solution.prompt_value
    before = float(solution.values[0]) if np.isnan(first) else first
    return -np.diff(np.array([before, *solution.step_values], np.float64))


def shortfalls(solution: Solution) -> Doubles:
    """By how much the value after each step is below 1: [steps]."""
    return 1 - np.array(solution.step_values, np.float64)


RULES: dict[str, Callable[[Solution], Doubles]] = {"drop": drops, "level": shortfalls}


def first_errors(solutions: Sequence[Solution], tuned_on: str | None) -> dict[str, Any] | None:
    """How well each rule finds the first wrong step, by part, with ProcessBench's figures.

    The threshold is the best one for F1 on the part `tuned_on`, or on the first part, and is used
    on all. None where no solution has steps and a label for them.
    """
    parts = parts_with_steps(solutions)
    if not parts:
        return None
    tuning = next(iter(parts)) if tuned_on is None else tuned_on
    return {"tuned_on": tuning} | {
        name: _rule(score, parts, tuning) for name, score in RULES.items()
    }


def parts_with_steps(solutions: Sequence[Solution]) -> dict[str, list[Solution]]:
    """The solutions that have steps and a label for them, by part, in the order of their first."""
    parts: dict[str, list[Solution]] = {}
    for one in solutions:
        if one.step_values and one.first_error is not None:
            parts.setdefault(one.part, []).append(one)
    return parts


def _rule(
    score: Callable[[Solution], Doubles], parts: dict[str, list[Solution]], tuning: str
) -> dict[str, Any]:
    cut = threshold([score(one) for one in parts[tuning]], _labels(parts[tuning]))
    shown = {name: _measured(score, own, cut) for name, own in parts.items()}
    f1 = [part["f1"]["value"] for part in shown.values() if part["f1"]["value"] is not None]
    mean = float(np.mean(f1)) if f1 else None
    return {"threshold": cut, "parts": shown, "mean_f1": mean}


def _measured(
    score: Callable[[Solution], Doubles], solutions: Sequence[Solution], cut: float
) -> dict[str, Any]:
    predicted = predict([score(one) for one in solutions], np.array([cut]))[:, 0]
    counts = counted(predicted, _labels(solutions))
    figures = figures_of(_by_problem(solutions, counts).sum(0))
    draws = figures_of(resampled_sums(_by_problem(solutions, counts)))
    low, high = interval(np.stack([draws[name] for name in NAMES], axis=1))
    return {"solutions": len(solutions)} | {
        name: {"value": _plain(figures[name]), "low": _plain(low[k]), "high": _plain(high[k])}
        for k, name in enumerate(NAMES)
    }


def _plain(x: Any) -> float | None:
    return None if np.isnan(x) else float(x)


def _by_problem(solutions: Sequence[Solution], counts: Doubles) -> Doubles:
    """Counts of solutions as sums over those of one problem: [problems, 5]."""
    _, group = np.unique([one.problem for one in solutions], return_inverse=True)
    sums = np.zeros((int(group.max()) + 1, counts.shape[1]))
    np.add.at(sums, group, counts)
    return sums


def _labels(solutions: Sequence[Solution]) -> Integers:
    return np.array([one.first_error for one in solutions], np.int64)


def predict(scores: Sequence[Doubles], cuts: Doubles) -> Integers:
    """The first step whose score reaches each threshold, -1 for none: [solutions, thresholds]."""
    found = np.empty((len(scores), len(cuts)), np.int64)
    for row, own in zip(found, scores, strict=True):
        row[:] = np.searchsorted(np.maximum.accumulate(own), cuts)
        row[row == len(own)] = -1
    return found


def counted(predicted: Integers, labels: Integers) -> Doubles:
    """Of each solution: wrong, found in the right place, correct, passed as such, flagged.

    predicted [solutions, ...], labels [solutions, ...] give [solutions, ..., 5].
    """
    labels = np.broadcast_to(labels, predicted.shape)
    wrong, hit, flagged = labels >= 0, predicted == labels, predicted >= 0
    return np.stack([wrong, wrong & hit, ~wrong, ~wrong & hit, flagged], -1).astype(np.float64)


def figures_of(counts: Doubles) -> dict[str, Any]:
    """ProcessBench's figures (arXiv 2412.06559) from counts [..., 5].

    The accuracies are shares of the wrong solutions whose first error is found and of the correct
    ones that are passed; F1 is their harmonic mean. Precision is the share of flagged solutions
    whose first error is where it is said to be, and recall another name for the first accuracy.
    """
    wrong, found, correct, passed, flagged = np.moveaxis(counts, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        error, right = found / wrong, passed / correct
        f1 = np.where(error + right == 0, 0.0, 2 * error * right / (error + right))
        return dict(zip(NAMES, (error, right, f1, found / flagged, error), strict=True))


def threshold(scores: Sequence[Doubles], labels: Integers) -> float:
    """The threshold of the best F1; of several, the one in the middle between two scores."""
    highest = [np.maximum.accumulate(own) for own in scores]
    reached = np.unique(np.concatenate(highest))
    between = (reached[:-1] + reached[1:]) / 2
    cuts = np.concatenate([[reached[0]], between, [reached[-1] + 1]])
    figures = figures_of(_counts_at(cuts, highest, labels))
    return float(cuts[int(np.nanargmax(_f1_or_less(figures)))])


def _counts_at(cuts: Doubles, highest: Sequence[Doubles], labels: Integers) -> Doubles:
    """Summed `counted` of each threshold, [cuts, 5], in the time of sorting.

    A step is the first to reach what lies above the highest score before it and not above its own.
    """
    last = np.array([own[-1] for own in highest])
    wrong = labels >= 0
    spans = [_span(own, label) for own, label in zip(highest, labels, strict=True) if label >= 0]
    before, own = np.array(spans, np.float64).reshape(-1, 2).T
    found = _below(before, cuts) - _below(own, cuts)
    passed, flagged = _below(last[~wrong], cuts), len(last) - _below(last, cuts)
    sums = np.broadcast_arrays(wrong.sum(), found, (~wrong).sum(), passed, flagged)
    return np.stack(sums, axis=-1).astype(np.float64)


def _span(highest: Doubles, step: int) -> tuple[float, float]:
    """The thresholds of which a step is the first to reach each, without the lower end."""
    if step >= len(highest):
        return 0.0, 0.0
    return float(highest[step - 1]) if step else -np.inf, float(highest[step])


def _below(scores: Doubles, cuts: Doubles) -> Integers:
    return np.searchsorted(np.sort(scores), cuts)


def _f1_or_less(figures: dict[str, Any]) -> Doubles:
    """F1, or where one class is missing the accuracy of the other."""
    error, right = figures["accuracy_error"], figures["accuracy_correct"]
    f1: Doubles = np.where(np.isnan(error), right, np.where(np.isnan(right), error, figures["f1"]))
    return f1
