"""What the main job reaches at N=2, from pre-training on, with other seeds and on other CPUs.

    python bench/main_job.py --out bench/results/main_job.json

Five seeds, each of data, trunk and critic, on three sets of instructions with two threads, and the
worst of them with one thread as well. Cells that are there already, under runs/main_job, are kept;
with --kept nothing more is measured, and the record says how many of all cells it has.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import ROOT, OtherLoad, cell_text, command_line, say, table, write_record

from job.common.errors import run_command
from job.run.comparison import summarise
from job.run.directory import RunDirectory

TRUNK = "configs/pretrain/arithmetic.yaml"
CRITIC = "configs/critic/critic_local.yaml"
FOLDER = Path("runs/main_job")
SEEDS = 5
THREADS = 2
_LIBRARIES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
INSTRUCTIONS = {
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "sse4": ("default", "SSE41", "SSE4_2"),
}
_SHOWN = ("instructions", "threads", "seed", "share", "mse", "seconds", "cpu_seconds")

Cell = dict[str, Any]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--instructions", nargs="+", choices=INSTRUCTIONS, default=INSTRUCTIONS)
    parser.add_argument("--kept", action="store_true", help="only sum up the cells there are")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + SEEDS)
    cells = kept() if options.kept else measured(options.instructions, seeds)
    print(table(_SHOWN, [[cell_text(found[name]) for name in _SHOWN] for found in cells]))
    if options.out is None:
        say("not written; --out FILE.json keeps the record")
    else:
        results = {"summary": summary(cells), "cells": cells}
        write_record(options.out, results, seed=options.seed, packages=("numpy",))


def measured(instructions: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells, the worst of them once more with one thread."""
    cells = [cell(name, THREADS, seed) for name in instructions for seed in seeds]
    worst = min(cells, key=lambda found: found["share"])
    return [*cells, cell(worst["instructions"], 1, worst["seed"])]


def kept() -> list[Cell]:
    """The cells that are there, whichever they are."""
    return [json.loads(file.read_text()) for file in sorted((ROOT / FOLDER).glob("*/cell.json"))]


def cell(instructions: str, threads: int, seed: int) -> Cell:
    """One trunk and the critic on it, made with the given instructions, threads and seed."""
    folder = FOLDER / f"{instructions}-{threads}-{seed}"
    file = ROOT / folder / "cell.json"
    if not file.exists():
        found = {"instructions": instructions, "threads": threads, "seed": seed}
        found |= _made(folder, environment(instructions, threads), seed)
        file.write_text(json.dumps(found))
        say(f"{folder.name}: {found['share']:.1%} in {found['seconds']:.0f} s")
    there: Cell = json.loads(file.read_text())
    return there


def environment(instructions: str, threads: int) -> dict[str, str]:
    """What makes the libraries behind torch take a CPU for one without later instructions."""
    limits = dict(zip(_LIBRARIES, INSTRUCTIONS[instructions], strict=True))
    return {**limits, "OMP_NUM_THREADS": str(threads)}


def commands(folder: Path, seed: int) -> tuple[list[str], list[str]]:
    """Pre-training and training; with seed 0 they are those of `make run`."""
    shared = f"data.arithmetic.seed={seed}"
    trunk = [f"out={folder}/trunk", f"training.seed={seed + 1}", shared]
    critic = [f"model.path={folder}/trunk", "model.recipe=null", f"run.dir={folder}/n2"]
    critic += [f"training.seed={seed}", shared, "mlflow.enabled=false"]
    return (
        ["-m", "job.pretrain", "--config", TRUNK, "--override", *trunk],
        ["-m", "job.train", "--config", CRITIC, "--override", *critic],
    )


def _made(folder: Path, limits: Mapping[str, str], seed: int) -> Cell:
    load, began, cpu = OtherLoad(), time.perf_counter(), _cpu_seconds()
    for command in commands(folder, seed):
        subprocess.run(
            [sys.executable, *command], cwd=ROOT, env={**os.environ, **limits}, check=True
        )
    used = _cpu_seconds() - cpu
    seconds = time.perf_counter() - began
    last = summarise(RunDirectory(ROOT / folder / "n2"))
    return {
        "share": last["achievable_share"],
        "mse": last["mse"],
        "mse_optimal": last["mse_optimal"],
        "steps_to_half": last["steps_to_half"],
        "seconds": seconds,
        "cpu_seconds": used,
        "other_load": max(0.0, load.share() - used / seconds / (os.cpu_count() or 1)),
    }


def _cpu_seconds() -> float:
    """Of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """The worst, the middle and the best of all cells."""
    shares = [found["share"] for found in cells]
    return {
        "cells": len(cells),
        "of": SEEDS * len(INSTRUCTIONS) + 1,
        "share": {"worst": min(shares), "median": median(shares), "best": max(shares)},
        "mse": {"worst": max(found["mse"] for found in cells)},
        "seconds": {"median": median(found["seconds"] for found in cells)},
    }


if __name__ == "__main__":
    run_command(main)
