"""What all figures share: look, colours, panels, lines and legend. Imports matplotlib to draw."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from job.run.reader import Snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 144
# Okabe and Ito's colours, told apart with any colour vision; without yellow, too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_DASHES = ("-", "--", ":")
STEPS = "optimizer step"  # label of an axis on which there are no halves
GREY = "#6b6b6b"
_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.h_pad": 0.08,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "text.parse_math": False,  # a run may have dollar signs in its name
}


def look() -> AbstractContextManager[None]:
    """Within it figures look as all of them do."""
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)


def run_colour(index: int) -> str:
    """The colour of the run at this place of a comparison."""
    return _COLOURS[index % len(_COLOURS)]


def panels(title: str, heights: Sequence[int] = (1,)) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per height, stacked, sharing the x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    grid = figure.subplots(
        len(heights), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    stacked: list[Axes] = list(grid[:, 0])
    stacked[0].set_title(title)
    return figure, stacked


def png(figure: Figure) -> bytes:
    for axes in figure.axes:
        if axes.get_xlabel() == STEPS:
            axes.locator_params(axis="x", integer=True)
    _draw_legend(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _draw_legend(figure: Figure) -> None:
    """One legend for all panels, below them, in as many columns as its texts leave room for."""
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    shown = {name: line for name, line in lines.items() if not name.startswith("_")}
    if shown:
        columns = 96 // (6 + max(map(len, shown)))
        figure.legend(
            list(shown.values()),
            list(shown),
            loc="outside lower center",
            ncols=min(max(columns, 1), 4),
        )


def styled(
    runs: Sequence[Snapshot], alone: str = "_unnamed"
) -> Iterator[tuple[Snapshot, dict[str, Any]]]:
    """Each run with its line style; a single one is labelled `alone` instead of by its name."""
    for i, run in enumerate(runs):
        # Matplotlib hides labels that begin with an underscore.
        name = f" {run.name}" if run.name.startswith("_") else run.name
        yield (
            run,
            {
                "color": run_colour(i),
                "linestyle": _DASHES[i // len(_COLOURS) % len(_DASHES)],
                "marker": _MARKERS[i % len(_MARKERS)],
                "label": name if len(runs) > 1 else alone,
            },
        )


def draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], style: Mapping[str, Any]) -> None:
    """Draw a line with a marker here and there; without points draw nothing."""
    lone = {"marker": "."} if len(x) == 1 else {}  # else nothing of it would be seen
    if x:
        axes.plot(x, y, markevery=max(1, len(x) // 20), **lone | dict(style))


def start_at_zero(*panels: Axes) -> None:
    for axes in panels:
        if axes.has_data():
            axes.set_ylim(0, 1.08 * axes.dataLim.ymax or 1)


def draw_level(axes: Axes, level: float, label: str, linestyle: str) -> None:
    axes.axhline(level, color=GREY, linestyle=linestyle, linewidth=1.2, label=label)
    axes.autoscale_view(scalex=False)  # a margin even where the line lies just within the view
