"""What `make test` runs of large grids, and when it is too expensive."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from budget import SLACK, over, part
from thinning import covering

GRID = [{"a": str(a), "b": str(b), "c": str(c)} for a, b, c in product(range(4), "xy", range(3))]


def _combinations(cases: list[dict[str, str]], together: int) -> set[object]:
    return {some for case in cases for some in combinations(sorted(case.items()), together)}


@pytest.mark.parametrize(("together", "fewest"), [(1, 4), (2, 12), (3, 24)])
def test_few_cases_cover_what_all_of_a_grid_do(together: int, fewest: int) -> None:
    kept = [GRID[number] for number in covering(GRID, together)]
    assert _combinations(kept, together) == _combinations(GRID, together)
    assert len(kept) == fewest


def test_only_what_occurs_is_covered() -> None:
    diagonal = [{"a": str(k), "b": str(k)} for k in range(3)]
    assert covering(diagonal, together=2) == {0, 1, 2}
    assert covering([]) == set()
    assert covering([{}]) == set()


def test_a_part_may_take_what_is_planned_and_some_slack() -> None:
    planned = {"unit": 100.0, "cluster": 10.0}
    assert over({"unit": 100 * SLACK, "cluster": 9}, planned) == []
    (line,) = over({"unit": 100 * SLACK + 1, "cluster": 9}, planned)
    assert line == "tests/unit took 131 CPU seconds, and 100 are planned"


def test_a_part_without_a_plan_may_take_nothing() -> None:
    assert len(over({"new": 1.0}, {})) == 1


def test_parts_are_the_folders_of_tests() -> None:
    assert part("tests/unit/test_selection.py::test_it[a/b]") == "unit"
