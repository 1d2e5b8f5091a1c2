"""The benchmark's data as libraries want it: lists of examples, with the rows in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

IGNORED = -100  # as label: no target


class Examples:
    """Sequences of token ids, where their responses begin, and their rewards (0 or 1)."""

    def __init__(self, folder: str) -> None:
        tokens = np.fromfile(Path(folder) / "tokens.bin", np.uint32)
        with np.load(Path(folder) / "index.npz") as index:
            self._ids = [part.tolist() for part in np.split(tokens, index["offsets"][1:-1])]
            self._starts = index["response_starts"].tolist()
            self._rewards = index["rewards"].astype(int).tolist()

    def labelled(self) -> list[dict[str, Any]]:
        """The reward at each token of the response."""
        return [
            {
                "input_ids": ids,
                "labels": [IGNORED] * start + [reward] * (len(ids) - start),
                "rows": [row],
            }
            for row, (ids, start, reward) in enumerate(
                zip(self._ids, self._starts, self._rewards, strict=True)
            )
        ]

    def pairs(self, better: str, worse: str) -> list[dict[str, Any]]:
        """Each row and the one after it, under the given names."""
        firsts = range(0, len(self._ids), 2)
        return [
            {better: self._ids[row], worse: self._ids[row + 1], "rows": [row, row + 1]}
            for row in firsts
        ]
