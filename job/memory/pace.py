"""A steady pace for a thread that does something again and again."""

from __future__ import annotations

import threading
import time

_SHORT_SECONDS = 0.1


class Pace:
    """Rounds of equal length from construction on; what takes longer skips rounds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = time.monotonic()

    def wait(self, ended: threading.Event) -> bool:
        """Wait until the next round begins, the first one at once; whether it is the end."""
        now = time.monotonic()
        pause = self._next - now
        self._next = max(self._next, now - self._seconds) + self._seconds
        if pause > _SHORT_SECONDS:
            return ended.wait(pause)
        if pause > 0:
            time.sleep(pause)  # half the CPU time of waiting for an event
        return ended.is_set()
