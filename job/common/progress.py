"""Progress of anything that runs long: a bar on a terminal, plain log lines elsewhere.

Without a terminal nothing but the standard library is needed.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

ATTEMPT = "CRITIC_ATTEMPT"  # environment: the number that a supervisor has taken
LINE_SECONDS = 10.0  # between two lines where there is no terminal
_LINES = "job.progress"
_PLAIN = "%(asctime)s %(levelname)s %(message)s"
_quiet = False

Advance = Callable[[int, str], None]


def set_up_logging() -> None:
    """Send the log of `job` to stderr: styled on a terminal, plain lines elsewhere."""
    logger = logging.getLogger("job")
    logger.setLevel(logging.INFO)
    if logger.handlers:
        return
    if _on_terminal():
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(
            console=_console(), show_path=False, log_time_format="[%X]"
        )
        handler.addFilter(lambda record: record.name != _LINES)  # the bar shows it
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_PLAIN))
    logger.addHandler(handler)


def only_warnings() -> None:
    """Keep to warnings on stderr, on ranks whose log nobody follows; log files get everything."""
    global _quiet
    _quiet = True
    for handler in logging.getLogger("job").handlers:
        handler.setLevel(logging.WARNING)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Write the log of `job` to a file as well."""
    handler = _LogFile(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter(_PLAIN))
    logger = logging.getLogger("job")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def has_own_terminal() -> bool:
    """Whether no other rank writes to this stderr: a supervisor gives each of them a file."""
    return ATTEMPT in os.environ


def keep_in_files(error: str) -> bool:
    """Log an error to the log files alone, for stderr has or gets it otherwise; False: to none."""
    logger = logging.getLogger("job")
    files = [handler for handler in logger.handlers if isinstance(handler, _LogFile)]
    for file in files:
        file.handle(logger.makeRecord("job", logging.ERROR, __file__, 0, error, (), None))
    return bool(files)


class _LogFile(WatchedFileHandler):
    """A log file of which a disk in trouble costs lines and nothing else; it is opened anew."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError):
                stream.close()


@contextmanager
def progress(task: str, total: int | None = None) -> Iterator[Advance]:
    """Yield a function (done, note) that shows how far `task` is, and logs it now and then."""
    write_line = _line_writer(task, total)
    if _quiet or not _on_terminal():
        yield write_line
        return
    with _bar() as bar:
        row = bar.add_task(task, total=total, note="")

        def advance(done: int, note: str) -> None:
            bar.update(row, completed=done, note=note)
            write_line(done, note)

        yield advance


def _on_terminal() -> bool:
    return sys.stderr.isatty()


@functools.cache
def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _bar() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=_console(), transient=True)


def _line_writer(task: str, total: int | None) -> Advance:
    logger = logging.getLogger(_LINES)
    started = last = time.monotonic()

    def advance(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_SECONDS:
            return
        last = now
        left = f", {(now - started) * (total / done - 1):.0f} s left" if total and done else ""
        of = f"/{total}" if total else ""
        logger.info("%s", f"{task} {done}{of}{left}  {note}".rstrip())

    return advance
