"""A night in MLflow, which is the same run however often it is judged."""

from __future__ import annotations

from pathlib import Path

from mirrored_runs import MARKS

from job.nightly.matrix import Entry
from job.nightly.record import Night, NightFolder, Plan, Result
from job.nightly.tracking import track

pytestmark = MARKS


def test_a_night_is_one_run_wherever_its_folder_is(tmp_path: Path, database: str) -> None:
    runs = []
    for folder in ("it's mine", "it_s mine", 'a "b" 100% \\ c', "plain"):
        path = tmp_path / folder / "night-000001"
        plan = Plan(1, "little", "abc", 1e9, {"one": Entry()}, [], "python")
        night = Night(plan, {"one": Result("one", False, "dead")})
        first, again = (track(night, NightFolder(path).path, database) for _ in range(2))
        assert first == again
        runs.append(first)
    assert len(set(runs)) == 4
