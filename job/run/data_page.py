"""A page on what is in data: counts, labels, lengths, and rows as the model will see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from job.common.errors import file_error
from job.common.files import write_atomic
from job.data.rows import BadRow
from job.data.survey import Piece, ShownRow, Survey
from job.run.html import Html, document, fold, join, section, table, tag

REFUSED = "Rows that job.train refuses for their label"
_CSS = """
.tokens { font-family: ui-monospace, monospace; font-size: .85rem; line-height: 2;
  overflow-wrap: anywhere; white-space: pre-wrap; }
.tokens span { padding: .1rem 0; border-bottom: 2px solid var(--line); margin-right: 2px; }
.tokens .prompt { color: var(--faint); }
.tokens b { padding: 0 .3rem; color: var(--bad); }
.tokens sup { color: var(--bad); font-weight: 600; }
.bar { display: inline-block; height: .8em; background: #0072B2; }
"""


def write_data_page(name: str, found: Survey, out: Path) -> Path:
    """Write the page and return its path."""
    body = join(
        [
            tag("h1", name),
            section("What is in it", table(["", ""], list(facts(found)), "texts")),
            *_listed("Bad rows", found.bad, found.n_bad),
            *_listed(REFUSED, found.unlabelled, found.n_unlabelled),
            *(_of_rows(found) if found.rows else ()),
        ]
    )
    try:
        write_atomic(out, document(name, body, _CSS))
    except OSError as error:
        raise file_error(error, f"{out}: cannot be written: {error.strerror}") from None
    return out


def facts(found: Survey) -> Iterator[tuple[str, str]]:
    """Counts by name, for people."""
    yield "rows", f"{found.rows:,}" + (f", and {found.n_bad:,} bad" if found.n_bad else "")
    yield "problems", f"{len(found.problems):,}"
    yield "solutions a problem", _solutions(found)
    if found.rows:
        lengths = sorted(found.lengths.tolist())
        middle = lengths[len(lengths) // 2]
        yield found.unit, f"{sum(lengths):,}; {lengths[0]:,} to {lengths[-1]:,}, median {middle:,}"
        yield "of them in responses", f"{sum(found.responses) / max(sum(lengths), 1):.1%}"
    for name, count in (
        ("without a label", found.n_unlabelled),
        ("longer than data.max_length", found.overlong),
        ("cut off", found.truncated),
        ("with targets within", found.with_targets),
    ):
        if count:
            yield name, f"{count:,} rows"
    if len(found.parts) > 1:
        yield "parts", ", ".join(f"{part or 'none'} {n:,}" for part, n in found.parts.items())
    if found.is_validation:
        yield "validation", "these very files"
    if found.shared_files:
        yield "files that validation has too", f"{found.shared_files:,}"
    if found.shared is not None:
        yield "problems that validation has too", f"{found.shared:,}"


def _solutions(found: Survey) -> str:
    counts = found.solutions
    if len(counts) > 6:
        return f"{min(counts)} to {max(counts)}, {found.rows / len(found.problems):.1f} on average"
    return ", ".join(f"{n} ({problems:,} problems)" for n, problems in counts.items()) or "none"


def _listed(title: str, first: Sequence[BadRow], count: int) -> Iterator[Html]:
    if first:
        shown = "\n".join(map(str, first))
        yield section(title, fold(f"the first {len(first)} of {count:,}", shown))


def _of_rows(found: Survey) -> Iterator[Html]:
    labels = [(name, f"{n:,}", f"{a:.1%}", f"{b:.1%}") for name, n, a, b in found.labels()]
    yield section("Labels", table(["label", "rows", "by row", f"by response {found.unit}"], labels))
    bins = found.histogram()
    most = max(n for _, _, n in bins)
    rows = [(f"{a:,} to {b:,}", f"{n:,}", _bar(n / most)) for a, b, n in bins]
    head = [f"{found.unit} of prompt and response", "rows", ""]
    yield section("Lengths", table(head, rows, "explained"))
    yield section("First rows", *map(_shown, found.first))


def _bar(share: float) -> Html:
    return tag("i", class_="bar", style=f"width:{20 * share:.2f}rem")


def _shown(shown: ShownRow) -> Html:
    return join(
        [
            tag("h3", heading(shown)),
            tag(
                "p",
                *_tokens(shown.prompt, "prompt"),
                tag("b", "\N{BLACK RIGHT-POINTING TRIANGLE}", title="the response begins"),
                *_tokens(shown.response, "response"),
                class_="tokens",
            ),
        ]
    )


def heading(shown: ShownRow) -> str:
    """Where a row stands, what it belongs to, and its reward."""
    row = shown.row
    reward = "no label" if row.reward != row.reward else f"reward {row.reward:g}"
    part = f", part {row.part}" if row.part else ""
    return f"{shown.place.file}:{shown.place.line}, problem {row.problem_id}{part}, {reward}"


def _tokens(pieces: Sequence[Piece], kind: str) -> Iterator[Html]:
    for piece in pieces:
        marks = [tag("sup", f"{target.value:g}") for target in piece.targets]
        yield tag("span", visible(piece.text), *marks, class_=kind)


def visible(text: str) -> str:
    """A text whose line ends can be seen."""
    return text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")
