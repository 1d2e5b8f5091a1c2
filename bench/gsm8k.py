"""What unfreezing does on real labelled solutions: critics with N = 0, 2 and all blocks.

    GSM8K_DIR=DATA python bench/gsm8k.py --out bench/results/gsm8k.json

GSM8K_DIR is the folder with problems.jsonl, solutions.train.jsonl and solutions.val.jsonl. What is
missing under runs/gsm8k, trunk and runs, is made there. The seed is the training's.
"""

from __future__ import annotations

from common import command_line, say, write_record

from job.common.errors import run_command
from job.compare import compare
from job.run.comparison import summarise
from job.run.reader import StoredRun

CONFIG = "configs/critic/critic_gsm8k.yaml"
UNFREEZE = (0, 2, 5)  # the trunk of configs/pretrain/gsm8k.yaml has five blocks


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--group-by-problem",
        action="store_true",
        help="with solutions of one problem in a row (data.group_by_problem), in folders beside",
    )
    options = parser.parse_args()
    seed, grouped = options.seed, options.group_by_problem
    folder = f"runs/gsm8k/seed{seed}" + "-grouped" * grouped
    overrides = [f"training.seed={seed}", f"data.group_by_problem={str(grouped).lower()}"]
    runs = compare(CONFIG, [*overrides, f"run.dir={folder}/${{run.name}}"], UNFREEZE)
    rows = [summarise(StoredRun(run)) for run in runs]
    if options.out is None:
        say("not written; --out FILE.json keeps the record")
    else:
        write_record(options.out, {"config": CONFIG, "runs": rows}, seed=seed, packages=())


if __name__ == "__main__":
    run_command(main)
