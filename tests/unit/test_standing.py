"""Where a run stands follows from its own word and from Slurm's, also if one of them is silent."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm, begun, submitted, write_inputs

from job.common.errors import InputError
from job.run.reader import StoredRun
from slurm.record import Record
from slurm.scheduler import Job
from slurm.status import SILENT_SECONDS, combine, log_file, runs_of, standing, standings

NOW = 1_795_396_000.0
RUNS: dict[str, Any] = {"state": "running", "heartbeat": NOW - 5}
FINAL = ("finished", "failed", "stopped", "cancelled")


def _job(state: str, *, completing: bool = False, reason: str = "None", start: float = NOW) -> Job:
    return Job("7", state, completing, reason, 0, start, None, "node1")


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    return write_inputs(tmp_path)


# Own word and Slurm's


@pytest.mark.parametrize("own", FINAL)
@pytest.mark.parametrize(
    "job",
    [
        None,
        _job("RUNNING"),  # the last words of a task
        _job("COMPLETED", completing=True),
        _job("CANCELLED"),
        _job("FAILED"),
    ],
)
def test_the_runs_own_last_word_holds(own: str, job: Job | None) -> None:
    assert combine({"state": own, "reason": "why"}, job, None, NOW) == (own, "why")
    assert combine({"state": own, "reason": "why"}, None, "away", NOW) == (own, "why")


@pytest.mark.parametrize("own", [*FINAL, "running", "pending"])
def test_a_job_that_waits_is_pending_whatever_was_said_before(own: str) -> None:
    job = _job("PENDING", reason="BeginTime")
    found = combine({"state": own, "reason": "preempted by Slurm"}, job, None, NOW)
    assert found == ("pending", "waits in the queue (BeginTime); preempted by Slurm")
    assert combine({"state": own}, job, None, NOW)[1] == "waits in the queue (BeginTime)"
    # where the disk was full, the run's record may be old, and Slurm has been told
    told = replace(job, comment="No space left on device: '/run'")
    found = combine({"state": own, "reason": "preempted by Slurm"}, told, None, NOW)
    assert found[1] == "waits in the queue (BeginTime); No space left on device: '/run'"


@pytest.mark.parametrize("own", ["pending", "running"])
@pytest.mark.parametrize(
    ("job", "state", "reason"),
    [
        pytest.param(None, "lost", "Slurm does not know its job any more", id="forgotten"),
        pytest.param(_job("RUNNING"), "running", None, id="running"),
        pytest.param(_job("CONFIGURING"), "running", "configuring", id="nodes being made ready"),
        pytest.param(_job("PENDING", completing=True), "pending", "waits", id="requeued"),
        pytest.param(_job("TIMEOUT", completing=True), "running", "ending", id="completing"),
        pytest.param(_job("CANCELLED"), "cancelled", "cancelled by scancel", id="cancelled"),
        pytest.param(_job("COMPLETED"), "failed", "COMPLETED without a word", id="no word"),
        pytest.param(_job("NODE_FAIL"), "failed", "NODE_FAIL without a word", id="node failed"),
        pytest.param(_job("PREEMPTED"), "failed", "PREEMPTED without a word", id="preempted"),
        pytest.param(
            _job("CANCELLED", reason="DependencyNeverSatisfied"),
            "cancelled",
            "the job before it, --after, has not ended well",
            id="dependency failed",
        ),
    ],
)
def test_without_a_last_word_slurm_is_right(
    own: str, job: Job | None, state: str, reason: str | None
) -> None:
    found, why = combine({"state": own, "heartbeat": NOW}, job, None, NOW)
    assert found == state
    assert why is None if reason is None else reason in str(why)


@pytest.mark.parametrize("own", ["pending", "running"])
def test_while_the_controller_is_away_the_own_word_is_shown(own: str) -> None:
    state, reason = combine({"state": own, "reason": "why"}, None, "no route", NOW)
    assert (state, reason) == (own, "why; Slurm does not answer: no route")
    assert combine({}, None, "no route", NOW) == ("pending", "Slurm does not answer: no route")


# Silence


def test_a_run_that_is_heard_of_has_no_warning() -> None:
    assert combine(RUNS, _job("RUNNING", start=NOW - 999), None, NOW) == ("running", None)
    just = RUNS | {"heartbeat": NOW - SILENT_SECONDS, "reason": "why"}
    assert combine(just, _job("RUNNING", start=NOW - 999), None, NOW) == ("running", "why")


def test_a_run_that_is_not_heard_of_may_be_dead() -> None:
    silent = RUNS | {"heartbeat": NOW - SILENT_SECONDS - 1}
    state, reason = combine(silent, _job("RUNNING", start=NOW - 999), None, NOW)
    assert state == "running"
    assert reason == "not heard of for 61 s: its node may be dead"


def test_a_run_that_never_spoke_is_waited_for_from_its_start() -> None:
    job = _job("RUNNING", start=NOW - SILENT_SECONDS - 1)
    assert combine({}, job, None, NOW)[1] == "not heard of for 61 s: its node may be dead"
    assert combine({}, _job("RUNNING", start=NOW - 5), None, NOW)[1] is None


def test_a_job_that_has_just_started_again_may_have_been_silent_before() -> None:
    old = RUNS | {"heartbeat": NOW - 5000}
    assert combine(old, _job("RUNNING", start=NOW - 5), None, NOW) == ("running", None)


# Figures


def test_the_newest_value_of_each_key(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "value/r2": 0.5}\n{"step": 2, "train/loss": 0.25}\n')
    assert StoredRun(tmp_path).newest_values("metrics.jsonl") == {
        "step": 2,
        "value/r2": 0.5,
        "train/loss": 0.25,
    }


@pytest.mark.parametrize(
    "torn",
    ['{"step": 3, "tra', '{"step": 3}{"step": 4}\n', '{"a": {"b": 1}\n', "\n", "7\n", "\0\0\0\n"],
)
def test_torn_lines_do_not_count(tmp_path: Path, torn: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 2}}\n{torn}')
    assert StoredRun(tmp_path).newest_values("metrics.jsonl") == {"step": 2}


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"first": 1}), *(json.dumps({"step": k}) for k in range(20_000))]
    file.write_text("\n".join(lines) + "\n")
    assert StoredRun(tmp_path).newest_values("metrics.jsonl") == {"step": 19_999}


def test_without_a_file_there_are_no_values(tmp_path: Path) -> None:
    assert StoredRun(tmp_path / "none").newest_values("metrics.jsonl") == {}


# A run as a whole


def test_a_run_that_trains(tmp_path: Path, slurm: FakeSlurm, inputs: list[str]) -> None:
    record = submitted(tmp_path / "run", inputs, state="running")
    for _ in range(2):
        attempt = begun(record)
    attempt.log(0).write_text("1\n2\n3\n4\n5\n6\n")
    (record.run / "checkpoints" / "step-00000004").mkdir(parents=True)
    trainer = {"step": 3, "max_steps": 20, "alarm": "constant"}
    (record.run / "status.json").write_text(json.dumps(trainer))
    (record.run / "metrics.jsonl").write_text('{"step": 5, "train/loss": 0.25, "value/r2": 0.5}\n')
    (record.run / "telemetry.jsonl").write_text('{"step": 5, "memory_bytes": 2e9}\n')
    slurm.says("scontrol", "JobId=7 JobState=RUNNING NodeList=node[1-2] StartTime=99999999999\n")
    found = standing(record.run)
    assert (found.state, found.job_id, found.attempts, found.nodes) == (
        "running",
        "7",
        2,
        "node[1-2]",
    )
    assert (found.step, found.max_steps, found.checkpoint) == (5, 20, 4)
    assert (found.loss, found.r2, found.memory_gb, found.alarm) == (0.25, 0.5, 2.0, "constant")
    assert found.last_lines == ["2", "3", "4", "5", "6"]
    assert found.expected_start is None
    assert not found.is_final
    assert json.loads(json.dumps(found.to_dict()))["run"] == str(record.run)


def test_a_run_that_waits(tmp_path: Path, slurm: FakeSlurm, inputs: list[str]) -> None:
    record = submitted(tmp_path / "run", inputs)
    slurm.says("scontrol", "JobId=7 JobState=PENDING Reason=Priority StartTime=1795398481\n")
    found = standing(record.run)
    assert (found.state, found.reason) == ("pending", "waits in the queue (Priority)")
    assert (found.expected_start, found.nodes, found.step, found.last_lines) == (
        1795398481,
        None,
        0,
        [],
    )


def test_a_run_without_slurm(tmp_path: Path, slurm: FakeSlurm, inputs: list[str]) -> None:
    found = standing(submitted(tmp_path / "run", inputs, state="running").run)
    assert found.state == "running"
    assert "Slurm does not answer: scontrol is not installed here" in str(found.reason)


def test_a_run_that_was_cancelled_before_it_ran_stays_so_when_slurm_has_forgotten_it(
    tmp_path: Path, slurm: FakeSlurm, inputs: list[str]
) -> None:
    record = submitted(tmp_path / "run", inputs)
    slurm.says("scontrol", stderr="Invalid job id specified", code=1)
    assert standing(record.run).state == "lost"
    record.cancelled.touch()
    assert standing(record.run).state == "cancelled"


def test_a_run_that_is_being_submitted(tmp_path: Path, slurm: FakeSlurm, inputs: list[str]) -> None:
    found = standing(submitted(tmp_path / "run", inputs, job_id=None).run)
    assert (found.state, found.reason) == ("pending", "Slurm has not given it an id yet")
    assert slurm.calls == []


def test_of_a_run_that_failed_the_last_words_are_those_of_the_cause(
    tmp_path: Path, slurm: FakeSlurm, inputs: list[str]
) -> None:
    record = submitted(tmp_path / "run", inputs, state="failed", last_lines=["of rank 3"])
    begun(record).log(0).write_text("of rank 0\n")
    slurm.says("scontrol", stderr="Invalid job id specified", code=1)
    found = standing(record.run)
    assert found.last_lines == ["of rank 3"]
    assert found.is_final
    assert found.is_bad


@pytest.mark.parametrize(
    ("state", "final", "bad"),
    [
        ("pending", False, False),
        ("running", False, False),
        ("finished", True, False),
        ("stopped", True, False),
        ("failed", True, True),
        ("cancelled", True, True),
    ],
)
def test_which_states_are_final_or_bad(
    tmp_path: Path, slurm: FakeSlurm, inputs: list[str], state: str, final: bool, bad: bool
) -> None:
    found = standing(submitted(tmp_path / "run", inputs, state=state).run)
    assert (found.state, found.is_final, found.is_bad) == (state, final, bad)


# Folders


def test_a_run_is_itself(tmp_path: Path, inputs: list[str]) -> None:
    run = submitted(tmp_path / "run", inputs).run
    assert runs_of(run) == [run]


def test_a_sweep_is_its_runs(tmp_path: Path, inputs: list[str]) -> None:
    runs = [submitted(tmp_path / "sweep" / name, inputs).run for name in ("n4", "n0")]
    (tmp_path / "sweep" / "slurm").mkdir()  # of submitit
    (tmp_path / "sweep" / "notes").mkdir()
    for copy in ("n4.bak", "n4 before", "new"):
        shutil.copytree(runs[0], tmp_path / "sweep" / copy)
    assert runs_of(tmp_path / "sweep") == sorted(runs)


@pytest.mark.parametrize("name", ["empty", "none"])
def test_another_folder_is_neither(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"neither a run nor a sweep that submit.py has submitted"):
        runs_of(tmp_path / name)


def test_the_log_is_that_of_the_newest_attempt(tmp_path: Path) -> None:
    record = Record(tmp_path)
    assert log_file(record) is None
    (tmp_path / "slurm" / "attempts" / "7-10").mkdir(parents=True)  # as 0.1.0 named them
    assert log_file(record, 2) == tmp_path / "slurm" / "attempts" / "7-10" / "rank-00002.log"
    for _ in range(2):
        begun(record)
    assert log_file(record, 2) == tmp_path / "slurm" / "attempts" / "0002" / "rank-00002.log"


def test_the_runs_of_a_sweep_are_asked_for_at_once(
    tmp_path: Path, inputs: list[str], slurm: FakeSlurm
) -> None:
    runs = [submitted(tmp_path / f"n{k}", inputs, job_id=f"7_{k}").run for k in range(3)]
    line = "JobId=%d ArrayJobId=7 ArrayTaskId=%s JobState=%s Reason=Priority NodeList=\n"
    slurm.says("scontrol", line % (7, "1-2", "PENDING") + line % (8, "0", "RUNNING"))
    assert [one.state for one in standings(runs)] == ["running", "pending", "pending"]
    assert slurm.calls == ["scontrol show job -o 7"]
