"""Targets of a tokenised set, as its folder keeps them."""

from __future__ import annotations

from collections.abc import Sequence
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

    @classmethod
    def of(cls, found: Sequence[dict[int, tuple[float, float]]]) -> Targets:
        pairs = [pair for one in found for pair in one.values()]
        return cls(
            np.concatenate(([0], np.cumsum([len(one) for one in found]))).astype(np.int64),
            np.asarray([at for one in found for at in one], np.int64),
            np.asarray([value for value, _ in pairs], np.float64),
            np.asarray([weight for _, weight in pairs], np.float64),
        )

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
