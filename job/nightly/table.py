"""Every figure of the nightly: what it means, and how it is judged."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

_SHORT = 10  # signs of a text


class Rule(enum.Enum):
    """How a figure is judged."""

    EXACT = "the same each night"
    QUALITY = "exact for one seed; by its spread over three or more"
    MEMORY = "within 3 % of the prediction, and exact where all is, on a GPU; else not judged"
    SERIES = "over nights"
    HOLDS = "no problems"
    SHOWN = "not judged"


@dataclass(frozen=True)
class Figure:
    """One figure: what it means, and which way is better (1: more, -1: less, 0: neither)."""

    rule: Rule
    better: int
    unit: str
    meaning: str


FIGURES: dict[str, Figure] = {
    "loss": Figure(Rule.EXACT, 0, "", "training loss of each step"),
    "parameters": Figure(Rule.EXACT, 0, "", "checksum of the trained parameters"),
    "mse": Figure(Rule.QUALITY, -1, "", "mean squared error on validation"),
    "r2": Figure(Rule.QUALITY, 1, "", "explained share of the variance"),
    "std_prediction": Figure(Rule.QUALITY, 0, "", "spread of the predictions"),
    "pairwise_accuracy": Figure(Rule.QUALITY, 1, "", "pairs of answers ranked rightly"),
    "ece": Figure(Rule.QUALITY, -1, "", "expected calibration error"),
    "achievable_share": Figure(Rule.QUALITY, 1, "", "share of the achievable variance"),
    "memory_predicted": Figure(Rule.EXACT, -1, "B", "peak of a rank, by the closed form"),
    "memory_measured": Figure(Rule.MEMORY, -1, "B", "peak of the fullest rank"),
    "memory_validation": Figure(Rule.HOLDS, 0, "", "prediction against measurement, by N"),
    "speed": Figure(Rule.SERIES, 1, "tokens/GFLOP", "tokens by operations of matrix products"),
    "startup_seconds": Figure(Rule.SERIES, -1, "s", "from its start to the first step"),
    "save_seconds": Figure(Rule.SERIES, -1, "s", "for which saving held up training"),
    "signal_to_saved_seconds": Figure(Rule.SERIES, -1, "s", "from the signal to the checkpoint"),
    "checkpoint_bytes": Figure(Rule.EXACT, -1, "B", "parameters and moments of a checkpoint"),
    "preflight": Figure(Rule.HOLDS, 0, "", "what is wrong with the node, its GPUs or files"),
    "tokens_per_second": Figure(Rule.SHOWN, 1, "1/s", "of all ranks"),
    "product_rate": Figure(Rule.SHOWN, 1, "FLOP/s", "of rank 0's matrix products, in the same job"),
}
QUALITY = tuple(name for name, one in FIGURES.items() if one.rule is Rule.QUALITY)
BITS = ("loss", "parameters")  # of a training; what `same_as` means


def text_of(name: str, value: Any) -> str:
    """A figure for people, with its unit."""
    number, unit = as_number(name, value), FIGURES[name].unit
    if number is None:
        return str(value)[:_SHORT]
    if unit == "B":
        return f"{number / 1e6:,.1f} MB"
    if unit in ("FLOP/s", "1/s"):
        return f"{number:,.4g} {unit}"
    return f"{number:.5g}{' ' + unit if unit else ''}"


def as_number(name: str, value: Any) -> float | None:
    """A figure as one number: of losses the last, of seeds their mean; None if it is none."""
    several = value if isinstance(value, list) else [value]
    shown = several[-1:] if name == "loss" else several
    if not shown or not all(isinstance(one, int | float) for one in shown):
        return None
    return float(sum(shown) / len(shown))
