"""Embedded labelled data whose optimal values are known in closed form.

A problem is a chain of single-digit additions and subtractions modulo 10, solved step by step:

    prompt    7+5-3?
    response  7+5=2;2-3=9;A9

Each step's result is wrong with probability p, and later steps build on the wrong digit. The
reward is 1 if no step was wrong. After a token, the best prediction of the reward is 0 once a
step was wrong, else (1 - p) ** (steps whose result is still to come).
"""

from __future__ import annotations

import zlib
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
    count: int,
    *,
    min_steps: int,
    max_steps: int,
    error_probability: float,
    attempts: int,
    seed: int,
    held_out: bool = False,
) -> Iterator[Chain]:
    """`count` chains, `attempts` in a row to each problem; the i-th depends on i and the rest.

    A tenth of all problems, chosen by their text, is held out: no problem is on both sides.
    """
    for start in range(0, count, _CHUNK * attempts):
        rng = np.random.default_rng([seed, int(held_out), start])
        for first in range(start, min(count, start + _CHUNK * attempts), attempts):
            digits, signs = _draw_problem(rng, min_steps, max_steps, held_out)
            shape = (attempts, len(signs))
            wrong = rng.random(shape) < error_probability
            slips = np.where(wrong, rng.integers(1, 10, shape), 0).tolist()
            for slip in slips[: count - first]:
                yield _solve(digits, signs, slip, error_probability)


def _draw_problem(
    rng: np.random.Generator, low: int, high: int, held_out: bool
) -> tuple[list[int], list[int]]:
    """Digits and signs of a problem from the side asked for."""
    while True:
        steps = int(rng.integers(low, high + 1))
        digits = rng.integers(0, 10, steps + 1).tolist()
        signs = rng.choice([1, -1], steps).tolist()
        if is_held_out(_prompt(digits, signs)) == held_out:
            return digits, signs


def is_held_out(prompt: str) -> bool:
    return zlib.crc32(prompt.encode()) % 10 == 0


def _prompt(digits: list[int], signs: list[int]) -> str:
    operators = ["+" if sign > 0 else "-" for sign in signs]
    return str(digits[0]) + "".join(map("{}{}".format, operators, digits[1:])) + "?"


def _solve(digits: list[int], signs: list[int], slips: list[int], p: float) -> Chain:
    """Write out a chain in which step i is off by slips[i] (0 = right)."""
    response, optimal = "", []
    current, right = digits[0], True
    for i, (digit, sign, slip) in enumerate(zip(digits[1:], signs, slips, strict=True)):
        result = (current + sign * digit + slip) % 10
        operator = "+" if sign > 0 else "-"
        step = f"{current}{operator}{digit}={result};"
        before = (1 - p) ** (len(signs) - i) if right else 0.0
        right = right and slip == 0
        after = (1 - p) ** (len(signs) - i - 1) if right else 0.0
        response += step
        optimal += [before] * (len(step) - 2) + [after] * 2
        current = result
    final = 1.0 if right else 0.0
    return Chain(_prompt(digits, signs), f"{response}A{current}", final, (*optimal, final, final))
