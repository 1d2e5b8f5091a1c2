"""Pages that need nothing but themselves: elements, tables, and one look, light and dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence


class Html(str):
    """Text that is HTML already; any other text is escaped where it enters the page."""


def escaped(content: object) -> Html:
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; an attribute's trailing underscore is dropped, so that `class_` can be said."""
    said = "".join(f' {key.rstrip("_")}="{escaped(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{said}>{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    return Html("".join(map(escaped, parts)))


def section(title: str, *children: object) -> Html:
    return tag("section", tag("h2", title), *children)


def fold(title: object, text: str, **attributes: object) -> Html:
    return tag("details", tag("summary", title), tag("pre", text), **attributes)


def table(head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "") -> Html:
    """A table of numbers, or of what `kind` says; its first column names the rows."""
    body = [
        tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest))
        for first, *rest in rows
    ]
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    whole = tag("table", tag("thead", top), tag("tbody", *body), class_=kind)
    return tag("div", whole, class_="wide")


def images(pictures: Mapping[str, bytes]) -> Html:
    """PNG pictures by name, side by side where there is room."""
    shown = [
        tag("img", src=f"data:image/png;base64,{base64.b64encode(png).decode()}", alt=name)
        for name, png in pictures.items()
    ]
    return tag("div", *shown, class_="plots")


def document(title: str, body: Html, css: str = "") -> str:
    """A whole page; `css` is added to the common look."""
    head = Html(
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"{tag('title', title)}<style>{_CSS}{css}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


_CSS = """
:root { --ink: #1c1c1c; --paper: #fff; --faint: #6b6b6b; --line: #ddd; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --faint: #a0a0a0; --line: #3a3d42; --bad: #ff8a80; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; }
h1 { margin-bottom: .5rem; }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { margin: 1.25rem 0 .25rem; font-size: 1rem; }
p { margin: .4rem 0; }
footer { margin: 3rem 0 1rem; color: var(--faint); }
.verdict { font-size: 1.25rem; }
.run h3 + .verdict { font-size: 1.05rem; }
.facts span { display: inline-block; margin-right: 1.25rem; color: var(--faint); }
.facts .state { padding: .1rem .6rem; border: 1px solid; border-radius: 1rem; color: var(--ink); }
.facts .bad { color: var(--bad); font-weight: 600; }
.alarm { padding: .6rem .9rem; border: 2px solid var(--bad); border-radius: .4rem;
  color: var(--bad); overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em;
  border-radius: .2em; print-color-adjust: exact; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, .texts *, .explained :last-child { text-align: left; }
thead th { color: var(--faint); font-weight: 500; vertical-align: bottom; }
tbody th { min-width: 8.5rem; font-weight: 500; }
.sum tr:last-child > * { font-weight: 600; }
.plots { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }
img { width: 100%; background: #fff; border: 1px solid var(--line); border-radius: .4rem; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid var(--line); border-radius: .4rem;
  font-size: .85rem; }
summary { cursor: pointer; }
@media print {
  :root { --ink: #000; --paper: #fff; --faint: #444; --line: #bbb; --bad: #b3261e; }
  body { margin: 0; max-width: none; font-size: 11px; }
  img, tr, .run { break-inside: avoid; }
  .plots { grid-template-columns: 1fr 1fr; }
  pre { white-space: pre-wrap; }
}
"""
