"""Which code runs. Free of heavy imports."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

_OF_THE_IMAGE = Path("/opt/critic/COMMIT")  # as the Dockerfile writes it


@functools.lru_cache(maxsize=1)
def commit() -> str | None:
    """The commit of this code: the image's, or the checkout's; None where neither is known."""
    try:
        if _OF_THE_IMAGE.is_file():
            return _OF_THE_IMAGE.read_text(encoding="utf-8", errors="replace").strip()
        command = ("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
