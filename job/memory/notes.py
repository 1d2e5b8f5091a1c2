"""What could not be measured: each problem once, however often it is met."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

_log = logging.getLogger(__name__)


@dataclass
class Note:
    """`call` met `problem` `since` seconds after the beginning, `until` it answered again."""

    call: str
    problem: str
    since: float
    until: float | None = None


class Notes:
    """The problems met since construction; threads may share them."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._notes: dict[tuple[str, str], Note] = {}

    def add(self, call: str, problem: str, *, since: float | None = None) -> None:
        """Take down that a call met a problem, now or at `since` on time.monotonic's clock."""
        seconds = (time.monotonic() if since is None else since) - self._began
        note = Note(call, problem, round(seconds, 3))
        known = self._notes.setdefault((call, problem), note)
        if known is note:
            _log.warning("%s: %s; going on without it", call, problem)
        known.until = None

    def settle(self, call: str) -> None:
        """Take down that a call answers again."""
        for note in list(self._notes.values()):
            if note.call == call and note.until is None:
                note.until = round(time.monotonic() - self._began, 3)

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(note) for note in list(self._notes.values())]
