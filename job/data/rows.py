"""Labelled solutions from JSONL (plain, .gz, .zst) and Parquet, row by row."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import math
import reprlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from job.common.data_file import check_readable
from job.common.errors import file_error

ALPACA_FIELDS = {"prompt": "instruction", "response": "output", "reward": "is_correct"}
Rewards = bool | Literal["optional"]  # whether rows must carry one


@dataclass(frozen=True)
class Row:
    """A solution and its label, NaN where it has none.

    `optimal[i]` is the best value after response character i.
    """

    prompt: str
    response: str
    reward: float
    problem_id: str
    optimal: tuple[float, ...] | None = None


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

    Args:
        fields: None, a mapping from `prompt`, `response`, `reward`, `problem_id` to the file's
            names, or `alpaca`.
        rewards: whether rows must carry a reward. If not, it is 0, and with `optional` that of
            the row or NaN.

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
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, functools.partial(_parse_json, line)


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.suffix == ".zst":
        import pyarrow  # its reader refuses a cut-off frame, zstandard's takes it for the end

        return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd")))
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
            prompt = _alpaca_prompt(prompt, row)
        response_field = names.get("response", "response")
        response = _text(row, response_field)
        if not response.strip():
            raise _RowError(f"field {response_field!r} is empty")
        reward = _reward(row, names.get("reward", "reward"), rewards) if rewards else 0.0
        return Row(prompt, response, reward, _problem(row, problem_field, prompt))

    return parse


def _field(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise _RowError(f"field {name!r} is missing; the row has {', '.join(map(repr, row))}")
    return row[name]


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


def _reward(row: dict[str, Any], name: str, rewards: Rewards) -> float:
    if rewards == "optional" and row.get(name) is None:
        return math.nan
    value = _field(row, name)
    if not isinstance(value, int | float) or value != value:  # NaN
        shown = reprlib.repr(value)
        raise _RowError(f"field {name!r} must be a number or true/false, not {shown}")
    if not 0 <= value <= 1:
        raise _RowError(f"{name} {reprlib.repr(value)} lies outside [0, 1]")
    return float(value)


def _problem(row: dict[str, Any], field: str | None, prompt: str) -> str:
    """The row's problem; rows without one belong together if their prompts are equal."""
    value = _field(row, field) if field else row.get("problem_id")
    if value is None:
        return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()
    if not isinstance(value, str | int):
        name = repr(field or "problem_id")
        raise _RowError(f"field {name} must be text or an integer, not {type(value).__name__}")
    return str(value)


def _alpaca_prompt(instruction: str, row: dict[str, Any]) -> str:
    """The instruction template of Stanford Alpaca (Taori et al. 2023), with or without input."""
    context = _text(row, "input") if row.get("input") else ""
    lead = "Below is an instruction that describes a task"
    if context:
        lead += ", paired with an input that provides further context"
    lead += ". Write a response that appropriately completes the request."
    middle = f"\n\n### Input:\n{context}" if context else ""
    return f"{lead}\n\n### Instruction:\n{instruction}{middle}\n\n### Response:"
