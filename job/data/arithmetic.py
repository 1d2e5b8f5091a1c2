"""Embedded labelled data whose optimal values are known in closed form.

A problem is a chain of single-digit additions and subtractions modulo 10, solved step by step:

    prompt    7+5-3?
    response  7+5=2;2-3=9;A9

Each step's result is wrong with probability p, and later steps build on the wrong digit. The
reward is 1 if no step was wrong. After a token, the best prediction of the reward is 0 once a
step was wrong, else (1 - p) ** (steps whose result is still to come).
"""

from __future__ import annotations

from collections.abc import Iterator
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
    count: int, *, min_steps: int, max_steps: int, error_probability: float, seed: int
) -> Iterator[Chain]:
    """`count` chains; the i-th depends on the other arguments and i alone."""
    for start in range(0, count, _CHUNK):
        rng = np.random.default_rng([seed, start])
        for _ in range(min(_CHUNK, count - start)):
            yield _draw_chain(rng, min_steps, max_steps, error_probability)


def _draw_chain(rng: np.random.Generator, low: int, high: int, p: float) -> Chain:
    steps = int(rng.integers(low, high + 1))
    digits = rng.integers(0, 10, steps + 1).tolist()
    signs = rng.choice([1, -1], steps).tolist()
    slips = np.where(rng.random(steps) < p, rng.integers(1, 10, steps), 0).tolist()
    return _solve(digits, signs, slips, p)


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
