"""Memory over time in a bounded number of points, however long it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LIMIT = 2000


class MemorySeries:
    """Figures by time and phase, thinned so that no maximum is lost.

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
        known = self._points.get(key)
        if known is None:
            self._points[key] = (seconds, values)
            return
        largest = tuple(map(_larger, known[1], values))
        self._points[key] = (seconds if _leads(values, known[1]) else known[0], largest)

    def _thin(self) -> None:
        while len(self._points) > self._limit // 2:
            self._width *= 2
            points, self._points = self._points, {}
            for (_, phase), (seconds, values) in points.items():
                self._put(seconds, phase, values)

    def forget(self, name: str) -> None:
        """Make a figure unknown throughout."""
        place = self._columns.index(name)
        for key, (seconds, values) in self._points.items():
            self._points[key] = (seconds, (*values[:place], None, *values[place + 1 :]))

    def highest(self) -> dict[str, float]:
        """The largest of each figure that was ever known."""
        columns = zip(*(values for _, values in self._points.values()), strict=True)
        known = ([v for v in column if v is not None] for column in columns)
        return {name: max(v) for name, v in zip(self._columns, known, strict=False) if v}

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
    for value, other in zip(values, known, strict=True):
        if value is not None and other is not None:
            return value > other
    return False
