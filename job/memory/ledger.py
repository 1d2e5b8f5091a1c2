"""What a recording takes down: peaks, the course of memory, and what could not be measured.

Free of torch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLUMNS = ("device_used", "process", "allocated", "reserved", "inactive")  # bytes

_LIMIT = 2000  # points of a course
_log = logging.getLogger(__name__)

Figures = dict[str, float]


class MemoryLedger:
    """Peaks by phase, by telemetry window and over a run, and the course; threads may share it."""

    def __init__(self, phases: Iterable[str], seconds: float) -> None:
        """`seconds`: between two samples."""
        self._phases = {phase: Figures() for phase in phases}
        self._run, self._window = Figures(), Figures()
        self._series = MemorySeries(COLUMNS, seconds)
        self._wrong: set[str] = set()
        self._lock = threading.Lock()  # never held while anything is measured
        self.samples = 0

    def sample(self, seconds: float, phase: str, figures: Figures, sure: bool) -> None:
        """Count a sample; where the phase changed meanwhile it is not `sure`, nor the phase's."""
        with self._lock:
            self.samples += 1
            self._series.add(seconds, phase, figures)
            self._raise(figures, *([self._phases[phase]] if sure else []))

    def exact(self, phase: str, peaks: Figures) -> None:
        """Count a phase's peaks, which nothing has escaped."""
        with self._lock:
            self._raise(peaks, self._phases[phase])

    def _raise(self, figures: Figures, *of_phase: Figures) -> None:
        for peaks in (self._run, self._window, *of_phase):
            for name, value in figures.items():
                peaks[name] = max(value, peaks.get(name, value))

    def forget(self, name: str) -> None:
        """Leave out a figure that has turned out to be wrong."""
        with self._lock:
            self._wrong.add(name)

    def known(self, figures: Figures) -> Figures:
        """Of some figures those that are kept, in the order of the columns."""
        return {n: figures[n] for n in COLUMNS if n in figures and n not in self._wrong}

    def take_window(self) -> Figures:
        """Peaks since the last call."""
        with self._lock:
            window, self._window = self._window, Figures()
        return self.known(window)

    def peaks(self) -> dict[str, Figures]:
        """Peaks by phase, of phases that there were."""
        with self._lock:
            return {phase: self.known(f) for phase, f in self._phases.items() if self.known(f)}

    def peak(self) -> Figures:
        """Peaks over the whole run."""
        with self._lock:
            return self.known(self._run)

    def series(self) -> dict[str, list[Any]]:
        with self._lock:
            columns = self._series.columns()
            return columns | {name: [None] * len(columns["seconds"]) for name in self._wrong}


class MemorySeries:
    """Figures by time and phase in a bounded number of points, so that no maximum is lost.

    Time is divided into equal bins, and a bin keeps one point per phase: the largest of each
    figure, at the time of the first figure's largest. When there are too many points the bins
    become twice as wide.
    """

    def __init__(self, columns: Sequence[str], seconds: float, limit: int = _LIMIT) -> None:
        """`columns`: names of the figures; `seconds`: the first width of a bin."""
        self._columns, self._width, self._limit = tuple(columns), seconds, limit
        self._points: dict[tuple[int, str], tuple[float, tuple[float | None, ...]]] = {}

    def add(self, seconds: float, phase: str, figures: Mapping[str, float]) -> None:
        self._put(seconds, phase, tuple(figures.get(name) for name in self._columns))
        if len(self._points) > self._limit:
            self._thin()

    def _put(self, seconds: float, phase: str, values: tuple[float | None, ...]) -> None:
        key = (int(seconds / self._width), phase)
        if key in self._points:
            before, known = self._points[key]
            seconds = seconds if _leads(values, known) else before
            values = tuple(map(_larger, known, values))
        self._points[key] = (seconds, values)

    def _thin(self) -> None:
        while len(self._points) > self._limit // 2:
            self._width *= 2
            points, self._points = self._points, {}
            for (_, phase), (seconds, values) in points.items():
                self._put(seconds, phase, values)

    def columns(self) -> dict[str, list[Any]]:
        """Seconds, phase, and each figure, in the order of time; None where it was not known."""
        points = [(seconds, phase, v) for (_, phase), (seconds, v) in self._points.items()]
        rows = sorted(points, key=lambda point: point[0])
        return {
            "seconds": [round(seconds, 3) for seconds, _, _ in rows],
            "phase": [phase for _, phase, _ in rows],
            **{name: [row[2][i] for row in rows] for i, name in enumerate(self._columns)},
        }


def _larger(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return b if a is None else a
    return max(a, b)


def _leads(values: Sequence[float | None], known: Sequence[float | None]) -> bool:
    """Whether the first figure that both have is the larger one in `values`."""
    pairs = zip(values, known, strict=True)
    return next((new > old for new, old in pairs if new is not None and old is not None), False)


class Notes:
    """What could not be measured: each problem once, however often it is met.

    A row says that `call` met `problem`, `since` so many seconds after the beginning, and `until`
    when, if it has answered again. Threads may share it.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, call: str, problem: str, *, since: float | None = None) -> None:
        """Take down that a call met a problem, now or at `since` on time.monotonic's clock."""
        seconds = (time.monotonic() if since is None else since) - self._began
        row = {"call": call, "problem": problem, "since": round(seconds, 3), "until": None}
        known = self._rows.setdefault((call, problem), row)
        if known is row:
            _log.warning("%s: %s; going on without it", call, problem)
        known["until"] = None

    def settle(self, call: str) -> None:
        """Take down that a call answers again."""
        for row in list(self._rows.values()):
            if row["call"] == call and row["until"] is None:
                row["until"] = round(time.monotonic() - self._began, 3)

    def rows(self) -> list[dict[str, Any]]:
        return [dict(row) for row in list(self._rows.values())]
