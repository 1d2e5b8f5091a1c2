"""Ends a process that makes no progress, and says where it hung."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from job.common.errors import Exit, NoProgress
from job.common.files import try_for
from job.distributed.failure import CAUSE_SECONDS, LAST_WORDS_SECONDS

_PAUSES, _LONGEST_PAUSE_SECONDS = 20, 1.0  # between two looks at whether there was a beat
_log = logging.getLogger(__name__)


class Watchdog:
    """A thread that ends the process when `beat` was not called for `seconds`.

    Seconds in which the process was suspended do not count. The stacks of all threads go to `file`.
    A stuck collective cannot be cancelled; a new attempt can go on from the last checkpoint.
    """

    def __init__(
        self, seconds: float, file: Path, report: Callable[[NoProgress], None] = lambda error: None
    ) -> None:
        self._report = report
        self._seconds, self._file = seconds, file
        self._beats = 0

    def beat(self) -> None:
        self._beats += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Expect beats for the length of the body."""
        self.beat()
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(ended,), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, ended: threading.Event) -> None:
        pause = min(_LONGEST_PAUSE_SECONDS, self._seconds / _PAUSES)
        silent, beats = 0.0, self._beats
        while silent < self._seconds:
            if ended.wait(pause):
                return
            # not by the clock, which goes on while the whole process is suspended
            silent = silent + pause if beats == self._beats else 0.0
            beats = self._beats
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
