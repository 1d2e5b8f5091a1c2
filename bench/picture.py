"""README's picture: what `make run` has left, drawn as the report draws it.

python bench/picture.py
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from common import ROOT

from job.common.errors import run_command
from job.run.plots import write_plots

RUNS = [ROOT / "runs/local/n0", ROOT / "runs/local/n2"]
PICTURE = ROOT / "docs/main_job.png"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_plots(RUNS, Path(folder))
        shutil.copyfile(Path(folder) / "value_mse.png", PICTURE)


if __name__ == "__main__":
    run_command(main)
