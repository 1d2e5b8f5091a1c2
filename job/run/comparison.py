"""Runs of one critic side by side: what their last evaluations say, and a table of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from job.common.errors import InputError
from job.run.reader import StoredRun

_PREFIX = "validation/value/"
_COLUMNS = (
    "num_unfrozen_layers",
    "mse",
    "std",
    "r2",
    "achievable_share",
    "prompt_mse",
    "steps_to_half",
    "last_token_auc",
)
# Of values before responses, where they are trained.
_PROMPT = ("mse", "mse_constant", "mse_optimal", "r2", "auc", "first_step")
_DISTANCES = ("distance_to_optimal", "next_distance_to_optimal")


def summarise(run: StoredRun) -> dict[str, Any]:
    """A finished run's last evaluation, and how fast it got there.

    Raises:
        InputError: the run has no evaluation.
    """
    evaluations = [r for r in run.records() if _PREFIX + "mse" in r]
    if not evaluations:
        raise InputError(
            f"{run.path}: finished, but without an evaluation in metrics.jsonl; remove the folder"
        )
    last = {k.removeprefix(_PREFIX): v for k, v in evaluations[-1].items()}
    return {
        "num_unfrozen_layers": run.config()["training"]["num_unfrozen_layers"],
        "mse": last["mse"],
        "std": last["std_prediction"],
        "r2": last.get("r2"),
        "achievable_share": last.get("achievable_share"),
        "mse_constant": last["mse_constant"],
        "mse_optimal": last.get("mse_optimal"),
        "std_optimal": last.get("std_optimal"),
        "last_token_auc": last.get("last_token_auc"),
        "length_auc": last.get("length_auc"),
        **{f"prompt_{name}": last.get(f"prompt/{name}") for name in (*_PROMPT, *_DISTANCES)},
        "steps_to_half": steps_to_half(evaluations),
        "seconds": run.status()["seconds"],
    }


def steps_to_half(evaluations: Sequence[dict[str, Any]]) -> int | None:
    """The first evaluated step that explains half of the achievable variance."""
    share = _PREFIX + "achievable_share"
    reached = (int(r["step"]) for r in evaluations if r.get(share, 0.0) >= 0.5)
    return next(reached, None)


def comparison_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The runs between the constant and the optimal predictor, in 80 columns."""
    table = Table(
        title="Validation: critics against the constant and the optimal predictor",
        caption="share: of what the optimal predictor explains; V0 MSE: before the first token;\n"
        "half at: the first evaluated step that explains half of that; AUC: at the last token",
    )
    for name in ("blocks", "MSE", "std", "R2", "share", "V0 MSE", "half at", "AUC"):
        table.add_column(name, justify="right", no_wrap=True)
    first = rows[0]
    constant = (first["mse_constant"], 0.0, 0.0)
    table.add_row(
        *("constant", *map(_cell, constant), "", _cell(first["prompt_mse_constant"])),
        *("", "0.5000"),
    )
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in _COLUMNS))
    if first["mse_optimal"] is not None:
        r2 = 1 - first["mse_optimal"] / first["mse_constant"]
        best = (first["mse_optimal"], first["std_optimal"], r2, 1.0)
        table.add_row("optimal", *map(_cell, best), _cell(first["prompt_mse_optimal"]), "", "")
    return table


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
