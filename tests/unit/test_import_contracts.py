"""The arrows between the rooms: `make lint` holds them, and would see one that points upwards."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages and their contracts."""
    folder = tmp_path_factory.mktemp("rooms")
    for package in ("job", "slurm"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def _contracts(folder: Path) -> subprocess.CompletedProcess[str]:
    lint = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [lint, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (
            "job/data/packing.py",
            "import job.training.loop",
            "job.data.packing -> job.training.loop",
        ),
        ("job/run/fence.py", "import job.memory.fit", "job.run.fence -> job.memory.fit"),
        ("job/common/files.py", "import slurm.record", "job.common.files -> slurm.record"),
        ("slurm/plan.py", "import torch", "slurm.plan -> torch"),
    ],
)
def test_an_upward_import_breaks_a_contract(copy: Path, file: str, line: str, broken: str) -> None:
    planted = copy / file
    before = planted.read_text()
    planted.write_text(f"{before}\n\ndef _planted() -> None:\n    {line}\n")
    try:
        ended = _contracts(copy)
    finally:
        planted.write_text(before)
    assert ended.returncode == 1
    assert broken in ended.stdout
