"""Pairs of a better and a worse solution: the closest in length; length tells nothing of them."""

from __future__ import annotations

import numpy as np

from job.data.pairs import balanced_pairs


def random_solutions(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, problems and lengths; wrong solutions tend to be longer."""
    rewards = rng.choice([0.0, 0.0, 0.5, 1.0], n)
    problems = rng.choice(rng.integers(0, 2**64, max(1, n // 5), np.uint64), n)
    lengths = rng.integers(1, 60, n) + (10 * (1 - rewards)).astype(np.int64)
    return rewards, problems, lengths


def test_pairs_are_of_one_problem_with_the_better_one_first_and_each_sequence_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        rewards, problems, lengths = random_solutions(rng, int(rng.integers(1, 120)))
        pairs = balanced_pairs(rewards, problems, lengths)
        assert pairs.shape[1] == 2
        assert pairs.dtype == np.int64
        assert (rewards[pairs[:, 0]] > rewards[pairs[:, 1]]).all()
        assert (problems[pairs[:, 0]] == problems[pairs[:, 1]]).all()
        assert len(np.unique(pairs)) == pairs.size


def test_length_does_not_tell_the_better_one() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        rewards, problems, lengths = random_solutions(rng, int(rng.integers(1, 120)))
        pairs = balanced_pairs(rewards, problems, lengths)
        difference = lengths[pairs[:, 0]] - lengths[pairs[:, 1]]
        assert (difference > 0).sum() == (difference < 0).sum()
        found += len(pairs)
    assert found > 1000


def test_solutions_of_equal_length_are_all_paired() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        n = int(rng.integers(1, 100))
        rewards, problems = rng.integers(0, 2, n).astype(float), rng.integers(0, 9, n, np.uint64)
        pairs = balanced_pairs(rewards, problems, np.full(n, 7))
        groups = [rewards[problems == problem] for problem in np.unique(problems)]
        assert len(pairs) == sum(min((g == 0).sum(), (g == 1).sum()) for g in groups)


def test_the_order_of_the_rows_does_not_matter_where_no_two_pairs_are_alike() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        rewards, problems, _ = random_solutions(rng, 40)
        lengths = 2 ** rng.permutation(40)  # so that all differences differ
        order = rng.permutation(40)
        pairs = balanced_pairs(rewards, problems, lengths)
        moved = order[balanced_pairs(rewards[order], problems[order], lengths[order])]
        assert sorted(moved.tolist()) == sorted(pairs.tolist())


def test_the_closest_in_length_are_paired_and_the_widest_dropped() -> None:
    # One problem each: pairs with differences -1, -5 and +2; one of the shorter winners must go.
    rewards = np.array([1, 0, 1, 0, 1, 0, 0], float)
    lengths = np.array([10, 11, 10, 15, 12, 10, 40])
    problems = np.array([1, 1, 2, 2, 3, 3, 1], np.uint64)
    assert balanced_pairs(rewards, problems, lengths).tolist() == [[0, 1], [4, 5]]


def test_without_two_different_rewards_there_are_no_pairs() -> None:
    lengths = np.array([3, 4, 5])
    same, apart = np.ones(3), np.array([0.0, 1.0, 0.5])
    one, each = np.zeros(3, np.uint64), np.arange(3, dtype=np.uint64)
    assert balanced_pairs(same, one, lengths).shape == (0, 2)
    assert balanced_pairs(apart, each, lengths).shape == (0, 2)


def test_problems_at_both_ends_of_the_numbers_are_told_apart() -> None:
    problems = np.array([0, 2**64 - 1, 2**63, 0, 2**64 - 1, 2**63], np.uint64)
    rewards, lengths = np.array([1, 1, 1, 0, 0, 0], float), np.full(6, 5)
    assert balanced_pairs(rewards, problems, lengths).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_each_pair_is_the_closest_of_all_that_were_left() -> None:
    rng = np.random.default_rng(4)
    for _ in range(300):
        n = int(rng.integers(2, 40))
        few = rng.integers(0, int(rng.integers(2, 6)), n).astype(float)
        rewards = few if rng.random() < 0.8 else rng.random(n)
        lengths = rng.integers(1, int(rng.integers(2, 30)), n)
        everything = _closest_first(rewards, lengths)
        found = balanced_pairs(rewards, np.zeros(n, np.uint64), lengths).tolist()
        assert [pair for pair in everything if pair in found] == found
        longer = [lengths[i] > lengths[j] for i, j in everything]
        shorter = [lengths[i] < lengths[j] for i, j in everything]
        assert len(found) == len(everything) - abs(sum(longer) - sum(shorter))


def _closest_first(rewards: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    """Each sequence of one problem in one pair at most, by trying all pairs in order."""
    n, used = len(rewards), set[int]()
    candidates = sorted(
        (abs(int(lengths[i] - lengths[j])), i, j)
        for i in range(n)
        for j in range(n)
        if rewards[i] > rewards[j]
    )
    pairs = []
    for _, i, j in candidates:
        if not {i, j} & used:
            used |= {i, j}
            pairs.append([i, j])
    return sorted(pairs)


def test_many_solutions_of_one_problem_are_paired_without_looking_at_all_pairs() -> None:
    rng = np.random.default_rng(5)
    n = 50_000  # all pairs would be 600 million
    rewards, lengths = rng.integers(0, 2, n).astype(float), rng.integers(1, 10_000, n)
    pairs = balanced_pairs(rewards, np.zeros(n, np.uint64), lengths)
    assert len(pairs) > 24_000
    assert (rewards[pairs[:, 0]] == 1).all()
    assert (rewards[pairs[:, 1]] == 0).all()
    assert np.median(np.abs(lengths[pairs[:, 0]] - lengths[pairs[:, 1]])) <= 1
