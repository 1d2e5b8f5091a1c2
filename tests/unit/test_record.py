"""What the Slurm side keeps of a run survives torn files, foreign names and many attempts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from job.common.errors import InputError
from slurm.record import Attempt, Outcome, Record, newest_attempt


@pytest.fixture
def record(tmp_path: Path) -> Record:
    record = Record(tmp_path / "run")
    record.folder.mkdir(parents=True)
    return record


def _begin(record: Record, *numbers: tuple[int, int]) -> list[Attempt]:
    attempts = [Attempt(record, job, restart) for job, restart in numbers]
    for attempt in attempts:
        attempt.begin()
    return attempts


# Status


def test_a_run_that_was_not_submitted_has_no_record(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run that submit.py has submitted"):
        Record.of(tmp_path)


def test_entries_of_the_status_are_changed_one_by_one(record: Record) -> None:
    record.start_status(state="pending", submitted=1.0)
    record.set_status(state="running")
    assert record.status() == {"state": "running", "submitted": 1.0}


def test_a_new_status_keeps_nothing_of_the_old(record: Record) -> None:
    record.start_status(state="failed", reason="any")
    record.start_status(state="pending")
    assert record.status() == {"state": "pending"}


@pytest.mark.parametrize("content", [None, b"", b'{"state": ', b"null", b"[1]", b"\xff"])
def test_a_status_that_cannot_be_read_is_empty(record: Record, content: bytes | None) -> None:
    for folder, status in ((record.folder, record.status), (record.run, record.trainer_status)):
        if content is not None:
            (folder / "status.json").write_bytes(content)
        assert status() == {}


def test_what_the_trainer_says_is_not_what_the_job_says(record: Record) -> None:
    (record.run / "status.json").write_text('{"state": "running", "step": 3}')
    assert record.status() == {}
    assert record.trainer_status() == {"state": "running", "step": 3}


# Jobs and events


def test_the_newest_job_is_the_last_one(record: Record) -> None:
    assert record.job_id() is None
    for job_id in ("12", "9_3"):
        record.add_job(job_id)
    assert record.job_id() == "9_3"


def test_events_come_in_their_order_with_time_and_facts(record: Record) -> None:
    assert record.events() == []
    before = time.time()
    record.add_event("submitted")
    record.add_event("ended", code=75)
    first, second = record.events()
    assert before <= first.pop("time") <= second.pop("time") <= time.time()
    assert (first, second) == ({"event": "submitted"}, {"event": "ended", "code": 75})


def test_an_event_that_is_still_being_written_does_not_count(record: Record) -> None:
    record.add_event("submitted")
    with (record.folder / "events.jsonl").open("a") as stream:
        stream.write('{"time": 2.0, "eve')
    assert [event["event"] for event in record.events()] == ["submitted"]


def test_the_newest_checkpoint_among_other_names(record: Record) -> None:
    assert record.stored.newest_checkpoint() == 0
    folder = record.run / "checkpoints"
    names = ("step-00000002", "step-00000010", ".step-00000012.attempt-0002", "step-99", "step-x")
    for name in (*names, "damaged-step-00000014", "step-00000016.old"):
        (folder / name).mkdir(parents=True)
    assert record.stored.newest_checkpoint() == 10


# Attempts


@pytest.mark.parametrize(
    ("earlier", "later"), [((9, 0), (10, 0)), ((10, 0), (10, 1)), ((10, 9), (10, 10))]
)
def test_attempts_are_in_the_order_of_jobs_and_restarts(
    record: Record, earlier: tuple[int, int], later: tuple[int, int]
) -> None:
    (first,) = _begin(record, earlier)
    assert not first.superseded
    (second,) = _begin(record, later)
    assert first.superseded
    assert not second.superseded
    assert newest_attempt(record) == second.folder


def test_a_job_after_another_one_supersedes_all_its_restarts(record: Record) -> None:
    old, new = _begin(record, (9, 12), (10, 0))
    assert old.superseded
    assert not new.superseded


def test_other_names_among_the_attempts_do_not_matter(record: Record) -> None:
    assert newest_attempt(record) is None
    (attempt,) = _begin(record, (9, 0))
    for name in ("notes", "99", "x-99", "99-", ".nfs-99"):
        (attempt.folder.parent / name).mkdir()
    assert not attempt.superseded
    assert newest_attempt(record) == attempt.folder


def test_where_to_meet_is_empty_until_it_is_said(record: Record) -> None:
    attempt = Attempt(record, 9, 0)
    assert attempt.meeting() == {}  # without a folder too
    attempt.begin()
    assert attempt.meeting() == {}
    attempt.set_meeting(MASTER_ADDR="node1")
    assert attempt.meeting() == {"MASTER_ADDR": "node1"}
    (attempt.folder / "meeting.json").write_text('{"MASTER')
    assert attempt.meeting() == {}


def test_outcomes_are_read_back_in_the_order_of_ranks(record: Record) -> None:
    (attempt,) = _begin(record, (9, 0))
    outcomes = [Outcome(rank, "node1", -9, 1.5, "killed", ["a", "b"]) for rank in range(12)]
    for outcome in reversed(outcomes):
        attempt.set_outcome(outcome)
    assert attempt.outcomes() == outcomes


def test_a_torn_outcome_is_as_if_missing(record: Record) -> None:
    (attempt,) = _begin(record, (9, 0))
    assert attempt.outcomes() == []
    attempt.set_outcome(Outcome(0, "node1", 0, 1.5, "finished", []))
    (attempt.folder / "outcome-00001.json").write_text(json.dumps({"rank": 1})[:-3])
    assert [outcome.rank for outcome in attempt.outcomes()] == [0]


def test_logs_of_ranks_are_apart(record: Record) -> None:
    attempt = Attempt(record, 9, 1)
    assert attempt.log(3) == record.folder / "attempts" / "9-1" / "rank-00003.log"
