"""Other versions of transformers than the one that is installed, each in a folder of its own.

They are taken once from where pip finds packages, into a cache outside the checkout, and stand
before the installed ones on the path of a process. Where they cannot be had, tests skip by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from read_critics import read

PINNED = transformers.__version__
OTHERS = {
    "4.57.3": ("tokenizers==0.22.2", "huggingface_hub==0.36.2"),
    "5.3.0": (
        *("tokenizers==0.22.2", "huggingface_hub==1.33.0"),
        *("httpx==0.28.1", "httpcore==1.0.9", "h11==0.16.0", "anyio==4.16.0"),
    ),
}
ALL = [PINNED, *(pytest.param(version, marks=pytest.mark.all) for version in OTHERS)]
_SCRIPT = Path(__file__).with_name("read_critics.py")


def read_with(version: str, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What a version makes of exported critics, as `read_critics.read` says it."""
    if version == PINNED:
        return [read(folder) for folder in folders]
    environment = os.environ | {
        "PYTHONPATH": str(_packages(version)),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, str(_SCRIPT), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / "found.json").read_text()) for folder in folders]
    assert all(one["version"] == version for one in found)
    return found


def _packages(version: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    wanted = [f"transformers=={version}", *OTHERS[version]]
    folder = base / "critic-transformers" / "_".join(wanted).replace("==", "-")
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        target = Path(scratch) / "packages"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
        done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            pytest.skip(f"transformers {version} cannot be had: {last}")
        if not folder.exists():
            target.rename(folder)
    return folder
