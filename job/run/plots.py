"""Plots of one run, or of several runs laid over one another. Free of matplotlib until they draw.

loss               training loss, raw and smoothed
value_mse          validation error between the best constant and the optimal predictor
value_std          spread of the predictions beside that of the labels
value_r2           explained variance
achievable_share   explained variance as a share of what can be explained
reliability        observed reward by predicted value
value_by_position  prediction and reward along the response
optimizer          learning rate and gradient norm
speed              tokens per second and memory
memory             memory over time and its peaks, by phase
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.run.figure import (
    GREY,
    STEPS,
    draw_level,
    draw_line,
    look,
    panels,
    png,
    run_colour,
    start_at_zero,
    styled,
)
from job.run.reader import VALIDATION, Snapshot, snapshots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAINING = "value/"
_GB = 1e9
_MOST_COLUMNS = 150  # of memory over time: more would blur
_PHASE_COLOURS = {
    "load": "#56B4E9",
    "shard": "#E69F00",
    "cache": "#CC79A7",
    "forward": "#0072B2",
    "backward": "#D55E00",
    "optimizer": "#009E73",
    "save": "#7B4B2A",
    "evaluate": "#882255",
    "other": "#9a9a9a",
}


def write_plots(runs: Sequence[Path], folder: Path) -> list[Path]:
    """Draw the runs into PNG files of `folder`; a plot without any data is left out."""
    return save_plots(draw_plots(snapshots(runs)), folder)


def save_plots(plots: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Write what draw_plots returned as NAME.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in plots]
    for path, image in zip(paths, plots.values(), strict=True):
        path.write_bytes(image)
    return paths


def draw_plots(runs: Sequence[Snapshot]) -> dict[str, bytes]:
    """PNG images by plot name, in reading order; a plot without any data is left out."""
    with look():
        figures = {name: draw(runs) for name, draw in _PLOTS.items()}
        return {
            name: png(figure)
            for name, figure in figures.items()
            if any(axes.has_data() for axes in figure.axes)
        }


def draw_loss(runs: Sequence[Snapshot]) -> Figure:
    """Training loss, every step and smoothed."""
    figure, (axes,) = panels("Training loss: every step and smoothed")
    _draw_smoothed(axes, runs, "train/loss")
    axes.set(xlabel=STEPS, ylabel="loss")
    return figure


def draw_mse(runs: Sequence[Snapshot]) -> Figure:
    """Validation MSE between that of the best constant and that of the optimal predictor."""
    figure, (axes,) = panels("Validation error: below the best constant, towards the optimum")
    _draw_evaluations(axes, runs, "mse")
    _draw_levels(axes, runs, "mse_constant", "best constant", "--")
    _draw_levels(axes, runs, "mse_optimal", "optimal predictor", ":")
    axes.set(xlabel=STEPS, ylabel="MSE (squared reward)")
    return figure


def draw_std(runs: Sequence[Snapshot]) -> Figure:
    """Spread of the predictions beside the spread of labels and optimal values."""
    figure, (axes,) = panels("Spread of the predictions: near 0 the critic is a constant")
    _draw_evaluations(axes, runs, "std_prediction")
    _draw_levels(axes, runs, "std_target", "labels", "--")
    _draw_levels(axes, runs, "std_optimal", "optimal predictor", ":")
    axes.set(xlabel=STEPS, ylabel="standard deviation (reward)")
    start_at_zero(axes)
    return figure


def draw_r2(runs: Sequence[Snapshot]) -> Figure:
    """Explained variance of the validation labels."""
    figure, (axes,) = panels("Explained variance on validation: 0 is a constant, 1 is perfect")
    _draw_evaluations(axes, runs, "r2")
    if axes.has_data():
        draw_level(axes, 0.0, "best constant", "--")
    _draw_levels(axes, runs, "r2_optimal", "optimal predictor", ":")
    axes.set(xlabel=STEPS, ylabel="R²")
    return figure


def draw_achievable_share(runs: Sequence[Snapshot]) -> Figure:
    """Explained variance as a share of what the optimal predictor explains."""
    figure, (axes,) = panels("Explained share of the achievable variance")
    _draw_evaluations(axes, runs, "achievable_share")
    if axes.has_data():
        draw_level(axes, 0.0, "best constant", "--")
        draw_level(axes, 1.0, "optimal predictor", ":")
    axes.set(xlabel=STEPS, ylabel="share of the achievable variance")
    axes.yaxis.set_major_formatter("{x:.0%}")
    return figure


def draw_reliability(runs: Sequence[Snapshot]) -> Figure:
    """Observed reward by predicted value, above the share of tokens in each bin."""
    figure, (curve, counts) = panels("Calibration: observed reward by predicted value", (3, 1))
    for run, style in styled(runs, "critic"):
        draw_line(curve, *_pairs(run, "bin_mean_prediction", "bin_mean_label"), style)
        bins = run.reliability.get("bin_count", [])
        if any(bins):
            edges = [k / len(bins) for k in range(len(bins) + 1)]
            counts.stairs(_shares(bins), edges, color=style["color"], fill=len(runs) == 1)
            if len(runs) == 1:
                _write_counts(counts, bins)
    if curve.has_data():
        curve.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="perfectly calibrated")
    curve.set(ylabel="mean observed reward", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    counts.set(xlabel="predicted value (reward)", ylabel="tokens")
    counts.yaxis.set_major_formatter("{x:.0%}")
    return figure


def draw_value_by_position(runs: Sequence[Snapshot]) -> Figure:
    """Mean prediction and mean label along the response."""
    figure, (axes,) = panels("Mean value along the response: predictions and labels")
    for run, style in styled(runs, "predictions"):
        _draw_positions(axes, run, "position_mean_prediction", style)
    labels = {"color": GREY, "linestyle": "--", "marker": ".", "label": "labels"}
    for run in runs:
        _draw_positions(axes, run, "position_mean_label", labels)
    axes.set(xlabel="position in the response", ylabel="mean value (reward)", xlim=(0, 1))
    axes.xaxis.set_major_formatter("{x:.0%}")
    return figure


def draw_optimizer(runs: Sequence[Snapshot]) -> Figure:
    """Learning rate above the gradient norm."""
    figure, (rate, norm) = panels("Learning rate and gradient norm before clipping", (1, 1))
    for run, style in styled(runs):
        draw_line(rate, *run.series("train/learning_rate"), style)
    _draw_smoothed(norm, runs, "train/grad_norm")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rate.set(ylabel="learning rate")
    norm.set(xlabel=STEPS, ylabel="gradient norm")
    start_at_zero(rate, norm)
    return figure


def draw_speed(runs: Sequence[Snapshot]) -> Figure:
    """Tokens per second above memory."""
    figure, (speed, memory) = panels("Throughput and peak memory", (1, 1))
    for run, style in styled(runs):
        draw_line(speed, *run.series("tokens_per_second"), style)
        steps, sizes = run.series("memory_bytes")
        draw_line(memory, steps, [size / _GB for size in sizes], style)
    speed.yaxis.set_major_formatter("{x:,.0f}")
    speed.set(ylabel="tokens/s")
    memory.set(xlabel=STEPS, ylabel="peak memory (GB)")
    start_at_zero(speed, memory)
    return figure


def draw_memory(runs: Sequence[Snapshot]) -> Figure:
    """Memory of the fullest rank over time, above its peaks; both by phase for a single run."""
    title = "Memory of the fullest rank over time"
    if len(runs) == 1 and (fullest := _fullest_rank(runs[0])) is not None:
        return _draw_phases(runs[0], *fullest)
    figure, (axes,) = panels(title)
    for run, style in styled(runs):
        if (fullest := _fullest_rank(run)) is not None:
            series = fullest[1]["series"]
            sizes = _sizes(series[_main_figure(fullest[1])])
            draw_line(axes, series["seconds"], sizes, style | {"drawstyle": "steps-post"})
    axes.set(xlabel="seconds", ylabel="memory (GB)")
    start_at_zero(axes)
    return figure


_PLOTS: dict[str, Callable[[Sequence[Snapshot]], Figure]] = {
    "loss": draw_loss,
    "value_mse": draw_mse,
    "value_std": draw_std,
    "value_r2": draw_r2,
    "achievable_share": draw_achievable_share,
    "reliability": draw_reliability,
    "value_by_position": draw_value_by_position,
    "optimizer": draw_optimizer,
    "speed": draw_speed,
    "memory": draw_memory,
}


def _draw_smoothed(axes: Axes, runs: Sequence[Snapshot], key: str) -> None:
    raw: dict[str, Any] = {"alpha": 0.25, "linewidth": 0.8}
    if len(runs) == 1:
        raw["label"] = "every step"
    for run, style in styled(runs, "smoothed"):
        steps, values = run.series(key)
        draw_line(axes, steps, values, {"color": style["color"], **raw})
        draw_line(axes, steps, _smooth(values), style)


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over a window of a twentieth of the points, cut off at both ends."""
    reach, count = len(values) // 40, len(values)
    sums = [0.0, *accumulate(values)]
    windows = [(max(i - reach, 0), min(i + reach + 1, count)) for i in range(count)]
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def _draw_evaluations(axes: Axes, runs: Sequence[Snapshot], metric: str) -> None:
    """A validation metric; for a single run also its training windows, where it has them."""
    for run, style in styled(runs, "validation"):
        draw_line(axes, *run.series(VALIDATION + metric), style)
        if len(runs) == 1:
            light = {"color": run_colour(5), "linewidth": 0.8, "label": "training windows"}
            draw_line(axes, *run.series(_TRAINING + metric), light)


def _draw_levels(
    axes: Axes, runs: Sequence[Snapshot], metric: str, label: str, linestyle: str
) -> None:
    """Horizontal lines at a metric of the last evaluations, one where all runs agree."""
    finals = [run.validation()[1] for run in runs]
    for level in sorted({round(final[metric], 6) for final in finals if metric in final}):
        draw_level(axes, level, label, linestyle)


def _pairs(run: Snapshot, x: str, y: str) -> tuple[list[float], list[float]]:
    """Two lists of reliability.json, without the places where either is empty."""
    both = zip(run.reliability.get(x, []), run.reliability.get(y, []), strict=True)
    points = [(a, b) for a, b in both if a is not None and b is not None]
    return [a for a, _ in points], [b for _, b in points]


def _shares(counts: Sequence[float]) -> list[float]:
    return [count / sum(counts) for count in counts]


def _write_counts(axes: Axes, bins: Sequence[float]) -> None:
    """How many tokens stand behind each bin, which its mean does not show."""
    for k, (count, share) in enumerate(zip(bins, _shares(bins), strict=True)):
        if count:
            text = f"{count:.0f}" if count < 1000 else f"{count / 1000:.3g}k"
            at = ((k + 0.5) / len(bins), share)
            axes.annotate(text, at, (0, 2), textcoords="offset points", ha="center", fontsize=6.5)
    axes.set_ylim(0, 1.3 * max(_shares(bins)))  # room for them


def _draw_positions(axes: Axes, run: Snapshot, key: str, style: dict[str, Any]) -> None:
    values = run.reliability.get(key, [])
    points = [((k + 0.5) / len(values), v) for k, v in enumerate(values) if v is not None]
    draw_line(axes, [x for x, _ in points], [y for _, y in points], style)


def _fullest_rank(run: Snapshot) -> tuple[int, dict[str, Any]] | None:
    """The rank whose memory rose highest, and what was recorded of it."""
    ranks = [r for r in enumerate(run.memory.get("ranks", [])) if r[1]["series"]["seconds"]]
    return max(ranks, key=lambda r: r[1]["peak"].get(_main_figure(r[1]), 0), default=None)


def _main_figure(rank: Mapping[str, Any]) -> str:
    """What the phases are told by: the allocator's memory, or a process's without a GPU."""
    return "process" if rank["backend"] == "process" else "allocated"


def _sizes(values: Sequence[float | None]) -> list[float]:
    """Bytes in GB, with gaps where nothing is known."""
    return [math.nan if value is None else value / _GB for value in values]


def _draw_phases(run: Snapshot, number: int, rank: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    phases = [phase for phase in _PHASE_COLOURS if phase in rank["peaks"]]
    course, peaks = figure.subplots(2, gridspec_kw={"height_ratios": (3, 0.4 + 0.28 * len(phases))})
    ranks = len(run.memory["ranks"])
    where = f"fullest of {ranks} ranks ({number})" if ranks > 1 else rank["device"]
    course.set_title(f"Memory over time, by phase: {where}")
    _draw_course(course, rank)
    predicted = (run.memory.get("predicted") or {}).get("peak_bytes")
    if predicted is not None:
        predicted += rank.get("before", {}).get("process", 0)  # a process has more than tensors
        draw_level(course, predicted / _GB, "predicted peak", "--")
    course.set_ylim(0, 1.08 * course.dataLim.ymax)
    _draw_peaks(peaks, rank, phases)
    return figure


def draw_stacks(title: str, bars: Mapping[str, Mapping[str, float]]) -> bytes:
    """A PNG of bars in GB, each stacked from the same named parts (bytes)."""
    from matplotlib.figure import Figure

    with look():
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        below = [0.0] * len(bars)
        for index, part in enumerate(next(iter(bars.values()))):
            sizes = [bar[part] / _GB for bar in bars.values()]
            axes.bar(list(bars), sizes, bottom=below, color=run_colour(index), label=part)
            below = [low + size for low, size in zip(below, sizes, strict=True)]
        axes.set(title=title, ylabel="GB")
        axes.legend()
        return png(figure)


def _draw_course(axes: Axes, rank: Mapping[str, Any]) -> None:
    """The main figure filled in its phases' colours, and in grey what is stacked upon it.

    A short course has a column a point. In the columns of a long one several phases lie upon one
    another in the order of their peaks, each from where the one below ends to its own.
    """
    series, main = rank["series"], _main_figure(rank)
    unit, scale = _time_unit(series["seconds"][-1])
    edges = _column_edges([seconds / scale for seconds in series["seconds"]])
    places = [bisect_right(edges, seconds / scale) - 1 for seconds in series["seconds"]]
    bands, top = _bands(places, series["phase"], _sizes(series[main]), len(edges) - 1)
    for phase, (lower, upper) in bands.items():
        colour = _PHASE_COLOURS[phase]
        axes.stairs(upper, edges, baseline=lower, fill=True, color=colour, alpha=0.75, lw=0)
    for name, label, shade, dashes in (
        ("reserved", "reserved by the allocator", 0.16, "-"),
        ("device_used", "in use on the device (NVML)", 0.08, ":"),
    ):
        known = _highest(places, _sizes(series[name]), len(edges) - 1)
        if any(map(math.isfinite, known)):
            axes.stairs(known, edges, baseline=top, fill=True, color="black", alpha=shade, lw=0)
            style: dict[str, Any] = {"color": "black", "lw": 0.9, "linestyle": dashes}
            axes.plot(edges[:-1], known, drawstyle="steps-post", label=label, **style)
            top = known
    axes.set(xlabel=unit, ylabel="memory (GB)", xlim=(0, edges[-1]))


def _column_edges(times: Sequence[float]) -> list[float]:
    end = times[-1] + (times[-1] - times[-2] if len(times) > 1 else 1.0)
    if len(times) <= _MOST_COLUMNS:
        return [*times, end]
    return [end * k / _MOST_COLUMNS for k in range(_MOST_COLUMNS + 1)]


def _highest(places: Sequence[int], sizes: Sequence[float], columns: int) -> list[float]:
    """The largest size in each column; NaN where there is none."""
    highest = [math.nan] * columns
    for place, size in zip(places, sizes, strict=True):
        if math.isfinite(size) and not size <= highest[place]:  # also where there was none yet
            highest[place] = size
    return highest


def _bands(
    places: Sequence[int], phases: Sequence[str], sizes: Sequence[float], columns: int
) -> tuple[dict[str, tuple[list[float], list[float]]], list[float]]:
    """Lower and upper ends of each phase's band by column, and the top of them all."""
    peaks = {}
    for phase in (phase for phase in _PHASE_COLOURS if phase in phases):
        own = [s if p == phase else math.nan for s, p in zip(sizes, phases, strict=True)]
        peaks[phase] = _highest(places, own, columns)
    bands = {phase: ([math.nan] * columns, upper) for phase, upper in peaks.items()}
    for k in range(columns):
        below = 0.0
        there = [(upper[k], phase) for phase, upper in peaks.items() if math.isfinite(upper[k])]
        for size, phase in sorted(there):
            bands[phase][0][k], below = below, size
    return bands, _highest(places, sizes, columns)


def _time_unit(seconds: float) -> tuple[str, float]:
    for unit, scale in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 4 * scale:
            return unit, scale
    return "seconds", 1.0


def _draw_peaks(axes: Axes, rank: Mapping[str, Any], phases: Sequence[str]) -> None:
    """A bar a phase: the peak of the main figure, and beyond it what was reserved."""
    main = _main_figure(rank)
    for place, phase in enumerate(phases):
        peaks = rank["peaks"][phase]
        size, reserved = peaks.get(main, 0) / _GB, peaks.get("reserved", 0) / _GB
        if reserved:
            axes.barh(place, reserved, color="black", alpha=0.16, height=0.7)
        axes.barh(place, size, color=_PHASE_COLOURS[phase], alpha=0.75, height=0.7)
        axes.annotate(
            f"{size:.2f}" if size >= 1 else f"{size:.3f}",
            (max(size, reserved), place),
            (4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(phases)), phases)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    name = "memory of the process (PSS)" if main == "process" else "allocated"
    axes.set_xlabel(f"peak by phase: {name} (GB)")
