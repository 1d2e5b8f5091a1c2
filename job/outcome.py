"""How a command ends: the exit codes that the supervisor reads, and errors made for people."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Sequence


class Exit(enum.IntEnum):
    """Exit codes of every command; anything else is a crash."""

    FINISHED = 0
    UNFIT_NODE = 71
    SUPERSEDED = 73
    STOPPED = 75
    BAD_INPUT = 78


class InputError(Exception):
    """Wrong input or configuration. The message says what, where and what to do."""


def listing(lines: Sequence[str], shown: int = 10) -> str:
    """A message's list: the first lines, indented, and a count of the rest."""
    more = [f"... and {len(lines) - shown} more"] if len(lines) > shown else []
    return "".join(f"\n  {line}" for line in [*lines[:shown], *more])


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main; an InputError becomes its message on stderr and exit code 78."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(Exit.BAD_INPUT)
