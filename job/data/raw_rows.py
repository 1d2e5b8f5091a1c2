"""What stands in a data file, row by row: JSON lines or one array, Parquet, Arrow."""

from __future__ import annotations

import functools
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from job.common.data_file import check_readable
from job.common.errors import file_error
from job.data.json_array import array_items, begins_array

RawRow = dict[str, Any]
_AT_ONCE = 1024  # rows
_LOOKED_AT = 4096  # bytes: blanks before an array, or an object


class RowError(ValueError):
    """What is wrong with one row."""


def raw_rows(path: Path) -> Iterator[tuple[int, RawRow | Callable[[], RawRow]]]:
    """Number and content of each row of a file, or what gives it or raises RowError.

    Raises:
        InputError: the file is missing, of an unknown kind, or damaged.
    """
    check_readable(path)
    read = _READERS.get(path.suffix, _json_rows)
    try:
        yield from read(path)
    except (OSError, EOFError, ValueError, zlib.error, _arrow_error()) as error:
        raise file_error(error, f"{path}: damaged file: {error}") from None


def _arrow_error() -> type[Exception]:
    """What pyarrow raises; where nobody has imported it, it has raised nothing."""
    return cast(type[Exception], getattr(sys.modules.get("pyarrow"), "ArrowException", OSError))


def _json_rows(path: Path) -> Iterator[tuple[int, Callable[[], RawRow]]]:
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


def _parse_json(line: bytes) -> RawRow:
    try:
        row = json.loads(line.rstrip())  # an error at the end would count as on line 2
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise RowError(f"broken JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # thousands of digits or of brackets
        raise RowError(f"broken JSON: {error}") from None
    return _object(row)


def _object(row: Any) -> RawRow:
    if not isinstance(row, dict):
        raise RowError(f"a row must be a JSON object, not {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    import pyarrow.parquet

    number = 0
    # By default a row group, and so perhaps the whole file, would be read ahead into memory.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as table:
        for batch in table.iter_batches(_AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _arrow_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    """Of a file as the `datasets` library saves it: a stream of batches, without a footer."""
    import pyarrow

    number = 0
    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as batches:
        for batch in batches:
            for start in range(0, batch.num_rows, _AT_ONCE):
                for row in batch.slice(start, _AT_ONCE).to_pylist():
                    number += 1
                    yield number, row


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
