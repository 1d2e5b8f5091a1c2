"""Whether this Python has the packages of the project. Needs none of them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_BAD_INPUT = 78  # job.common.errors.Exit's, which needs more: the same on each node


def require(package: str) -> None:
    """End this process, with what to do, where this Python lacks a package."""
    if find_spec(package) is None:
        sys.stderr.write(
            f"error: no module named {package!r} in {sys.executable}: this Python lacks the "
            "project's packages. `make run` puts them into .venv; after that call .venv/bin/python "
            "-m job.train, or `source .venv/bin/activate` first (by hand: pip install '.[train]')\n"
        )
        sys.exit(_BAD_INPUT)
