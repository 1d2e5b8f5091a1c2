"""How long a SIF takes from its start to the first training step.

    python bench/cold_start.py critic.sif --out bench/results/cold_start.json

Apptainer starts a training of two steps on a micro trunk that is there already, as a Slurm task
would (`--containall`), on CPU. Cold: none of the SIF's pages is in the page cache, as on a node
that has not run it yet; its file system is this machine's. Warm: right after. Figures are medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from common import command_line, say, table, write_record

ROUNDS = 5
_TRUNK = """
out: trunk
architecture: {dim: 128, n_layers: 6, n_heads: 4, n_future_tokens: 2}
data: {train: embedded, max_length: 64, arithmetic: {train_examples: 256}}
training: {max_steps: 2, batch_size: 16, micro_batch_tokens: 1024}
"""
_LOCAL = "/opt/critic/configs/critic/critic_local.yaml"
_SETTINGS = (
    "model.path=trunk",
    "model.recipe=trunk.yaml",
    "mlflow.enabled=false",
    "data.arithmetic.train_examples=1000",
    "data.arithmetic.validation_examples=20",
    "training.max_steps=2",
    "logging.every_steps=1",
)


def seconds_to_first_step(sif: Path, folder: Path, name: str) -> float:
    """Of one new run, trained to its end.

    Raises:
        subprocess.CalledProcessError: it does not end well.
    """
    inside = ["--containall", "--pwd", str(folder), "--bind", str(folder), str(sif)]
    train = ["train", "--config", _LOCAL, "--override", *_SETTINGS, f"run.dir={name}"]
    began = time.time()
    subprocess.run(["apptainer", "run", *inside, *train], check=True, capture_output=True)
    lines = map(json.loads, (folder / name / "telemetry.jsonl").read_text().splitlines())
    return next(line["time"] for line in lines if line["step"] == 1) - began


def leave_page_cache(file: Path) -> None:
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("sif", type=Path)
    options = parser.parse_args()
    seconds = dict[str, list[float]](cold=[], warm=[])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "trunk.yaml").write_text(_TRUNK)
        seconds_to_first_step(options.sif, folder, "before")  # makes the trunk
        for number in range(ROUNDS):
            leave_page_cache(options.sif)
            for kind, times in seconds.items():
                times.append(seconds_to_first_step(options.sif, folder, f"{kind}-{number}"))
                say(f"{kind}: {times[-1]:.1f} s")
    print(table(["start", "s"], [[k, f"{statistics.median(v):.1f}"] for k, v in seconds.items()]))
    if options.out is not None:
        results = {"sif_bytes": options.sif.stat().st_size, "seconds": seconds}
        write_record(options.out, results, seed=options.seed, packages=[])


if __name__ == "__main__":
    main()
