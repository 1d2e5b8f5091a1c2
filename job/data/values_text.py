"""Token values as text: an object a line, or a table whose lists are JSON."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from job.common.errors import InputError, file_error

PARQUET = ".parquet"
_JSON, _CSV = (".jsonl", ".jsonl.gz"), ".csv"
SUFFIXES = (PARQUET, *_JSON, _CSV)
_TEXTS = ("problem", "response", "error")
_LISTS = ("values", "tokens", "ends")
_AT_ONCE = 1024
Row = dict[str, Any]


@dataclass(frozen=True)
class Values:
    """Values of one sequence of T response tokens.

    Attributes:
        tokens: float32 [T], the value after each of them.
        prompt: the value after the last token before them; None where there is none.
    """

    tokens: NDArray[np.float32]
    prompt: float | None

    @classmethod
    def of(cls, values: NDArray[np.float32], response_length: int) -> Values:
        """From values in the order of a batch's positions."""
        prompt = float(values[0]) if len(values) > response_length else None
        return cls(values[len(values) - response_length :], prompt)

    @property
    def in_order(self) -> NDArray[np.float32]:
        """As `of` takes them."""
        before = np.asarray([] if self.prompt is None else [self.prompt], np.float32)
        return np.concatenate([before, self.tokens])


def check_suffix(path: Path) -> None:
    """Raise InputError unless values can be written to a file of this name."""
    if path.is_dir():
        raise InputError(f"{path}: --out is a file, and this is a folder")
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: --out is a file that ends in {', '.join(SUFFIXES)}")


def write_rows(path: Path, stream: BinaryIO, names: list[str], rows: Iterable[Row]) -> None:
    """Write rows to the stream as the name of `path` says; `names` are the columns of a table."""
    with _written(path, stream) as text:
        if not path.name.endswith(_CSV):
            text.writelines(json.dumps(_plain(row)) + "\n" for row in rows)
            return
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        for row in map(_plain, rows):
            lists = {n: json.dumps(row[n]) for n in _LISTS if row[n] is not None}
            table.writerow(row | lists)


def read_values(path: Path) -> Iterator[Values]:
    """The values of each row that has any, in order."""
    for row in _text_rows(path):
        if row["values"]:
            prompt = row.get("prompt_value")  # files of 0.1.0 have none
            yield Values(
                np.asarray(row["values"], np.float32), None if prompt is None else float(prompt)
            )


def stored_rows(path: Path) -> Iterator[Row]:
    """The rows of a finished file of values, of any kind.

    Raises:
        InputError: there is none, or it is no file of values.
    """
    check_suffix(path)
    try:
        for row in _parquet_rows(path) if path.suffix == PARQUET else _text_rows(path):
            if "line" not in row or "values" not in row:
                raise InputError(f"{path}: no file of values; job.score writes such")
            yield row
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        raise file_error(error, f"{path}: cannot read the values: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(_AT_ONCE):
            yield from batch.to_pylist()


def _text_rows(path: Path) -> Iterator[Row]:
    with _opened(path) as text:
        if not path.name.endswith(_CSV):
            yield from map(json.loads, text)
            return
        for row in csv.DictReader(text):
            yield {name: _from_csv(name, value) for name, value in row.items()}


def _from_csv(name: str, cell: str) -> Any:
    """A cell's text, or its list or number; none where it is empty."""
    return cell if name in _TEXTS else json.loads(cell) if cell else None


def _plain(row: Row) -> Row:
    """A row for JSON, its float32 in no more digits than tell them apart."""
    single = {
        name: None if row[name] is None else _shortest(row[name])
        for name in ("prompt_value", "final_value")
    }
    values = row["values"]
    return row | single | {"values": values and [_shortest(value) for value in values]}


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


@contextmanager
def _written(path: Path, stream: BinaryIO) -> Iterator[io.TextIOWrapper]:
    if path.suffix == ".gz":
        with (
            gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed,
            io.TextIOWrapper(packed, encoding="utf-8") as text,
        ):
            yield text
        return
    plain = io.TextIOWrapper(cast(io.BufferedWriter, stream), encoding="utf-8")
    yield plain
    plain.detach()  # which writes what is left, and leaves the stream to its owner


@contextmanager
def _opened(path: Path) -> Iterator[io.TextIOBase]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as text:
        yield cast(io.TextIOBase, text)
