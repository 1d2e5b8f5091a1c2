"""Bad rows and data files end in exit code 78 and a short message that names file and line."""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from spoiled_input import ROWS, json_lines

pytestmark = pytest.mark.slow


def _row(**changes: Any) -> str:
    return json.dumps({k: v for k, v in (ROWS[0] | changes).items() if v is not ...})


BAD_ROWS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "broken JSON": ('{"prompt": "1+2?", ', ("broken JSON", "column")),
    "Python, not JSON": ("{'prompt': '1+2?'}", ("broken JSON", "column 2")),
    "nested thousands deep": ("[" * 100_000, ("broken JSON",)),
    "not UTF-8": (b'{"prompt": "\xff"}', ("not UTF-8",)),
    "array": ('["1+2?", "A3", 1]', ("a JSON object, not list",)),
    "null": ("null", ("a JSON object, not NoneType",)),
    "no prompt": (_row(prompt=...), ("'prompt' is missing", "'response'")),
    "no response": (_row(response=...), ("'response' is missing",)),
    "no reward": (_row(reward=...), ("'reward' is missing",)),
    "prompt is a number": (_row(prompt=3), ("'prompt' must be text, not int",)),
    "prompt is null": (_row(prompt=None), ("'prompt' must be text, not NoneType",)),
    "response is a list": (_row(response=["A3"]), ("'response' must be text, not list",)),
    "empty response": (_row(response=" \n"), ("'response' is empty",)),
    "reward above 1": (_row(reward=1.5), ("1.5", "[0, 1]")),
    "reward below 0": (_row(reward=-1), ("-1", "[0, 1]")),
    "reward is text": (_row(reward="1"), ("'reward'", "'1'")),
    "reward is null": (_row(reward=None), ("'reward'", "None")),
    "reward is NaN": (_row(reward=math.nan), ("'reward'", "nan")),
    "reward is infinite": (_row(reward=math.inf), ("reward inf",)),
    "problem is a list": (_row(problem_id=["a"]), ("problem_id", "list")),
    "too long": (_row(response="1" * 40), ("tokens, more than data.max_length 32",)),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_row(case: str, workplace: Path, refused: Callable[..., None]) -> None:
    content, words = BAD_ROWS[case]
    raw = content.encode() if isinstance(content, str) else content
    (workplace / "train.jsonl").write_bytes(json_lines(*ROWS[:2]).encode() + raw + b"\n")
    refused("train.jsonl: 1 bad of 3 rows", "train.jsonl:3: ", *words)


def test_row_of_the_validation_set(workplace: Path, refused: Callable[..., None]) -> None:
    (workplace / "validation.jsonl").write_text(json_lines(*ROWS, {"prompt": "1+2?"}))
    refused("validation.jsonl:5: ", "'response' is missing")


def test_row_under_other_names(workplace: Path, refused: Callable[..., None]) -> None:
    fields = "data.fields={reward: is_correct}"
    refused("train.jsonl:1: ", "'is_correct' is missing", "'reward'", overrides=(fields,))
    alpaca = ("run.name=alpaca", "data.fields=alpaca")
    refused("train.jsonl:1: ", "'instruction' is missing", overrides=alpaca)


def test_bad_rows_are_counted_and_the_first_ten_shown(
    workplace: Path, refused: Callable[..., None]
) -> None:
    (workplace / "train.jsonl").write_text(json_lines(*ROWS, *[{"prompt": "1?"}] * 15))
    refused("15 bad of 19 rows", "train.jsonl:14: ", "... and 5 more", "data.bad_rows=skip")


def test_only_bad_rows(workplace: Path, refused: Callable[..., None]) -> None:
    (workplace / "train.jsonl").write_text(json_lines({"prompt": "1?"}, {}))
    refused("train.jsonl: no usable row (2 read)", overrides=("data.bad_rows=skip",))


def _parquet(**columns: list[Any]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), stream)
    return stream.getvalue()


GOOD_PARQUET = _parquet(prompt=["1?"] * 99, response=["A1"] * 99, reward=[1.0] * 99)
DATA_FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("bad.jsonl", b"", ("the file is empty",)),
    "blank": ("bad.jsonl", b"\n\n", ("no usable row",)),
    "wrong suffix": ("bad.csv", b"1?,A1,1\n", ("unknown kind of data file", ".jsonl.gz")),
    "garbage gz": ("bad.jsonl.gz", b"garbage", ("damaged file",)),
    "truncated gz": (
        "bad.jsonl.gz",
        gzip.compress(json_lines(*ROWS).encode())[:-9],
        ("damaged file",),
    ),
    "garbage zst": ("bad.jsonl.zst", b"garbage", ("damaged file",)),
    "garbage parquet": ("bad.parquet", b"garbage" * 9, ("damaged file",)),
    "truncated parquet": ("bad.parquet", GOOD_PARQUET[:-20], ("damaged file",)),
    "parquet without a column": (
        "bad.parquet",
        _parquet(prompt=["1?"], response=["A1"]),
        ("bad.parquet:1: ", "'reward' is missing"),
    ),
    "parquet of wrong types": (
        "bad.parquet",
        _parquet(prompt=["1?", "1?"], response=["A1", "A1"], reward=["1", None]),
        ("2 bad of 2 rows", "bad.parquet:2: ", "'reward'"),
    ),
}


@pytest.mark.parametrize("case", DATA_FILES)
def test_data_file(case: str, workplace: Path, refused: Callable[..., None]) -> None:
    name, content, words = DATA_FILES[case]
    (workplace / name).write_bytes(content)
    refused(name, *words, overrides=(f"data.train={name}",))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("none.jsonl", "cannot read the data: No such file"),
        ("folder.jsonl", "a folder without data files"),
    ],
)
def test_no_data_file(
    file: str, reason: str, workplace: Path, refused: Callable[..., None]
) -> None:
    (workplace / "folder.jsonl").mkdir()
    refused(file, reason, overrides=(f"data.validation={file}",))


def test_no_pairs(workplace: Path, refused: Callable[..., None]) -> None:
    (workplace / "train.jsonl").write_text(json_lines(ROWS[0], ROWS[3]))
    refused(
        "train.jsonl", "no two solutions of one problem", overrides=("objective.loss=pairwise",)
    )


def test_cache_cannot_be_written(workplace: Path, refused: Callable[..., None]) -> None:
    refused(
        "data.cache_dir: cannot use train.jsonl/cache",
        overrides=("data.cache_dir=train.jsonl/cache",),
    )
