"""The benchmark of large data sets, at a small size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def large(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("data")


def test_rows_are_four_solutions_of_each_problem_and_the_same_each_time(large: ModuleType) -> None:
    found = list(large.rows(41, 3))
    assert found == list(large.rows(41, 3))
    assert len({row["prompt"] for row in found}) == 11
    assert found[0]["prompt"] == found[3]["prompt"] != found[4]["prompt"]
    mean = sum(len(row["prompt"] + row["response"]) for row in found) / len(found)
    assert 350 < mean < 750  # characters, as GSM8K's


def test_growth_is_bytes_a_row_between_the_two_largest(large: ModuleType) -> None:
    sizes = [
        {"rows": rows, **{way: {"peak_mb": peak} for way in large.WAYS}}
        for rows, peak in ((100, 300.0), (1_000_000, 350.0), (3_000_000, 450.0))
    ]
    assert large.growth(sizes) == dict.fromkeys(large.WAYS, 50.0)


@pytest.mark.slow
def test_both_ways_run_at_a_small_size(large: ModuleType, tmp_path: Path) -> None:
    large.write_rows(tmp_path / "train.jsonl", 300, 0)
    large.write_rows(tmp_path / "validation.jsonl", 40, 1)
    large.write_model(tmp_path / "model", 0)
    tokenised = large.tokenising(tmp_path)
    assert 60 < tokenised["tokens_per_row"] < 400
    started = large.starting(tmp_path)
    assert started["seconds_of_the_first_plan"] > 0
    assert started["seconds_of_the_cache_s_keys"] > 0
    assert started["peak_mb"] >= started["mb_before"] > 0
