"""What a GPU reports beside its memory, over a telemetry window and over a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from job.memory.nvml import THROTTLE_REASONS

_FRESH_SECONDS = 10.0  # how long a figure stands for a window in which none was read
_HIGHEST = ("temperature_celsius", "ecc_uncorrected_errors")  # of other figures the mean

Figures = dict[str, float]


class Gauges:
    """Means of figures that are read about once a second, by another thread."""

    def __init__(self) -> None:
        self._run, self._window = _Tally(), _Tally()
        self._last: dict[str, tuple[float, float]] = {}  # when, and what
        self._throttled: dict[str, int] = {}
        self._lock = threading.Lock()  # never held while anything is read

    def add(self, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        with self._lock:
            self._run.add(figures)
            self._window.add(figures)
            self._last |= {name: (now, value) for name, value in figures.items()}
            for reason in throttle_names(figures.get("throttle_reasons", 0)):
                self._throttled[reason] = self._throttled.get(reason, 0) + 1

    def take_window(self) -> Figures:
        """Figures since the last call, or the last ones where none were read since."""
        now = time.monotonic()
        with self._lock:
            window, self._window = self._window, _Tally()
            last = {n: v for n, (when, v) in self._last.items() if now - when < _FRESH_SECONDS}
        return last | {name: window.figure(name) for name in window.counts}

    def summary(self) -> dict[str, Any]:
        """Mean and highest of each figure, and each throttle reason's share of the readings."""
        with self._lock:
            run, throttled = self._run, dict(self._throttled)
            figures = {
                name: {"mean": run.sums[name] / count, "highest": run.highest[name]}
                for name, count in run.counts.items()
                if name != "throttle_reasons"
            }
            readings = run.counts.get("throttle_reasons", 0)
        if not readings:
            return figures
        return figures | {"throttled": {name: n / readings for name, n in throttled.items()}}


class _Tally:
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.sums, self.highest = Figures(), Figures()
        self._reasons = 0

    def add(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.counts[name] = self.counts.get(name, 0) + 1
            self.sums[name] = self.sums.get(name, 0) + value
            self.highest[name] = max(self.highest.get(name, value), value)
        self._reasons |= int(figures.get("throttle_reasons", 0))

    def figure(self, name: str) -> float:
        """What stands for all of them: mean, highest, or every bit that was set."""
        if name == "throttle_reasons":
            return self._reasons
        return self.highest[name] if name in _HIGHEST else self.sums[name] / self.counts[name]


def throttle_names(reasons: float) -> list[str]:
    """Names of the bits that are set."""
    return [name for bit, name in THROTTLE_REASONS.items() if int(reasons) & bit]
