"""Which objective makes the better critic of the same steps: weighting, losses, terms, stages.

    GSM8K_DIR=DATA python bench/objectives.py --out bench/results/objectives.json

And what another order of the data does: solutions of a problem in a row. Three seeds of each with
N=2, on the embedded data and on GSM8K (left out, which is said, without GSM8K_DIR: the folder that
bench/unfreezing.py takes). Each data set has one trunk. Runs that are finished already, under
runs/objectives, are kept; with --kept no other is begun.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common import ROOT, command_line, say, table, write_record

from job.common.config import load_config
from job.common.errors import run_command
from job.common.schema import CriticConfig
from job.run.reader import StoredRun

FOLDER = Path("runs/objectives")
CONFIGS = {
    "embedded": "configs/critic/critic_local.yaml",
    "gsm8k": "configs/critic/critic_gsm8k.yaml",
}
SEEDS = 3
HEAD_FIRST = 0.1  # of the steps
OBJECTIVES = {
    "token": (),
    "without V_0": ("objective.prompt_value=false",),
    "sequence": ("objective.weighting=sequence",),
    "problem": ("objective.weighting=problem",),
    "balanced": ("objective.balance_labels=true",),
    "huber": ("objective.loss=huber",),
    "bce": ("objective.loss=bce",),
    "hl_gauss": ("objective.loss=hl_gauss",),
    "td": ("objective.target=lambda_return",),
    "with td": ("objective.terms={monte_carlo: 1.0, td: 0.5}",),
    "with pairs": ("objective.terms={monte_carlo: 1.0, pairwise: 0.5}",),
    "with both": ("objective.terms={monte_carlo: 1.0, td: 0.5, pairwise: 0.5}",),
    "head first": (),  # and stages, which hang on the steps
    "grouped": ("data.group_by_problem=true",),
}
FIGURES = (
    "mse",
    "r2",
    "r2_between_problems",
    "r2_within_problems",
    "sequence/r2",
    "last_token_auc",
    "pairwise_accuracy",
    "ece",
    "achievable_share",
    "prompt/mse",
    "prompt/auc",
    "prompt/distance_to_optimal",
    "prompt/next_distance_to_optimal",
)
_SHOWN = ("mse", "r2", "last_token_auc", "pairwise_accuracy", "prompt/mse", "seconds")

Cell = dict[str, Any]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="default: 3")
    parser.add_argument("--steps", type=int, metavar="N", help="default: the configuration's")
    parser.add_argument("--kept", action="store_true", help="only sum up the runs there are")
    options = parser.parse_args()
    data = [one for one in options.data if is_there(one)]
    seeds = range(options.seed, options.seed + options.seeds)
    cells = [
        measured(one, objective, seed, options.steps)
        for seed in seeds
        for one in data
        for objective in options.objectives
        if not options.kept or is_finished(run_of(one, objective, seed, options.steps))
    ]
    rows = list(summary(cells))
    shown = [[_text(row, name) for name in ("data", "objective", "seeds", *_SHOWN)] for row in rows]
    print(table(("data", "objective", "seeds", *_SHOWN), shown))
    if options.out is None:
        say("not written; --out FILE.json keeps the record")
    else:
        results = {"summary": rows, "cells": cells}
        write_record(options.out, results, seed=options.seed, packages=("numpy",))


def is_there(data: str) -> bool:
    if data == "gsm8k" and "GSM8K_DIR" not in os.environ:
        say("gsm8k: LEFT OUT, for GSM8K_DIR is not set")
        return False
    return True


def run_of(data: str, objective: str, seed: int, steps: int | None) -> Path:
    length = "" if steps is None else f"-{steps}"
    return FOLDER / f"{data}{length}" / f"{objective.replace(' ', '-')}-{seed}"


def is_finished(run: Path) -> bool:
    return StoredRun(run).status().get("state") == "finished"


def overrides(data: str, objective: str, seed: int, steps: int | None) -> list[str]:
    """What one run has otherwise than its configuration."""
    length = [] if steps is None else [f"training.max_steps={steps}", "training.warmup_steps=10"]
    run = run_of(data, objective, seed, steps)
    given = [
        *length,
        *OBJECTIVES[objective],
        "training.num_unfrozen_layers=2",
        f"training.seed={seed}",
        f"run.name={run.name}",
        f"run.dir={run}",
        "mlflow.enabled=false",
        "report.enabled=false",
    ]
    if objective == "head first":
        last = load_config(CriticConfig, ROOT / CONFIGS[data], given).training.max_steps
        first = max(1, round(HEAD_FIRST * last))
        stages = [(0, first), (2, last - first)]
        written = ", ".join(f"{{num_unfrozen_layers: {n}, steps: {s}}}" for n, s in stages)
        given.append(f"training.stages=[{written}]")
    return given


def measured(data: str, objective: str, seed: int, steps: int | None) -> Cell:
    """The last evaluation of one run, which is trained if it is not there."""
    run = run_of(data, objective, seed, steps)
    if not is_finished(run):
        say(f"{data}, {objective}, seed {seed}")
        command = [sys.executable, "-m", "job.train", "--config", str(ROOT / CONFIGS[data])]
        given = overrides(data, objective, seed, steps)
        subprocess.run([*command, "--override", *given], check=True)
    stored = StoredRun(run)
    prefix = "validation/value/"
    last = [r for r in stored.records() if f"{prefix}mse" in r][-1]
    figures = {name: last.get(f"{prefix}{name}") for name in FIGURES}
    seconds = stored.status()["seconds"]
    return {"data": data, "objective": objective, "seed": seed, "seconds": seconds, **figures}


def summary(cells: Sequence[Cell]) -> Iterator[Cell]:
    """Of each objective the mean of each figure and of seconds, and their ranges, over seeds."""
    for data, objective in dict.fromkeys((cell["data"], cell["objective"]) for cell in cells):
        found = [c for c in cells if (c["data"], c["objective"]) == (data, objective)]
        row: Cell = {"data": data, "objective": objective, "seeds": len(found)}
        for name in (*FIGURES, "seconds"):
            values = [cell[name] for cell in found if cell[name] is not None]
            if values:
                row[name] = {"mean": fmean(values), "range": [min(values), max(values)]}
        yield row


def _text(row: Cell, name: str) -> str:
    value = row.get(name, "-")
    return f"{value['mean']:.4f}" if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    run_command(main)
