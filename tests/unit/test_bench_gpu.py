"""The GPU benchmark asks for few packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
_BLOCKED = "rich mlflow matplotlib pyarrow tokenizers transformers sentencepiece"
_IMPORT = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_BLOCKED.split()}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {str(BENCH)!r})
import gpu
"""


@pytest.mark.slow
def test_the_benchmark_needs_none_of_the_large_packages() -> None:
    subprocess.run([sys.executable, "-c", _IMPORT], check=True, timeout=120)
