"""Seconds to pair the solutions of one problem, and how they grow with their number.

    python bench/pairs.py --out bench/results/pairs.json

Lengths up to 600 tokens, as a problem's solutions have, and up to a million, where no two are
alike; rewards of two values and of as many as there are solutions.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
from common import command_line, say, table, write_record

from job.common.errors import run_command
from job.data.pairs import balanced_pairs

COUNTS = (2_000, 20_000)
ROUNDS = 9


def main() -> None:
    options = command_line(__doc__).parse_args()
    rng = np.random.default_rng(options.seed)
    cases = [
        case(rng, rewards, longest)
        for rewards in ("two", "all different")
        for longest in (600, 10**6)
    ]
    columns = list(cases[0])
    print(table(columns, [[f"{found[name]}" for name in columns] for found in cases]))
    if options.out is None:
        say("not written; --out FILE.json keeps the record")
    else:
        write_record(options.out, {"cases": cases}, seed=options.seed, packages=("numpy",))


def case(rng: np.random.Generator, rewards: str, longest: int) -> dict[str, Any]:
    """Median seconds for each count, the counts in turns, and their ratio."""
    taken: dict[int, list[float]] = {n: [] for n in COUNTS}
    for _ in range(ROUNDS):
        for n in COUNTS:
            labels = rng.integers(0, 2, n).astype(float) if rewards == "two" else rng.random(n)
            lengths = rng.integers(1, longest + 1, n)
            began = time.perf_counter()
            balanced_pairs(labels, np.zeros(n, np.uint64), lengths)
            taken[n].append(time.perf_counter() - began)
    few, many = (median(taken[n]) for n in COUNTS)
    return {
        "rewards": rewards,
        "longest": longest,
        **{f"seconds_{n}": round(median(taken[n]), 4) for n in COUNTS},
        "ratio": round(many / few, 1),
    }


if __name__ == "__main__":
    run_command(main)
