"""Values of a raw row by their names, each checked for what it must be."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from job.common.errors import quoted, short
from job.data.raw_rows import RawRow, RowError

NO_LABEL = -100  # as torch and transformers mark what has none
_ROUNDING = 1e-6  # by which labels that were computed in float32 may lie outside their range
_NAMES = 12  # of a row's fields, in a message


def field(row: RawRow, name: str) -> Any:
    """A field by its name, or within others by `a.b`.

    Raises:
        RowError: there is none; the names most like it come first.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise RowError(f"field {name!r} is missing; the row has {_names(row, name)}")
        value = value[part]
    return value


def first_there(row: RawRow, names: Sequence[str]) -> str:
    """The first of several names under which the row has something; if none, the first of all."""
    return next((name for name in names if row.get(name) is not None), names[0])


def _names(row: RawRow, wanted: str) -> str:
    if not row:
        return "none"
    if len(row) <= _NAMES:
        return ", ".join(map(short, map(repr, row)))
    near = difflib.get_close_matches(wanted, row, _NAMES // 2)
    first = list(dict.fromkeys([*near, *row]))[:_NAMES]
    return f"{', '.join(map(short, map(repr, first)))} and {len(row) - _NAMES} more"


def text(row: RawRow, name: str) -> str:
    return as_text(field(row, name), name)


def as_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"field {name!r} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        where = f"field {name!r}, character {error.start + 1}"
        raise RowError(f"{where}: half of a surrogate pair, which is no text") from None
    return value


def as_list(row: RawRow, name: str) -> list[Any]:
    value = field(row, name)
    if not isinstance(value, list):
        raise RowError(f"field {name!r} must be a list, not {type(value).__name__}")
    return value


def is_none(value: Any, span: tuple[float, float]) -> bool:
    """Whether a label says that there is none; pandas writes NaN for that."""
    return value is None or value != value or _is_no_label(value, span)


def _is_no_label(value: Any, span: tuple[float, float]) -> bool:
    """Whether a number marks what has no label, and is not one of those in the span."""
    return is_number(value) and value == NO_LABEL and span[0] > NO_LABEL


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal)


def as_label(value: Any, name: str, span: tuple[float, float] = (0.0, 1.0)) -> float:
    """A label as a reward in [0, 1]: of a number by its place in the span, of true or false 1 or 0.

    Raises:
        RowError: it is of another kind, such as a text, or lies outside.
    """
    if isinstance(value, bool):
        return float(value)
    if not is_number(value) or value != value:  # NaN
        raise RowError(f"field {name!r} must be a number or true/false, not {quoted(value)}")
    if _is_no_label(value, span):
        raise RowError(f"field {name!r} has no label ({NO_LABEL})")
    low, high = span
    rounding = _ROUNDING * (high - low)
    if not low - rounding <= value <= high + rounding:
        raise RowError(f"{name} {quoted(value)} lies outside [{low:g}, {high:g}]")
    return min(max((float(value) - low) / (high - low), 0.0), 1.0)


def optional_label(value: Any, name: str, span: tuple[float, float]) -> tuple[float, str | None]:
    """A label where none is needed: NaN and the reason for one that is none."""
    if is_none(value, span):
        return math.nan, None
    try:
        return as_label(value, name, span), None
    except RowError as error:
        return math.nan, str(error)


def problem(row: RawRow, name: str | None, prompt: str) -> str:
    """The row's problem; rows without one belong together if their prompts are equal."""
    value = field(row, name) if name else row.get("problem_id")
    if value is None or value != value:  # pandas writes NaN for none, and 7.0 for 7 beside one
        return of_prompt(prompt)
    return _named(value, name or "problem_id")


def of_prompt(prompt: str) -> str:
    return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()


def _named(value: Any, name: str) -> str:
    if isinstance(value, float | Decimal) and value == value // 1:
        value = int(value)
    if not isinstance(value, str | int | float | Decimal):
        raise RowError(f"field {name!r} must be text or a number, not {type(value).__name__}")
    return str(value)


def optional_name(row: RawRow, name: str | None) -> str | None:
    """A text or number that rows may have."""
    value = field(row, name) if name else None
    if value is None or value != value:
        return None
    return as_text(_named(value, str(name)), str(name))


def truncated(row: RawRow, name: str | None) -> bool:
    """Whether the row's answer was cut off; where it does not say, it was not."""
    value = field(row, name) if name else row.get("truncated")
    if value is None or value != value:  # pandas writes NaN for none
        return False
    if not isinstance(value, int | float) or value not in (0, 1):
        said = repr(name or "truncated")
        raise RowError(f"field {said} must be true or false, not {quoted(value)}")
    return bool(value)
