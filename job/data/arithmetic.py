"""Embedded labelled data whose optimal values are known in closed form.

A problem is a chain of single-digit additions and subtractions modulo 10, solved step by step:

    prompt    7+5-3?
    response  7+5=2;2-3=9;A9

Each step's result is wrong with probability p, and later steps build on the wrong digit. The
reward is 1 if no step was wrong. After a token, the best prediction of the reward is 0 once a
step was wrong, else (1 - p) ** (steps whose result is still to come).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

ALPHABET = "0123456789+-=;?A"
_CHUNK = 1024


@dataclass(frozen=True)
class Chain:
    """One solved problem; `optimal[i]` is the optimal value after response character i."""

    prompt: str
    response: str
    reward: float
    optimal: tuple[float, ...]


def chains(
    count: int,
    *,
    min_steps: int,
    max_steps: int,
    error_probability: float,
    attempts: int,
    seed: int | Sequence[int],
) -> Iterator[Chain]:
    """`count` chains, `attempts` in a row to each problem; the i-th depends on i and the rest."""
    for start in range(0, count, _CHUNK * attempts):
        rng = np.random.default_rng([*np.atleast_1d(seed), start])
        for first in range(start, min(count, start + _CHUNK * attempts), attempts):
            steps = int(rng.integers(min_steps, max_steps + 1))
            digits = rng.integers(0, 10, steps + 1).tolist()
            signs = rng.choice([1, -1], steps).tolist()
            wrong = rng.random((attempts, steps)) < error_probability
            slips = np.where(wrong, rng.integers(1, 10, (attempts, steps)), 0).tolist()
            for slip in slips[: count - first]:
                yield _solve(digits, signs, slip, error_probability)


def _solve(digits: list[int], signs: list[int], slips: list[int], p: float) -> Chain:
    """Write out a chain in which step i is off by slips[i] (0 = right)."""
    prompt, response, optimal = str(digits[0]), "", []
    current, right = digits[0], True
    for i, (digit, sign, slip) in enumerate(zip(digits[1:], signs, slips, strict=True)):
        result = (current + sign * digit + slip) % 10
        operator = "+" if sign > 0 else "-"
        prompt += f"{operator}{digit}"
        step = f"{current}{operator}{digit}={result};"
        before = (1 - p) ** (len(signs) - i) if right else 0.0
        right = right and slip == 0
        after = (1 - p) ** (len(signs) - i - 1) if right else 0.0
        response += step
        optimal += [before] * (len(step) - 2) + [after] * 2
        current = result
    final = 1.0 if right else 0.0
    return Chain(prompt + "?", f"{response}A{current}", final, (*optimal, final, final))
