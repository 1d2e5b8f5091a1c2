"""The line for `git bisect run`: which findings have one, and what a commit answers."""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from job.common.errors import InputError
from job.nightly.baseline import accept
from job.nightly.judge import judge
from job.nightly.matrix import Entry, Kind
from job.nightly.record import Finding, Night, NightFolder, Plan, Result, Verdict
from slurm import night_bisect

KEY = {"device": "A100", "instructions": "AVX512", "torch": "2.11", "image": "none"}
ENTRIES = {
    "plain": Entry(floor={"r2": 0.3}),
    "stopped": Entry(same_as="plain"),
    "preflight": Entry(kind=Kind.preflight),
}
GOOD: dict[str, dict[str, Any]] = {
    "plain": {"loss": [0.5, 0.25], "r2": 0.5, "memory_predicted": 1e9, "memory_measured": 1e9},
    "stopped": {"loss": [0.5, 0.25]},
    "preflight": {"preflight": []},
}


def _night(folder: Path, number: int, nights: list[Night], **changes: dict[str, Any]) -> Night:
    """A judged night, which is accepted if it is the first."""
    place = NightFolder(folder / f"night {number:06}")
    plan = Plan(number, "own", f"commit{number}", 1e9, ENTRIES, [], "/my python")
    results = {
        name: Result(name, True, None, KEY, None, True, figures | changes.get(name, {}))
        for name, figures in GOOD.items()
    }
    place.baselines = folder / "accepted"
    night = judge(place, plan, results, nights)
    if not nights:
        accept(place.baselines, night, [], "*/*", "looked at")
    return night


def _regressed(folder: Path, **changes: dict[str, Any]) -> list[Finding]:
    """The regressions of a third night, after one that was accepted and one that passed."""
    nights: list[Night] = []
    for number in (1, 2):
        nights.append(_night(folder, number, nights))
    found = _night(folder, 3, nights, **changes).findings
    return [one for one in found if one.verdict is Verdict.REGRESSED]


def test_the_line_is_quoted(tmp_path: Path) -> None:
    plain, *_ = _regressed(tmp_path, plain={"loss": [0.5, 0.3]})
    assert plain.bisect is not None
    words = shlex.split(plain.bisect)
    assert words[:4] == ["git", "bisect", "start", "commit3"]
    assert words[-7:] == [
        *("run", "/my python", "slurm/nightly.py", "--bisect", "plain/loss"),
        *("--night", str(tmp_path / "night 000003")),
    ]


@pytest.mark.parametrize(
    "changes", [{"preflight": {"preflight": ["no room"]}}, {"plain": {"r2": 0.2}}]
)
def test_what_is_held_against_no_earlier_night_has_no_line(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    (found,) = _regressed(tmp_path, **changes)
    assert (found.before, found.bisect) == (None, None)


def test_an_entry_is_not_held_against_what_another_has_lost(tmp_path: Path) -> None:
    plain, stopped = _regressed(tmp_path, plain={"loss": [0.5, 0.3]})
    assert (plain.name, stopped.name) == ("plain/loss", "stopped/loss")
    assert plain.bisect is not None
    assert (stopped.before, stopped.bisect) == (None, None)
    assert stopped.between == ("commit2", "commit3")


def test_an_entry_that_has_moved_itself_is_held_against_its_own_baseline(tmp_path: Path) -> None:
    beside, itself = _regressed(tmp_path, stopped={"loss": [0.5, 0.3]})
    assert "not as plain" in beside.text
    assert beside.bisect is None
    assert itself.before == [0.5, 0.25]
    assert itself.bisect is not None


def test_a_night_in_which_the_other_entry_had_moved_was_a_good_one(tmp_path: Path) -> None:
    nights: list[Night] = []
    for number, losses in enumerate(([0.5, 0.25], [0.5, 0.25], [0.5, 0.3]), 1):
        nights.append(_night(tmp_path, number, nights, plain={"loss": losses}))
    night = _night(tmp_path, 4, nights, stopped={"loss": [0.5, 0.2]})
    itself = next(one for one in night.findings if one.name == "stopped/loss" and one.bisect)
    assert itself.between == ("commit3", "commit4")


def _answer(
    monkeypatch: pytest.MonkeyPatch, folder: Path, here: Result, there: Result, before: Any
) -> int:
    name = next(iter(here.figures))
    found = Finding("one", name, Verdict.REGRESSED, "", "", there.figures[name], before)
    beside = Finding("one", name, Verdict.REGRESSED, "not as two", "", there.figures[name])
    night = NightFolder(folder / "night-000001")
    night.path.mkdir()
    plan = Plan(1, "own", "abc", 1e9, {"one": Entry()}, [], "python")
    night.write_plan(plan)
    night.write(Night(plan, {"one": there}, [beside, found]))
    monkeypatch.setattr(night_bisect, "_again", lambda *_: here)
    return night_bisect.side(Namespace(folder=folder, night="1", bisect=f"one/{name}"))


def _result(on_gpu: bool = True, key: dict[str, str] = KEY, **figures: Any) -> Result:
    return Result("one", True, None, key, None, on_gpu, figures)


@pytest.mark.parametrize(
    ("figure", "bad", "before", "here"),
    [
        ("loss", [0.5, 0.3], [0.5, 0.2], [0.5, 0.21]),
        ("loss", [0.5, 0.3], [0.5, 0.2], [0.5]),
        ("r2", 0.4, 0.5, 0.45),
        ("parameters", "ab", "cd", "ef"),
        ("checkpoint_bytes", 2e9, 1e9, 3e9),
        ("memory_measured", 1.02e9, 1.01e9, 1.015e9),
    ],
)
def test_an_exact_figure_like_neither_night_has_no_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, figure: str, bad: Any, before: Any, here: Any
) -> None:
    there = _result(**{"memory_predicted": 1e9, figure: bad})
    now = _result(**{figure: here, "memory_predicted": 1e9})
    with pytest.raises(InputError, match=f"one/{figure} is neither as it was nor as in that night"):
        _answer(monkeypatch, tmp_path, now, there, before)


@pytest.mark.parametrize("figure", ["loss", "speed"])
@pytest.mark.parametrize(
    ("name", "value", "answer"),
    [
        ("image", "critic.sif", 1),
        ("device", "Xeon", None),
        ("instructions", "AVX2", None),
        ("torch", "2.12", None),
    ],
)
def test_a_commit_has_an_answer_only_on_a_machine_like_the_nights(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    figure: str,
    name: str,
    value: str,
    answer: int | None,
) -> None:
    there = _result(**{figure: 8.0})
    now = _result(key=KEY | {name: value}, **{figure: 8.0})
    if answer is not None:
        assert _answer(monkeypatch, tmp_path, now, there, 10.0) == answer
        return
    with pytest.raises(InputError, match=f"the night had {name} {KEY[name]}, here {value}: bisect"):
        _answer(monkeypatch, tmp_path, now, there, 10.0)


@pytest.mark.parametrize(
    ("figure", "bad", "before", "here", "answer"),
    [
        ("r2", [0.2, 0.3, 0.25], 0.5, [0.49, 0.5, 0.52], 0),
        ("r2", [0.2, 0.3, 0.25], 0.5, [0.26, 0.27, 0.2], 1),
        ("r2", 0.4, 0.5, 0.5, 0),
        ("r2", 0.4, 0.5, 0.4, 1),
        ("loss", [0.5, 0.3], [0.5, 0.2], [0.5, 0.2], 0),
        ("loss", [0.5, 0.3], [0.5, 0.2], [0.5, 0.3], 1),
        ("parameters", "ab", "cd", "cd", 0),
        ("parameters", "ab", "cd", "ab", 1),
        ("speed", 8.0, 10.0, 9.5, 0),
        ("speed", 8.0, 10.0, 8.5, 1),
    ],
)
def test_a_commit_answers_by_the_side_on_which_it_lies(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    figure: str,
    bad: Any,
    before: Any,
    here: Any,
    answer: int,
) -> None:
    there, now = _result(**{figure: bad}), _result(**{figure: here})
    assert _answer(monkeypatch, tmp_path, now, there, before) == answer


@pytest.mark.parametrize(
    ("bad", "before", "here", "answer"),
    [
        (1.06e9, 1e9, 1.02e9, 0),  # parted from its prediction, which `before` then is
        (1.06e9, 1e9, 1.05e9, 1),
        (1.02e9, 1.01e9, 1.01e9, 0),  # within it, and other than accepted
        (1.02e9, 1.01e9, 1.02e9, 1),
    ],
)
def test_memory_answers_by_its_prediction_or_by_what_was_accepted(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bad: float,
    before: float,
    here: float,
    answer: int,
) -> None:
    there = _result(memory_measured=bad, memory_predicted=1e9)
    now = _result(memory_measured=here, memory_predicted=1e9)
    assert _answer(monkeypatch, tmp_path, now, there, before) == answer


def test_memory_of_a_gpu_has_no_answer_without_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = _result(memory_measured=1.06e9, memory_predicted=1e9)
    now = _result(on_gpu=False, memory_measured=3e8, memory_predicted=1e9)
    with pytest.raises(InputError, match="is a GPU's"):
        _answer(monkeypatch, tmp_path, now, there, 1e9)
