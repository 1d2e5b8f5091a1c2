"""What can be said of data files without reading their rows. Free of everything heavy."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from job.common.errors import InputError, file_error

Source = str | Path | Sequence[str | Path]  # a file, a glob, a folder of shards, or a list of these
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".ndjson", ".parquet")
_ARROW = ".arrow"
_STATE = "state.json"  # of a folder that `datasets.save_to_disk` made
_SPLITS = "dataset_dict.json"  # of a folder of such folders


def data_files(source: Source) -> list[Path]:
    """The files of a data source in the order in which they are read.

    Those of a glob or folder are in the order of their names; those of a folder that
    `datasets.save_to_disk` made as it says. What is named twice is read twice.

    Raises:
        InputError: a glob or folder has none, or a folder holds several splits.
    """
    if isinstance(source, str | Path):
        return _of_one(str(source))
    return [file for one in source for file in _of_one(str(one))]


def _of_one(source: str) -> list[Path]:
    path = Path(source)
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.exists() or not glob.has_magic(source):
            return [path]
        found = sorted(Path(one) for one in glob.glob(source, recursive=True))  # noqa: PTH207
    except OSError as error:
        raise file_error(error, f"{source}: cannot read the data: {error.strerror}") from None
    if not found:
        raise InputError(f"{source}: no file has such a name")
    return found


def _in_folder(folder: Path) -> list[Path]:
    if (folder / _STATE).is_file():
        return _saved(folder)
    if (folder / _SPLITS).is_file():
        named = ", ".join(str(folder / name) for name in _read(folder / _SPLITS).get("splits", []))
        raise InputError(f"{folder}: several splits; name the folder of one: {named}")
    found = sorted(file for file in folder.iterdir() if file.name.endswith(_SUFFIXES))
    if not found:
        raise InputError(f"{folder}: a folder without data files; known: {', '.join(_SUFFIXES)}")
    return found


def _saved(folder: Path) -> list[Path]:
    state = _read(folder / _STATE)
    try:
        return [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise InputError(f"{folder / _STATE}: does not say what its Arrow files are") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: broken JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def check_readable(source: Source) -> None:
    """Raise InputError unless `source` is readable files of kinds that a training takes."""
    for path in data_files(source):
        try:
            if not path.name.endswith((*_SUFFIXES, _ARROW)):
                raise InputError(f"{path}: {_unknown(path)}")
            with path.open("rb") as stream:
                if not stream.read(1):
                    raise InputError(f"{path}: the file is empty")
        except OSError as error:
            raise file_error(error, f"{path}: cannot read the data: {error.strerror}") from None


def _unknown(path: Path) -> str:
    known = f"unknown kind of data file; known: {', '.join(_SUFFIXES)}"
    return known if path.exists() else "no such file or folder"


def described(source: Any) -> str:
    """A source in a line, for messages and tables."""
    if isinstance(source, list | tuple):
        return f"{source[0]} and {len(source) - 1} more" if len(source) > 1 else str(source[0])
    return str(source)


def one_or_all(named: Sequence[str]) -> Source:
    """What a command line names: a single source by itself, which may be `embedded`."""
    return named[0] if len(named) == 1 else list(named)
