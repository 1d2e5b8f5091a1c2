"""Everything that is told of a critic's values on a set of solutions, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from job.evaluation.calibration import calibration, chances
from job.evaluation.choosing import choosing
from job.evaluation.ranking import TENTHS, best_of_four, pair_accuracy
from job.evaluation.solutions import Solution, problems_of
from job.evaluation.steps import NAMES, RULES, first_errors
from job.run.evaluations import shown_rules

ERRORS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
_SHOWN = (1, 2, 4, 8, 16, 32, 64)  # of the curves, in the table
_NAMES = {"best_of_n": "critic", "weighted_majority": "weighted vote", "pass": "pass@n"}
Summary = dict[str, Any]


def summarise(
    solutions: Sequence[Solution],
    *,
    errors: Sequence[float] = ERRORS,
    tuned_on: str | None = None,
    logits: bool = False,
) -> Summary:
    """All figures of a set of solutions; those that its labels do not give are left out.

    Args:
        tuned_on: the part whose first errors choose the threshold; default: the first.
        logits: the values are those of a critic that only ranks.
    """
    problems = problems_of(solutions)
    found: Summary = {"solutions": len(solutions), "problems": len(problems)}
    found["labelled"] = sum(len(p.solutions) for p in problems)
    if problems:
        found["solutions_per_problem"] = [
            fold(len(p.solutions) for p in problems) for fold in (min, max)
        ]
        found["choosing"] = choosing(problems, errors, lambda s: chances(s, logits=logits))
        found["choosing"]["errors"] = list(errors)
        pairs = pair_accuracy(problems)
        found["pairs"] = pairs if pairs["pairs"] else None
        found["best_of_four"] = best_of_four(problems)
        found["calibration"] = calibration(solutions, logits=logits)
    found["steps"] = first_errors(solutions, tuned_on)
    return {name: figure for name, figure in found.items() if figure is not None}


def tables(summary: Summary) -> Iterator[Table]:
    """The figures in 80 columns."""
    if "choosing" in summary:
        yield _choosing(summary["choosing"])
        yield _needed(summary["choosing"])
    if "pairs" in summary:
        yield _pairs(summary["pairs"])
    if "best_of_four" in summary:
        yield _best_of_four(summary["best_of_four"])
    if "steps" in summary:
        yield _steps(summary["steps"])
    if "calibration" in summary:
        yield _calibration(summary["calibration"])


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    return table


def _choosing(found: Summary) -> Table:
    shown = [n - 1 for n in _SHOWN if n in found["n"]]
    table = _table(
        "Reward of the solution chosen out of n",
        "rule",
        *(f"n={k + 1}" for k in shown),
        "95 %",
        caption="expected over all choices of n; 95 % at the last of them, over problems",
    )
    for rule, curve in shown_rules(found["rules"]):
        ends = _ends(curve["low"][shown[-1]], curve["high"][shown[-1]])
        table.add_row(_name(rule), *(_cell(curve["value"][k]) for k in shown), ends)
    for name in ("problems", "left_out"):
        table.add_row(_name(name), *(f"{found[name][k]}" for k in shown), "")
    return table


def _needed(found: Summary) -> Table:
    heads = [f"{error:.0%}" if error >= 0.01 else f"{error:g}" for error in found["errors"]]
    table = _table("Solutions needed for an error of", "rule", *heads)
    for rule, _ in shown_rules(found["rules"]):
        needed = found["needed"][rule]
        table.add_row(_name(rule), *("-" if n is None else str(n) for n in needed))
    return table


def _pairs(found: Summary) -> Table:
    title = f"Accuracy of the last value read, on {found['pairs']:,} pairs"
    table = _table(title, "read", "accuracy", "95 %", caption="of both solutions is read so much")
    accuracy = found["accuracy"]
    ends = zip(accuracy["value"], accuracy["low"], accuracy["high"], strict=True)
    for k, (value, low, high) in enumerate(ends, 1):
        table.add_row(f"{k / TENTHS:.0%}", _cell(value), _ends(low, high))
    return table


def _best_of_four(found: Summary) -> Table:
    table = _table("The one right of four", "part", "problems", "accuracy", "95 %")
    for name, part in found["parts"].items():
        ends = _ends(part["low"], part["high"])
        table.add_row(name or "all", str(part["problems"]), _cell(part["value"]), ends)
    table.add_row("mean of parts", "", _cell(found["mean"]), "")
    table.add_row("left out", str(found["left_out"]), "", "")
    return table


def _steps(found: Summary) -> Table:
    heads = ("error", "correct", "F1", "95 %", "prec.", "recall")
    table = _table(
        "First wrong step",
        "rule, part",
        "n",
        *heads,
        caption=f"threshold with the best F1 on {found['tuned_on'] or 'these very solutions'}",
    )
    for rule in RULES:
        for name, part in found[rule]["parts"].items():
            error, correct, f1, precision, recall = (_cell(part[key]["value"]) for key in NAMES)
            ends = _ends(part["f1"]["low"], part["f1"]["high"])
            cells = (error, correct, f1, ends, precision, recall)
            table.add_row(f"{rule} {name}", str(part["solutions"]), *cells)
        table.add_row(f"{rule}, mean", "", "", "", _cell(found[rule]["mean_f1"]), "", "", "")
    return table


def _calibration(found: Summary) -> Table:
    title = f"Last value as a chance; temperature {found['temperature']:.3f}"
    table = _table(title, "", "ECE", "Brier", "log loss")
    for name in ("before", "after"):
        table.add_row(name, *(_cell(found[name][key]) for key in ("ece", "brier", "log_loss")))
    return table


def _name(rule: str) -> str:
    return _NAMES.get(rule, rule.replace("_", " "))


def _ends(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{_cell(low)}-{_cell(high)}"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
