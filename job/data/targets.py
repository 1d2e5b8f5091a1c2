"""Targets at positions of a response: where rows have them, and at which tokens they lie."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from job.common.errors import quoted
from job.common.schema import Spread

CHARACTER, TOKEN, STEP, END = "character", "token", "step", "end"
UNITS = (CHARACTER, TOKEN, STEP)
_NAMES = ("at", "value", "weight", "unit")
_FILE = "targets.npz"
Floats = NDArray[np.float64]


class Target(NamedTuple):
    """What the value is to be once `at` characters of the response are read, or `at` tokens."""

    at: int
    value: float
    weight: float = 1.0
    unit: str = CHARACTER


class TargetError(ValueError):
    """What is wrong with the targets of one row."""


def read_targets(
    given: Any, name: str, response: str, label: Callable[[Any, str], float]
) -> tuple[Target, ...]:
    """A row's targets: a list of {at, value}, with `unit` (characters by default) and `weight`.

    A step is a line of the response that is not blank; its target stands at its end, as character.

    Args:
        label: what reads a value.

    Raises:
        TargetError: it is no such list, or a target lies outside the response.
    """
    if not isinstance(given, list) or not given:
        raise TargetError(f"field {name!r} must be a list of targets, not {quoted(given)}")
    return tuple(_read_one(one, f"{name}[{i}]", response, label) for i, one in enumerate(given))


def _read_one(one: Any, name: str, response: str, label: Callable[[Any, str], float]) -> Target:
    if not isinstance(one, dict) or not {"at", "value"} <= one.keys() <= set(_NAMES):
        raise TargetError(f"{name}: an object with {', '.join(_NAMES)}, not {quoted(one)}")
    at, unit, weight = one["at"], one.get("unit") or CHARACTER, one.get("weight")
    weight = 1.0 if weight is None else weight
    if unit not in UNITS:
        raise TargetError(f"{name}.unit: {quoted(unit)} is none of {', '.join(UNITS)}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
        raise TargetError(f"{name}.weight: {quoted(weight)} is no number above 0")
    if isinstance(at, bool) or not isinstance(at, int) or at < 0:
        raise TargetError(f"{name}.at: {quoted(at)} is no whole number from 0 on")
    places = [0, *step_ends(response)] if unit == STEP else range(len(response) + 1)
    if unit != TOKEN and at >= len(places):
        raise TargetError(f"{name}.at: {at}, and the response has {len(places) - 1} {unit}s")
    value = label(one["value"], f"{name}.value")
    if unit == TOKEN:
        return Target(at, value, float(weight), TOKEN)
    return Target(places[at], value, float(weight))


def step_ends(response: str) -> list[int]:
    """Characters up to the end of each line that is not blank."""
    ends, start = [], 0
    for line in response.splitlines(keepends=True):
        if bare := line.rstrip():
            ends.append(start + len(bare))
        start += len(line)
    return ends


def by_token(
    targets: Sequence[Target], prompt: str, ends: Sequence[int], response_start: int
) -> dict[int, tuple[float, float]]:
    """Value and weight by token of the sequence; of several at one token, the weighted mean.

    Args and errors: as of `token_of`.
    """
    sums: dict[int, tuple[float, float]] = {}
    for target in targets:
        at = token_of(target, prompt, ends, response_start)
        if at >= 0:
            value, weight = sums.get(at, (0.0, 0.0))
            sums[at] = value + target.weight * target.value, weight + target.weight
    return {at: (value / weight, weight) for at, (value, weight) in sorted(sums.items())}


def token_of(target: Target, prompt: str, ends: Sequence[int], response_start: int) -> int:
    """The token of a sequence at which a target lies.

    A character inside a token belongs to the token that ends at or after it; what stands before
    the response lies at the last token before it, at -1 if there is none.

    Args:
        ends: characters of prompt and response up to the end of each token.

    Raises:
        TargetError: the response has fewer tokens.
    """
    last = len(ends) - 1
    if target.unit == END:
        return last
    if target.unit == CHARACTER and target.at:
        return min(bisect.bisect_left(ends, len(prompt) + target.at, response_start), last)
    at = response_start - 1 + target.at
    if at > last:
        raise TargetError(f"targets: token {target.at} of {last + 1 - response_start}")
    return at


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
