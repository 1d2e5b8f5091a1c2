"""Which code runs. Free of heavy imports."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

_OF_THE_IMAGE = Path("/opt/critic/COMMIT")  # as the Dockerfile writes it
_CHECKOUT = Path(__file__).parents[2]
# Whose changes make other figures; accepted baselines wait to be committed.
_CODE = ("job", "slurm", "configs", ":!configs/nightly/baseline")


def is_edited() -> bool:
    """Whether a checkout's code is other than its commit; false where that is not known."""
    try:
        changed = _git("status", "--untracked-files=no", "--porcelain", "--", *_CODE)
        return bool(changed) and not _OF_THE_IMAGE.is_file()
    except (OSError, subprocess.SubprocessError):
        return False


def _git(*command: str) -> str:
    words = ("git", "-C", str(_CHECKOUT), *command)
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


@functools.lru_cache(maxsize=1)
def commit() -> str | None:
    """The commit of this code: the image's, or the checkout's; None where neither is known."""
    try:
        if _OF_THE_IMAGE.is_file():
            return _OF_THE_IMAGE.read_text(encoding="utf-8", errors="replace").strip()
        return _git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
