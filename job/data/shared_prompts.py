"""Prompts that solutions of one problem have in common, and that are computed once for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from job.data.token_cache import TokenizedSet

Indices = NDArray[np.int64]

SAVES_ENOUGH = 1.1  # times fewer tokens to compute
_LOOKED_AT = 1000  # problems, to say what sharing saves


class SharedPrompts:
    """How many first tokens all solutions of a problem have in common; at most those of a prompt.

    Found when first asked for, problem by problem: all tokens of a large set would take long.

    Attributes:
        problems: int64 [n], each sequence's problem, counted from 0.
    """

    def __init__(self, data: TokenizedSet) -> None:
        self._data = data
        _, problems, sizes = np.unique(data.problems, return_inverse=True, return_counts=True)
        self.problems: Indices = problems.astype(np.int64)
        self._rows = np.argsort(self.problems, kind="stable")  # problem by problem
        self._ends = np.cumsum(sizes)
        self._counts = np.where(sizes > 1, -1, 0)  # not known yet, or none

    def counts(self, rows: Indices) -> Indices:
        """Tokens that each of these sequences begins with as all others of its problem do."""
        problems = self.problems[rows]
        for problem in np.unique(problems[self._counts[problems] < 0]):
            self._counts[problem] = self._common(self._solutions(problem))
        return self._counts[problems]

    def _solutions(self, problem: int) -> Indices:
        end = self._ends[problem]
        return self._rows[self._ends[problem - 1] if problem else 0 : end]

    def _common(self, rows: Indices) -> int:
        tokens, starts = self._data.tokens.view(np.ndarray), self._data.offsets[rows].tolist()
        first = tokens[starts[0] :][: self._data.response_starts[rows].min()]
        for start in starts[1:]:
            differs = first != tokens[start : start + len(first)]
            if differs.any():
                first = first[: differs.argmax()]
        return len(first)

    def shared(self, rows: Indices) -> tuple[Indices, Indices]:
        """Which of these sequences computes each one's first tokens, and how many: int64 [b] both.

        It is the first of its problem, which shares none itself.
        """
        _, first, which = np.unique(self.problems[rows], return_index=True, return_inverse=True)
        leaders = first[which]
        return leaders, np.where(leaders == np.arange(len(rows)), 0, self.counts(rows))

    def saving(self, together: int | None = None) -> float:
        """Tokens of some problems over those that are computed, with all solutions of a problem
        together or at most so many.
        """
        starts = np.concatenate(([0], self._ends[:-1]))[:_LOOKED_AT]
        sizes = self._ends[:_LOOKED_AT] - starts
        counts = self.counts(self._rows[starts])
        groups = 1 if together is None else -(-sizes // together)
        tokens = int(self._data.lengths[self._rows[: sizes.sum()]].sum())
        return tokens / (tokens - int((counts * (sizes - groups)).sum()))


def shared_in_evaluations(data: TokenizedSet) -> SharedPrompts | None:
    """The set's prompts, if sharing them saves enough where any order will do."""
    prompts = SharedPrompts(data)
    return prompts if prompts.saving() >= SAVES_ENOUGH else None


@dataclass(frozen=True, eq=False)
class Groups:
    """Which units of an epoch come one after the other.

    Attributes:
        problems: int64 [units], what those have in common.
        most: units, at most.
    """

    problems: Indices
    most: int

    def arrange(self, order: Indices, generator: np.random.Generator) -> Indices:
        """An order of all units in groups, which others are in one changes with the order given."""
        by_problem = order[np.argsort(self.problems[order], kind="stable")]
        problems = self.problems[by_problem]
        begins = np.flatnonzero(np.diff(problems, prepend=-1))
        within = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
        groups = np.cumsum(within % self.most == 0) - 1
        place = generator.permutation(groups[-1] + 1)
        return by_problem[np.argsort(place[groups], kind="stable")]
