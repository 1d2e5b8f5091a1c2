"""A steady pace for a thread that does something again and again."""

from __future__ import annotations

import time


class Pace:
    """Rounds of equal length from construction on; what takes longer skips rounds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = time.monotonic()

    def pause(self) -> float:
        """Seconds until the next round begins; none before the first."""
        now = time.monotonic()
        left = max(0.0, self._next - now)
        self._next = max(self._next, now - self._seconds) + self._seconds
        return left
