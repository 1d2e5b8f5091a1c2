"""Token values as text: an object a line, or a table whose lists are JSON."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from job.common.errors import InputError, file_error

PARQUET = ".parquet"
_JSON, _CSV = (".jsonl", ".jsonl.gz"), ".csv"
SUFFIXES = (PARQUET, *_JSON, _CSV)
_TEXTS = ("problem", "error")
_LISTS = ("values", "tokens", "ends")
_AT_ONCE = 1024
Row = dict[str, Any]


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


def read_values(path: Path) -> Iterator[NDArray[np.float32]]:
    """The values of each row that has any, in order."""
    with _opened(path) as text:
        rows: Iterable[Row] = (
            csv.DictReader(text) if path.name.endswith(_CSV) else map(json.loads, text)
        )
        for row in rows:
            values = row["values"]
            if values:
                found = json.loads(values) if isinstance(values, str) else values
                yield np.asarray(found, np.float32)


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
    values, final = row["values"], row["final_value"]
    return row | {
        "values": None if values is None else [_shortest(value) for value in values],
        "final_value": None if final is None else _shortest(final),
    }


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
