"""Labelled solutions from JSON lines or one array (plain, .gz, .zst) and Parquet, row by row."""

from __future__ import annotations

import difflib
import functools
import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, cast

from job.common.data_file import check_readable
from job.common.errors import file_error, quoted, short
from job.data.json_array import array_items, begins_array
from job.data.targets import END, Target, TargetError, read_targets

ALPACA_FIELDS = {"prompt": "instruction", "response": "output", "reward": "is_correct"}
Rewards = bool | Literal["optional"]  # whether rows must carry one
_ROUNDING = 1e-6  # by which labels that were computed in float32 may lie outside [0, 1]
_NAMES = 12  # of a row's fields, in a message
_LOOKED_AT = 4096  # bytes: blanks before an array, or an object


@dataclass(frozen=True)
class Row:
    """A solution and its label, NaN where it has none.

    `optimal[i]` is the best value after i characters of the response; `truncated` says that the
    answer was cut off, and `odd_label` why a label that is there is not used. `targets`, where
    there are any, are all that is trained.
    """

    prompt: str
    response: str
    reward: float
    problem_id: str
    optimal: tuple[float, ...] | None = None
    truncated: bool = False
    odd_label: str | None = None
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it stands and what is wrong with it."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class _RowError(ValueError):
    """What is wrong with one row."""


def read_rows(
    path: str | Path, fields: Any = None, *, rewards: Rewards = True
) -> Iterator[tuple[int, Row | BadRow]]:
    """Line number and Row or BadRow for each row of a file, few in memory at a time.

    Rows of an array and of Parquet are counted as lines are.

    Args:
        fields: None, a mapping from `prompt`, `response`, `reward`, `problem_id`, `truncated`,
            `targets` to the file's names (`a.b` is b within a), or `alpaca`. Targets are read
            where they are named, and then the reward, the target at the end, may be missing.
        rewards: whether rows must carry a reward. If not, it is 0, and with `optional` that of
            the row, or NaN where that is none between 0 and 1.

    Raises:
        InputError: the file is missing, of an unknown kind, or damaged.
    """
    parse = _row_parser(fields, rewards)
    for line, raw in _rows(Path(path)):
        try:
            yield line, parse(raw() if callable(raw) else raw)
        except _RowError as error:
            yield line, BadRow(str(path), line, str(error))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | Callable[[], dict[str, Any]]]]:
    check_readable(path)
    try:
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    except (OSError, EOFError, ValueError, zlib.error, _arrow_error()) as error:
        raise file_error(error, f"{path}: damaged file: {error}") from None


def _arrow_error() -> type[Exception]:
    import pyarrow

    return cast(type[Exception], pyarrow.ArrowException)


def _json_rows(path: Path) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    with path.open("rb") as raw, _decompressed(path, raw) as stream:
        if begins_array(stream.peek(_LOOKED_AT)[:_LOOKED_AT]):
            with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
                for number, item in enumerate(array_items(text), 1):
                    yield number, functools.partial(_object, item)
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, functools.partial(_parse_json, line)


def _decompressed(path: Path, raw: io.BufferedReader) -> io.BufferedReader:
    if path.suffix == ".gz":
        return cast(io.BufferedReader, gzip.GzipFile(fileobj=raw))  # it can all that is asked for
    if path.suffix == ".zst":
        import pyarrow  # its reader refuses a cut-off frame, zstandard's takes it for the end

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return raw


def _parse_json(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.rstrip())  # an error at the end would count as on line 2
    except UnicodeDecodeError as error:
        raise _RowError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _RowError(f"broken JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # thousands of digits or of brackets
        raise _RowError(f"broken JSON: {error}") from None
    return _object(row)


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise _RowError(f"a row must be a JSON object, not {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    number = 0
    # By default a row group, and so perhaps the whole file, would be read ahead into memory.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as table:
        for batch in table.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _row_parser(fields: Any, rewards: Rewards) -> Callable[[dict[str, Any]], Row]:
    names = ALPACA_FIELDS if fields == "alpaca" else dict(fields or {})
    problem_field = names.get("problem_id")

    def parse(row: dict[str, Any]) -> Row:
        prompt = _text(row, names.get("prompt", "prompt"))
        if fields == "alpaca":
            prompt = alpaca_prompt(prompt, row)
        response_field = names.get("response", "response")
        response = _text(row, response_field)
        if not response.strip():
            raise _RowError(f"field {response_field!r} is empty")
        name = names.get("reward", "reward")
        targets = _targets(row, names.get("targets"), response) if rewards else ()
        optional = "optional" if targets else rewards
        reward, odd = _reward(row, name, optional) if rewards else (0.0, None)
        if targets:
            end = () if math.isnan(reward) else (Target(0, reward, 1.0, END),)
            reward, targets = (targets[-1].value if not end else reward), (*targets, *end)
        problem = _problem(row, problem_field, prompt)
        cut = _truncated(row, names.get("truncated"))
        return Row(prompt, response, reward, problem, None, cut, odd, targets)

    return parse


def _field(row: dict[str, Any], name: str) -> Any:
    """A field by its name, or within others by `a.b`.

    Raises:
        _RowError: there is none; the names most like it come first.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise _RowError(f"field {name!r} is missing; the row has {_names(row, name)}")
        value = value[part]
    return value


def _names(row: dict[str, Any], wanted: str) -> str:
    if len(row) <= _NAMES:
        return ", ".join(map(short, map(repr, row)))
    near = difflib.get_close_matches(wanted, row, _NAMES // 2)
    first = list(dict.fromkeys([*near, *row]))[:_NAMES]
    return f"{', '.join(map(short, map(repr, first)))} and {len(row) - _NAMES} more"


def _text(row: dict[str, Any], name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise _RowError(f"field {name!r} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        where = f"field {name!r}, character {error.start + 1}"
        raise _RowError(f"{where}: half of a surrogate pair, which is no text") from None
    return value


def _reward(row: dict[str, Any], name: str, rewards: Rewards) -> tuple[float, str | None]:
    """A row's label; where none is needed, NaN and the reason for one that is none."""
    if rewards != "optional":
        return _label(_field(row, name), name), None
    try:
        value = _field(row, name)
    except _RowError:
        return math.nan, None
    if value is None or value != value:
        return math.nan, None
    try:
        return _label(value, name), None
    except _RowError as error:
        return math.nan, str(error)


def _targets(row: dict[str, Any], field: str | None, response: str) -> tuple[Target, ...]:
    """A row's targets at positions; none where the field is null or missing."""
    given = None
    if field is not None:
        with suppress(_RowError):
            given = _field(row, field)
    if given is None:
        return ()
    try:
        return read_targets(given, str(field), response, _label)
    except TargetError as error:
        raise _RowError(str(error)) from None


def _label(value: Any, name: str) -> float:
    if not isinstance(value, int | float | Decimal) or value != value:  # NaN
        raise _RowError(f"field {name!r} must be a number or true/false, not {quoted(value)}")
    if not -_ROUNDING <= value <= 1 + _ROUNDING:
        raise _RowError(f"{name} {quoted(value)} lies outside [0, 1]")
    return min(max(float(value), 0.0), 1.0)


def _problem(row: dict[str, Any], field: str | None, prompt: str) -> str:
    """The row's problem; rows without one belong together if their prompts are equal."""
    value = _field(row, field) if field else row.get("problem_id")
    if value is None or value != value:  # pandas writes NaN for none, and 7.0 for 7 beside one
        return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()
    if isinstance(value, float | Decimal) and value == value // 1:
        value = int(value)
    if not isinstance(value, str | int | float | Decimal):
        name = repr(field or "problem_id")
        raise _RowError(f"field {name} must be text or a number, not {type(value).__name__}")
    return str(value)


def _truncated(row: dict[str, Any], field: str | None) -> bool:
    """Whether the row's answer was cut off; where it does not say, it was not."""
    value = _field(row, field) if field else row.get("truncated")
    if value is None or value != value:  # pandas writes NaN for none
        return False
    if not isinstance(value, int | float) or value not in (0, 1):
        name = repr(field or "truncated")
        raise _RowError(f"field {name} must be true or false, not {quoted(value)}")
    return bool(value)


def alpaca_prompt(instruction: str, row: dict[str, Any]) -> str:
    """The instruction template of Stanford Alpaca (Taori et al. 2023), with or without input."""
    context = _text(row, "input") if row.get("input") else ""
    lead = "Below is an instruction that describes a task"
    if context:
        lead += ", paired with an input that provides further context"
    lead += ". Write a response that appropriately completes the request."
    middle = f"\n\n### Input:\n{context}" if context else ""
    return f"{lead}\n\n### Instruction:\n{instruction}{middle}\n\n### Response:"
