"""The solutions of a file of values, with what the data says of them beyond."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from job.common.data_file import Source
from job.common.errors import InputError, quoted
from job.data.rows import BadRow, Place, Row, read_source, text_key
from job.data.values_text import stored_rows
from job.evaluation.solutions import Solution, problems_of

_SAME = 1e-6  # labels that were computed in float32 differ by less
_log = logging.getLogger("job.evaluate")


@dataclass(frozen=True)
class Data:
    """The data that the values belong to, and how to read it.

    Attributes:
        fields: as `data.fields`.
        answer: a pattern whose last match in a response is its answer, or the match's first group.
    """

    source: Source
    fields: Any = None
    reward_range: list[float] | None = None
    answer: re.Pattern[str] | None = None

    @property
    def names_answers(self) -> bool:
        """Whether a field has them."""
        return isinstance(self.fields, dict) and "answer" in self.fields

    @property
    def has_answers(self) -> bool:
        return self.names_answers or self.answer is not None


def read_solutions(values: Path, data: Data | None) -> list[Solution]:
    """The solutions that have values, in order.

    Raises:
        InputError: one of the files cannot be read, what should be a value or a reward is none, or
            the values belong to other data.
    """
    stored = _usable(stored_rows(values), values)
    if data is None:
        return [
            _solution(row, None, None) for row in _named_problems(stored, values) if row["values"]
        ]
    paired = _labels_compared(_checked(itertools.zip_longest(stored, _rows(data)), values))
    return [_solution(row, found, data.answer) for row, found in paired if row["values"]]


def first_bad(data: Data) -> tuple[Place, BadRow] | None:
    """The first row of data, if it cannot be read so."""
    first = itertools.islice(_rows(data), 1)
    return next(((place, row) for place, row in first if isinstance(row, BadRow)), None)


def named_parts(data: Data) -> set[str]:
    """The parts of data that have solutions with labelled steps."""
    rows = (row for _, row in _rows(data) if isinstance(row, Row))
    return {row.part for row in rows if row.step_ends and row.first_error is not None}


def _rows(data: Data) -> Iterator[tuple[Place, Row | BadRow]]:
    options = {"rewards": "optional", "reward_range": data.reward_range}
    return read_source(data.source, data.fields, **options)


def answers_found(solutions: Sequence[Solution], data: Data) -> str:
    """Of how many responses an answer is known; a problem without any leaves no votes to count."""
    count = sum(one.answer is not None for one in solutions)
    found = "an answer is known in" if data.names_answers else "--answer matches in"
    text = f"{found} {count:,} of {len(solutions):,} responses"
    problems = problems_of(solutions)
    none = sum(all(answer is None for answer in one.answers) for one in problems)
    votes = f"; no majorities: {none:,} of {len(problems):,} problems have no answer"
    return text + (votes if none else "")


def _usable(stored: Iterator[dict[str, Any]], values: Path) -> Iterator[dict[str, Any]]:
    """The rows, if values and rewards are such: NaN would rank above all, and 7 be a reward."""
    for number, row in enumerate(stored, 1):
        for wrong in _unusable(row):
            raise InputError(f"{values}: row {number}: {wrong}")
        yield row


def _unusable(row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a row of values."""
    values, prompt, reward = (row.get(name) for name in ("values", "prompt_value", "reward"))
    if not isinstance(values, list | None):
        yield f"values must be a list of numbers or null, not {quoted(values)}"
        return
    for k, value in enumerate(values or ()):
        if not _is_finite(value):
            yield f"values[{k}] must be a finite number, not {quoted(value)}"
    if prompt is not None and not _is_finite(prompt):
        yield f"prompt_value must be a finite number or null, not {quoted(prompt)}"
    if reward is not None and not (_is_finite(reward) and 0 <= reward <= 1):
        yield f"reward must be a number from 0 to 1 or null, not {quoted(reward)}"


def _is_finite(x: Any) -> bool:
    return isinstance(x, int | float) and abs(x) <= sys.float_info.max


def _named_problems(stored: Iterator[dict[str, Any]], values: Path) -> Iterator[dict[str, Any]]:
    for row in stored:
        if "problem" not in row:
            raise InputError(
                f"{values}: an earlier version's, which does not say what solutions belong to one "
                "problem; name the data with --data"
            )
        yield row


def _checked(
    paired: Iterator[tuple[dict[str, Any] | None, tuple[Place, Row | BadRow] | None]], values: Path
) -> Iterator[tuple[dict[str, Any], Row | None]]:
    """Values and their rows; whether a row has any, the data alone does not say."""
    for number, (stored, there) in enumerate(paired, 1):
        if stored is None or there is None or stored["line"] != there[0].line:
            raise InputError(
                f"{values}: row {number} is {_named(stored)}, and in the data {_place(there)}: "
                "values of other data, or read with other --fields"
            )
        if stored["values"] and (problem := _difference(stored, there[1])):
            raise InputError(
                f"{values}: row {number} and {_place(there)} do not belong together: {problem}; "
                "values of other data, of its rows in another order, or read with other --fields"
            )
        found = there[1]
        yield stored, found if isinstance(found, Row) else None


def _difference(stored: dict[str, Any], row: Row | BadRow) -> str | None:
    """What of a row is not that which its values were computed for."""
    if isinstance(row, BadRow):
        return f"it has values, and there {row.reason}"
    texts = {"problem": row.problem_id, "response": row.response}
    for name, text in texts.items():
        known = stored.get(name)  # files of earlier versions have not both
        if known is not None and known != _key(text):
            return f"another {name}"
    return None


def _key(text: str) -> str:
    """A problem or response as the values name it, so that it is the same without the data."""
    return f"{text_key(text):016x}"


def _labels_compared(
    paired: Iterable[tuple[dict[str, Any], Row | None]],
) -> Iterator[tuple[dict[str, Any], Row | None]]:
    """Pass values and rows on; say at the end how many labels the data has changed, as it may."""
    both = other = 0
    for stored, row in paired:
        yield stored, row
        if row is not None and stored["reward"] is not None and not math.isnan(row.reward):
            both += 1
            other += abs(stored["reward"] - row.reward) > _SAME
    if other:
        text = "%d of %d labels differ from those that the values were made with; the data's count"
        _log.warning(text, other, both)


def _named(stored: dict[str, Any] | None) -> str:
    return "missing" if stored is None else f"line {stored['line']}"


def _place(there: tuple[Place, Row | BadRow] | None) -> str:
    return "missing" if there is None else f"{there[0].file}:{there[0].line}"


def _solution(stored: dict[str, Any], row: Row | None, pattern: re.Pattern[str] | None) -> Solution:
    values = np.asarray(stored["values"], np.float64)
    prompt = stored.get("prompt_value")
    reward = stored["reward"]
    own: dict[str, Any] = {
        "problem": stored.get("problem", ""),
        "line": stored["line"],
        "values": values,
        "reward": np.nan if reward is None else float(reward),
        "prompt_value": np.nan if prompt is None else float(prompt),
    }
    if row is not None:
        own |= {
            "problem": _key(row.problem_id),
            "reward": own["reward"] if np.isnan(row.reward) else row.reward,
            "answer": _answer(row, pattern),
            "part": row.part,
            "step_values": tuple(_at(row.step_ends, stored, values)),
            "first_error": row.first_error,
        }
    return Solution(**own)


def _answer(row: Row, pattern: re.Pattern[str] | None) -> str | None:
    """The answer that the data has, or else the last one that the pattern finds."""
    if row.answer is not None or pattern is None:
        return row.answer
    last = deque(pattern.finditer(row.response), 1)
    if not last:
        return None
    found = last[0]
    return ((found[1] if pattern.groups else found[0]) or "").strip()


def _at(step_ends: tuple[int, ...], stored: dict[str, Any], values: Any) -> Iterator[float]:
    """The value after the token with which, or within which, each step ends."""
    ends = stored.get("ends") or []
    for at in step_ends if ends else ():
        yield float(values[min(bisect.bisect_left(ends, at), len(values) - 1)])
