"""What a run has settled about its cache, as the next attempt finds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.run.directory import RunDirectory
from job.training.cache_record import RECORD, Record

DEEPEST = 4
GOOD: dict[str, Any] = {
    "name": "0a1b2c3d4e5f",
    "given": ["a-000000"],
    "block": 3,
    "validation": None,
    "training": True,
    "earlier": 2,
    "earlier_given": [],
    "mode": "auto",
}


def _read(folder: Path, content: dict[str, Any]) -> Record | None:
    (folder / RECORD).write_text(json.dumps(content))
    return Record.read(RunDirectory(folder), DEEPEST)


def test_a_record_is_read_as_it_was_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Record.read(RunDirectory(tmp_path), DEEPEST) is None
    assert _read(tmp_path, GOOD) == Record(**GOOD)
    least = {key: GOOD[key] for key in ("name", "given", "block", "validation", "training")}
    assert _read(tmp_path, least) == Record(**least)
    assert not caplog.records


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 7),
        ("name", "*"),
        ("given", "a-000000"),
        ("given", [1]),
        ("block", "x"),
        ("block", 0),
        ("block", True),
        ("block", DEEPEST + 1),
        ("validation", "yes"),
        ("training", 1),
        ("earlier", 3),
        ("earlier", "x"),
        ("earlier_given", None),
        ("mode", None),
        ("other", 1),
    ],
)
def test_one_that_cannot_be_counts_as_absent(
    tmp_path: Path, key: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert _read(tmp_path, GOOD | {key: value}) is None
    assert Record.read(RunDirectory(tmp_path), DEEPEST) is None
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path / RECORD}: not readable, and taken as absent: ")
    assert key in line
