"""Of several attempts at one run, only the newest writes, and only what it builds on counts."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.common.config import load_config
from job.common.errors import Exit, InputError, Superseded
from job.common.nested import to_dict
from job.common.progress import ATTEMPT
from job.common.schema import CriticConfig
from job.run.committed import committed
from job.run.directory import RunDirectory
from job.run.fence import Fence
from job.run.manifest import Manifest
from job.run.metrics_log import Tracker
from job.run.reader import StoredRun


def _attempt(run: Path, resumed_step: int | None = None) -> Fence:
    """The next attempt; it records where it went on unless that is None."""
    fence = Fence.take(run)
    if resumed_step is not None:
        fence.record(1, resumed_step)
    return fence


def _content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Numbers


def test_attempts_are_numbered_by_their_folders(tmp_path: Path) -> None:
    fences = [Fence.take(tmp_path) for _ in range(3)]
    assert [fence.number for fence in fences] == [1, 2, 3]
    assert [fence.folder for fence in fences] == [tmp_path / f"attempts/000{i}" for i in (1, 2, 3)]
    assert all(fence.folder.is_dir() for fence in fences)


def test_a_number_is_not_given_twice_after_an_earlier_folder_was_removed(tmp_path: Path) -> None:
    first, _ = Fence.take(tmp_path), Fence.take(tmp_path)
    first.folder.rmdir()
    assert Fence.take(tmp_path).number == 3


def test_other_files_among_the_attempts_do_not_matter(tmp_path: Path) -> None:
    _attempt(tmp_path, 0)
    (tmp_path / "attempts/notes.txt").write_text("mine")
    for name in (".nfs0001", "0003.bak", "0004 old", "5", "00006", "²", "damaged-0007"):
        (tmp_path / "attempts" / name).touch()
    assert Fence.take(tmp_path).number == 2


def test_twenty_that_start_at_once_get_twenty_numbers(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    together = threading.Barrier(20)

    def take(_: int) -> int:
        together.wait()
        return Fence.take(tmp_path).number

    with ThreadPoolExecutor(20) as pool:
        assert sorted(pool.map(take, range(20))) == list(range(1, 21))


def test_numbers_go_on_past_four_digits(tmp_path: Path) -> None:
    (tmp_path / "attempts/9999").mkdir(parents=True)
    before = Fence(tmp_path / "attempts", 9999)
    assert Fence.take(tmp_path).number == 10000
    assert before.superseded()
    assert Fence.take(tmp_path).number == 10001


# What a supervisor has taken


def test_without_a_supervisor_no_number_is_given(tmp_path: Path) -> None:
    assert Fence.given(tmp_path) is None


def test_a_trainer_has_the_number_that_its_supervisor_has_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fence.take(tmp_path)
    monkeypatch.setenv(ATTEMPT, str(Fence.take(tmp_path).number))
    given = Fence.given(tmp_path)
    assert given is not None
    assert (given.number, given.superseded()) == (2, False)


def test_a_trainer_that_starts_after_a_newer_attempt_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ATTEMPT, str(Fence.take(tmp_path).number))
    Fence.take(tmp_path)
    with pytest.raises(Superseded, match="attempt 1: a newer attempt"):
        Fence.given(tmp_path)


def test_a_number_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTEMPT, "7-0")
    with pytest.raises(InputError, match="CRITIC_ATTEMPT=7-0: not the number of an attempt"):
        Fence.given(tmp_path)


# Superseded


def test_only_the_newest_attempt_is_not_superseded(tmp_path: Path) -> None:
    first = Fence.take(tmp_path)
    assert not first.superseded()
    second = Fence.take(tmp_path)  # before it has recorded anything
    assert first.superseded()
    assert not second.superseded()


def test_a_superseded_attempt_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    ending = Fence.take(tmp_path).ending()
    assert isinstance(ending, Superseded)
    assert ending.code == Exit.SUPERSEDED == 73
    assert "attempt 1" in str(ending)


def _run_with_lines(path: Path) -> RunDirectory:
    config = load_config(CriticConfig, _config(path), ["mlflow.enabled=false"])
    run = RunDirectory(path / "run")
    run.claim(to_dict(config))
    run.fence = Fence.take(run.path)
    run.set_status(state="running")
    with Tracker(run) as tracker:
        for step in (1, 2, 3):
            tracker.metrics(step, {"train/loss": 0.5})
    return run


def _config(path: Path) -> Path:
    file = path / "critic.yaml"
    data = "{train: embedded, validation: embedded}"
    file.write_text(f"{{run: {{name: r, dir: run}}, model: {{path: t}}, data: {data}}}")
    return file


def test_a_superseded_run_directory_writes_nothing(tmp_path: Path) -> None:
    run = _run_with_lines(tmp_path)
    assert run.writes
    Fence.take(run.path)
    before = _content(run.path)
    assert not run.writes
    run.set_status(state="failed", step=99)
    run.write_json("parameters.json", {})
    run.write_json("status.json", {})
    run.keep_lines(1)
    with pytest.raises(ValueError, match="any"), run.recorded(attempt=1):
        raise ValueError("any")
    with Tracker(run) as tracker:
        tracker.metrics(4, {"train/loss": 0.5})
        tracker.rewind(2)
        tracker.flush()
    assert _content(run.path) == before


def test_a_rank_other_than_the_first_writes_nothing(tmp_path: Path) -> None:
    path = _run_with_lines(tmp_path).path
    before = _content(path)
    run = RunDirectory(path, is_main=False)
    assert not run.writes
    run.set_status(state="failed")
    run.keep_lines(0)
    run.write_json("parameters.json", {})
    assert _content(path) == before


def test_lines_of_an_attempt_that_does_not_know_it_is_superseded_are_lost(tmp_path: Path) -> None:
    run = _run_with_lines(tmp_path)
    with Tracker(run) as unaware:
        newer = RunDirectory(run.path)
        newer.fence = Fence.take(run.path)
        unaware.metrics(4, {"train/loss": 0.5})  # the newer one will drop it
        newer.keep_lines(2)
        unaware.metrics(5, {"train/loss": 0.5})  # and this goes into a file that is gone
        with Tracker(newer) as tracker:
            tracker.metrics(3, {"train/loss": 0.25})
            unaware.metrics(6, {"train/loss": 0.5})
    assert [(r["step"], r["train/loss"]) for r in newer.records()] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.25),
    ]


# Lineage


def test_everything_of_the_only_attempt_counts(tmp_path: Path) -> None:
    fence = _attempt(tmp_path, 0)
    assert fence.includes(1, 0)
    assert fence.includes(1, 10**9)


def test_only_what_a_later_attempt_went_on_from_or_came_before_counts(tmp_path: Path) -> None:
    _attempt(tmp_path, 0)
    fence = _attempt(tmp_path, 4)
    assert [step for step in range(0, 10, 2) if fence.includes(1, step)] == [0, 2, 4]
    assert all(fence.includes(2, step) for step in (6, 8, 10))


def test_every_later_attempt_limits_what_counts(tmp_path: Path) -> None:
    for resumed_step in (0, 8, 4, 6):
        fence = _attempt(tmp_path, resumed_step)
    found = {a: [step for step in range(2, 12, 2) if fence.includes(a, step)] for a in (1, 2, 3, 4)}
    assert found == {1: [2, 4], 2: [2, 4], 3: [2, 4, 6], 4: [2, 4, 6, 8, 10]}


def test_a_run_that_started_over_counts_nothing_of_before(tmp_path: Path) -> None:
    _attempt(tmp_path, 0)
    fence = _attempt(tmp_path, 0)
    assert not fence.includes(1, 2)
    assert fence.includes(2, 2)


def test_an_attempt_that_died_before_recording_constrains_nothing(tmp_path: Path) -> None:
    _attempt(tmp_path, 0)
    _attempt(tmp_path)
    fence = Fence.take(tmp_path)
    assert fence.includes(1, 100)


@pytest.mark.parametrize(
    "record",
    ["", "{", "{}", "null", "[]", '{"resumed_step": null}', '{"resumed_step": NaN}', "\0\0\0\0"],
)
def test_a_damaged_record_constrains_nothing(tmp_path: Path, record: str) -> None:
    _attempt(tmp_path, 0)
    damaged = _attempt(tmp_path, 4)
    (damaged.folder / "attempt.json").write_text(record)
    assert Fence.take(tmp_path).includes(1, 100)


def test_a_record_says_who_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    fence = _attempt(tmp_path, 4)
    facts = json.loads((fence.folder / "attempt.json").read_text())
    expected = {"attempt": 1, "resumed_step": 4, "world_size": 1, "slurm_job": "4711"}
    assert expected.items() <= facts.items()


def test_committed_checkpoints_are_those_that_count_oldest_first(tmp_path: Path) -> None:
    for resumed_step in (0, 4):
        _attempt(tmp_path, resumed_step)
    folder = tmp_path / "checkpoints"
    for step, attempt in ((10, 2), (2, 1), (4, 1), (6, 1), (8, 1), (12, 1)):
        one = folder / f"step-{step:08}"
        one.mkdir(parents=True)
        Manifest(step, attempt, {}).write(one)
    (folder / ".step-00000012.attempt-0002").mkdir()
    (folder / "damaged-step-00000003").mkdir()
    (folder / "step-00000014").touch()  # no folder
    assert [path.name for path in committed(tmp_path)] == [f"step-{step:08}" for step in (2, 4, 10)]
    assert StoredRun(tmp_path).newest_checkpoint() == 10  # for the Slurm side too
    # damage is found by verifying; without a manifest nobody can say whether it came too late
    (folder / "step-00000006/manifest.json").unlink()
    assert "step-00000006" in [path.name for path in committed(tmp_path)]


# Files of the run


@pytest.mark.parametrize("moment", ["before the look", "after the look"])
def test_a_sleeper_does_not_replace_what_a_newer_attempt_wrote(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper, file = Fence.take(tmp_path), tmp_path / "status.json"
    look = Fence.superseded

    def asleep(fence: Fence) -> bool:
        monkeypatch.undo()
        seen = look(fence)
        Fence.take(tmp_path).replace(file, "new")
        return seen if moment == "after the look" else look(fence)

    monkeypatch.setattr(Fence, "superseded", asleep)
    sleeper.replace(file, "old")
    assert file.read_text() == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["attempts", "status.json"]


def test_an_attempt_removes_what_killed_ones_left_and_nothing_of_later_ones(
    tmp_path: Path,
) -> None:
    Fence.take(tmp_path)
    left = tmp_path / f".status.json.attempt-0001.{'a' * 32}"
    later = tmp_path / f".status.json.attempt-0003.{'b' * 32}"
    others = [tmp_path / name for name in (".env", ".notes.attempt-0001.txt", ".attempt-0001.")]
    for file in (left, later, *others):
        file.touch()
    Fence.take(tmp_path)
    assert [left.exists(), later.exists()] == [False, True]
    assert all(other.exists() for other in others)


def test_a_folder_that_is_gone_is_an_error_of_the_newest_attempt(tmp_path: Path) -> None:
    fence = Fence.take(tmp_path)
    with pytest.raises(FileNotFoundError):
        fence.replace(tmp_path / "gone/status.json", "text")
