"""Evaluations that `job.evaluate` has written: where they lie in a run, and how they are shown."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.common.schema import EMBEDDED
from job.common.state_files import read_json
from job.run.figure import GREY, draw_level, look, panels, png, run_colour
from job.run.html import Html, images, join, section, table, tag

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER, FILE = "evaluations", "evaluation.json"
DATA = "data"  # of the figures: where the data lies
_NONE = "\N{EN DASH}"
_SHOWN = (1, 2, 4, 8, 16, 32, 64)
_NAMES = {
    "best_of_n": "critic",
    "mean_value": "critic, by its mean value",
    "least_value": "critic, by its least value",
    "weighted_majority": "majority weighted by the critic",
    "majority": "majority",
    "shortest": "shortest",
    "length_matched": "as long as the critic's",
    "random": "random",
    "oracle": "oracle",
    "pass": "pass@n",
}
_MEANINGS = {
    "best_of_n": "the solution with the highest last value",
    "mean_value": "the solution whose tokens have the highest mean value",
    "least_value": "the solution whose lowest value is highest: no step looks wrong",
    "weighted_majority": "the answer with the greatest sum of last values",
    "majority": "the answer given most often",
    "shortest": "the solution with the fewest tokens",
    "length_matched": "by length alone, as long as the critic's choices in the other problems",
    "random": "any solution",
    "oracle": "the solution with the highest reward",
    "pass": "chance that one of n is right",
}


@dataclass(frozen=True)
class Evaluation:
    """An evaluation by its name, and its figures as in its JSON."""

    name: str
    figures: Mapping[str, Any]


def data_place(data: str) -> str:
    """By what evaluations on data of equal names are told apart."""
    return data if data == EMBEDDED else os.path.abspath(data)  # noqa: PTH100 - a glob is no path


def evaluation_folder(run: Path, data: str) -> Path:
    """Where a run keeps its evaluation on some data; of several names the last part counts.

    Where data of another place has that folder, the name of the folder above counts too, and so on.
    """
    place = data_place(data)
    parts = Path(place).parts
    folders = [run / FOLDER / _plain(parts[k:]) for k in reversed(range(len(parts)))]
    free = (folder for folder in folders if _place_of(folder) in (None, place))
    return next(free, folders[-1])


def _plain(parts: Sequence[str]) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "/".join(parts)).strip("-.") or "data"


def _place_of(folder: Path) -> Any:
    """The place of the data whose evaluation is in a folder; None where nothing says so."""
    return (read_json(folder / FILE, dict) or {}).get(DATA)


def evaluations(run: Path) -> list[Evaluation]:
    """Those of a run by name; one that cannot be read counts as none."""
    files = sorted(run.glob(f"{FOLDER}/*/{FILE}"))
    read = ((file.parent.name, read_json(file, dict)) for file in files)
    return [Evaluation(name, figures) for name, figures in read if figures]


def evaluation_section(evaluation: Evaluation) -> Html:
    """Curves and tables of an evaluation."""
    figures = evaluation.figures
    size = f"{figures['solutions']:,} solutions of {figures['problems']:,} problems"
    if "solutions_per_problem" in figures:
        fewest, most = figures["solutions_per_problem"]
        each = f"{fewest} to {most}" if fewest < most else str(most)
        size += f", {each} labelled solutions each"
    shown = [build(figures[key]) for key, build in _TABLES.items() if key in figures]
    return section(
        f"Evaluation: {evaluation.name}",
        tag("p", f"{size}; intervals of 95 % by resampling problems"),
        images(draw_evaluation(figures)),
        *shown,
    )


def shown_rules(rules: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The rules in the order of what they know, pass@n only where it differs from the oracle."""
    both = zip(rules["pass"]["value"], rules["oracle"]["value"], strict=True)
    same = all(math.isclose(a, b, abs_tol=1e-9) for a, b in both)
    shown = [rule for rule in _NAMES if rule in rules and not (same and rule == "pass")]
    return [(rule, rules[rule]) for rule in shown]


# --- tables ------------------------------------------------------------------------------------


def _choosing(found: Mapping[str, Any]) -> Html:
    shown = [n - 1 for n in _SHOWN if n in found["n"]]
    rules = found["rules"]
    head = ["reward of the solution chosen", *(f"n={k + 1}" for k in shown), "meaning"]
    rows = [
        [_NAMES[rule], *(_with_ends(curve, k) for k in shown), _MEANINGS[rule]]
        for rule, curve in shown_rules(rules)
    ]
    for key, name in (("problems", "problems"), ("left_out", "left out, with fewer solutions")):
        rows.append([name, *(f"{found[key][k]:,}" for k in shown), ""])
    needed = [
        [_NAMES[rule], *(_NONE if n is None else n for n in found["needed"][rule])]
        for rule, _ in shown_rules(rules)
    ]
    heads = ["solutions needed for an error of", *(f"{error:.0%}" for error in found["errors"])]
    return join([table(head, rows, "explained"), table(heads, needed)])


def _with_ends(curve: Mapping[str, Any], k: int | None = None) -> Html:
    value, low, high = (curve[x] if k is None else curve[x][k] for x in ("value", "low", "high"))
    ends = _NONE if low is None or high is None else f"{low:.3f} to {high:.3f}"
    return tag("span", _NONE if value is None else f"{value:.3f}", title=ends)


def _steps(found: Mapping[str, Any]) -> Html:
    head = ["first wrong step", "solutions", "error", "correct", "F1", "95 %", "precision"]
    rows: list[list[object]] = []
    for rule in ("drop", "level"):
        for name, part in found[rule]["parts"].items():
            f1 = part["f1"]
            ends = _NONE if f1["low"] is None else f"{f1['low']:.3f} to {f1['high']:.3f}"
            keys = ("accuracy_error", "accuracy_correct", "f1")
            cells = [_with_ends(part[key]) for key in keys]
            rows.append(
                [f"{rule} {name}", part["solutions"], *cells, ends, _with_ends(part["precision"])]
            )
        mean = found[rule]["mean_f1"]
        rows.append([f"{rule}, mean of parts", "", "", "", _number(mean), "", ""])
    tuned = found["tuned_on"] or "these very solutions"
    note = f"Thresholds have the best F1 on {tuned}; figures are ProcessBench's."
    return join([table(head, rows), tag("p", note)])


def _best_of_four(found: Mapping[str, Any]) -> Html:
    rows: list[list[object]] = [
        [name or "all", part["problems"], _with_ends(part)] for name, part in found["parts"].items()
    ]
    rows.append(["mean of parts", "", _number(found["mean"])])
    rows.append(["left out, not one right of four", found.get("left_out", _NONE), ""])
    return table(["the one right of four", "problems", "accuracy"], rows)


def _calibration(found: Mapping[str, Any]) -> Html:
    keys = ("ece", "brier", "log_loss")
    temperature = f"after temperature {found['temperature']:.3f}"
    rows = [
        [name, *(_number(found[side][key]) for key in keys)]
        for side, name in (("before", "as it is"), ("after", temperature))
    ]
    return table(["last value as a chance", "ECE", "Brier", "log loss"], rows)


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


_TABLES: dict[str, Callable[[Mapping[str, Any]], Html]] = {
    "choosing": _choosing,
    "best_of_four": _best_of_four,
    "steps": _steps,
    "calibration": _calibration,
}


# --- curves ------------------------------------------------------------------------------------


def draw_evaluation(figures: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG pictures of the curves, by name."""
    with look():
        return {
            name: png(draw(figures[key])) for name, (key, draw) in _PLOTS.items() if key in figures
        }


def _draw_choosing(found: Mapping[str, Any]) -> Figure:
    """Reward by n for each rule, on axes of doublings."""
    figure, (axes,) = panels("Reward of the solution chosen out of n")
    for place, (rule, curve) in enumerate(shown_rules(found["rules"])):
        line = {"color": _colour(rule, place), "linestyle": _dash(rule), "label": _NAMES[rule]}
        _draw_band(axes, found["n"], curve, line)
    axes.set_xscale("log", base=2)
    axes.set_xticks([n for n in _SHOWN if n in found["n"]])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.set(xlabel="n", ylabel="mean reward", xlim=(1, max(found["n"][-1], 2)))
    return figure


def _colour(rule: str, place: int) -> str:
    own = {"length_matched": GREY, "random": GREY, "oracle": "#000000", "pass": "#000000"}
    return own.get(rule) or run_colour(place)


def _dash(rule: str) -> str:
    return {"random": "--", "oracle": ":", "pass": "-."}.get(rule, "-")


def _draw_band(axes: Axes, x: Sequence[float], curve: Mapping[str, Any], line: Any) -> None:
    axes.plot(x, curve["value"], **line)
    low, high = ([math.nan if y is None else y for y in curve[end]] for end in ("low", "high"))
    axes.fill_between(x, low, high, color=line["color"], alpha=0.12, lw=0)


def _draw_pairs(found: Mapping[str, Any]) -> Figure:
    figure, (axes,) = panels(f"Accuracy of the last value read, on {found['pairs']:,} pairs")
    curve = found["accuracy"]
    tenths = [(k + 1) / len(curve["value"]) for k in range(len(curve["value"]))]
    line = {"color": run_colour(0), "marker": "o", "label": "higher value for the better one"}
    _draw_band(axes, tenths, curve, line)
    draw_level(axes, 0.5, "chance", "--")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set(xlabel="share of both solutions that is read", ylabel="accuracy", xlim=(0, 1.02))
    return figure


def _draw_calibration(found: Mapping[str, Any]) -> Figure:
    figure, (axes,) = panels("Last value as a chance: observed reward by predicted value")
    for place, (side, name) in enumerate((("before", "as it is"), ("after", "after temperature"))):
        bins = found[side]["bins"]
        least = max(1, sum(bins["count"]) // 1000)  # of fewer a mean says nothing
        both = zip(bins["predicted"], bins["observed"], bins["count"], strict=True)
        points = [(x, y) for x, y, n in both if n >= least]
        style: dict[str, Any] = {"color": run_colour(place), "marker": "os"[place], "label": name}
        axes.plot([x for x, _ in points], [y for _, y in points], **style)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, label="calibrated")
    axes.set(xlabel="predicted", ylabel="observed", xlim=(0, 1), ylim=(0, 1))
    return figure


_PLOTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Figure]]] = {
    "best_of_n": ("choosing", _draw_choosing),
    "pair_accuracy": ("pairs", _draw_pairs),
    "calibration": ("calibration", _draw_calibration),
}
