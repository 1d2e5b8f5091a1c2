"""The page on a night: a row a figure, with its course over thirty nights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from job.nightly.record import Finding, Night, Result, Verdict
from job.nightly.summary import asks, headline
from job.nightly.table import FIGURES, Rule, as_number, text_of
from job.run.html import Html, document, fold, join, section, table, tag

NIGHTS = 30
_WIDTH, _HEIGHT, _EDGE = 180.0, 36.0, 5.0
_SHORT = 10  # characters of a commit


def page(nights: Sequence[Night]) -> str:
    """The page on the last of these nights; those before it are its history."""
    night = nights[-1]
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(night.plan.began))
    bad = " bad" if night.verdict in (Verdict.REGRESSED, Verdict.INCOMPLETE) else ""
    commit = night.plan.commit or "unknown"
    facts = [tag("span", began), tag("span", f"commit {commit[:_SHORT]}", title=commit)]
    state = tag("span", night.verdict.value, class_=f"state{bad}")
    body = join(
        [
            tag("h1", headline(night)),
            tag("p", state, *facts, class_="facts"),
            tag("p", f"Asked of you: {asks(night.verdict)}."),
            *_told(night),
            *_notes(night),
            *(_entry(nights, result) for result in night.results.values() if result.complete),
            tag(
                "footer",
                "Hollow: another machine. A vertical line: a regression was first found there.",
            ),
        ]
    )
    return document(headline(night), body, _CSS)


def _told(night: Night) -> Iterator[Html]:
    """What a person should read first."""
    for verdict in (Verdict.REGRESSED, Verdict.INCOMPLETE, Verdict.IMPROVED):
        found = [one for one in night.findings if one.verdict is verdict]
        if found:
            yield section(verdict.value.capitalize(), *map(_finding, found))


def _notes(night: Night) -> Iterator[Html]:
    if night.notes:
        yield tag("div", *(tag("p", note) for note in night.notes), class_="notes")


def _finding(found: Finding) -> Html:
    line = tag("p", tag("strong", found.name), f": {found.text}", class_="found")
    between = ""
    if found.between is not None:
        good, bad = found.between
        between = tag("p", f"between {good[:_SHORT]} (good) and {bad[:_SHORT]} (bad)")
    how = fold("how to find it", found.bisect) if found.bisect else ""
    return tag("div", line, between, how, class_="finding")


def _entry(nights: Sequence[Night], result: Result) -> Html:
    """A complete entry; why another one is not has been told above."""
    rows = [_row(nights, result, name) for name in FIGURES if name in result.figures]
    machine = tag("p", ", ".join((result.key or {}).values()), class_="machine")
    head = ["figure", "tonight", "verdict", "nights", "meaning"]
    return section(result.entry, machine, table(head, rows, "explained nights"))


def _row(nights: Sequence[Night], result: Result, name: str) -> list[object]:
    found = nights[-1].found(result.entry, name)
    verdict = "not judged" if found is None else found.verdict.value
    if found is not None and found.waits:
        verdict = "too few nights"
    bad = found is not None and found.verdict is Verdict.REGRESSED
    shown = tag("span", verdict, class_="bad" if bad else "", title=found.rule if found else "")
    if found is not None and found.between is not None:
        shown = join([shown, tag("small", f"since {found.between[1][:_SHORT]}")])
    figure, value = FIGURES[name], result.figures[name]
    if figure.rule is Rule.HOLDS:  # texts, which have no course
        told = tag("small", found.text if found is not None else "")
        return [name, f"{len(value)} problem(s)", shown, "", join([figure.meaning, told])]
    return [name, text_of(name, value), shown, _course(nights, result, name), figure.meaning]


@dataclass(frozen=True)
class _Point:
    """A figure in one night, at its place in the plot."""

    x: float
    y: float
    value: float
    same_machine: bool
    regressed: bool
    commit: str


def _course(nights: Sequence[Night], result: Result, name: str) -> Html:
    """A figure over nights as a small plot that takes the page's colours."""
    points = list(_points(nights[-NIGHTS:], result, name))
    if not points:
        return Html("")
    first = [not (before.regressed) for before in points[:-1]]
    marks = [_mark(p, begins) for p, begins in zip(points, [True, *first], strict=True)]
    line = " ".join(f"{p.x:.1f},{p.y:.1f}" for p in points if p.same_machine)
    values = [p.value for p in points]
    label = f"{name} over {len(points)} night(s), from {min(values):.5g} to {max(values):.5g}"
    size = f"0 0 {_WIDTH:g} {_HEIGHT:g}"
    course = tag("polyline", points=line)
    return tag("svg", tag("title", label), course, *marks, viewBox=size, role="img")


def _points(nights: Sequence[Night], result: Result, name: str) -> Iterator[_Point]:
    values = [_value(night, result.entry, name) for night in nights]
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    for place, (night, value) in enumerate(zip(nights, values, strict=True)):
        if value is not None:
            then, found = night.results[result.entry], night.found(result.entry, name)
            across = place / (len(nights) - 1) if len(nights) > 1 else 0.5
            up = (value - low) / (high - low) if high > low else 0.5
            yield _Point(
                _EDGE + across * (_WIDTH - 2 * _EDGE),
                _HEIGHT - _EDGE - up * (_HEIGHT - 2 * _EDGE),
                value,
                then.key == result.key,
                found is not None and found.verdict is Verdict.REGRESSED,
                (then.commit or night.plan.commit or "unknown")[:_SHORT],
            )


def _value(night: Night, entry: str, name: str) -> float | None:
    then = night.results.get(entry)
    value = as_number(name, then.figures.get(name)) if then is not None else None
    return value if value is not None and math.isfinite(value) else None


def _mark(point: _Point, begins: bool) -> Html:
    """A night's dot, and a line where a regression begins."""
    x, y = f"{point.x:.1f}", f"{point.y:.1f}"
    title = tag("title", f"{point.value:.6g}, commit {point.commit}")
    kind = "bad" if point.regressed else "" if point.same_machine else "other"
    dot = tag("circle", title, cx=x, cy=y, r="2.2", class_=kind)
    if not (point.regressed and begins):
        return dot
    return join([tag("line", title, x1=x, x2=x, y1="0", y2=f"{_HEIGHT:g}", class_="bad"), dot])


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
.nights small { display: block; color: var(--faint); }
.finding { margin-bottom: .8rem; }
.found, .machine, .notes, .nights td:last-child { overflow-wrap: anywhere; }
.notes, .machine { color: var(--faint); }
@media (max-width: 44rem) {
  .nights, .nights tbody { display: block; }
  .nights thead { display: none; }
  .nights svg { width: 10rem; height: 2rem; }
  .nights tr { display: grid; grid-template-columns: 1fr auto; column-gap: 1rem; padding: .4rem 0;
    border-bottom: 1px solid var(--line); }
  .nights tr > * { border: 0; padding: .1rem 0; }
  .nights td:nth-child(2) { white-space: normal; text-align: right; }
  .nights td:nth-child(3) { text-align: left; }
  .nights td:last-child { grid-column: 1 / 3; color: var(--faint); }
}
"""
