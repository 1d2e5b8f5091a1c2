"""Grids of parameters: few of the cases for `make test`, and others marked for `make test-all`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import combinations
from typing import Any

import pytest


def mark_beyond(items: Iterable[pytest.Item]) -> None:
    """Mark with `all` what the mark `grid` does not need of a test's cases."""
    grids: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("grid"):
            grids[item.nodeid.partition("[")[0]].append(item)
    for cases in grids.values():
        marker = cases[0].get_closest_marker("grid")
        assert marker is not None
        kept = covering([_factors(item) for item in cases], **marker.kwargs)
        for number, item in enumerate(cases):
            if number not in kept:
                item.add_marker(pytest.mark.all)


def covering(cases: Sequence[Mapping[str, str]], together: int = 1) -> set[int]:
    """Few of the cases, with every combination of values of so many factors that occurs in one.

    Greedy, and of equals the first.
    """
    has = [set(combinations(sorted(case.items()), together)) for case in cases]
    missing = set().union(*has)
    chosen: set[int] = set()
    while missing:
        best = max(range(len(cases)), key=lambda number: len(has[number] & missing))
        missing -= has[best]
        chosen.add(best)
    return chosen


def _factors(item: pytest.Function) -> dict[str, str]:
    """A case's parameters; of those that are dataclasses, the fields."""
    found: dict[str, Any] = {}
    for name, value in item.callspec.params.items():
        if is_dataclass(value):
            found |= {f"{name}.{field.name}": getattr(value, field.name) for field in fields(value)}
        else:
            found[name] = value
    return {name: repr(value) for name, value in found.items()}
