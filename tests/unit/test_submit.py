"""The command line: what it prints where, how it ends, and that failures leave nothing behind."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import SEVEN_B, STARTS, FakeSlurm, begun, submitted, write_inputs

from job.common.errors import run_command
from slurm.record import Record
from slurm.submission import PROJECT

pytestmark = pytest.mark.slow

COMMAND = PROJECT / "slurm" / "submit.py"
HEAVY = {"torch", "numpy", "mlflow", "matplotlib", "pyarrow", "pandas", "transformers"}
FORGOTTEN = "slurm_load_jobs error: Invalid job id specified"
REFUSAL = (
    "sbatch: error: Batch job submission failed: Invalid account or account/partition combination "
    "specified"
)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Submit = Callable[..., Result]


@pytest.fixture
def here(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which submit.py is called."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def given(tmp_path: Path, here: Path) -> list[str]:
    return write_inputs(tmp_path, SEVEN_B)


@pytest.fixture
def submit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> Submit:
    """The command, inside this process, which is faster than in one of its own."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # of which it replaces the first
    monkeypatch.setenv("COLUMNS", "200")
    main = importlib.import_module("slurm.commands").main

    def called(*arguments: str) -> Result:
        code = 0
        try:
            run_command(lambda: main(arguments))
        except SystemExit as ending:
            code = int(ending.code or 0)
        return Result(code, *capsys.readouterr())

    return called


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _takes_jobs(slurm: FakeSlurm, job_id: str = "41") -> None:
    """Let Slurm take every job, and forget it."""
    slurm.says("srun")
    slurm.runs(
        "sbatch",
        f'[ "$1" = --test-only ] && echo "{STARTS}" >&2 || echo "Submitted batch job {job_id}"',
    )
    slurm.says("scontrol", stderr=FORGOTTEN, code=1)


# As a command


def _run(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, str(COMMAND), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_shows_examples(here: Path) -> None:
    done = _run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "python slurm/submit.py --gpus 4 --unfreeze 4" in done.stdout
    assert "--resume RUN" in done.stdout


def test_a_dry_run_without_slurm_needs_nothing_heavy_and_writes_nothing(
    here: Path, given: list[str]
) -> None:
    before = _files(here)
    asked = ("--dry-run", "--json", "--unfreeze", "1")  # 1: its checkpoints fit on any disk
    done = _run(*asked, "--override", *given, options=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    found = {one["name"]: one["state"] for one in result["checks"]}
    assert found["memory N=1"] == "ok"
    assert found["Slurm"] == "not checked"
    assert result["script"].startswith("#!/bin/bash\n")
    assert (result["gpus_per_node"], result["gpu_hours"]) == (1, 24.0)
    times = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in times}
    assert {"submitit", "omegaconf", "rich"} <= imported
    assert not HEAVY & imported
    assert _files(here) == before


def test_a_wrong_option_ends_with_78_and_the_usage(here: Path) -> None:
    done = _run("--gpu-count", "4")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("error: unrecognized arguments: --gpu-count 4\nusage: submit.py")
    assert done.stderr.endswith("see submit.py --help\n")


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "many"], "argument --gpus: invalid int value: 'many'"),
        (["--unfreeze"], "argument --unfreeze: expected at least one argument"),
        (["status"], "the following arguments are required: run"),
        (["logs", "here", "--rank", "first"], "argument --rank: invalid int value"),
        (["cancle", "runs/RUN"], "unrecognized arguments: cancle runs/RUN"),
        (["status", "."], "neither a run nor a sweep that submit.py has submitted"),
        (["cancel", "nowhere"], "neither a run nor a sweep that submit.py has submitted"),
        (["logs", "."], "no run that submit.py has submitted"),
        (["--resume", "."], "no run that submit.py has submitted"),
    ],
)
def test_what_is_wrong_is_said_on_stderr(
    submit: Submit, here: Path, arguments: list[str], message: str
) -> None:
    done = submit(*arguments)
    assert (done.code, done.out) == (78, "")
    assert done.err.startswith("error: ")
    assert message in done.err
    assert not _files(here)


def test_a_key_that_is_unknown_lists_the_valid_ones(submit: Submit, given: list[str]) -> None:
    done = submit("--override", *given, "trainig.batch_size=3")
    assert (done.code, done.out) == (78, "")
    assert "trainig: unknown key (nearest: training; valid here: run, model, tokenizer" in done.err


# Dry runs and checks


def test_a_dry_run_for_people_is_all_on_stderr(
    submit: Submit, given: list[str], here: Path
) -> None:
    done = submit("--dry-run", "--override", *given)
    assert (done.code, done.out) == (0, "")
    for text in ("memory N=4", "sbatch is not installed here", "#SBATCH --gpus-per-node=a100:1"):
        assert text in done.err
    assert not _files(here)


def test_a_dry_run_shows_the_memory_of_each_gpu(submit: Submit, given: list[str]) -> None:
    done = submit("--dry-run", "--gpus", "4", "--unfreeze", "4", "--override", *given)
    assert done.code == 0
    assert "memory of each of 4 GPU(s), N=4, 8,192 tokens" in done.err
    for name in ("frozen weights", "gathered weights", "gradients", "optimizer", "activations"):
        assert name in done.err
    lines = [" ".join(line.split()) for line in done.err.splitlines()]
    (together,) = [line for line in lines if "together" in line]
    assert "19.23" in together  # at the peak
    assert "13.62" in together  # after the backward pass: the frozen blocks are whole on each
    fits = "fits, 22.0 GB with 1.6 GB outside the allocator; largest N"
    assert any(line.startswith(f"42.3 GB: {fits} 17, largest micro-batch ") for line in lines)
    assert any(line.startswith(f"85.0 GB: {fits} 29, largest micro-batch ") for line in lines)


def test_the_memory_of_each_run_as_json(submit: Submit, given: list[str]) -> None:
    asked = ("--gpus", "4", "--unfreeze", "4", "29")
    done = submit("--dry-run", "--json", *asked, "--override", *given)
    assert done.code == 0, done.err
    small, large = done.json["memory"]
    assert [one["num_unfrozen_layers"] for one in (small, large)] == [4, 29]
    for one in (small, large):
        assert (one["world_size"], one["micro_batch_tokens"]) == (4, 8192)
        assert one["peak_bytes"] == sum(one["peak"].values()) > sum(one["after_backward"].values())
        assert (one["peak_moment"], one["host_bytes"]) == ("block 0", 0)
        assert one["outside_bytes"] == 1_600_000_000
        assert one["largest_unfrozen"] == {"42.3": 17, "85": 29}
    assert small["fits"] == {"42.3": True, "85": True}
    assert large["fits"] == {"42.3": False, "85": True}


def test_of_a_trunk_that_cannot_be_read_no_memory_is_predicted(
    submit: Submit, given: list[str], tmp_path: Path
) -> None:
    (tmp_path / "trunk" / "params.json").write_text("{")
    done = submit("--dry-run", "--json", "--override", *given)
    assert (done.code, done.json["memory"]) == (78, [])


def test_an_error_of_a_check_keeps_the_job_from_being_submitted(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path
) -> None:
    _takes_jobs(slurm)
    done = submit("--json", "--gpus", "8", "--override", *given)
    assert done.code == 78
    assert "job_ids" not in done.json
    errors = [one["text"] for one in done.json["checks"] if one["state"] == "error"]
    assert errors == ["--gpus 8: a node has 4; take more --nodes"]
    assert done.err == f"error: nothing was submitted\n  resources: {errors[0]}\n"
    assert not _files(here)
    assert not any("--test-only" not in call for call in slurm.calls if call.startswith("sbatch"))


def test_texts_with_brackets_are_shown_as_they_are(
    submit: Submit, slurm: FakeSlurm, given: list[str]
) -> None:
    slurm.says("sbatch", stderr="sbatch: Job 1 to start on nodes gpu[a-b] in partition [/main]\n")
    done = submit("--dry-run", "--override", *given, "run.dir=runs/[old]/mine")
    shown = "".join(done.err.split())  # lines are folded where they fill the terminal
    assert "nodesgpu[a-b]inpartition[/main]" in shown
    assert "runs/[old]/mine" in shown


# Submitting


def test_a_run_is_submitted(submit: Submit, slurm: FakeSlurm, given: list[str], here: Path) -> None:
    _takes_jobs(slurm)
    done = submit("--json", "--name", "mine", "--override", *given)
    assert done.code == 0, done.err
    assert done.json["job_ids"] == ["41"]
    assert "script" not in done.json
    record = Record.of(done.json["run"])
    assert record.run.parent == here / "runs"
    assert record.job_id() == "41"
    assert record.status()["state"] == "pending"
    assert [event["event"] for event in record.events()] == ["submitted"]
    assert (record.folder / "41_submitted.pkl").exists()


def test_a_person_is_told_how_to_follow_it(
    submit: Submit, slurm: FakeSlurm, given: list[str]
) -> None:
    _takes_jobs(slurm)
    done = submit("--override", *given, "run.dir=runs/mine")
    assert (done.code, done.out) == (0, "")
    assert "submitted: job 41\nsubmit.py status" in done.err
    assert "/runs/mine --watch" in done.err


def test_a_sweep_is_one_array(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path
) -> None:
    _takes_jobs(slurm)
    done = submit("--json", "--unfreeze", "0", "2", "--name", "depth", "--override", *given)
    assert done.code == 0, done.err
    assert done.json["job_ids"] == ["41_0", "41_1"]
    assert [Record.of(run).job_id() for run in done.json["runs"]] == ["41_0", "41_1"]
    assert sum(call.startswith("sbatch") for call in slurm.calls) == 2  # one of them a test


@pytest.mark.parametrize("sweep", [[], ["--unfreeze", "0", "2"]])
@pytest.mark.parametrize(
    ("refusal", "code", "message"),
    [
        (REFUSAL, 78, "Batch job submission failed: Invalid account"),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", 69, "Unable to"),
    ],
)
def test_a_submission_that_fails_leaves_nothing(
    submit: Submit,
    slurm: FakeSlurm,
    given: list[str],
    here: Path,
    sweep: list[str],
    refusal: str,
    code: int,
    message: str,
) -> None:
    _takes_jobs(slurm)
    slurm.runs("sbatch", f'[ "$1" = --test-only ] || {{ echo "{refusal}" >&2; exit 1; }}')
    done = submit(*sweep, "--override", *given)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert not list((here / "runs").glob("*"))


def test_without_slurm_nothing_is_left_either(submit: Submit, given: list[str], here: Path) -> None:
    for sweep in ([], ["--unfreeze", "0", "2"]):
        done = submit(*sweep, "--override", *given)
        assert done.code == 69
        assert "sbatch is not installed here: run this on a login node" in done.err
        assert not list((here / "runs").glob("*"))


def test_a_folder_that_cannot_be_made_is_said(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path
) -> None:
    _takes_jobs(slurm)
    (here / "file").touch()
    done = submit("--override", *given, "run.dir=file/run")
    assert done.code == 78
    assert f"{here}/file/run: cannot write: Not a directory" in done.err
    assert "Traceback" not in done.err


def test_what_was_in_a_folder_named_by_hand_stays_when_the_submission_fails(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path
) -> None:
    _takes_jobs(slurm)
    slurm.runs("sbatch", f'[ "$1" = --test-only ] || {{ echo "{REFUSAL}" >&2; exit 1; }}')
    (here / "mine").mkdir()
    (here / "mine" / "config.yaml").write_text("of a run on this machine")
    before = _files(here)
    assert submit("--override", *given, "run.dir=mine").code == 78
    assert _files(here) == before
    assert not (here / "mine" / "slurm").exists()


# Again


def _ended(here: Path, given: list[str], **status: Any) -> Record:
    return submitted(here / "runs" / "mine", given, **{"state": "failed", "reason": "any"} | status)


def test_a_run_that_has_ended_is_submitted_again(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path
) -> None:
    record = _ended(here, given)
    record.cancelled.touch()
    _takes_jobs(slurm, "42")
    done = submit("--json", "--resume", "runs/mine", "--gpus", "2")
    assert done.code == 0, done.err
    assert done.json["gpus_per_node"] == 2
    assert record.job_id() == "42"
    assert record.status().keys() == {"state", "submitted"}
    assert not record.cancelled.exists()


def test_when_that_fails_the_former_status_holds(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path
) -> None:
    record = _ended(here, given)
    _takes_jobs(slurm)
    slurm.runs("sbatch", f'[ "$1" = --test-only ] || {{ echo "{REFUSAL}" >&2; exit 1; }}')
    before = record.status()
    assert submit("--resume", "runs/mine").code == 78
    assert record.status() == before == {"state": "failed", "reason": "any"}
    assert record.job_id() == "7"


@pytest.mark.parametrize("again", [["--resume", "runs/mine"], ["--override", "run.dir=runs/mine"]])
def test_a_run_whose_job_is_there_is_not_submitted_twice(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path, again: list[str]
) -> None:
    record = _ended(here, given, state="running")
    _takes_jobs(slurm)
    slurm.says("scontrol", "JobId=7 JobState=RUNNING NodeList=node1\n")
    before = _files(record.run)
    done = submit(*again, *(given if again[0] == "--override" else []))
    assert done.code == 78
    assert f"{record.run}: its job 7 is running; cancel it first" in done.err
    assert _files(record.run) == before


def test_a_run_whose_submission_cannot_be_read_is_submitted_anew_as_is_said(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path
) -> None:
    record = _ended(here, given)
    _takes_jobs(slurm, "42")
    record.submission.write_bytes(b"")
    refused = submit("--resume", "runs/mine")
    assert refused.code == 78
    assert f"submit the run anew: --config FILE --override run.dir={record.run}" in refused.err
    config = str(PROJECT / "configs/critic/critic_1gpu.yaml")
    done = submit("--json", "--config", config, "--override", f"run.dir={record.run}", *given)
    assert done.code == 0, done.err
    assert record.job_id() == "42"


def test_a_run_whose_given_configuration_is_damaged_is_resumed_with_the_trainers(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path
) -> None:
    record = _ended(here, given)
    _takes_jobs(slurm, "42")
    record.config.rename(record.run / "config.yaml")
    record.config.write_bytes(bytes(50))
    assert submit("--resume", "runs/mine").code == 0
    assert "name: critic" in record.config.read_text()


@pytest.mark.parametrize("moment", ["check", "submit"])
def test_of_two_submissions_of_one_run_at_once_one_wins_and_the_other_says_so(
    submit: Submit,
    slurm: FakeSlurm,
    given: list[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """The other comes while the one makes its checks, or while it asks Slurm."""
    _takes_jobs(slurm)
    main = importlib.import_module("slurm.commands")
    arguments = ("--json", "--override", *given, "run.dir=runs/mine")
    others: list[Result] = []
    original = getattr(main, moment)

    def with_another(*these: Any) -> Any:
        monkeypatch.setattr(main, moment, original)
        others.append(submit(*arguments))
        slurm.says("scontrol", "JobId=41 JobState=PENDING Reason=Priority\n")
        return original(*these)

    monkeypatch.setattr(main, moment, with_another)
    results = [submit(*arguments), *others]
    lost, won = sorted(results, key=lambda result: -result.code)
    assert (lost.code, won.code) == (78, 0)
    assert won.json["job_ids"] == ["41"]
    record = Record(here / "runs/mine")
    assert f"{record.run}: " in lost.err
    said = "cancel it first" if moment == "check" else "another submission of this run is under way"
    assert said in lost.err
    assert record.job_id() == "41"
    assert [event["event"] for event in record.events()] == ["submitted"]
    real = [call for call in slurm.calls if call.startswith("sbatch") and "--test" not in call]
    assert len(real) == 1


# Status, logs, cancel


def test_the_status_as_json(submit: Submit, slurm: FakeSlurm, given: list[str], here: Path) -> None:
    for name in ("n0", "n2"):
        submitted(here / "sweep" / name, given, state="finished")
    slurm.says("scontrol", stderr=FORGOTTEN, code=1)
    done = submit("status", "sweep", "--json")
    assert (done.code, done.err) == (0, "")
    assert [Path(one["run"]).name for one in done.json] == ["n0", "n2"]
    assert {one["state"] for one in done.json} == {"finished"}


@pytest.mark.parametrize(
    ("state", "code"), [("finished", 0), ("stopped", 0), ("failed", 1), ("pending", 1)]
)
def test_the_status_of_a_run_that_came_to_a_bad_end_is_one(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path, state: str, code: int
) -> None:
    submitted(here / "mine", given, state=state)  # pending, and unknown to Slurm: lost
    slurm.says("scontrol", stderr=FORGOTTEN, code=1)
    done = submit("status", "mine")
    assert (done.code, done.out) == (code, "")
    assert f"mine  {'lost' if state == 'pending' else state}" in done.err


def test_a_run_is_watched_to_its_end(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path
) -> None:
    submitted(here / "mine", given, state="finished")
    slurm.says("scontrol", stderr=FORGOTTEN, code=1)
    done = submit("status", "mine", "--watch", "--json")
    assert done.code == 0
    assert done.json[0]["state"] == "finished"
    assert "mine  finished" in done.err


def test_the_log_of_a_rank_is_on_stdout(submit: Submit, given: list[str], here: Path) -> None:
    record = submitted(here / "mine", given, state="finished")
    attempt = begun(record)
    attempt.log(2).write_bytes(b"first\nlast \xff\n")
    done = submit("logs", "mine", "--rank", "2")
    assert (done.code, done.out, done.err) == (0, "first\nlast \ufffd\n", "")
    missing = submit("logs", "mine")
    assert (missing.code, missing.out) == (78, "")
    assert "mine: rank 0 has written nothing yet" in missing.err


def test_a_log_is_followed_to_the_runs_end(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path
) -> None:
    record = submitted(here / "mine", given, state="finished")
    slurm.says("scontrol", stderr=FORGOTTEN, code=1)
    begun(record).log(0).write_text("all\n")
    assert submit("logs", "mine", "--follow").out == "all\n"


def test_a_run_is_cancelled_with_all_of_its_sweep(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path
) -> None:
    records = [
        submitted(here / "sweep" / name, given, job_id=job_id, state=state)
        for name, job_id, state in [("n0", "7_0", "running"), ("n2", "7_1", "finished")]
    ]
    line = "JobId=%d ArrayJobId=7 ArrayTaskId=%d JobState=%s NodeList=node1\n"
    slurm.says("scontrol", line % (8, 0, "RUNNING") + line % (7, 1, "COMPLETED"))
    marked = f"[ -e {records[0].cancelled} ] || exit 9"
    slurm.runs("scancel", marked)
    done = submit("cancel", "sweep", "--json")
    assert done.code == 0, done.err
    assert done.json == {"cancelled": ["7_0"]}
    assert [call for call in slurm.calls if call.startswith("scancel")] == ["scancel 7_0"]
    assert records[0].events()[-1]["event"] == "cancelled"


def test_where_nothing_is_queued_nothing_is_cancelled(
    submit: Submit, slurm: FakeSlurm, given: list[str], here: Path
) -> None:
    submitted(here / "mine", given, state="failed")
    slurm.says("scontrol", stderr=FORGOTTEN, code=1)
    done = submit("cancel", "mine")
    assert (done.code, done.out, done.err) == (0, "", "cancelled: nothing was queued\n")


def test_while_no_slurm_answers_a_cancellation_ends_with_69_and_its_marker_stays(
    submit: Submit, given: list[str], here: Path
) -> None:
    record = submitted(here / "mine", given, state="running")
    done = submit("cancel", "mine")
    assert (done.code, done.out) == (69, "")
    assert "scancel is not installed here: run this on a login node" in done.err
    assert record.cancelled.exists()


def test_nothing_of_this_environment_reaches_the_script(
    submit: Submit, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2")
    done = submit("--dry-run", "--json", "--override", *given)
    assert "MLFLOW_TRACKING_TOKEN" in os.environ
    assert "hunter2" not in done.out + done.err


@pytest.mark.parametrize("command", [(), ("status",), ("logs",), ("cancel",), ("init",)])
def test_an_argument_that_is_no_utf8_is_named(submit: Submit, command: tuple[str, ...]) -> None:
    done = submit(*command, os.fsdecode(b"--name=\xff"))
    assert done.code == 78
    assert r"'--name=\udcff': this argument is not UTF-8 text" in done.err
