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
    options = command_line(__doc__).parse_args()
    seed = options.seed
    directory = f"run.dir=runs/gsm8k/seed{seed}/${{run.name}}"
    runs = compare(CONFIG, [f"training.seed={seed}", directory], UNFREEZE)
    rows = [summarise(StoredRun(run)) for run in runs]
    if options.out is None:
        say("not written; --out FILE.json keeps the record")
    else:
        write_record(options.out, {"config": CONFIG, "runs": rows}, seed=seed, packages=())


if __name__ == "__main__":
    run_command(main)
