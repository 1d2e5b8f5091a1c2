"""Ends a process that makes no progress, and says where it hung."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from job.outcome import Exit

_log = logging.getLogger(__name__)


class Watchdog:
    """A thread that ends the process when `beat` was not called for `seconds`.

    The stacks of all threads go to `file`. A stuck collective cannot be cancelled; a new attempt
    can go on from the last checkpoint.
    """

    def __init__(self, seconds: float, file: Path) -> None:
        self._seconds, self._file = seconds, file
        self._beaten = time.monotonic()
        self._ended = threading.Event()

    def beat(self) -> None:
        self._beaten = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while (left := self._beaten + self._seconds - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        with self._file.open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        _log.error(
            "no progress for %.0f s: a collective or a file system hangs; "
            "ended with exit code %d, stacks of all threads in %s",
            *(self._seconds, Exit.CRASHED, self._file),
        )
        logging.shutdown()
        os._exit(Exit.CRASHED)
