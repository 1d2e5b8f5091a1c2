"""What is in data before anything is trained on it: counts, labels, lengths, and its first rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from job.common.data_file import data_files
from job.common.progress import progress
from job.common.schema import DataConfig
from job.common.signals import stop_if_asked
from job.data.rows import BadRow, Place, Placed, Rewards, Row, in_chunks, read_source
from job.data.targets import CHARACTER, END, Target, TargetError, by_token, token_of
from job.data.template import Template, encode_rows, load_template, render_rows
from job.data.tokenizer import Encoded, Tokenizer

SHOWN = 3  # rows that are shown whole
_BAD = 10  # bad rows, and unlabelled ones, whose reasons are kept
_LABELS = 5  # equal parts of [0, 1] between the labels 0 and 1


@dataclass(frozen=True)
class Piece:
    """A token as its text, what the model sees it to be, and the targets that lie at it."""

    text: str
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class ShownRow:
    """A row as the model will see it: its prompt's tokens and its response's.

    Without a tokenizer there is one piece for each stretch of text up to a target.
    """

    place: Place
    row: Row
    prompt: tuple[Piece, ...]
    response: tuple[Piece, ...]


@dataclass
class Survey:
    """Counts over rows; lengths are tokens, or without a tokenizer characters."""

    unit: str
    rows: int = 0
    bad: list[BadRow] = field(default_factory=list)  # the first of them
    n_bad: int = 0
    unlabelled: list[BadRow] = field(default_factory=list)  # the first, as job.train refuses them
    problems: Counter[str] = field(default_factory=Counter)
    rewards: list[float] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)
    parts: Counter[str] = field(default_factory=Counter)
    with_targets: int = 0
    truncated: int = 0
    overlong: int = 0
    first: list[ShownRow] = field(default_factory=list)
    is_validation: bool = False  # whether these are the files of the validation data
    shared_files: int = 0  # that validation data has too
    shared: int | None = None  # problems that it has too

    @property
    def solutions(self) -> dict[int, int]:
        """How many problems have how many solutions."""
        return dict(sorted(Counter(self.problems.values()).items()))

    @property
    def n_unlabelled(self) -> int:
        """How many rows have no label, or none that is one: job.score takes them."""
        return int(np.isnan(self.rewards).sum())

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Of prompt and response together: [rows]."""
        return np.asarray(self.prompts, np.int64) + np.asarray(self.responses, np.int64)

    def labels(self) -> list[tuple[str, int, float, float]]:
        """Name, rows, and shares by row and by response length of each kind of label."""
        rewards, weights = np.asarray(self.rewards), np.asarray(self.responses, np.float64)
        edges = np.linspace(0, 1, _LABELS + 1)
        between = ~np.isnan(rewards) & (rewards > 0) & (rewards < 1)
        place = np.searchsorted(edges, rewards, "right")
        kinds = [("0", rewards == 0)]
        for k in range(1, _LABELS + 1):
            kinds.append((f"{edges[k - 1]:.1f} to {edges[k]:.1f}", between & (place == k)))
        kinds += [("1", rewards == 1), ("no label", np.isnan(rewards))]
        total = max(weights.sum(), 1.0)
        return [
            (name, int(own.sum()), float(own.mean()), float(weights[own].sum() / total))
            for name, own in kinds
            if own.any()
        ]

    def histogram(self, bins: int = 12) -> list[tuple[int, int, int]]:
        """First length, last length and rows of so many equal bins, or fewer."""
        lengths = self.lengths
        low, high = int(lengths.min()), int(lengths.max())
        width = -(-(high - low + 1) // bins)
        counts = np.bincount((lengths - low) // width)
        ends = ((low + k * width, low + (k + 1) * width - 1) for k in range(len(counts)))
        return [(a, b, int(n)) for (a, b), n in zip(ends, counts, strict=True)]


def survey(data: DataConfig, tokenizer: Tokenizer | None, shown: int = SHOWN) -> Survey:
    """Look at all of `data.train`, and at which of its problems `data.validation` has too.

    Raises:
        InputError: data that cannot be read, or no template that works.
    """
    found, places = Survey("characters" if tokenizer is None else "tokens"), list[Place]()
    template = None if tokenizer is None else load_template(data.template, tokenizer)
    rows = _rows(data, data.train, "optional")
    with progress("reading") as advance:
        for chunk in in_chunks(rows):
            stop_if_asked()
            _add(found, chunk, data, tokenizer, template, shown)
            places += _unlabelled(chunk)[: max(_BAD - len(places), 0)]
            advance(found.rows + found.n_bad, f"{found.n_bad} bad" if found.n_bad else "")
    found.unlabelled = _refusals(data, places)
    if isinstance(data.validation, str | list):
        _compare(found, data)
    return found


def _compare(found: Survey, data: DataConfig) -> None:
    """Count what `data.validation` has too: files, however they are named, and problems."""
    own, other = ({f.resolve() for f in data_files(s)} for s in (data.train, data.validation))
    if own == other:
        found.is_validation = True
        return
    found.shared_files = len(own & other)
    rows = _rows(data, data.validation, "optional")
    problems = {row.problem_id for _, row in rows if isinstance(row, Row)}
    found.shared = len(problems & found.problems.keys())


def _rows(data: DataConfig, source: str | list[str], rewards: Rewards) -> Iterator[Placed]:
    return read_source(source, data.fields, rewards=rewards, reward_range=data.reward_range)


def _unlabelled(chunk: list[Placed]) -> list[Place]:
    return [place for place, row in chunk if isinstance(row, Row) and np.isnan(row.reward)]


def _refusals(data: DataConfig, places: list[Place]) -> list[BadRow]:
    """What a training, which reads labels, says of rows at these places beyond what anyone does."""
    known = {str(row) for row in _bad_at(data, places, "optional")}
    return [row for row in _bad_at(data, places, True) if str(row) not in known][:_BAD]


def _bad_at(data: DataConfig, places: list[Place], rewards: Rewards) -> Iterator[BadRow]:
    """The bad rows at these places, which follow each other."""
    left, seen = set(places), 0
    with progress("reading labels") as advance:
        for chunk in in_chunks(_rows(data, data.train, rewards)) if places else ():
            stop_if_asked()
            yield from (row for place, row in chunk if isinstance(row, BadRow) and place in places)
            if not left:  # this chunk may have had the rest of a place's rows
                return
            left -= {place for place, _ in chunk}
            seen += len(chunk)
            advance(seen, "")


def _add(
    found: Survey,
    chunk: list[Placed],
    data: DataConfig,
    tokenizer: Tokenizer | None,
    template: Template | None,
    shown: int,
) -> None:
    if template is not None:
        chunk = list(render_rows(chunk, template))
    good = [(place, row) for place, row in chunk if isinstance(row, Row)]
    bad = [row for _, row in chunk if isinstance(row, BadRow)]
    encoded: Sequence[Encoded | None] = [None] * len(good)
    if tokenizer is not None and template is not None:
        encoded = encode_rows([row for _, row in good], tokenizer, framed=template.framed)
    for (place, row), tokens in zip(good, encoded, strict=True):
        if (problem := _misplaced(row, tokens)) is not None:
            bad.append(BadRow(*place, problem))
            continue
        _count(found, row, tokens, data.max_length)
        if len(found.first) < shown:
            found.first.append(_shown(place, row, tokens, tokenizer))
    found.n_bad += len(bad)
    found.bad += bad[: max(_BAD - len(found.bad), 0)]


def _misplaced(row: Row, tokens: Encoded | None) -> str | None:
    """Why a row's targets have no place among its tokens."""
    try:
        if tokens is not None:
            by_token(row.targets, row.prompt, tokens.ends, tokens.response_start)
    except TargetError as error:
        return str(error)
    return None


def _count(found: Survey, row: Row, tokens: Encoded | None, max_length: int) -> None:
    found.rows += 1
    found.problems[row.problem_id] += 1
    found.rewards.append(row.reward)
    found.parts[row.part] += 1
    found.with_targets += bool(row.targets)
    found.truncated += row.truncated
    prompt = len(row.prompt) if tokens is None else tokens.response_start
    whole = len(row.prompt) + len(row.response) if tokens is None else len(tokens.ids)
    found.prompts.append(prompt)
    found.responses.append(whole - prompt)
    found.overlong += tokens is not None and whole > max_length


def _shown(place: Place, row: Row, tokens: Encoded | None, tokenizer: Tokenizer | None) -> ShownRow:
    if tokens is None or tokenizer is None:
        return ShownRow(place, row, (Piece(row.prompt),), _stretches(row))
    pieces = list(_pieces(row, tokens, tokenizer))
    at = tokens.response_start
    return ShownRow(place, row, tuple(pieces[:at]), tuple(pieces[at:]))


def _stretches(row: Row) -> tuple[Piece, ...]:
    """A response's text up to each target."""
    last = len(row.response)
    known = [t for t in row.targets if t.unit in (CHARACTER, END)]  # there are no tokens to count
    places = [last if t.unit == END else t.at for t in known]
    ends = sorted({*places, last})
    return tuple(
        Piece(row.response[a:b], tuple(t for t, p in zip(known, places, strict=True) if p == b))
        for a, b in zip([0, *ends[:-1]], ends, strict=True)
    )


def _pieces(row: Row, tokens: Encoded, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Each token's own characters, or where it has none of its own its text in the vocabulary."""
    text = row.prompt + row.response
    places = [token_of(t, row.prompt, tokens.ends, tokens.response_start) for t in row.targets]
    starts = [0, *tokens.ends[:-1]]
    for k, (start, end) in enumerate(zip(starts, tokens.ends, strict=True)):
        own = text[start:end] or tokenizer.token_text(tokens.ids[k])
        yield Piece(own, tuple(t for t, p in zip(row.targets, places, strict=True) if p == k))
