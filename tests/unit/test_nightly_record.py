"""What is kept of a night, where it is damaged: told as such, and no history."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.common.errors import InputError
from job.nightly.matrix import Entry
from job.nightly.record import (
    Finding,
    Night,
    NightFolder,
    Plan,
    PlannedRun,
    Result,
    Verdict,
    judged,
)

WRONG: list[Any] = [
    *([], "", 1, None, {}, {"version": 1}),
    *({"version": 1, "entries": [], "results": []}, {"version": 1, "entries": {"one": 3}}),
]


@pytest.fixture
def night(tmp_path: Path) -> NightFolder:
    """A judged night."""
    folder = NightFolder(tmp_path / "night-000001")
    folder.path.mkdir()
    runs = [PlannedRun("one", "run", 0, "config.yaml", job_id="41_0")]
    plan = Plan(1, "little", "abc", 1, {"one": Entry(floor={"r2": 0.5})}, runs, "python")
    result = Result("one", True, None, {"device": "cpu"}, figures={"r2": 0.5})
    found = Finding("one", "r2", Verdict.REGRESSED, "lower", between=("abc", "def"), before=1)
    folder.write_plan(plan)
    folder.write(Night(plan, {"one": result}, [found], ["a note"]))
    return folder


def _change(file: Path, *keys: str | int, to: Any) -> None:
    content = inner = json.loads(file.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    file.write_text(json.dumps(content))


def test_a_night_is_read_as_it_was_written(night: NightFolder) -> None:
    read = night.night()
    assert read.plan == night.plan()
    assert read.plan.entries == {"one": Entry(floor={"r2": 0.5})}
    assert read.findings[0].between == ("abc", "def")
    night.write(read)
    assert night.night() == read


def test_a_plan_from_before_a_field_was_there_is_read(night: NightFolder) -> None:
    content = json.loads(night.plan_file.read_text())
    for name in ("matrix_file", "site", "cluster", "deadline"):
        del content[name]
    night.plan_file.write_text(json.dumps(content))
    assert night.plan().matrix_file is None


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("plan.json", ("colour",)),
        ("plan.json", ("runs", 0, "colour")),
        ("record.json", ("results", "one", "colour")),
    ],
)
def test_a_night_of_newer_code_is_read_as_far_as_it_is_known(
    night: NightFolder, name: str, keys: tuple[str | int, ...]
) -> None:
    """Bisecting runs older code on it."""
    before = night.night()
    _change(night.path / name, *keys, to="red")
    assert night.night() == before


@pytest.mark.parametrize("name", ["plan.json", "record.json"])
@pytest.mark.parametrize("content", WRONG, ids=str)
def test_json_of_another_shape_is_damaged(night: NightFolder, name: str, content: Any) -> None:
    (night.path / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"night-000001/{name}: damaged; (submit|judge it)"):
        night.night()
    assert not [*judged(night.path.parent, "little", 2)]


@pytest.mark.parametrize(
    ("name", "keys", "to"),
    [
        ("plan.json", ("began",), "yesterday"),
        ("plan.json", ("runs", 0, "path"), None),
        ("plan.json", ("entries", "one", "kind"), "dance"),
        ("plan.json", ("entries", "one", "gpus"), "one"),
        ("record.json", ("notes",), 3),
        ("record.json", ("results", "one", "figures"), [1]),
        ("record.json", ("findings", 0, "verdict"), "good"),
        ("record.json", ("findings", 0, "between"), ["abc"]),
        ("record.json", ("findings", 0, "text"), None),
    ],
)
def test_a_field_of_another_kind_is_damage(
    night: NightFolder, name: str, keys: tuple[str | int, ...], to: Any
) -> None:
    _change(night.path / name, *keys, to=to)
    with pytest.raises(InputError, match=f"{name}: damaged"):
        night.night()
