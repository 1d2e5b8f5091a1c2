"""Critic training on a language-model trunk: everything that runs inside the container."""

import sys
from importlib.util import find_spec

__version__ = "0.2.0"


def require(package: str) -> None:
    """Raise ModuleNotFoundError, with what to do, where this Python lacks a package."""
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"no module named {package!r} in {sys.executable}: this Python lacks the project's "
            "packages. `make run` puts them into .venv; after that call .venv/bin/python -m "
            "job.train, or `source .venv/bin/activate` first (by hand: pip install '.[train]')",
            name=__name__,  # of the command's own package: then `python -m` says it in one line
        )


require("omegaconf")
