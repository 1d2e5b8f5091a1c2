"""What reading the frozen blocks' states spares, beside what it could spare at most.

    python bench/prefix_cache.py --out bench/results/prefix_cache.json

Trainings by `job.train`, one after the other on this machine: without a cache, with one that is
written in the first epoch and read from then on, and a sweep over N that shares the deepest
boundary's. Steps and evaluations are medians; the ceilings are (L + 2N) / 3N for a step, from the
operations of frozen and trained blocks, and L / N for an evaluation, of L blocks.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from common import ROOT, OtherLoad, command_line, say, table, write_record

from job.common.errors import run_command

FOLDER = Path("runs/bench_prefix_cache")
LAYERS, SWEEP = 16, (4, 2, 1, 0)
EPOCH, EPOCHS = 20, 3  # steps of one, and how many
BATCH = 8
TRUNK = (
    f"out={FOLDER}/trunk",
    f"architecture.n_layers={LAYERS + 1}",
    "architecture.dim=512",
    "architecture.n_heads=8",
    "data.max_length=512",
    "data.arithmetic.train_examples=64",
    "training.max_steps=1",
    "training.batch_size=2",
)
CRITIC = (
    f"model.path={FOLDER}/trunk",
    "model.recipe=null",
    "data.max_length=512",
    f"data.arithmetic={{train_examples: {EPOCH * BATCH}, validation_examples: 40, attempts: 1, "
    "min_steps: 9, max_steps: 60, error_probability: 0.02, seed: 0}",
    f"training.batch_size={BATCH}",
    f"training.max_steps={EPOCH * EPOCHS}",
    f"evaluation.every_steps={EPOCH // 2}",
    f"checkpoint.every_steps={EPOCH * EPOCHS}",
    "logging.every_steps=1",
    "mlflow.enabled=false",
    "report.enabled=false",
)


@dataclass(frozen=True)
class Run:
    """What one training took.

    Attributes:
        steps: seconds of each.
        evaluations: seconds of each.
        seconds: of all of it, from its first step to its end.
    """

    steps: list[float]
    evaluations: list[float]
    seconds: float
    other_load: float
    losses: list[float]

    @property
    def first(self) -> list[float]:
        """The first epoch's steps, but for the first two."""
        return self.steps[2:EPOCH]

    @property
    def later(self) -> list[float]:
        return self.steps[EPOCH + 1 :]


def main() -> None:
    options = command_line(__doc__).parse_args()
    shutil.rmtree(ROOT / FOLDER, ignore_errors=True)
    _command("job.pretrain", "configs/pretrain/arithmetic.yaml", TRUNK)
    plain = {n: _run(f"none{n}", n, "none") for n in (2, max(SWEEP))}
    cached = _run("cached", 2, "all")
    sweep = {n: _run(f"sweep{n}", n, "all", states="sweep") for n in SWEEP}
    results = _results(plain, cached, sweep)
    print(table(("", "measured", "at most"), [[n, *map(_text, v)] for n, v in _rows(results)]))
    if options.out is None:
        say("not written; --out FILE.json keeps the record")
    else:
        write_record(options.out, results, seed=0, packages=("numpy",))


def _run(name: str, n: int, mode: str, states: str = "") -> Run:
    load, began, cpu = OtherLoad(), time.perf_counter(), _cpu_seconds()
    settings = (
        f"run.dir={FOLDER}/{name}",
        f"training.num_unfrozen_layers={n}",
        f"training.prefix_cache={mode}",
        f"training.prefix_cache_dir={FOLDER}/states-{states or name}",
    )
    _command("job.train", "configs/critic/critic_local.yaml", (*CRITIC, *settings))
    run = ROOT / FOLDER / name
    telemetry = [json.loads(line) for line in (run / "telemetry.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Run(
        [row["seconds_per_step"] for row in telemetry if "seconds_per_step" in row],
        [row["evaluation_seconds"] for row in telemetry if "evaluation_seconds" in row],
        json.loads((run / "status.json").read_text())["seconds"],
        max(0.0, load.share() - _share_of_children(began, cpu)),
        [row["train/loss"] for row in metrics],
    )


def _cpu_seconds() -> float:
    """Of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _share_of_children(began: float, cpu: float) -> float:
    seconds = time.perf_counter() - began
    return (_cpu_seconds() - cpu) / seconds / (os.cpu_count() or 1)


def _command(module: str, config: str, settings: Sequence[str]) -> None:
    say(f"{module} {settings[-2:]}")
    command = [sys.executable, "-m", module, "--config", config, "--override", *settings]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=True)


def _results(plain: dict[int, Run], cached: Run, sweep: dict[int, Run]) -> dict[str, Any]:
    uncached, most = plain[2], plain[max(SWEEP)]
    return {
        "layers": LAYERS,
        "first_epoch": _ratio(uncached.first, cached.first),
        "later_epochs": _ratio(uncached.later, cached.later),
        "evaluations": _ratio(uncached.evaluations[1:], cached.evaluations[1:]),
        "sweep": {
            "n": list(SWEEP),
            "seconds": [sweep[n].seconds for n in SWEEP],
            "in_steps": [sum(sweep[n].steps) for n in SWEEP],
            "in_evaluations": [sum(sweep[n].evaluations) for n in SWEEP],
            "most_expensive_without": most.seconds,
            "times": sum(run.seconds for run in sweep.values()) / most.seconds,
        },
        "ceilings": {"later_epochs": (LAYERS + 4) / 6, "evaluations": LAYERS / 2},
        "largest_difference_of_losses": max(
            abs(a - b) / abs(a) for a, b in zip(uncached.losses, cached.losses, strict=True)
        ),
        "other_load": max(run.other_load for run in (*plain.values(), cached, *sweep.values())),
    }


def _ratio(without: Sequence[float], with_: Sequence[float]) -> dict[str, Any]:
    """Medians in seconds with their quartiles, and how many times as fast."""
    return {
        "without": [*quantiles(without, n=4)],
        "with": [*quantiles(with_, n=4)],
        "times": median(without) / median(with_),
    }


def _rows(results: dict[str, Any]) -> list[tuple[str, tuple[float, float | None]]]:
    ceilings = results["ceilings"]
    return [
        ("a step of the first epoch, times as fast", (results["first_epoch"]["times"], 1.0)),
        *(
            (f"{name.replace('_', ' ')}, times as fast", (results[name]["times"], ceilings[name]))
            for name in ceilings
        ),
        ("a sweep, in times of its most expensive run", (results["sweep"]["times"], None)),
    ]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    run_command(main)
