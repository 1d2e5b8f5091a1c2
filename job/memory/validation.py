"""Prediction held against measurement: configurations run in fresh processes, one after the other.

Every process sees the same batches, so that differences between two N are what the blocks cost.
On a GPU the allocator's peak is what a prediction must meet. A process without a GPU has memory
of its own besides tensors; there the growth from the smallest N to each other must be met.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.common.errors import Ending
from job.memory.fit import CPU_TOLERANCE, GPU_TOLERANCE
from job.memory.footprint import STATE, gigabytes

if TYPE_CHECKING:
    from rich.table import Table

CPU_BASE_BYTES = 10e6  # what a backward pass needs of a process whatever its size
# glibc then gives freed memory back at once, as the tensors' sizes would have it
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TOP_PAD_": "0", "MALLOC_ARENA_MAX": "1"}


class Disagreement(Ending):
    """Prediction and measurement differ by more than the tolerance."""


@dataclass(frozen=True)
class Row:
    """Bytes of one part: predicted, as torch's allocator has it (the process on a CPU), by NVML."""

    part: str
    predicted: float
    measured: float
    nvml: float | None

    @property
    def difference(self) -> float:
        return self.predicted - self.measured


@dataclass(frozen=True)
class Measured:
    """What rank 0 of one configuration predicted and measured."""

    num_unfrozen_layers: int
    predicted: dict[str, Any]
    stages: dict[str, dict[str, float]]
    recorder: dict[str, Any]

    @property
    def on_gpu(self) -> bool:
        return self.recorder["backend"] != "process"

    @property
    def figure(self) -> str:
        """What is measured: the allocator's memory, or the process's."""
        return "allocated" if self.on_gpu else "process"

    def stage(self, name: str, figure: str | None = None) -> float:
        """Bytes at a stage, beyond those before the critic came."""
        figure = figure or self.figure
        return self.stages[name][figure] - self.stages["before"][figure]

    @property
    def rows(self) -> list[Row]:
        """The parts in the order in which they come to be."""
        parts = zip(self._parts(), _STAGES, strict=True)
        return [
            Row(name, predicted, self._between(*stages, None), self._nvml(*stages))
            for (name, predicted), stages in parts
        ]

    def _parts(self) -> Iterator[tuple[str, float]]:
        after, peak = self.predicted["after_backward"], self.predicted["peak_bytes"]
        peak -= self.predicted["peak"]["workspaces"]  # which are there before the critic comes
        head = after["value_head"] / 16  # 4 bytes of weight, 4 of gradient, 8 of moments
        yield "weights", after["frozen_weights"] + after["masters"] + 4 * head
        yield "optimizer state", after["optimizer"] + 8 * head
        yield "gradients", after["gradients"] + 4 * head
        yield "activations and buffers", peak - sum(after[name] for name in STATE)
        yield "peak", peak

    def _between(self, first: str, last: str, figure: str | None) -> float:
        return self.stage(last, figure) - self.stage(first, figure)

    def _nvml(self, first: str, last: str) -> float | None:
        known = all("device_used" in self.stages[name] for name in ("before", first, last))
        return self._between(first, last, "device_used") if known else None


_STAGES = (
    ("before", "loaded"),
    ("loaded", "update"),
    ("update", "backward"),
    ("backward", "peak"),
    ("before", "peak"),
)


def validate(
    config_file: str, overrides: Sequence[str], unfreeze: Sequence[int], gpus: int
) -> list[Measured]:
    """Measure each N in processes of its own.

    Raises:
        Ending: a measurement failed; its message is above.
    """
    return [
        _measure(config_file, [*overrides, f"training.num_unfrozen_layers={n}"], gpus)
        for n in sorted(set(unfreeze))
    ]


def _measure(config_file: str, overrides: Sequence[str], gpus: int) -> Measured:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "measured.json")
        command = [sys.executable, "-m", "job.memory", "measure", "--config", config_file]
        command += ["--out", str(out), "--override", *overrides]
        shared = {**os.environ, **MALLOC, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port()}
        shared |= {"WORLD_SIZE": str(gpus), "LOCAL_WORLD_SIZE": str(gpus)}
        ranks = [
            subprocess.Popen(command, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(gpus)
        ]
        codes = [process.wait() for process in ranks]
        if any(codes):
            failed = next(code for code in codes if code)
            raise Ending(f"the measurement of {overrides[-1]} ended with exit code {failed}")
        return Measured(**json.loads(out.read_text())[0])


def _port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def component_table(measured: Sequence[Measured]) -> Table:
    """Parts of each N: predicted, measured, difference."""
    from rich.table import Table

    table = Table(title="Memory of rank 0, GB", title_justify="left")
    for name in _header(measured):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in _cells(measured):
        table.add_row(*row, end_section=row[1] == "peak")
    return table


def _header(measured: Sequence[Measured]) -> list[str]:
    of = "allocator" if measured[0].on_gpu else "process"
    return ["N", "part", "predicted", of, "NVML", "difference"]


def _cells(measured: Sequence[Measured]) -> Iterator[list[str]]:
    """Of each part of each N, what stands under the header; sizes in GB."""
    for one in measured:
        for row in one.rows:
            nvml = "-" if row.nvml is None else gigabytes(row.nvml)
            yield [
                str(one.num_unfrozen_layers),
                row.part,
                gigabytes(row.predicted),
                gigabytes(row.measured),
                nvml,
                gigabytes(row.difference),
            ]


def outside(one: Measured) -> list[tuple[str, float]]:
    """What NVML shows beyond the allocator's peak, in bytes: each part by itself."""
    if not one.on_gpu or "device_used" not in one.stages["peak"]:
        return []
    peak = one.stages["peak"]
    context = one.stages["before"]["device_used"] - one.stages["before"].get("reserved", 0.0)
    rest = peak["device_used"] - peak["reserved"] - context
    return [
        ("reserved and not allocated", peak["reserved"] - peak["allocated"]),
        ("context, and others, before the critic", context),
        ("more since: kernels, NCCL, others", rest),
    ]


def differences(measured: Sequence[Measured]) -> list[Row]:
    """How the peak grows from the smallest N to each other.

    Of peaks as they are: what a process has before its critic comes hangs on what it has freed.
    """
    first, *others = measured
    return [
        Row(
            f"peak of N={one.num_unfrozen_layers} above that of N={first.num_unfrozen_layers}",
            one.predicted["peak_bytes"] - first.predicted["peak_bytes"],
            one.stages["peak"][one.figure] - first.stages["peak"][one.figure],
            None,
        )
        for one in others
    ]


def disagreements(measured: Sequence[Measured]) -> list[str]:
    """What differs by more than the tolerance."""
    if measured[0].on_gpu:
        rows, tolerance, base = [one.rows[-1] for one in measured], GPU_TOLERANCE, 0.0
    else:
        rows, tolerance, base = differences(measured), CPU_TOLERANCE, CPU_BASE_BYTES
    return [
        f"{row.part}: {gigabytes(row.predicted)} GB predicted, {gigabytes(row.measured)} measured"
        for row in rows
        if abs(row.difference) > tolerance * abs(row.measured) + base
    ]


def verdict(measured: Sequence[Measured]) -> list[str]:
    """In words: what the trained blocks cost, by prediction and by measurement."""
    lines = [_cost(one) for one in measured if one.num_unfrozen_layers]
    for row in differences(measured):
        share = row.predicted / row.measured - 1 if row.measured else 0.0
        lines.append(
            f"The {row.part} by {gigabytes(row.measured)} GB, predicted "
            f"{gigabytes(row.predicted)} GB ({share:+.1%})."
        )
    return lines


def _cost(one: Measured) -> str:
    after = one.predicted["after_backward"]
    gross = after["masters"] + after["gradients"] + after["optimizer"]
    net = gross - after["masters"] / 2
    world = one.predicted["world_size"]
    return (
        f"N={one.num_unfrozen_layers}: masters, gradients and optimizer state take "
        f"{gigabytes(gross)} GB on each of {world} GPU(s), {gigabytes(net)} GB net of the bf16 "
        f"copies that the masters replace; gradients and optimizer state alone "
        f"{gigabytes(after['gradients'] + after['optimizer'])} GB."
    )


def markdown(measured: Sequence[Measured]) -> str:
    """The whole result as a page."""
    lines = ["# Memory of rank 0 in GB, predicted and measured", "", *verdict(measured), ""]
    lines += [f"| {' | '.join(_header(measured))} |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in _cells(measured)]
    for one in measured:
        for name, size in outside(one):
            lines.append(
                f"\nN={one.num_unfrozen_layers}, beyond the peak: {name} {gigabytes(size)}"
            )
    found = disagreements(measured)
    lines += ["", "Within the tolerance." if not found else "Out of tolerance: " + "; ".join(found)]
    return "\n".join(lines) + "\n"


def write(measured: Sequence[Measured], folder: Path) -> None:
    """memory-validation.json, .md and .png in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {**vars(one), "rows": [vars(row) for row in one.rows], "outside": dict(outside(one))}
        for one in measured
    ]
    result = {
        "measured": rows,
        "differences": [vars(row) for row in differences(measured)],
        "verdict": verdict(measured),
        "disagreements": disagreements(measured),
    }
    file = folder / "memory-validation"
    file.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    file.with_suffix(".md").write_text(markdown(measured))
    file.with_suffix(".png").write_bytes(_plot(measured))


def _plot(measured: Sequence[Measured]) -> bytes:
    """Predicted and measured parts of each N, stacked side by side."""
    from job.run.plots import draw_stacks

    bars = {}
    for one in measured:
        parts = one.rows[:-1]
        bars[f"N={one.num_unfrozen_layers}\npredicted"] = {r.part: r.predicted for r in parts}
        bars[f"N={one.num_unfrozen_layers}\nmeasured"] = {r.part: r.measured for r in parts}
    return draw_stacks("Memory of rank 0: predicted and measured", bars)
