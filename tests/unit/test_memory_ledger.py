"""The course of memory, thinned: bounded, and no maximum is lost."""

from __future__ import annotations

import numpy as np

from job.memory.ledger import MemorySeries


def filled(count: int, limit: int) -> tuple[MemorySeries, np.ndarray, list[str]]:
    series = MemorySeries(["a", "b"], 0.04, limit)
    values = np.random.default_rng(0).random((count, 2))
    phases = [("forward", "backward", "optimizer")[i % 3] for i in range(count)]
    for i in range(count):
        series.add(i * 0.04, phases[i], {"a": values[i, 0], "b": values[i, 1]})
    return series, values, phases


def test_a_short_course_is_kept_as_it_is() -> None:
    series, values, phases = filled(90, 100)
    columns = series.columns()
    assert columns["phase"] == phases
    np.testing.assert_array_equal(columns["a"], values[:, 0])
    np.testing.assert_allclose(columns["seconds"], np.arange(90) * 0.04, atol=1e-3)


def test_a_long_course_is_bounded_and_keeps_each_phases_maximum() -> None:
    series, values, phases = filled(50_000, 100)
    columns = series.columns()
    assert 30 <= len(columns["seconds"]) <= 100
    for phase in set(phases):
        there = np.array(phases) == phase
        for k, name in enumerate("ab"):
            kept = np.array(columns[name])[np.array(columns["phase"]) == phase]
            assert kept.max() == values[there, k].max()
    highest = int(np.argmax(values[:, 0]))
    assert columns["seconds"][int(np.argmax(columns["a"]))] == round(highest * 0.04, 3)
    assert np.diff(columns["seconds"]).max() < 50_000 * 0.04 / 5  # spread over all of it


def test_unknown_figures_stay_unknown() -> None:
    series = MemorySeries(["a", "b"], 1.0)
    series.add(0.1, "load", {"b": 2.0})
    series.add(0.2, "load", {"a": 1.0})
    series.add(5.0, "load", {})
    assert series.columns() == {
        "seconds": [0.1, 5.0],
        "phase": ["load", "load"],
        "a": [1.0, None],
        "b": [2.0, None],
    }


def test_an_empty_course_has_empty_columns() -> None:
    columns = MemorySeries(["a"], 1.0).columns()
    assert columns == {"seconds": [], "phase": [], "a": []}
