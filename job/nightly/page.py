"""The page on a night: a row a figure, with its course over thirty nights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from job.nightly.figures import FIGURES, Rule
from job.nightly.record import Finding, Night, Result, Verdict
from job.nightly.summary import asks, headline
from job.run.html import Html, document, fold, join, section, table, tag

NIGHTS = 30
_WIDTH, _HEIGHT, _EDGE = 180.0, 36.0, 5.0
_SHORT = 10  # characters of a commit


def page(nights: Sequence[Night]) -> str:
    """The page on the last of these nights; those before it are its history."""
    night = nights[-1]
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(night.plan.began))
    bad = " bad" if night.verdict in (Verdict.REGRESSED, Verdict.INCOMPLETE) else ""
    facts = [tag("span", fact) for fact in (began, f"commit {night.plan.commit or 'unknown'}")]
    state = tag("span", night.verdict.value, class_=f"state{bad}")
    body = join(
        [
            tag("h1", headline(night)),
            tag("p", state, *facts, class_="facts"),
            tag("p", f"Asked of you: {asks(night.verdict)}."),
            *(tag("p", note, class_="alarm") for note in night.notes),
            *_told(night),
            *(_entry(nights, result) for result in night.results.values()),
            tag("footer", "Hollow points: other machines. Vertical lines: regressions."),
        ]
    )
    return document(headline(night), body, _CSS)


def _told(night: Night) -> Iterator[Html]:
    """What a person should read first."""
    for verdict in (Verdict.REGRESSED, Verdict.INCOMPLETE, Verdict.IMPROVED):
        found = [one for one in night.findings if one.verdict is verdict]
        if found:
            yield section(verdict.value.capitalize(), *map(_finding, found))


def _finding(found: Finding) -> Html:
    parts: list[object] = [tag("strong", found.name), f": {found.text}"]
    if found.between is not None:
        good, bad = found.between
        parts += [tag("br"), f"between {good[:_SHORT]} (good) and {bad[:_SHORT]} (bad)"]
    line = tag("p", *parts, class_="found")
    how = fold("how to find it", found.bisect) if found.bisect else ""
    return tag("div", line, how)


def _entry(nights: Sequence[Night], result: Result) -> Html:
    if not result.complete:
        return section(result.entry, tag("p", result.reason or "", class_="alarm"))
    rows = [
        _row(nights, result, name)
        for name in FIGURES
        if name in result.figures and FIGURES[name].rule is not Rule.HOLDS
    ]
    machine = tag("p", ", ".join((result.key or {}).values()), class_="machine")
    head = ["figure", "tonight", "verdict", "nights", "meaning"]
    return section(result.entry, machine, table(head, rows, "explained nights") if rows else "")


def _row(nights: Sequence[Night], result: Result, name: str) -> list[object]:
    found = nights[-1].found(result.entry, name)
    verdict = "not judged" if found is None else found.verdict.value
    if found is not None and found.waits:
        verdict = "too few nights"
    bad = found is not None and found.verdict is Verdict.REGRESSED
    shown = tag("span", verdict, class_="bad" if bad else "", title=found.rule if found else "")
    figure = FIGURES[name]
    value = _shown(result.figures[name], figure.unit)
    return [name, value, shown, _course(nights, result, name), figure.meaning]


def _shown(value: Any, unit: str) -> str:
    number = _number(value)
    if number is None:
        return str(value)[:_SHORT]
    if unit == "B":
        return f"{number / 1e6:,.1f} MB"
    if unit in ("FLOP/s", "1/s"):
        return f"{number:,.4g} {unit}"
    return f"{number:.5g}{' ' + unit if unit else ''}"


def _number(value: Any) -> float | None:
    """A figure as one number: of seeds their mean, of losses the last."""
    if isinstance(value, list) and value:
        return float(value[-1]) if len(value) > 5 else float(sum(value) / len(value))
    return float(value) if isinstance(value, int | float) else None


def _course(nights: Sequence[Night], result: Result, name: str) -> Html:
    """A figure over nights as a small plot that takes the page's colours."""
    points = []
    for place, night in enumerate(nights[-NIGHTS:]):
        then = night.results.get(result.entry)
        value = _number(then.figures.get(name)) if then else None
        if then is not None and value is not None and math.isfinite(value):
            found = night.found(result.entry, name)
            points.append((place, value, then.key == result.key, found, then.commit))
    if not points:
        return Html("")
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    marks = [_mark(p, _at(p[0], p[1], low, high, len(nights[-NIGHTS:]))) for p in points]
    same = [_at(p[0], p[1], low, high, len(nights[-NIGHTS:])) for p in points if p[2]]
    line = tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in same))
    label = f"{name} over {len(points)} night(s), from {low:.5g} to {high:.5g}"
    size = f"0 0 {_WIDTH:g} {_HEIGHT:g}"
    return tag("svg", tag("title", label), line, *marks, viewBox=size, role="img")


def _at(place: int, value: float, low: float, high: float, count: int) -> tuple[float, float]:
    across = place / (count - 1) if count > 1 else 0.5
    up = (value - low) / (high - low) if high > low else 0.5
    inner = _WIDTH - 2 * _EDGE, _HEIGHT - 2 * _EDGE
    return _EDGE + across * inner[0], _HEIGHT - _EDGE - up * inner[1]


def _mark(
    point: tuple[int, float, bool, Finding | None, str | None], at: tuple[float, float]
) -> Html:
    _, value, same, found, commit = point
    x, y = f"{at[0]:.1f}", f"{at[1]:.1f}"
    regressed = found is not None and found.verdict is Verdict.REGRESSED
    title = tag("title", f"{value:.6g}, commit {(commit or 'unknown')[:_SHORT]}")
    kind = "bad" if regressed else "" if same else "other"
    dot = tag("circle", title, cx=x, cy=y, r="2.2", class_=kind)
    if not regressed:
        return dot
    return join([tag("line", x1=x, x2=x, y1="0", y2=f"{_HEIGHT:g}", class_="bad"), dot])


_CSS = """
.nights svg { width: 11.25rem; height: 2.25rem; display: block; color: var(--ink); }
.nights td:nth-child(4) { padding-top: .1rem; padding-bottom: .1rem; }
.nights polyline { fill: none; stroke: currentColor; stroke-opacity: .45; }
.nights circle { fill: currentColor; stroke: currentColor; }
.nights circle.other { fill: var(--paper); }
.nights .bad { color: var(--bad); fill: var(--bad); stroke: var(--bad); font-weight: 600; }
.nights span.bad { stroke: none; }
.nights line.bad { stroke-opacity: .5; }
.nights td:nth-child(2), .nights td:nth-child(3) { white-space: nowrap; }
.found, .machine { overflow-wrap: anywhere; }
.machine { color: var(--faint); }
"""
