"""The grid of memory settings: what is in it, and that what differs is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from job.common.schema import FsdpConfig, ShardingStrategy
from job.memory.footprint import footprint
from job.model.architecture import TransformerConfig
from job.model.parameters import count_parameters

RESULTS = Path(__file__).parents[2] / "bench/results/memory_grid.csv"
TINY = TransformerConfig(dim=32, n_layers=2, n_heads=2, vocab_size=64, multiple_of=8)


@pytest.fixture(scope="module")
def memory_grid(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("memory_grid")


def test_the_grid_has_every_combination_once(memory_grid: ModuleType) -> None:
    names = [case.name for case in memory_grid.grid(True)]
    assert len(names) == len(set(names))
    plain = [name for name in names if "," not in name]
    assert len(plain) == 3 * 5 * (5 * 5 - 3)  # NO_SHARD on 1 and 2 GPUs alone
    assert {"70b N=8 4 GPUs SHARD_GRAD_OP", "13b N=32 64 GPUs HYBRID_SHARD"} <= set(names)
    fewer = {case.name for case in memory_grid.grid(False)}
    assert fewer < set(names)
    assert sum(name.startswith("7b") for name in fewer) == sum(n.startswith("7b") for n in names)


def test_settings_are_varied_one_at_a_time(memory_grid: ModuleType) -> None:
    cases = {case.name: case.setting for case in memory_grid.grid(False)}
    plain = cases["7b N=4 8 GPUs FULL_SHARD"]
    assert (plain.micro_batch_tokens, plain.world_size, plain.per_node) == (8192, 8, 8)
    assert plain.fsdp == FsdpConfig(sharding_strategy=ShardingStrategy.FULL_SHARD)
    exact = cases["7b N=4 8 GPUs FULL_SHARD, float32"]
    assert exact.fsdp == replace(plain.fsdp, mixed_precision=False)
    assert cases["7b N=4 8 GPUs FULL_SHARD, 64 tokens"].micro_batch_tokens == 64
    assert cases["70b N=4 64 GPUs FULL_SHARD"].per_node == 8


def _row(memory_grid: ModuleType, **changes: int) -> dict[str, object]:
    """A comparison with a simulation that finds what is predicted, with these bytes more."""
    case = next(c for c in memory_grid.grid(False) if c.name == "7b N=4 8 GPUs FULL_SHARD")
    predicted = footprint(case.setting)
    peak = memory_grid.joined(predicted.peak.components)
    peak |= {name: peak[name] + more for name, more in changes.items()}
    after = memory_grid.joined(predicted.after_backward.components)
    return memory_grid.compare(case, memory_grid.Simulated(peak, after))


def test_what_is_equal_is_within_tolerance(memory_grid: ModuleType) -> None:
    summary = memory_grid.summarise([_row(memory_grid)])
    assert summary["out_of_tolerance"] == []
    assert summary["worst_total"]["difference"] == 0
    assert summary["worst_component"]["difference"] == 0
    assert (summary["count"], summary["compared_at_another_moment"]) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "out"),
    [
        ({"activations": 10**8}, []),
        ({"activations": 5 * 10**8}, ["FULL_SHARD", "FULL_SHARD: activations, peak"]),
        ({"gradients": 10**8, "optimizer": -(10**8)}, ["gradients, peak", "optimizer, peak"]),
        ({"gradient_buffers": 99 * 10**6}, []),  # too small to be compared by itself
        ({"gradient_buffers": 101 * 10**6}, ["FULL_SHARD: gradient_buffers, peak"]),
    ],
)
def test_what_differs_is_named(
    memory_grid: ModuleType, changes: dict[str, int], out: list[str]
) -> None:
    summary = memory_grid.summarise([_row(memory_grid, **changes)])
    found = summary["out_of_tolerance"]
    assert len(found) == len(out)
    assert all(name.endswith(end) for name, end in zip(found, out, strict=True))


def test_of_moments_that_are_as_high_the_most_alike_is_compared(memory_grid: ModuleType) -> None:
    case = next(c for c in memory_grid.grid(False) if c.name == "7b N=4 1 GPUs FULL_SHARD")
    predicted = footprint(case.setting)
    other = next(moment for moment in predicted.moments if moment.name == "suffix")
    assert 0.98 * predicted.peak.total < other.total < predicted.peak.total
    after = predicted.after_backward.components
    row = memory_grid.compare(case, memory_grid.Simulated(other.components, after))
    assert row["compared_moment"] == other.name != row["peak_moment"]
    assert set(row["peak"]["component_differences"].values()) == {0}
    assert row["peak_difference"] > 0
    assert memory_grid.summarise([row])["compared_at_another_moment"] == 1


def test_results_are_read_as_they_were_written(memory_grid: ModuleType, tmp_path: Path) -> None:
    rows = [_row(memory_grid), _row(memory_grid, activations=5 * 10**8)]
    facts = {"commit": None, "summary": memory_grid.summarise(rows)}
    memory_grid.write_results(tmp_path / "new/grid.csv", facts, rows)
    assert memory_grid.read_results(tmp_path / "new/grid.csv") == (facts, rows)


def test_the_results_are_those_of_todays_closed_form(memory_grid: ModuleType) -> None:
    facts, rows = memory_grid.read_results(RESULTS)
    assert facts["summary"] == memory_grid.summarise(rows)
    simulated = {
        row["name"]: memory_grid.Simulated(*(row[w]["simulated"] for w in memory_grid.WHEN))
        for row in rows
    }
    cases = [case for case in memory_grid.grid(False) if case.name in simulated]
    assert len(cases) == len(rows) == 221
    assert [memory_grid.compare(case, simulated[case.name]) for case in cases] == rows


@pytest.mark.slow
def test_what_is_simulated_already_is_not_simulated_again(
    memory_grid: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "kept.jsonl"
    cases = memory_grid.grid(False)[:2]
    tiny = replace(cases[0].setting, architecture=TINY, micro_batch_tokens=64)
    first, second = (replace(case, setting=tiny) for case in cases)
    (found,) = memory_grid.simulate_all([first], file).values()
    assert found.peak["frozen_weights"] == 2 * count_parameters(TINY, 0).frozen
    other = {"frozen_weights": 7}
    line = {"name": second.name, "peak": other, "after_backward": other}
    with file.open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    again = memory_grid.simulate_all([first, second], file)
    assert again == {first.name: found, second.name: memory_grid.Simulated(other, other)}
    assert len(file.read_text().splitlines()) == 2
