"""Which rows a critic is evaluated on."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from job.training.data import sample_of_problems, warn_of_one_label


def test_a_sample_is_of_whole_problems_from_all_over_the_file() -> None:
    problems = np.repeat(np.arange(100, dtype=np.uint64), 8)
    rows = sample_of_problems(problems, 161)
    assert len(rows) == 161
    assert (np.diff(rows) > 0).all()
    counts = np.bincount(problems[rows].astype(int), minlength=100)
    assert sorted(counts.tolist())[-21:] == [1, *[8] * 20]
    assert (counts[:50] > 0).sum() > 5, "not the first rows alone"
    assert (counts[50:] > 0).sum() > 5, "nor the last"


def test_a_sample_is_the_same_in_every_run_and_a_larger_one_holds_it() -> None:
    problems = np.random.default_rng(1).integers(0, 2**63, 50).astype(np.uint64).repeat(3)
    small, large = (sample_of_problems(problems, n) for n in (30, 90))
    assert np.array_equal(small, sample_of_problems(problems, 30))
    assert set(small) <= set(large)


@pytest.mark.parametrize("most", [None, 7, 8])
def test_all_rows_are_kept_where_no_more_are_asked_for(most: int | None) -> None:
    assert sample_of_problems(np.arange(7, dtype=np.uint64), most).tolist() == list(range(7))


def test_evaluations_of_one_label_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_one_label(np.array([0.0, 0.0, 1.0]))
        assert not caplog.text
        warn_of_one_label(np.array([1.0, 1.0]))
    assert "all 2 solutions of the evaluations have the reward 1" in caplog.text
