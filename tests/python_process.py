"""A Python process of a few lines, that says when it is ready and is gone at the end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def python_process(
    code: str, *arguments: str, folder: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run code that prints `ready`; from then on its streams are the test's."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()
