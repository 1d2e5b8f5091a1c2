"""What the Slurm side keeps of a run survives torn files, foreign names and many attempts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from fake_slurm import begun

from job.common.errors import InputError
from job.run.fence import Fence
from slurm.record import Attempt, Outcome, Record, Start, attempt_folders


@pytest.fixture
def record(tmp_path: Path) -> Record:
    record = Record(tmp_path / "run")
    record.folder.mkdir(parents=True)
    return record


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


@pytest.mark.parametrize("content", [b"", b"\0\0\0\0", b'{"state": ', b"[1]", b"\xff"])
def test_a_status_that_cannot_be_read_is_as_if_there_were_none(
    record: Record, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    file = record.folder / "status.json"
    file.write_bytes(content)
    record.set_status(state="running")
    assert record.status() == {"state": "running"}
    assert caplog.text.count(f"{file}: not readable, and taken as absent") == 1


def test_a_status_whose_file_system_is_away_is_not_replaced(record: Record) -> None:
    (record.folder / "status.json").mkdir()  # which is an OSError, as a stale handle is
    with pytest.raises(OSError, match="Is a directory"):
        record.set_status(state="running")


def test_the_configuration_is_found_where_a_copy_of_it_is_whole(record: Record) -> None:
    places = (
        record.run / "checkpoints/step-00000010/config.yaml",
        record.run / "checkpoints/step-00000020/config.yaml",
        record.run / "config.yaml",
        record.config,
    )
    assert record.readable_config() == record.config  # whose error tells
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("run: {name: x}\n")
        assert record.readable_config() == place
    for place, next_best in zip(places[:0:-1], places[-2::-1], strict=True):
        place.write_bytes(bytes(9))
        assert record.readable_config() == next_best


def test_what_the_trainer_says_is_not_what_the_job_says(record: Record) -> None:
    (record.run / "status.json").write_text('{"state": "running", "step": 3}')
    assert record.status() == {}
    assert record.trainer_status() == {"state": "running", "step": 3}


# Jobs and events


def test_a_job_that_has_the_run_already_is_noted_once(record: Record) -> None:
    for job_id in ("12", "12", "9", "9", "12"):
        record.add_job(job_id)
    assert (record.folder / "jobs").read_text().split() == ["12", "9", "12"]


def test_what_is_no_job_id_does_not_count(record: Record) -> None:
    record.add_job("9_3")
    with (record.folder / "jobs").open("ab") as stream:
        stream.write(b"\xff\n\0\0\0\0")
    assert record.job_id() == "9_3"
    record.add_job("12")  # on a line of its own
    assert record.job_id() == "12"


def test_one_submission_of_a_run_at_a_time(record: Record) -> None:
    with (
        record.being_submitted(),
        pytest.raises(InputError, match="another submission of this run is under way"),
        Record(record.run).being_submitted(),
    ):
        pass
    with record.being_submitted():
        pass


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


def test_an_event_that_was_damaged_does_not_count(record: Record) -> None:
    record.add_event("submitted")
    with (record.folder / "events.jsonl").open("ab") as stream:
        stream.write(b"\0\0\0\n[1]\n\xff")
    record.add_event("ended")
    assert [event["event"] for event in record.events()] == ["submitted", "ended"]


# Attempts


def test_attempts_have_an_order_of_their_own(record: Record) -> None:
    first = begun(record)
    assert not first.superseded
    second = begun(record)
    assert (first.number, second.number) == (1, 2)
    assert first.superseded
    assert not second.superseded
    assert attempt_folders(record) == [first.folder, second.folder]


def test_a_supervisor_and_trainers_that_are_started_by_hand_share_one_order(record: Record) -> None:
    ours = begun(record)
    assert Fence.take(record.run).number == 2
    assert ours.superseded
    assert begun(record).number == 3


def test_attempts_of_before_they_had_numbers_come_first(record: Record) -> None:
    for name in ("9-0", "99876543-0", "10-10", "10-9"):
        (record.folder / "attempts" / name).mkdir(parents=True)
    new = begun(record)
    assert not new.superseded
    names = [folder.name for folder in attempt_folders(record)]
    assert names == ["9-0", "10-9", "10-10", "99876543-0", "0001"]


def test_other_names_among_the_attempts_do_not_matter(record: Record) -> None:
    assert attempt_folders(record) == []
    attempt = begun(record)
    for name in ("notes", "99", "x-99", "99-", ".nfs-99", "9-9.bak", "0009.bak", "0009 old"):
        (attempt.folder.parent / name).mkdir()
    assert not attempt.superseded
    assert attempt_folders(record) == [attempt.folder]


def test_where_to_meet_is_empty_until_it_is_said(record: Record) -> None:
    start = Start(9, 0, 0)
    assert Attempt.of(record, start) is None
    attempt = begun(record)
    assert attempt.meeting() == {}
    assert Attempt.of(record, start) is None
    attempt.set_meeting(start, environment={"MASTER_ADDR": "node1"})
    assert attempt.meeting() == {"start": [9, 0, 0], "environment": {"MASTER_ADDR": "node1"}}
    (attempt.folder / "meeting.json").write_text('{"MASTER')
    assert attempt.meeting() == {}


@pytest.mark.parametrize("other", [(9, 0, 1), (9, 1, 0), (10, 0, 0)])
def test_a_task_meets_in_the_attempt_of_its_own_start(
    record: Record, other: tuple[int, int, int]
) -> None:
    ours, theirs = begun(record), begun(record)
    ours.set_meeting(Start(9, 0, 0), environment={})
    theirs.set_meeting(Start(*other), environment={})
    found = Attempt.of(record, Start(9, 0, 0))
    assert found is not None
    assert found.number == ours.number
    assert found.superseded
    assert Attempt.of(record, Start(9, 2, 0)) is None


def test_outcomes_are_read_back_in_the_order_of_ranks(record: Record) -> None:
    attempt = begun(record)
    outcomes = [Outcome(rank, "node1", -9, 1.5, "killed", ["a", "b"]) for rank in range(12)]
    for outcome in reversed(outcomes):
        attempt.set_outcome(outcome)
    assert attempt.outcomes() == outcomes


def test_a_torn_outcome_is_as_if_missing(record: Record) -> None:
    attempt = begun(record)
    assert attempt.outcomes() == []
    attempt.set_outcome(Outcome(0, "node1", 0, 1.5, "finished", []))
    (attempt.folder / "outcome-00001.json").write_text(json.dumps({"rank": 1})[:-3])
    (attempt.folder / "outcome-00002.json").write_text(json.dumps({"rank": 2}))
    (attempt.folder / "outcome-00003.json").write_bytes(bytes(9))
    assert [outcome.rank for outcome in attempt.outcomes()] == [0]


def test_logs_of_ranks_are_apart(record: Record) -> None:
    assert Attempt(record, 9).log(3) == record.folder / "attempts" / "0009" / "rank-00003.log"


def test_copies_of_outcomes_do_not_count(record: Record) -> None:
    attempt = begun(record)
    attempt.set_outcome(Outcome(0, "node1", 0, 1.5, "finished", []))
    content = (attempt.folder / "outcome-00000.json").read_bytes()
    for name in ("outcome-00000 copy.json", "outcome-0.json", "outcome-00000.json.bak"):
        (attempt.folder / name).write_bytes(content)
    assert len(attempt.outcomes()) == 1
