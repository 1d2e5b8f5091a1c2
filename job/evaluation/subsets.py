"""What a rule chooses of n solutions, in expectation over all choices of n of a problem's m.

Every expectation but the weighted majority's is in closed form, so that it has no noise of its own
and no bias. Notation: m solutions of a problem, n of 1 to N; arrays over n begin at n = 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
_DRAWS = 256  # subsets of one size, where there are more and no closed form is known


def within(m: int, most: int) -> Doubles:
    """Chance that all n of a random subset are among a given `a` of the m: [N, m + 1].

    N is `most`, or m if that is less. C(a, n) / C(m, n), a factor after the other.
    """
    n = np.arange(min(most, m))[:, None]
    factors = np.maximum(np.arange(m + 1) - n, 0) / (m - n)
    chances: Doubles = np.cumprod(factors, axis=0)
    return chances


def best_of(scores: Doubles, most: int) -> Doubles:
    """Chance of each solution to be the one with the highest score of n: [N, m].

    Solutions of equal score have equal chances.
    """
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    upto = np.cumsum(size)
    chances = within(len(scores), most)
    highest = (chances[:, upto] - chances[:, upto - size]) / size
    return highest[:, group]


def pass_at(right: NDArray[np.bool_], most: int) -> Doubles:
    """Chance that one of n is right: [N]. Chen et al. 2021 (arXiv 2107.03374), equation 1."""
    return 1 - within(len(right), most)[:, int((~right).sum())]


def majority(answers: Sequence[str | None], rewards: Doubles, most: int) -> Doubles:
    """Mean reward of the answer that most of n give, ties drawn by lot: [N].

    A solution without an answer agrees with no other; an answer's reward is the mean of its
    solutions'. For each number of votes t, a polynomial whose coefficient of x^n y^w counts the
    subsets of n in which w answers have t votes and none has more.
    """
    size, worth = _by_answer(answers, rewards)
    m, most = len(rewards), min(most, len(rewards))
    total = np.zeros(most + 1)
    for votes in range(1, int(size.max()) + 1):
        leads = size >= votes
        start = _binomials(int(size[~leads].sum()), most)
        total += _won(size[leads], worth[leads], votes, start)
    return total[1:] / np.array([math.comb(m, n) for n in range(1, most + 1)], np.float64)


def _won(size: NDArray[np.int64], worth: Doubles, votes: int, start: Doubles) -> Doubles:
    """By n: the sum over subsets won with so many votes of the winners' mean worth."""
    most = len(start) - 1
    winners = min(len(size), most // votes)
    ways = np.zeros((winners + 1, most + 1))  # [w, n]
    ways[0] = start
    reward = np.zeros_like(ways)  # the same, each subset times its winners' summed worth
    for count, value in zip(size.tolist(), worth.tolist(), strict=True):
        fewer = _binomials(count, most)
        ties = fewer[votes] if votes <= most else 0.0
        fewer[votes:] = 0
        reward = _times(reward, fewer) + _shifted(reward + value * ways, votes, ties)
        ways = _times(ways, fewer) + _shifted(ways, votes, ties)
    won: Doubles = (reward[1:] / np.arange(1, winners + 1)[:, None]).sum(0)
    return won


def _binomials(count: int, most: int) -> Doubles:
    return np.array([math.comb(count, k) for k in range(most + 1)], np.float64)


def _times(polynomials: Doubles, factor: Doubles) -> Doubles:
    """Each row times a polynomial, up to the rows' degree."""
    product = np.zeros_like(polynomials)
    for power in np.flatnonzero(factor):
        length = polynomials.shape[1] - power
        product[:, power:] += factor[power] * polynomials[:, :length]
    return product


def _shifted(polynomials: Doubles, votes: int, ties: float) -> Doubles:
    """Each row times `ties` x^votes y: one more winner."""
    moved = np.zeros_like(polynomials)
    moved[1:, votes:] = ties * polynomials[:-1, : polynomials.shape[1] - votes]
    return moved


def _by_answer(
    answers: Sequence[str | None], rewards: Doubles
) -> tuple[NDArray[np.int64], Doubles]:
    """How many solutions give each answer, and their mean reward."""
    group = answer_groups(answers)
    size = np.bincount(group)
    return size, np.bincount(group, rewards) / size


def answer_groups(answers: Sequence[str | None]) -> NDArray[np.int64]:
    """The number of each solution's answer, one of its own for each solution without any: [m]."""
    numbers: dict[object, int] = {}
    keys = (("none", i) if a is None else ("answer", a) for i, a in enumerate(answers))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def weighted_majority(
    answers: Sequence[str | None], weights: Doubles, rewards: Doubles, most: int, seed: int
) -> Doubles:
    """Mean reward of the answer with the greatest sum of weights among n: [N].

    Over all subsets of a size where there are few, else over 256 of them, drawn alike: an estimate
    without bias too. Equal sums are drawn by lot.
    """
    group = answer_groups(answers)
    votes = np.eye(int(group.max()) + 1)[group]
    worth = (votes.T @ rewards) / votes.sum(0)
    most = min(most, len(rewards))
    orders = np.random.default_rng(seed).random((_DRAWS, len(rewards))).argsort(1)
    found = _heaviest(votes, weights, orders[:, :most], worth)
    for n, subsets in _few(len(rewards), most):
        found[n - 1] = _heaviest(votes, weights, subsets, worth)[-1]
    return found


def _few(m: int, most: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """For each n of which there are no more subsets than are drawn: all, [subsets, n]."""
    for n in range(1, most + 1):
        if math.comb(m, n) <= _DRAWS:
            yield n, np.array(list(itertools.combinations(range(m), n)), np.int64)


def _heaviest(
    votes: Doubles, weights: Doubles, orders: NDArray[np.int64], worth: Doubles
) -> Doubles:
    """Mean worth of the heaviest answer among the first n of each order: [n] of [orders, n]."""
    cast = votes[orders]
    sums = np.cumsum(cast * weights[orders, None], axis=1)
    sums[np.cumsum(cast, axis=1) == 0] = -np.inf  # nobody of the subset gives this answer
    first = sums >= sums.max(-1, keepdims=True) - 1e-12  # equal but for rounding
    mean: Doubles = ((first @ worth) / first.sum(-1)).mean(0)
    return mean
