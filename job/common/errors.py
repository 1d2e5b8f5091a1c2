"""How a command ends: the exit codes that the supervisor reads, and errors made for people."""

from __future__ import annotations

import enum
import logging
import os
import reprlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, Self

_WIDTH = 200  # characters that a message quotes of a text


class Exit(enum.IntEnum):
    """Exit codes of every command; anything else is a crash."""

    FINISHED = 0
    CRASHED = 1
    UNAVAILABLE = 69  # of slurm/submit.py alone: no Slurm answers
    UNFIT_NODE = 71
    SUPERSEDED = 73
    STOPPED = 75
    BAD_INPUT = 78


class Ending(Exception):  # noqa: N818 - most of them are no errors
    """A command's end whose message is for people and whose code is for the supervisor.

    `of_all_ranks` says that every process of the job ends this way, so that none has to be told.
    """

    code = Exit.CRASHED
    of_all_ranks = False

    def everywhere(self) -> Self:
        self.of_all_ranks = True
        return self


class InputError(Ending):
    """Wrong input or configuration. The message says what, where and what to do."""

    code = Exit.BAD_INPUT


class Stopped(Ending):
    """Stopped on request; what was done is safe."""

    code = Exit.STOPPED


class Superseded(Ending):
    """A newer attempt of the same run has taken over."""

    code = Exit.SUPERSEDED


class UnfitNode(Ending):
    """This node cannot do the work; another may."""

    code = Exit.UNFIT_NODE


class NoProgress(Ending):
    """A collective or a file system hangs."""


def exit_code(error: BaseException) -> Exit:
    return error.code if isinstance(error, Ending) else Exit.CRASHED


def listing(lines: Sequence[str], shown: int = 10) -> str:
    """A message's list: the first lines, indented, and a count of the rest."""
    more = [f"... and {len(lines) - shown} more"] if len(lines) > shown else []
    return "".join(f"\n  {line}" for line in [*lines[:shown], *more])


def short(text: str) -> str:
    """What a message quotes of a text of any length."""
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."


class _Quoted(reprlib.Repr):
    """Short, and cut at the end: a name whose middle is missing cannot be searched for."""

    def repr_str(self, text: str, level: int) -> str:
        whole = repr(text[: _WIDTH // 2])
        return whole if len(text) <= _WIDTH // 2 else f"{whole[:-1]}..."


quoted = _Quoted().repr  # what a message quotes of a value of any kind and size


def first_line(error: object, *, named: bool = False) -> str:
    """An error in one line, after its class's name where `named` or where it says nothing else."""
    name = type(error).__name__
    text = f"{name}: {error}" if named else str(error)
    return text.partition("\n")[0] or name


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main; an Ending becomes its message on stderr and its exit code."""
    try:
        main()
    except Ending as ending:
        kind = "error: " if isinstance(ending, InputError) else ""
        print(f"{kind}{ending}", file=sys.stderr)
        sys.exit(ending.code)


def run_and_leave(main: Callable[[], None]) -> NoReturn:
    """`run_command` for a process whose threads may be inside native code.

    Such a thread aborts the process while the interpreter is taken down, and the exit code would
    be the abort's; so the process leaves without taking it down.
    """
    code = 0
    try:
        run_command(main)
    except SystemExit as ending:
        code = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
        code = Exit.CRASHED
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
