"""How a command ends: the exit codes that the supervisor reads, and errors made for people."""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import reprlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, Self

from job.common.places import disk

# What errors say for which a GPU has no memory left: torch's allocator and those beside it.
GPU_OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",  # NCCL's
    "Triton Error [CUDA]: out of memory",
)
_WIDTH = 200  # characters that a message quotes of a text
# What a file system says that is full, away, failing, read-only or lacks something: no file of
# ours is wrong, and later or elsewhere it may do.
_MAY_PASS = frozenset(
    {
        *(
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EROFS,
            errno.EIO,
            errno.EREMOTEIO,
            errno.ESTALE,
        ),
        *(errno.ENOTCONN, errno.ESHUTDOWN, errno.ECOMM, errno.ETIMEDOUT, errno.EHOSTDOWN),
        *(
            errno.ENOSYS,
            errno.EOPNOTSUPP,
            errno.ENODEV,
            errno.ENXIO,
            errno.ENOLCK,
            errno.ENFILE,
            errno.EMFILE,
        ),
    }
)
# What it says of a path that somebody has named, and that is not for this user, or none at all.
_OF_A_PATH = frozenset({errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP})


class Exit(enum.IntEnum):
    """Exit codes of every command; anything else is a crash."""

    FINISHED = 0
    CRASHED = 1
    UNAVAILABLE = 69  # of slurm/submit.py alone: no Slurm answers
    UNFIT_NODE = 71
    SUPERSEDED = 73
    IO_FAILED = 74
    STOPPED = 75
    BAD_INPUT = 78


class Ending(Exception):  # noqa: N818 - most of them are no errors
    """A command's end whose message is for people and whose code is for the supervisor.

    `of_all_ranks` says that every process of the job ends this way, so that none has to be told;
    `said` that another one, on the same terminal, says so.
    """

    code = Exit.CRASHED
    of_all_ranks = said = False

    def everywhere(self) -> Self:
        self.of_all_ranks = True
        return self


class InputError(Ending):
    """Wrong input or configuration. The message says what, where and what to do."""

    code = Exit.BAD_INPUT


class StorageError(Ending):
    """Input or output failed for a reason that may pass: a full disk, a quota, a stale handle."""

    code = Exit.IO_FAILED


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
    if isinstance(error, Ending):
        return error.code
    if _refuses_path(error):
        return Exit.BAD_INPUT
    return Exit.IO_FAILED if _may_pass(error) else Exit.CRASHED


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _MAY_PASS


def _refuses_path(error: BaseException) -> bool:
    """Whether the system has refused a path: any look at one, also whether it is there, may end so.

    Without a path the error is of something else, such as a signal to another user's process.
    """
    return isinstance(error, OSError) and error.errno in _OF_A_PATH and error.filename is not None


def file_error(error: Exception, text: str) -> Ending:
    """What a command ends with that cannot use a file: whose fault it is, the system has said."""
    return StorageError(text + _on_disk(error)) if _may_pass(error) else InputError(text)


def _on_disk(error: Exception) -> str:
    """The disk of the file that an error is about; empty where it names none."""
    file = getattr(error, "filename", None)
    return f" ({disk(Path(os.fsdecode(file)))})" if isinstance(file, str | bytes) else ""


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
        kind = "error: " if isinstance(ending, InputError | StorageError) else ""
        _leave_saying("" if ending.said else f"{kind}{ending}", ending.code)
    except KeyboardInterrupt:
        _leave_saying("ended by Ctrl-C", 128 + signal.SIGINT)
    except OSError as error:
        if _refuses_path(error):
            _leave_saying(f"error: {error.filename}: {error.strerror}", Exit.BAD_INPUT)
        if not _may_pass(error):
            raise
        _leave_saying(f"error: {error}{_on_disk(error)}", Exit.IO_FAILED)


def _leave_saying(text: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):  # the disk may be full that stderr is on
        print(text, end="\n" * bool(text), file=sys.stderr, flush=True)
    sys.exit(code)


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
        code = Exit.CRASHED
        with contextlib.suppress(OSError):
            traceback.print_exc()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
