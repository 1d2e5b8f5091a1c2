"""Targets of a tokenised set, as its folder keeps them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from job.common.schema import Spread

_FILE = "targets.npz"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Targets:
    """Those of a tokenised set: example i has `at[offsets[i]:offsets[i + 1]]`, none if it is empty.

    Attributes:
        offsets: int64 [n + 1].
        at: int64 [m], tokens, counted from the example's first; ascending in each example.
        values, weights: float64 [m].
    """

    offsets: NDArray[np.int64]
    at: NDArray[np.int64]
    values: Floats
    weights: Floats

    def write(self, folder: Path) -> None:
        np.savez(folder / _FILE, **vars(self))

    @classmethod
    def read(cls, folder: Path) -> Targets | None:
        if not (folder / _FILE).exists():
            return None
        with np.load(folder / _FILE) as stored:
            return cls(*(stored[name] for name in ("offsets", "at", "values", "weights")))

    def spread(self, row: int, first: int, length: int, spread: Spread) -> tuple[Floats, Floats]:
        """Values and weights [n] of a row's n valued positions, `first` and those after it.

        A weight of 0 is no target. A row without targets has NaN and 1: its reward is the target.
        """
        mine = slice(self.offsets[row], self.offsets[row + 1])
        at, n = self.at[mine] - first, length - first
        values, weights = np.full(n, np.nan), np.ones(n)
        if not len(at):
            return values, weights
        own, own_weights = self.values[mine], self.weights[mine]
        if spread is Spread.next:
            which = np.searchsorted(at, np.arange(n))
            reached = which < len(at)
            which = np.minimum(which, len(at) - 1)
            return own[which], np.where(reached, own_weights[which], 0.0)
        valued = at >= 0
        values, weights = np.zeros(n), np.zeros(n)
        values[at[valued]], weights[at[valued]] = own[valued], own_weights[valued]
        return values, weights


class TargetList:
    """Those of example after example, as a set is written: 8 bytes an example, 24 a target."""

    def __init__(self) -> None:
        self._offsets, self._at = array("q", [0]), array("q")
        self._values, self._weights = array("d"), array("d")

    def __len__(self) -> int:
        return len(self._at)

    def add(self, found: Mapping[int, tuple[float, float]]) -> None:
        """The next example's: value and weight by token."""
        for at, (value, weight) in found.items():
            self._at.append(at)
            self._values.append(value)
            self._weights.append(weight)
        self._offsets.append(len(self._at))

    def stored(self) -> Targets:
        parts = (self._offsets, self._at, self._values, self._weights)
        return Targets(*(np.asarray(part) for part in parts))
