"""Predictions of memory as tables for people. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from job.memory.fit import Fit, fit, largest_micro_batch, largest_unfrozen, prediction
from job.memory.footprint import COMPONENTS, Footprint, Setting, gigabytes

_LARGEST_TRIED = 262_144  # tokens of a micro-batch


def component_table(title: str, columns: Mapping[str, Mapping[str, int]]) -> Table:
    """GB by component, one column for each moment or source; components without bytes left out."""
    table = Table(title=title, title_justify="left")
    table.add_column("GB per GPU")
    for name in columns:
        table.add_column(name, justify="right")
    rows = [name for name in COMPONENTS if any(c.get(name) for c in columns.values())]
    for name in rows:
        cells = [gigabytes(c.get(name, 0)) for c in columns.values()]
        table.add_row(name.replace("_", " "), *cells, end_section=name == rows[-1])
    table.add_row("together", *(gigabytes(sum(c.values())) for c in columns.values()))
    return table


def footprint_columns(predicted: Footprint) -> dict[str, dict[str, int]]:
    """The peak and what is left after the backward pass, for `component_table`."""
    peak, after = predicted.peak, predicted.after_backward
    return {f"peak ({peak.name})": peak.components, after.name: after.components}


def verdicts(setting: Setting, capacities: Sequence[int]) -> list[str]:
    """For each size of GPU, whether the setting fits it, and the most that would."""
    return [verdict(setting, capacity) for capacity in capacities]


def verdict(setting: Setting, capacity: int) -> str:
    found = fit(setting, capacity)
    least = min(256, setting.micro_batch_tokens)
    n = largest_unfrozen(setting, capacity)
    tokens = largest_micro_batch(setting, capacity, _LARGEST_TRIED, least)
    most = ["no N fits" if n is None else f"largest N {n}"]
    if tokens is not None:
        most.append(f"largest micro-batch {tokens:,} tokens")
    return (
        f"{capacity / 1e9:.1f} GB: {_word(found)}, {found.needed / 1e9:.1f} GB with "
        f"{found.outside / 1e9:.1f} GB outside the allocator; {', '.join(most)}"
    )


def _word(found: Fit) -> str:
    if found.fits:
        return "fits"
    return "tight" if found.is_tight else "does not fit"


def as_dict(setting: Setting, capacities: Sequence[int]) -> dict[str, Any]:
    """The prediction and the verdicts for scripts."""
    return prediction(setting) | {
        "fits": {f"{c / 1e9:g}": fit(setting, c).fits for c in capacities},
        "largest_unfrozen": {f"{c / 1e9:g}": largest_unfrozen(setting, c) for c in capacities},
    }
