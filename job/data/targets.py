"""Targets at positions of a response: where rows have them, and at which tokens they lie."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from job.common.errors import quoted

CHARACTER, TOKEN, STEP, END = "character", "token", "step", "end"
UNITS = (CHARACTER, TOKEN, STEP)
_NAMES = ("at", "value", "weight", "unit")


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


def looks_like_targets(given: Any) -> bool:
    """Whether a value is meant as targets: a list of objects, and not of somebody else's."""
    objects = isinstance(given, list) and all(isinstance(one, dict) for one in given)
    return objects and any("at" in one for one in given)


def last_of(targets: Sequence[Target]) -> Target:
    """The target that lies furthest into the response.

    How far tokens reach is not known here: of one that counts characters and one that counts
    tokens, it is the later in the list.
    """
    furthest: dict[str, int] = {}
    for target in targets:
        furthest[target.unit] = max(target.at, furthest.get(target.unit, 0))
    return [target for target in targets if target.at == furthest[target.unit]][-1]


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
