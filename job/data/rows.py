"""Labelled solutions from data files of any known layout, row by row."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from job.common.data_file import Source, data_files
from job.data.raw_rows import RowError, raw_rows
from job.data.targets import Target

Rewards = bool | Literal["optional"]  # whether rows must carry one
Range = tuple[float, float]


class Message(NamedTuple):
    """A turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """A solution and its label, NaN where it has none.

    `optimal[i]` is the best value after i characters of the response; `truncated` says that the
    answer was cut off, and `odd_label` why a label that is there is not used.

    Attributes:
        messages: the turns before the response, where they are more than a prompt; `prompt` then
            has their texts.
        targets: labels within the response; where there are any, they are all that is trained.
        step_ends: how many characters of the response each of its steps ends with.
        first_error: the first wrong step, from 0; -1 without error, None where that is not known.
        answer: what the response answers; None where that is not known.
        part: the part of the data that the row belongs to.
        lead: characters that a template has put before the response's own (negative: taken away).
        given: the response as the data has it, where a template has changed it.
    """

    prompt: str
    response: str
    reward: float
    problem_id: str
    optimal: tuple[float, ...] | None = None
    truncated: bool = False
    odd_label: str | None = None
    messages: tuple[Message, ...] = ()
    targets: tuple[Target, ...] = ()
    step_ends: tuple[int, ...] = ()
    first_error: int | None = None
    answer: str | None = None
    part: str = ""
    lead: int = 0
    given: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it stands and what is wrong with it.

    `row` is its number among all that are read, good and bad, counted from 1; 0 where that is not
    known.
    """

    file: str
    line: int
    reason: str
    row: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class Place(NamedTuple):
    """Where a row stands: rows of an array and of Parquet are counted as lines are, from 1."""

    file: str
    line: int


Placed = tuple[Place, Row | BadRow]


def text_key(text: str) -> int:
    """64 bits by which a problem, or a response, is known where its text is not stored."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def in_chunks(rows: Iterable[Placed], size: int = 1024) -> Iterator[list[Placed]]:
    """The rows, so many together: a tokenizer is faster then."""
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def read_rows(
    path: str | Path,
    fields: Any = None,
    *,
    rewards: Rewards = True,
    reward_range: Sequence[float] | None = None,
) -> Iterator[tuple[int, Row | BadRow]]:
    """Line number and Row or BadRow for each solution of a file, few in memory at a time.

    Args:
        fields: None, a preset of `job.data.layouts`, or a mapping from what a row has to the
            file's names (`a.b` is b within a); `preset` in it names one of these to begin with.
        rewards: whether rows must carry a reward. If not, it is 0, and with `optional` that of
            the row, or NaN where that is none between 0 and 1.
        reward_range: the file's rewards for a worst and a best solution; default: 0 and 1, or the
            preset's own.

    Raises:
        InputError: the file is missing, of an unknown kind, or damaged.
    """
    from job.data.layouts import layout_parser

    parse = layout_parser(fields, rewards, reward_range)
    for line, raw in raw_rows(Path(path)):
        try:
            for row in parse(raw() if callable(raw) else raw):
                yield line, BadRow(str(path), line, str(row)) if isinstance(row, RowError) else row
        except RowError as error:
            yield line, BadRow(str(path), line, str(error))


def read_source(source: Source, fields: Any = None, **options: Any) -> Iterator[Placed]:
    """`read_rows` for each file of a source, one after the other."""
    for file in data_files(source):
        for line, row in read_rows(file, fields, **options):
            yield Place(str(file), line), row
