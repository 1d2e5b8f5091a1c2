"""Peaks of memory by phase, by telemetry window and over a run, and the course it took."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from job.memory.series import MemorySeries

COLUMNS = ("device_used", "process", "allocated", "reserved", "inactive")  # bytes

_BATCH = 32  # samples that are counted at once: a thread that has just woken is slow

Figures = dict[str, float]


class MemoryLedger:
    """Keeps samples, which threads take, and peaks that are exact, which one thread counts."""

    def __init__(self, phases: Iterable[str], seconds: float) -> None:
        """`seconds`: between two samples."""
        self._waiting: deque[tuple[float, str, Figures, bool]] = deque()
        self._sampled = {phase: Figures() for phase in phases}
        self._exact = {phase: Figures() for phase in self._sampled}
        self._window = Figures()
        self._exact_run, self._exact_window = Figures(), Figures()
        self._series = MemorySeries(COLUMNS, seconds)
        self._lock = threading.Lock()  # never held while anything is measured
        self.samples = 0

    def sample(self, seconds: float, phase: str, figures: Figures, sure: bool) -> None:
        """Count a sample; where the phase changed meanwhile it is not `sure`, nor the phase's."""
        self.samples += 1
        self._waiting.append((seconds, phase, figures, sure))
        if len(self._waiting) >= _BATCH:
            with self._lock:
                self._count_waiting()

    def _count_waiting(self) -> None:
        while self._waiting:
            seconds, phase, figures, sure = self._waiting.popleft()
            self._series.add(seconds, phase, figures)
            raise_to(self._window, figures)
            if sure:
                raise_to(self._sampled[phase], figures)

    def exact(self, phase: str | None, peaks: Mapping[str, float]) -> None:
        """Count peaks that nothing has escaped, of a phase or, for None, of several together."""
        for known in (self._exact_run, self._exact_window):
            raise_to(known, peaks)
        if phase is not None:
            raise_to(self._exact[phase], peaks)

    def forget(self, name: str) -> None:
        """Drop a sampled figure that has turned out to be wrong."""
        with self._lock:
            self._count_waiting()
            self._series.forget(name)
            for figures in (self._window, *self._sampled.values()):
                figures.pop(name, None)

    def take_window(self) -> Figures:
        """Peaks since the last call."""
        with self._lock:
            self._count_waiting()
            window, self._window = self._window, Figures()
        exact, self._exact_window = self._exact_window, Figures()
        return _highest(window, exact)

    def peaks(self) -> dict[str, Figures]:
        """Peaks by phase, of phases that there were."""
        with self._lock:
            self._count_waiting()
            sampled = {phase: dict(figures) for phase, figures in self._sampled.items()}
        merged = {phase: _highest(f, self._exact[phase]) for phase, f in sampled.items()}
        return {phase: figures for phase, figures in merged.items() if figures}

    def peak(self) -> Figures:
        """Peaks over the whole run."""
        with self._lock:
            self._count_waiting()
            run = self._series.highest()
        return _highest(run, self._exact_run)

    def series(self) -> dict[str, list[Any]]:
        with self._lock:
            self._count_waiting()
            return self._series.columns()


def raise_to(peaks: Figures, figures: Mapping[str, float]) -> None:
    """Raise what is lower in `peaks`."""
    for name, value in figures.items():
        if value > peaks.get(name, -1):
            peaks[name] = value


def _highest(first: Figures, second: Figures) -> Figures:
    raise_to(first, second)
    return {name: first[name] for name in COLUMNS if name in first}
