"""Pairs of a better and a worse solution of one problem, in which length says nothing."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Rewards = NDArray[np.float64]
Pair = tuple[int, int]  # better, worse


def balanced_pairs(rewards: Rewards, problems: NDArray[np.uint64], lengths: Indices) -> Indices:
    """(better, worse) sequences of one problem, in which length says nothing: int64 [pairs, 2].

    Within a problem the pairs closest in length come first, each sequence in one pair at most.
    Over all, as many winners are longer as are shorter than their losers: the surplus side's
    pairs of greatest length difference are dropped.
    """
    order = np.argsort(problems, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(problems[order])) + 1)
    found = [pair for group in groups for pair in _match(group, rewards, lengths)]
    pairs = np.asarray(sorted(found), np.int64).reshape(-1, 2)
    difference = lengths[pairs[:, 0]] - lengths[pairs[:, 1]]
    surplus = int((difference > 0).sum() - (difference < 0).sum())
    side = np.flatnonzero(difference > 0 if surplus > 0 else difference < 0)
    widest = side[np.argsort(-np.abs(difference[side]), kind="stable")][: abs(surplus)]
    return np.delete(pairs, widest, 0)


def with_others(pairs: Indices, n: int) -> Indices:
    """The pairs, and each other of n sequences alone, with -1 in place of a second: [units, 2]."""
    alone = np.setdiff1d(np.arange(n), pairs)
    return np.concatenate([pairs, np.stack([alone, np.full_like(alone, -1)], 1)])


def _match(group: Indices, rewards: Rewards, lengths: Indices) -> Iterator[Pair]:
    """The pairs of one problem: the closest first, of equally close ones the first in (i, j).

    n log n for n sequences. Pairs of equal length come first, and leave one reward at most in each
    length. From then on, the closest pair of all is one of neighbouring lengths: a length between
    them would differ in reward from one of the two, and be closer.
    """
    by_length: dict[int, list[int]] = {}
    for i in group.tolist():
        by_length.setdefault(int(lengths[i]), []).append(i)
    line: list[_Length] = []
    for length in sorted(by_length):
        alike = _AlikeInLength(by_length[length], rewards)
        yield from alike.pairs()
        if left := alike.unused():
            line.append(_Length(length, float(rewards[left[0]]), deque(left)))
    yield from _Line(line).pairs()


class _AlikeInLength:
    """Sequences of one problem and one length, each paired with the first that is worse.

    A tree of minima over places finds the first unused sequence with a reward below a given one.
    """

    def __init__(self, members: list[int], rewards: Rewards) -> None:
        self._members = members
        self._rewards = rewards[members].tolist()
        self._size = 1 << (len(members) - 1).bit_length()
        self._lowest = [np.inf] * (2 * self._size)
        self._lowest[self._size : self._size + len(members)] = self._rewards
        for node in range(self._size - 1, 0, -1):
            self._lowest[node] = min(self._lowest[2 * node : 2 * node + 2])

    def pairs(self) -> Iterator[Pair]:
        for better, reward in enumerate(self._rewards):
            if self._is_unused(better) and self._lowest[1] < reward:
                worse = self._first_below(reward)
                self._use(better)
                self._use(worse)
                yield self._members[better], self._members[worse]

    def unused(self) -> list[int]:
        return [member for k, member in enumerate(self._members) if self._is_unused(k)]

    def _is_unused(self, place: int) -> bool:
        return self._lowest[self._size + place] < np.inf

    def _first_below(self, reward: float) -> int:
        node = 1
        while node < self._size:
            node *= 2
            node += not self._lowest[node] < reward
        return node - self._size

    def _use(self, place: int) -> None:
        node = self._size + place
        self._lowest[node] = np.inf
        while node := node // 2:
            self._lowest[node] = min(self._lowest[2 * node : 2 * node + 2])


@dataclass
class _Length:
    """What is left of one length: sequences of one reward."""

    length: int
    reward: float
    members: deque[int]


class _Line:
    """The lengths that are left, in order, and a queue of the pairs of neighbours."""

    def __init__(self, lengths: list[_Length]) -> None:
        self._lengths = lengths
        self._before = list(range(-1, len(lengths) - 1))
        self._after = list(range(1, len(lengths) + 1))
        self._queue: list[tuple[int, int, int, int, int]] = []
        for place in range(len(lengths)):
            self._offer(place, self._after[place])

    def pairs(self) -> Iterator[Pair]:
        while self._queue:
            entry = heapq.heappop(self._queue)
            first, second = entry[3:]
            if entry != self._entry(first, second):
                continue  # one of its sequences has a pair by now
            yield entry[1], entry[2]
            for place in (first, second):
                self._lengths[place].members.popleft()
            self._close_up(first, second)

    def _close_up(self, first: int, second: int) -> None:
        """Take emptied lengths out of the line, and offer what their neighbours make now."""
        low = first if self._lengths[first].members else self._before[first]
        high = second if self._lengths[second].members else self._after[second]
        if low >= 0:
            self._after[low] = high
            self._offer(self._before[low], low)
        if high < len(self._lengths):
            self._before[high] = low
            self._offer(high, self._after[high])
        self._offer(low, high)

    def _offer(self, first: int, second: int) -> None:
        if first >= 0 and second < len(self._lengths):
            entry = self._entry(first, second)
            if entry is not None:
                heapq.heappush(self._queue, entry)

    def _entry(self, first: int, second: int) -> tuple[int, int, int, int, int] | None:
        """Gap, better and worse sequence, and their places; None where no reward is the better."""
        one, other = self._lengths[first], self._lengths[second]
        if one.reward == other.reward or not one.members or not other.members:
            return None
        better, worse = (one, other) if one.reward > other.reward else (other, one)
        gap = other.length - one.length
        return gap, better.members[0], worse.members[0], first, second
