"""How long a submission takes by itself, until sbatch is called and after it.

    python bench/submission.py --out bench/results/submission.json

Slurm's commands are stand-ins that answer at once, so that what is measured is the product's own
time: a login node's shell to its prompt again. In each round, in turns, fresh processes:

    submission   slurm/submit.py for a 7B trunk on 4 GPUs, N=4, all checks included
    dry run      the same with --dry-run, which shows the memory of each GPU
    interpreter  the same Python, doing nothing
    torch        the same Python, importing torch: what the submission does without

Figures are medians over rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import ROOT, OtherLoad, command_line, say, table, write_record

_ANSWERS = {
    "sbatch": 'echo "Submitted batch job 1"',
    "scontrol": 'echo "PartitionName=main Default=YES MaxTime=1-00:00:00 PreemptMode=OFF"',
    "srun": "true",
}
_SEVEN_B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000, "n_future_tokens": 4}


def prepare(folder: Path) -> None:
    """Stand-ins of Slurm's commands, a trunk's architecture, and data files."""
    for name, answer in _ANSWERS.items():
        file = folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{answer}\n")
        file.chmod(0o755)
    (folder / "trunk").mkdir()
    (folder / "trunk" / "params.json").write_text(json.dumps(_SEVEN_B))
    row = {"prompt": "2+3?", "response": "5", "reward": 1}
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")


def seconds(command: Sequence[str], folder: Path) -> float:
    """Wall time of a command, which must end well."""
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    environment |= {"CRITIC_SITE": "", "XDG_CONFIG_HOME": str(folder)}  # no site of this user's
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    took = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return took


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    data = ["model.path=trunk", "data.train=data.jsonl", "data.validation=data.jsonl"]
    asked = ["--gpus", "4", "--unfreeze", "4", "--override", *data]
    submit = str(ROOT / "slurm" / "submit.py")
    commands = {
        "submission": [sys.executable, submit, *asked],
        "dry run": [sys.executable, submit, "--dry-run", *asked],
        "interpreter": [sys.executable, "-c", "pass"],
        "torch": [sys.executable, "-c", "import torch"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    load = OtherLoad()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for turn in range(options.rounds + 1):  # the first fills the disk's cache
            took = {name: seconds(command, folder) for name, command in commands.items()}
            say(f"round {turn}: " + "  ".join(f"{k} {v:.3f} s" for k, v in took.items()))
            for kind, value in took.items() if turn else ():
                times[kind].append(value)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    ratios = {kind: medians[kind] / medians["torch"] for kind in ("submission", "dry run")}
    rows = [
        [k, f"{v:.3f}", f"{min(times[k]):.3f}", f"{max(times[k]):.3f}"] for k, v in medians.items()
    ]
    print(table(["", "median s", "least", "most"], rows))
    for kind, ratio in ratios.items():
        print(f"a {kind} takes {ratio:.2f} times as long as importing torch")
    if options.out:
        results = {"seconds": times, "medians": medians, "ratios_to_torch": ratios}
        results |= {"rounds": options.rounds, "share_of_other_processes": load.share()}
        write_record(options.out, results, seed=options.seed, packages=["submitit", "omegaconf"])


if __name__ == "__main__":
    main()
