"""What can be said of a data file without reading its rows. Free of everything heavy."""

from __future__ import annotations

from pathlib import Path

from job.common.errors import InputError, file_error

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".ndjson", ".parquet")


def check_readable(path: str | Path) -> None:
    """Raise InputError unless `path` is a readable file of a kind that a training takes."""
    path = Path(path)
    if not path.name.endswith(_SUFFIXES):
        raise InputError(f"{path}: unknown kind of data file; known: {', '.join(_SUFFIXES)}")
    try:
        with path.open("rb") as stream:
            if not stream.read(1):
                raise InputError(f"{path}: the file is empty")
    except OSError as error:
        raise file_error(error, f"{path}: cannot read the data: {error.strerror}") from None
