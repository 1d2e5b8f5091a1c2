"""Ends a process that makes no progress, and says where it hung."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from job.common.errors import Exit, NoProgress
from job.common.files import try_for
from job.distributed.failure import CAUSE_SECONDS, LAST_WORDS_SECONDS

_log = logging.getLogger(__name__)


class Watchdog:
    """A thread that ends the process when `beat` was not called for `seconds`.

    The stacks of all threads go to `file`. A stuck collective cannot be cancelled; a new attempt
    can go on from the last checkpoint.
    """

    def __init__(
        self, seconds: float, file: Path, report: Callable[[NoProgress], None] = lambda error: None
    ) -> None:
        self._report = report
        self._seconds, self._file = seconds, file
        self._beaten = time.monotonic()
        self._ended = threading.Event()

    def beat(self) -> None:
        self._beaten = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Expect beats for the length of the body."""
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()

    def _watch(self) -> None:
        while (left := self._beaten + self._seconds - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        try_for(LAST_WORDS_SECONDS, self._write_stacks)
        error = NoProgress(
            f"no progress for {self._seconds:.0f} s: a collective or a file system hangs; "
            f"ended with exit code {Exit.CRASHED}, stacks of all threads in {self._file}"
        )
        _log.error("%s", error)
        try_for(CAUSE_SECONDS + LAST_WORDS_SECONDS, lambda: self._report(error))
        try_for(LAST_WORDS_SECONDS, logging.shutdown)
        os._exit(Exit.CRASHED)

    def _write_stacks(self) -> None:
        with self._file.open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
