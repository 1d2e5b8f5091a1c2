"""What unfreezing does, with the prefix cache and without: critics with N = 0, 2 and all blocks.

    GSM8K_DIR=DATA python bench/unfreezing.py --out bench/results/unfreezing.json

On the embedded data and on GSM8K (left out, which is said, without GSM8K_DIR: the folder with
problems.jsonl, solutions.train.jsonl and solutions.val.jsonl), each with one trunk. With a cache a
data set's runs begin with none: each reads the states there are, and writes those it lacks. Runs
that are finished already, under runs/unfreezing, are kept. The seed is the training's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import cell_text, command_line, say, table, write_record
from objectives import CONFIGS, is_there

from job.common.errors import run_command
from job.compare import compare
from job.run.comparison import summarise
from job.run.reader import StoredRun

FOLDER = Path("runs/unfreezing")
UNFREEZE = {"embedded": (0, 2), "gsm8k": (0, 2, 5)}  # of four blocks, of five
CACHES = ("none", "all")
_SHOWN = ("num_unfrozen_layers", "mse", "std", "r2", "last_token_auc", "seconds")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--prefix-cache", nargs="+", choices=CACHES, default=CACHES)
    options = parser.parse_args()
    rows = [
        row
        for data in options.data
        if is_there(data)
        for cache in options.prefix_cache
        for row in trained(data, cache, options.seed)
    ]
    header = ("data", "prefix_cache", *_SHOWN)
    print(table(header, [[cell_text(row[name]) for name in header] for row in rows]))
    if options.out is None:
        say("not written; --out FILE.json keeps the record")
    else:
        write_record(options.out, {"runs": rows}, seed=options.seed, packages=())


def trained(data: str, cache: str, seed: int) -> list[dict[str, Any]]:
    """What each N came to, trained one after the other where it is not there."""
    folder = FOLDER / f"{data}-{seed}-{cache}"
    overrides = [
        f"run.dir={folder}/${{run.name}}",
        f"training.seed={seed}",
        f"training.prefix_cache={cache}",
        f"training.prefix_cache_dir={folder}/states",
        "mlflow.enabled=false",
    ]
    runs = compare(CONFIGS[data], overrides, UNFREEZE[data])
    return [{"data": data, "prefix_cache": cache, **summarise(StoredRun(run))} for run in runs]


if __name__ == "__main__":
    run_command(main)
