"""A Python without the project's packages is told the way to them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from job import require

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["job.train", "job.score", "job.report", "job.memory"])
def test_a_command_names_what_is_missing_and_what_to_do_in_one_line(command: str) -> None:
    # -S: without any installed package; -P and -E: nothing of the caller's either
    line = [sys.executable, "-S", "-E", "-m", command]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    (said,) = ended.stderr.splitlines()
    assert "no module named 'omegaconf'" in said
    assert "`make run` puts them into .venv" in said
    assert ".venv/bin/python -m job.train" in said


def test_any_package_can_be_required() -> None:
    with pytest.raises(ModuleNotFoundError, match="no module named 'no_such_package'"):
        require("no_such_package")
