"""Token values of a data file: written part by part, at the end one file, Parquet or text.

    OUT.parts/              while it is being written
        plan.json           what is scored with what
        START-STOP.parquet  sequences START to STOP of the set, committed by a rename
    OUT.plan.json           beside text, which has no place for it: what was scored with what

A row for each row of the data, in its order, those that were left out among them:

    line          where it stands in the data file, counted from 1
    prompt_value  the value after the last token before the response; null without such a token
    values        the value after each token of the response, null for a row that was left out
    final_value   the last of them
    tokens        the response's tokens
    reward        null without a label
    problem       the same text for solutions of one problem
    response      the same text for the same response
    ends          how many characters of the response are read after each of its tokens
    error         why it was left out, else null
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from job.common.errors import InputError, file_error
from job.common.files import lock_file, named, put_in_place, write_atomic
from job.common.nested import refuse_differences
from job.common.state_files import name_unreadable, read_json
from job.data.rows import BadRow
from job.data.token_cache import TokenizedSet
from job.data.values_text import PARQUET, Values, read_values, write_rows

_PART = re.compile("([0-9]{12})-([0-9]{12})[.]parquet")
_PLAN = b"critic-job"  # key of the plan in the file's metadata
_AT_ONCE = 1024  # rows that are read together


class ValuesFile:
    """One scoring's file, for the one process that writes it.

    Args:
        plan: what a file or its parts must agree with, as names and values.
    """

    def __init__(self, path: Path, data: TokenizedSet, plan: dict[str, Any]) -> None:
        self.path, self._data, self._plan = path, data, plan
        self._parts = path.with_name(f"{path.name}.parts")
        self._bad = list(data.bad_rows())
        self._numbers = _numbers(len(data), self._bad)

    @contextmanager
    def claimed(self) -> Iterator[int]:
        """Hold the file for the length of the body; yield how many sequences are written already.

        Raises:
            InputError: the file or its parts are another scoring's, or a process is at it.
        """
        if self.path.exists():
            plan = _plan_beside(self.path, self._sidecar) if self._is_text else _plan_of(self.path)
            self._refuse_other(self.path, plan)
            shutil.rmtree(self._parts, ignore_errors=True)
            yield len(self._data)
            return
        with ExitStack() as held:
            try:
                self._parts.mkdir(parents=True, exist_ok=True)
                self._lock(held.enter_context((self._parts / "lock").open("w")))
                written = self._begin()
            except OSError as error:
                raise file_error(
                    error, f"{self.path}: cannot be written: {error.strerror}"
                ) from None
            yield written

    def _lock(self, file: TextIO) -> None:
        """Lock until the file is closed, whichever way this process ends."""
        try:
            lock_file(file, wait=False)
        except BlockingIOError:
            raise InputError(f"{self.path}: another process is scoring into it") from None

    def _begin(self) -> int:
        plan = self._parts / "plan.json"
        known = read_json(plan, dict)
        if known is not None:
            self._refuse_other(self._parts, known)
        else:
            for part, _ in self._written():  # of nobody knows what
                part.unlink()
            write_atomic(plan, json.dumps(self._plan, indent=2) + "\n")
        written = self._written()
        return written[-1][1] if written else 0

    def _refuse_other(self, place: Path, plan: dict[str, Any]) -> None:
        problem = (
            f"{place}: values of something else (there -> asked for); choose another --out, "
            "or remove it"
        )
        refuse_differences(plan, self._plan, problem)

    def add(self, start: int, values: Sequence[Values]) -> None:
        """Commit the values of the sequences from `start` on."""
        import pyarrow.parquet

        stop = start + len(values)
        with self._committed(self._parts / f"{start:012}-{stop:012}.parquet") as stream:
            pyarrow.parquet.write_table(self._table(start, stop, values), stream)

    def finish(self) -> None:
        """Make one file of the parts, and remove them."""
        import pyarrow.parquet

        files = [file for file, _ in self._written()]
        schema = pyarrow.parquet.read_schema(files[0])
        tables = (pyarrow.parquet.read_table(file, schema=schema) for file in files)
        if self._is_text:
            write_atomic(self._sidecar, json.dumps(self._plan, indent=2) + "\n")
            rows = (row for table in tables for row in table.to_pylist())
            with self._committed(self.path) as stream:
                write_rows(self.path, stream, schema.names, rows)
        else:
            schema = schema.with_metadata({_PLAN: json.dumps(self._plan)})
            with (
                self._committed(self.path) as stream,
                pyarrow.parquet.ParquetWriter(stream, schema) as writer,
            ):
                for table in tables:
                    writer.write_table(table.cast(schema))
        shutil.rmtree(self._parts, ignore_errors=True)

    @property
    def _is_text(self) -> bool:
        return self.path.suffix != PARQUET

    @property
    def _sidecar(self) -> Path:
        return self.path.with_name(f"{self.path.name}.plan.json")

    @contextmanager
    def _committed(self, file: Path) -> Iterator[BinaryIO]:
        """A stream whose content appears as `file` once it is on the disk."""
        scratch = self._parts / f"{file.name}.unfinished"
        try:
            with named(file), scratch.open("wb") as stream:
                yield stream
            put_in_place(scratch, file)
        except OSError as error:
            raise file_error(error, f"{file}: cannot write the values: {error.strerror}") from None

    def values(self) -> Iterator[list[Values]]:
        """The values of the finished file's sequences, in order, some at a time."""
        import pyarrow.parquet

        if self._is_text:
            found = read_values(self.path)
            while some := list(itertools.islice(found, _AT_ONCE)):
                yield some
            return
        with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False) as file:
            for batch in file.iter_batches(_AT_ONCE, columns=["values", "prompt_value"]):
                rows = zip(batch["values"], batch["prompt_value"], strict=True)
                yield [Values(v.values.to_numpy(), p.as_py()) for v, p in rows if v.is_valid]

    def _written(self) -> list[tuple[Path, int]]:
        """The parts that follow each other from the first on, and where each of them ends.

        What comes after one that is missing or not readable is scored again.
        """
        named = ((_PART.fullmatch(file.name), file) for file in self._parts.glob("*"))
        ends = {int(m[1]): (file, int(m[2])) for m, file in named if m and m[1] < m[2]}
        parts, stop = [], 0
        while stop in ends and _is_whole(ends[stop][0]):
            parts.append(ends[stop])
            stop = ends[stop][1]
        return parts

    def _table(self, start: int, stop: int, values: Sequence[Values]) -> Any:
        import pyarrow as pa

        good = zip(range(start, stop), values, strict=True)
        numbered = {self._numbers[i]: self._row(i, v) for i, v in good}
        numbered |= {bad.row: _left_out(bad) for bad in self._bad_between(start, stop)}
        rows = [numbered[number] for number in sorted(numbered)]
        schema = pa.schema(
            [
                ("line", pa.int64()),
                ("prompt_value", pa.float32()),
                ("values", pa.list_(pa.float32())),
                ("final_value", pa.float32()),
                ("tokens", pa.list_(pa.uint32())),
                ("reward", pa.float64()),
                ("problem", pa.string()),
                ("response", pa.string()),
                ("ends", pa.list_(pa.int32())),
                ("error", pa.string()),
            ]
        )
        return pa.Table.from_pylist(rows, schema)

    def _row(self, index: int, values: Values) -> dict[str, Any]:
        data = self._data
        own = slice(data.offsets[index] + data.response_starts[index], data.offsets[index + 1])
        reward = data.rewards[index]
        assert data.ends is not None, "a set that is scored has them"
        assert data.responses is not None, "and these"
        return {
            "line": int(data.lines[index]),
            "prompt_value": values.prompt,
            "values": values.tokens,
            "final_value": values.tokens[-1],
            "tokens": np.asarray(data.tokens[own]),
            "reward": None if np.isnan(reward) else float(reward),
            "problem": f"{data.problems[index]:016x}",
            "response": f"{data.responses[index]:016x}",
            "ends": np.asarray(data.ends[own]),
            "error": None,
        }

    def _bad_between(self, start: int, stop: int) -> Iterator[BadRow]:
        """Rows left out since the part before; the last part has the rest."""
        numbers = self._numbers
        after = numbers[start - 1] if start else 0
        until = numbers[stop - 1] if stop < len(numbers) else np.inf
        return (bad for bad in self._bad if after < bad.row < until)


def _numbers(good: int, bad: list[BadRow]) -> list[int]:
    """The number among all rows of each that is good."""
    left_out = {row.row for row in bad}
    every = (number for number in itertools.count(1) if number not in left_out)
    return list(itertools.islice(every, good))


def _left_out(bad: BadRow) -> dict[str, Any]:
    return {"line": bad.line, "error": bad.reason}


def _plan_beside(file: Path, sidecar: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{file}: is there already, and {sidecar.name} does not say of what"
        ) from None
    return plan


def _plan_of(file: Path) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(file).metadata or {}
        plan: dict[str, Any] = json.loads(metadata[_PLAN])
    except (pyarrow.ArrowException, OSError, KeyError, ValueError):
        raise InputError(f"{file}: is there already, and no file of values") from None
    return plan


def _is_whole(part: Path) -> bool:
    """Whether a part can be read; its content is on the disk before it has its name."""
    import pyarrow
    import pyarrow.parquet

    try:
        pyarrow.parquet.read_table(part)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        name_unreadable(part, error)
        return False
    return True
