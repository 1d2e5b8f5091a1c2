"""The first rows of data, looked at before a job is submitted. Free of everything heavy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from job.common.data_file import Source, check_readable, data_files
from job.common.errors import InputError
from job.data.rows import BadRow, read_source

_FIRST = 20  # rows
# How files begin that only pyarrow reads, which a login node may lack.
_MAGIC = {".parquet": b"PAR1", ".zst": b"\x28\xb5\x2f\xfd", ".arrow": b"\xff\xff\xff\xff"}


def first_bad_rows(
    source: Source, fields: Any = None, reward_range: Sequence[float] | None = None
) -> tuple[list[BadRow], int]:
    """Those of the first rows that a training cannot use, and how many were looked at.

    Without pyarrow no row is, where a file is of a kind that only pyarrow reads.

    Raises:
        InputError: a file is missing, of an unknown kind, or damaged, or there is no row.
    """
    check_readable(source)
    unread = [file for file in data_files(source) if file.suffix in _MAGIC]
    if unread and find_spec("pyarrow") is None:
        for file in unread:
            _check_magic(file)
        return [], 0
    rows = read_source(source, fields, reward_range=reward_range)
    first = [row for _, row in itertools.islice(rows, _FIRST)]
    if not first:
        raise InputError(f"{source}: there is no row in it")
    return [row for row in first if isinstance(row, BadRow)], len(first)


def _check_magic(file: Path) -> None:
    begin = _MAGIC[file.suffix]
    with file.open("rb") as stream:
        if stream.read(len(begin)) != begin:
            raise InputError(f"{file}: damaged file: it does not begin as {file.suffix} files do")
