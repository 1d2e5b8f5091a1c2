"""Follow a run: state and queue, then progress and the last log lines. Leaving changes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slurm.status import Standing, standings

_PAUSE_SECONDS = 2.0
_STYLES = {"finished": "green", "running": "green", "pending": "yellow", "stopped": "yellow"}


def watch(runs: Sequence[Path], console: Console) -> list[Standing]:
    """Show the runs until all have come to an end; where each stands then, or at Ctrl-C."""
    shown: list[Standing] = []
    try:
        if console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                for shown in _standings(runs):
                    live.update(page(shown), refresh=True)
        else:
            before: list[str] = []
            for shown in _standings(runs):
                lines = [summary(one) for one in shown]
                for line in (line for line in lines if line not in before):
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                before = lines
    except KeyboardInterrupt:
        console.print("The job goes on; look again with: submit.py status RUN --watch")
    return shown


def _standings(runs: Sequence[Path]) -> Iterator[list[Standing]]:
    while True:
        now = standings(runs)
        yield now
        if all(one.is_final for one in now):
            return
        time.sleep(_PAUSE_SECONDS)


def summary(one: Standing) -> str:
    """A run in one line."""
    facts = [Path(one.run).name, one.state]
    if one.max_steps:
        facts.append(f"step {one.step}/{one.max_steps}, checkpoint {one.checkpoint}")
    facts += [f"{name} {value:.4f}" for name, value in _figures(one)]
    if one.expected_start:
        facts.append(f"expected to start at {_clock(one.expected_start)}")
    if one.reason:
        facts.append(one.reason)
    return "  ".join(facts)


def page(standings: Sequence[Standing]) -> RenderableType:
    """All runs on one screen."""
    parts: list[RenderableType] = []
    for one in standings:
        parts += [_head(one), *_progress(one), *(Text(f"  {line}", "dim") for line in _tail(one))]
    return Group(*parts)


def _head(one: Standing) -> Text:
    where = f" on {one.nodes}" if one.nodes else ""
    head = Text.assemble(
        (Path(one.run).name, "bold"),
        "  ",
        (one.state, _STYLES.get(one.state, "red")),
        f"  job {one.job_id}{where}, attempt {max(one.attempts, 1)}",
    )
    if one.expected_start:
        head.append(f", expected to start at {_clock(one.expected_start)}")
    if one.reason:
        head.append(f"\n  {one.reason}")
    if one.alarm:
        head.append(f"\n  {one.alarm}", "yellow")
    return head


def _progress(one: Standing) -> list[RenderableType]:
    if not one.max_steps:
        return []
    row = Table.grid(padding=(0, 2))
    figures = [f"{name} {value:.4f}" for name, value in _figures(one)]
    bar = ProgressBar(total=one.max_steps, completed=one.step, width=20)
    steps = f"{one.step}/{one.max_steps} steps, checkpoint {one.checkpoint}"
    row.add_row("", bar, steps, *figures)
    return [row]


def _figures(one: Standing) -> list[tuple[str, float]]:
    figures = {"loss": one.loss, "R2": one.r2, "memory GB": one.memory_gb}
    return [(name, value) for name, value in figures.items() if value is not None]


def _tail(one: Standing) -> list[str]:
    return one.last_lines[-20:] if one.is_bad else one.last_lines[-3:]


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
