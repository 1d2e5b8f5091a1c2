"""slurm/nightly.py: what it asks of Slurm, how it ends, and that failures leave nothing behind."""

from __future__ import annotations

import errno
import http.server
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fake_slurm import FakeSlurm, partition
from micro_job import write_job

from job.common.errors import InputError, run_command
from job.nightly import rules
from job.nightly.judge import judge
from job.nightly.matrix import Entry, load_matrix
from job.nightly.page import page
from job.nightly.record import Finding, Night, NightFolder, Plan, Result, Verdict
from job.nightly.summary import junit, markdown
from slurm.night import alone
from slurm.night_plan import NightRun
from slurm.submission import PROJECT
from slurm.telling import Channels, tell

COMMAND = PROJECT / "slurm" / "nightly.py"
FULL = (
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit "
    "limit, user's size and/or time limits)"
)
AWAY = "sbatch: error: Batch job submission failed: Unable to contact slurm controller"
ACTIVE = "JobId=9 JobState=PENDING Reason=Dependency Restarts=0 StartTime=Unknown EndTime=Unknown"
HEAVY = {"torch", "numpy", "scipy", "mlflow", "matplotlib", "pyarrow"}
KEY = {"device": "A100", "instructions": "AVX512", "torch": "2.11", "image": "none"}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Nightly = Callable[..., Done]


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    """Two sizes of resources, and an entry of each kind."""
    write_job(tmp_path)
    entries: dict[str, Any] = {
        "one": {"unfreeze": [1]},
        "seeds": {"unfreeze": [1], "seeds": [0, 1, 2]},
        "four": {"unfreeze": [0], "gpus": 4},
        "memory": {"kind": "memory", "unfreeze": [0, 1]},
        "preflight": {"kind": "preflight"},
    }
    content = {
        "config": str(tmp_path / "critic.yaml"),
        "time": "0:30:00",
        "nice": 77,
        "override": ["model.path={night}/trunk", f"model.recipe={tmp_path}/pretrain.yaml"],
        "entries": entries,
    }
    file = tmp_path / "little.yaml"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def nightly(
    tmp_path: Path,
    matrix: Path,
    slurm: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Nightly:
    """The command, inside this process, on a folder of nights of its own."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # of which it replaces the first
    monkeypatch.chdir(tmp_path)  # which it leaves
    main = importlib.import_module("slurm.night_commands").main

    def called(*arguments: str) -> Done:
        code = 0
        try:
            nights = ("--folder", str(tmp_path / "nights"), "--cluster", "localhost")
            run_command(lambda: main([*arguments, "--matrix", str(matrix), *nights]))
        except SystemExit as ending:
            code = int(ending.code or 0)
        return Done(code, *capsys.readouterr())

    return called


def _knows(slurm: FakeSlurm, job: str, code: int = 0) -> None:
    """Let the controller say this of each job."""
    of_job = f"echo '{job}' >&{1 + (code > 0)}; exit {code}"
    of_partition = f"echo '{partition('main', default=True)}'"
    slurm.runs("scontrol", f'[ "$2" = partition ] && {of_partition} || {{ {of_job}; }}')


def _takes_jobs(slurm: FakeSlurm, then: str = "") -> None:
    """Let Slurm take arrays, with ids that count up."""
    count = slurm.folder / "count"
    slurm.says("srun")
    _knows(slurm, ACTIVE)
    slurm.says("scancel")
    slurm.runs(
        "sbatch",
        f'[ "$1" = --test-only ] && exit 0\necho x >> {count}\n'
        f'n=$(/usr/bin/wc -l < {count})\n{then}\necho "Submitted batch job $((40 + n))"',
    )


def _nights(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "nights").glob("night-*"))


def test_a_dry_run_shows_entries_hours_and_scripts_and_writes_nothing(
    nightly: Nightly, tmp_path: Path
) -> None:
    done = nightly("--dry-run")
    assert done.code == 0, done.err
    assert "little: 7 runs, 5.0 GPU-hours at most" in done.out  # (6 x 1 + 4) x 0.5
    assert done.out.count("#!/bin/bash") == 3
    assert "#SBATCH --dependency=afterany:ARRAY-0:ARRAY-1" in done.out
    assert "#SBATCH --job-name=night-000000-judge" in done.out
    assert done.out.count("#SBATCH --nice=77") == 2
    assert done.out.count("#SBATCH --deadline=now+1200minutes") == 2
    assert "#SBATCH --array=0-5" in done.out
    assert not (tmp_path / "nights").exists()


def test_it_is_light() -> None:
    words = [sys.executable, "-X", "importtime", str(COMMAND), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert not HEAVY & imported


def test_a_night_is_an_array_a_size_and_a_job_that_judges_it(
    nightly: Nightly, slurm: FakeSlurm, tmp_path: Path
) -> None:
    _takes_jobs(slurm)
    done = nightly()
    assert (done.code, done.err) == (0, "")
    (night,) = _nights(tmp_path)
    plan = json.loads((night / "plan.json").read_text())
    assert plan["collector"] == "43"
    jobs = {Path(run["path"]).name: run["job_id"] for run in plan["runs"]}
    assert {name: job.partition("_")[0] for name, job in jobs.items()} == {
        **dict.fromkeys(("one", "seeds-s0", "seeds-s1", "seeds-s2", "memory", "preflight"), "41"),
        "four": "42",
    }
    script = next((night / "slurm/collector").glob("*.sh")).read_text()
    assert "#SBATCH --dependency=afterany:41:42" in script
    assert "gpus" not in script
    config = (night / "runs/seeds-s2/slurm/config.yaml").read_text()
    assert "seed: 2" in config
    assert f"{tmp_path}/nights/mlflow.db" in config


@pytest.mark.slow
def test_two_nights_never_overlap(nightly: Nightly, slurm: FakeSlurm, tmp_path: Path) -> None:
    _takes_jobs(slurm)
    assert nightly().code == 0
    _is_left_out_while(43, nightly)
    _follows_once_it_is_gone(nightly, slurm, tmp_path)


def _is_left_out_while(job: int, nightly: Nightly) -> None:
    again = nightly()
    assert (again.code, again.out) == (0, "")
    assert f"night-000001: still goes on (job {job}, pending); left out" in again.err


def _follows_once_it_is_gone(nightly: Nightly, slurm: FakeSlurm, folder: Path) -> None:
    _knows(slurm, "slurm_load_jobs error: Invalid job id specified", 1)
    assert nightly().code == 0
    assert [night.name for night in _nights(folder)] == ["night-000001", "night-000002"]


@pytest.mark.slow
def test_a_damaged_plan_keeps_no_later_night_back(
    nightly: Nightly, slurm: FakeSlurm, tmp_path: Path
) -> None:
    _takes_jobs(slurm)
    assert nightly().code == 0
    (_nights(tmp_path)[0] / "plan.json").write_text('{"version": 1}')
    done = nightly()
    assert done.code == 0
    assert re.fullmatch(r"not waited for: .*/night-000001/plan.json: damaged; .*\n", done.err)
    assert [night.name for night in _nights(tmp_path)] == ["night-000001", "night-000002"]


@pytest.mark.slow
def test_jobs_are_noted_before_there_is_one_that_judges(
    nightly: Nightly, slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a night is left whose submission is killed before its collector."""
    kept = tmp_path / "kept"

    def killed(_: object, jobs: dict[Path, str], night: NightFolder, *others: object) -> Any:
        assert {job.partition("_")[0] for job in jobs.values()} == {"41", "42"}
        shutil.copytree(night.path, kept)
        raise KeyboardInterrupt

    _takes_jobs(slurm)
    with monkeypatch.context() as patch:
        patch.setattr("slurm.night_jobs._submit_collector", killed)
        assert nightly().code == 130
    assert not _nights(tmp_path)
    cancelled = sorted(call for call in slurm.calls if call.startswith("scancel"))
    assert cancelled == ["scancel 41", "scancel 42"]
    kept.rename(tmp_path / "nights/night-000001")
    assert (tmp_path / "nights/night-000001/runs/four/slurm/jobs").read_text() == "42\n"
    _is_left_out_while(42, nightly)
    told = nightly("report")
    assert told.code == 3
    assert "was not judged: its jobs may go on until 20" in told.out
    _follows_once_it_is_gone(nightly, slurm, tmp_path)


def test_what_is_no_folder_of_baselines_is_refused_before_anything_is_made(
    nightly: Nightly, matrix: Path, tmp_path: Path
) -> None:
    for asked in ((), ("--local",), ("accept", "*", "--reason", "looked at")):
        done = nightly(*asked, "--baseline", str(matrix))
        assert done.code == 78
        assert done.err == f"error: --baseline {matrix}: no folder\n"
    assert not (tmp_path / "nights").exists()


def test_what_cannot_be_prepared_here_leaves_nothing(
    nightly: Nightly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("slurm.night_commands.prepare", full)
    assert nightly("--local", "--only", "one").code == 74
    assert not _nights(tmp_path)


def test_a_reason_that_all_runs_share_is_told_once(nightly: Nightly, matrix: Path) -> None:
    content = json.loads(matrix.read_text())
    for entry in content["entries"].values():
        entry["override"] = ["training.sead=1"]
    content["entries"]["four"]["override"] = ["training.sede=1"]
    matrix.write_text(json.dumps(content))
    done = nightly("--dry-run")
    assert done.code == 78
    assert done.err.count("--override training.sead") == 1
    assert "one, seeds-s0, seeds-s1, seeds-s2, memory, preflight: " in done.err
    assert done.err.count("  four: ") == 1
    del content["entries"]["one"]["override"]
    matrix.write_text(json.dumps(content))
    done = nightly("--dry-run")
    assert done.code == 0
    assert done.out.count("--override training.sead") == 1
    assert done.out.count("cannot be submitted") == 6


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize(("said", "code", "text"), [(FULL, 75, "queue is full"), (AWAY, 69, "")])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_slurm_does_not_take_leaves_nothing(
    nightly: Nightly, slurm: FakeSlurm, tmp_path: Path, said: str, code: int, text: str, at: int
) -> None:
    _takes_jobs(slurm, f'[ "$n" = {at} ] && {{ echo "{said}" >&2; exit 1; }}')
    done = nightly()
    assert done.code == code, done.err
    assert text in done.err
    assert len(done.err.splitlines()) == 1
    assert not _nights(tmp_path)
    cancelled = sorted(call for call in slurm.calls if call.startswith("scancel"))
    assert cancelled == [f"scancel {41 + k}" for k in range(at - 1)]


def test_without_slurm(nightly: Nightly, tmp_path: Path) -> None:
    done = nightly()
    assert done.code == 69
    assert "sbatch is not installed here" in done.err
    assert not _nights(tmp_path)


def test_an_absent_controller_is_asked_once(
    nightly: Nightly, slurm: FakeSlurm, tmp_path: Path
) -> None:
    for client in ("scontrol", "sbatch", "srun"):
        slurm.says(client, stderr=AWAY, code=1)
    done = nightly()
    assert done.code == 69
    assert len(done.err.splitlines()) == 1
    assert slurm.calls == ["scontrol show partition -o"]
    assert not _nights(tmp_path)
    shown = nightly("--dry-run")
    assert shown.code == 0
    assert "Slurm was not asked whether it would take them: scontrol: " in shown.out
    assert "little: 7 runs, 5.0 GPU-hours at most" in shown.out
    assert slurm.calls == ["scontrol show partition -o"] * 2


def test_a_controller_that_goes_away_is_asked_no_more(nightly: Nightly, slurm: FakeSlurm) -> None:
    _takes_jobs(slurm)
    slurm.says("sbatch", stderr=AWAY, code=1)
    assert nightly().code == 69
    assert sum(call.startswith("sbatch") for call in slurm.calls) == 1


@pytest.mark.slow
def test_an_entry_that_cannot_run_leaves_the_others(
    nightly: Nightly, slurm: FakeSlurm, matrix: Path, tmp_path: Path
) -> None:
    content = json.loads(matrix.read_text())
    content["entries"]["one"]["override"] = [
        "data.train=/nowhere.jsonl",
        "data.validation=/nowhere.jsonl",
    ]
    matrix.write_text(json.dumps(content))
    _takes_jobs(slurm)
    done = nightly()
    assert done.code == 0, done.err
    assert "1 of 7 runs could not be" in done.out
    plan = json.loads((_nights(tmp_path)[0] / "plan.json").read_text())
    refused = {run["entry"]: run["refused"] for run in plan["runs"] if run["refused"]}
    assert list(refused) == ["one"]
    assert "/nowhere.jsonl" in refused["one"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entries": {}}, "entries: none"),
        ({"entries": {"a": {"sead": 1}}}, "entries.a: unknown key sead (valid here: kind, config"),
        ({"entries": {"a": {"seeds": "x"}}}, "entries.a"),
        ({"entries": {"a": 3}}, "entries.a: a section with kind"),
        ({"entries": {"a": {"seeds": [1, 2]}}}, "a: seeds: one, or three or more"),
        ({"entries": {"a": {"unfreeze": [1, 2]}}}, "a: unfreeze: one number"),
        (
            {"entries": {"a": {}, "c": {"same_as": "b"}}},
            "c: same_as: no other entry b; there are a",
        ),
        (
            {"entries": {"a": {}, "c": {"same_as": "c"}}},
            "c: same_as: no other entry c; there are a",
        ),
        (
            {"entries": {"a": {"seeds": [0, 1, 2]}, "c": {"same_as": "a"}}},
            "c: same_as: a: both must be trainings of one seed, the same one",
        ),
        ({"entries": {"a": {"kind": "memory"}, "c": {"same_as": "a"}}}, "c: same_as: a: both must"),
        ({"entries": {"a": {"floor": {"mes": 0.3}}}}, "a: floor: mes: only of what has a better"),
        ({"entries": {"a": {"floor": {"std_prediction": 0.1}}}}, "a: floor: std_prediction: only"),
        ({"entries": {"a": {"floor": {"loss": 0.1}}}}, "a: floor: loss: only of what has a better"),
        ({"entries": {"a": {"floor": {"mse": math.nan}}}}, "a: floor: mse: nan is no number"),
        ({"entries": {"a": {"stop_at": -3}}}, "a: stop_at: -3: steps are counted from 1"),
        ({"entries": {"a": {"stop_at": 0}}}, "a: stop_at: 0: steps are counted from 1"),
        ({"entries": {"a": {"unfreeze": [-4]}}}, "a: unfreeze: -4 blocks: 0 or more"),
        (
            {"entries": {"a": {"kind": "memory", "unfreeze": []}}},
            "a: unfreeze: one number of blocks",
        ),
        (
            {"entries": {"a": {"kind": "preflight", "seeds": [0, 1, 2], "stop_at": 3}}},
            "a: stop_at and seeds: of trainings, and this is preflight",
        ),
        ({"entries": {"a/b": {}}}, "it names a folder"),
        ({"nicer": 3}, "nicer: unknown key"),
    ],
)
def test_a_wrong_matrix_is_refused_by_its_key(
    nightly: Nightly, matrix: Path, change: dict[str, Any], message: str
) -> None:
    matrix.write_text(json.dumps(json.loads(matrix.read_text()) | change))
    done = nightly("--dry-run")
    assert done.code == 78
    assert message in done.err
    assert str(matrix) in done.err


def test_every_rule_says_how_often_it_is_wrong() -> None:
    told = [
        value for name, value in vars(rules).items() if name.isupper() and isinstance(value, str)
    ]
    assert len(told) == 7
    for one in told:
        assert "false alarm" in one or "as `exact`" in one
    page = (PROJECT / "docs/nightly.md").read_text().partition("## Rules")[2]
    table = [line for line in page.partition("\n\n| variation")[0].splitlines() if line[:1] == "|"]
    assert all(cell.strip() for line in table for cell in line.strip("|").split("|"))


def test_an_unknown_matrix_names_those_that_there_are() -> None:
    with pytest.raises(InputError, match=r"--matrix none: no file .*; there are small, standard"):
        load_matrix("none")


@pytest.mark.parametrize("name", ["small", "standard"])
def test_the_matrices_of_the_project_are_whole(name: str) -> None:
    matrix, entries = load_matrix(name)
    assert {one.unfreeze[0] for one in entries.values()} >= {0, 4, 8}
    assert {one.gpus for one in entries.values()} == {1, 4}
    assert any(one.stop_at for one in entries.values())
    assert any(len(one.seeds) >= 3 for one in entries.values())
    for one in entries.values():
        assert (PROJECT / (one.config or matrix.config)).exists()


def test_the_lines_for_cron_need_nothing_of_cron(
    nightly: Nightly, slurm: FakeSlurm, matrix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.says("sbatch")
    monkeypatch.setenv("SLURM_CONF", "/etc/50%/slurm.conf")
    done = nightly("--install-line", "--mail", "who@where")
    lines = [line for line in done.out.splitlines() if line.startswith("17 2 * * * ")]
    assert len(lines) == 2
    assert f"cd {PROJECT} && SLURM_CONF='/etc/50\\%/slurm.conf'" in lines[0] or (
        f"cd {PROJECT} && SLURM_CONF=/etc/50\\%/slurm.conf" in lines[0]
    )
    assert f"PATH={slurm.folder}:/usr/bin:/bin {sys.executable} slurm/nightly.py" in lines[0]
    assert f"--matrix {matrix}" in lines[0]
    assert lines[0].endswith("/nights/cron.log 2>&1")
    assert "#SCRON --time=15" in done.out
    assert "--site" not in done.out


def test_the_line_for_cron_names_the_site_file_that_cron_would_not_find(
    nightly: Nightly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "critic-job/site.yaml"
    site.parent.mkdir()
    site.write_text("cluster: localhost\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert f"--site {site} " in nightly("--install-line").out


def test_the_line_for_cron_has_all_that_was_asked_for(
    nightly: Nightly, slurm: FakeSlurm, tmp_path: Path
) -> None:
    slurm.says("sbatch")
    asked = ("--baseline", str(tmp_path), "--image", "none", "--webhook", "http://who")
    line = nightly("--install-line", "--only", "one", "four", *asked).out.splitlines()[1]
    words = shlex.split(line)
    assert words[words.index("slurm/nightly.py") + 5 : words.index(">>")] == [
        *("--only", "one", "four", "--baseline", str(tmp_path), "--cluster", "localhost"),
        *("--image", "none", "--webhook", "http://who"),
    ]
    unknown = nightly("--install-line", "--only", "two")
    assert (unknown.code, unknown.out) == (78, "")
    assert "--only two: no such entry" in unknown.err


def _line(done: Done) -> list[str]:
    """The words of the command in a printed line, its variables first."""
    words = shlex.split(next(one for one in done.out.splitlines() if one.startswith("17 2")))
    return words[words.index("cd") + 3 : words.index(">>")]


def test_the_line_for_cron_submits_the_shells_night(
    nightly: Nightly, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "SBATCH_ACCOUNT": "foo bar's",
        "SBATCH_RESERVATION": "night",
        "SBATCH_TIMELIMIT": "5",  # which the profile's goes before
        "SLURM_CLUSTERS": "big",
        "MLFLOW_TRACKING_URI": "http://m:5000",
        "MLFLOW_TRACKING_USERNAME": "",
    }.items():
        monkeypatch.setenv(name, value)
    slurm.says("sbatch")
    words = _line(nightly("--install-line"))
    assert words[: words.index(sys.executable)] == [
        *("MLFLOW_TRACKING_URI=http://m:5000", "SBATCH_ACCOUNT=foo bar's"),
        *("SBATCH_RESERVATION=night", "SLURM_CLUSTERS=big", f"PATH={slurm.folder}:/usr/bin:/bin"),
    ]


@pytest.mark.parametrize("program", ["apptainer", "singularity"])
def test_the_line_for_cron_finds_containers_as_the_shell_does(
    nightly: Nightly,
    slurm: FakeSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
) -> None:
    slurm.says("sbatch")
    file = tmp_path / "of containers" / program
    file.parent.mkdir()
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slurm.folder}:{file.parent}:/usr/bin")
    words = _line(nightly("--install-line"))
    assert f"PATH={slurm.folder}:{file.parent}:/usr/bin:/bin" in words


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLFLOW_TRACKING_PASSWORD", "hunter2"),
        ("MLFLOW_TRACKING_TOKEN", "hunter2"),
        ("AWS_SECRET_ACCESS_KEY", "hunter2"),
        ("MLFLOW_TRACKING_URI", "https://me:hunter2@m:5000"),
        ("MLFLOW_TRACKING_URI", "postgresql://m/db?password=hunter2"),
        ("MLFLOW_TRACKING_URI", "postgresql://me:hunter2/@m/db"),
        ("MLFLOW_TRACKING_URI", "mssql+pyodbc:///x%3FPWD%3Dhunter2"),
        ("SBATCH_EXPORT", "ALL,PGPASS=hunter2"),
        ("NCCL_SOCKET_IFNAME", "hunter2"),
    ],
)
def test_the_line_for_cron_names_secrets_and_copies_none(
    nightly: Nightly, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    done = nightly("--install-line")
    assert "hunter2" not in done.out + done.err
    assert re.search(rf"^# set in this shell, and not in the line .*\b{name}\b", done.out, re.M)
    assert f"{name}=" not in done.out


def test_the_line_for_cron_without_slurm_is_no_line_for_slurm(nightly: Nightly) -> None:
    done = nightly("--install-line", "--local")
    assert " --local " in done.out
    assert "SCRON" not in done.out


@pytest.mark.parametrize(
    "asked", [["--reason", "x"], ["--night", "1"], ["--bisect", "one/loss"], ["--dry-run"]]
)
def test_the_line_for_cron_refuses_what_it_cannot_have(nightly: Nightly, asked: list[str]) -> None:
    done = nightly("--install-line", *asked)
    assert (done.code, done.out) == (78, "")
    assert f"{asked[0]} is of no night that cron submits" in done.err


# Reports


def _night(folder: Path, number: int = 1, **changes: Any) -> NightFolder:
    """A judged night of one entry."""
    night = NightFolder(folder / f"night-{number:06}")
    night.path.mkdir(parents=True)
    plan = Plan(number, "little", "abc", 1e9, {"one": Entry()}, [], "python")
    figures = {"loss": [0.5, 0.25], "speed": 3.0 + number / 100}
    result = Result("one", **{"complete": True, "key": KEY, "figures": figures} | changes)
    night.write_plan(plan)
    judged = judge(night, plan, {"one": result}, [])
    night.write(judged)
    (night.path / "summary.md").write_text(markdown(judged))
    return night


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 4),
        ({"complete": False, "reason": "no <node> & no \x01 word"}, 3),
        ({"complete": False, "reason": "\ufffe\uffff\x0b, \U0001f600"}, 3),
    ],
)
def test_the_report_has_the_verdicts_exit_code(
    nightly: Nightly, tmp_path: Path, changes: dict[str, Any], code: int
) -> None:
    assert nightly("report").code == 78
    night = _night(tmp_path / "nights", **changes)
    done = nightly("report")
    assert done.code == code
    assert done.out == (night.path / "summary.md").read_text()
    suite = ElementTree.fromstring(junit(night.night()))
    assert int(suite.attrib["tests"]) == len(night.night().findings)
    assert (suite.attrib["errors"] == "1") == (code == 3)
    assert "<script" not in page([night.night()])


def test_the_report_is_of_the_newest_night_that_was_submitted(
    nightly: Nightly, slurm: FakeSlurm, tmp_path: Path
) -> None:
    judged = _night(tmp_path / "nights")
    _takes_jobs(slurm)
    assert nightly().code == 0
    going_on = nightly("report")
    assert going_on.code == 3
    assert going_on.out.startswith("night-000002 is not judged yet: job 43 does so by 20")
    plan = NightFolder(_nights(tmp_path)[1]).plan()
    NightFolder(_nights(tmp_path)[1]).write_plan(replace(plan, deadline=plan.began - 1))
    over = nightly("report")
    assert over.code == 3
    assert "night-000002 was not judged: job 43 has left no record" in over.out
    assert f"judge it: {sys.executable} -m job.nightly {_nights(tmp_path)[1]}" in over.out
    assert nightly("report", "--night", "2").out == over.out
    assert nightly("report", "--night", "1").out == (judged.path / "summary.md").read_text()
    (_nights(tmp_path)[1] / "plan.json").write_text("{")
    damaged = nightly("report")
    assert damaged.code == 3
    assert "plan.json: damaged" in damaged.out


def test_a_night_of_this_machine_is_not_judged_yet_while_it_goes_on(
    nightly: Nightly, tmp_path: Path
) -> None:
    night = NightFolder(tmp_path / "nights/night-000001")
    night.path.mkdir(parents=True)
    night.write_plan(Plan(1, "little", "abc", 1e9, {}, [], "python"))
    with alone(night.path.parent):
        assert "is not judged yet: it goes on" in nightly("report").out
    done = nightly("report")
    assert done.code == 3
    assert "was not judged: it was ended on its way" in done.out


@pytest.mark.parametrize("name", ["plan.json", "record.json"])
@pytest.mark.parametrize("command", ["report", "accept"])
def test_a_damaged_night_is_no_regression(
    nightly: Nightly, tmp_path: Path, command: str, name: str
) -> None:
    night = _night(tmp_path / "nights")
    (night.path / name).write_text('{"version": 1}')
    done = nightly(command, *(["*", "--reason", "x"] if command == "accept" else []))
    assert done.code == 78
    assert f"{night.path}/{name}: damaged; " in done.err


def test_what_judges_a_night_again_can_be_pasted(nightly: Nightly, tmp_path: Path) -> None:
    night = _night(tmp_path / "it's mine")
    night.record_file.unlink()
    done = nightly("accept", "*", "--reason", "x", "--night", str(night.path))
    words = shlex.split(done.err.partition("judge it again: ")[2])
    assert words == ["python", "-m", "job.nightly", str(night.path)]


def test_figures_that_are_to_be_looked_at_are_shown(nightly: Nightly, tmp_path: Path) -> None:
    figures = {"loss": [0.5, 0.25], "parameters": "0123456789abcdef", "checkpoint_bytes": 3e6}
    night = _night(tmp_path / "nights", figures=figures | {"mse": 0.125})
    told = nightly("report").out
    for name, value in {
        "loss": "0.25",
        "parameters": "0123456789",
        "checkpoint_bytes": "3.0 MB",
        "mse": "0.125",
    }.items():
        line = f"**one/{name}**: {value}: no baseline on this kind of machine"
        assert line in told
        assert f"{value}: no baseline on this kind of machine" in junit(night.night())


def test_a_report_without_its_summary_is_made_anew(nightly: Nightly, tmp_path: Path) -> None:
    night = _night(tmp_path / "nights")
    summary = (night.path / "summary.md").read_text()
    (night.path / "summary.md").unlink()
    done = nightly("report", "--night", "1")
    assert (done.code, done.out, done.err) == (4, summary, "")


def test_a_night_is_named_by_its_number_or_from_where_the_user_is(
    nightly: Nightly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _night(tmp_path / "nights")
    for named, code in (("1", 4), ("0001", 4), ("nights/night-000001", 4), ("2", 78), ("²", 78)):
        monkeypatch.chdir(tmp_path)
        done = nightly("report", "--night", named)
        assert done.code == code, (named, done.err)
        assert not done.err or "is not there" in done.err
    unknown = nightly("report", "--night", "7").err
    assert f"--night 7: {tmp_path}/nights/night-000007 is not there; the nights of" in unknown
    assert unknown.endswith("are 1\n")
    assert "judge it" not in unknown


@pytest.mark.slow
def test_a_bisection_runs_the_entry_as_its_night_did(
    nightly: Nightly, slurm: FakeSlurm, matrix: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("cluster: localhost\n")
    _takes_jobs(slurm)
    assert nightly("--site", str(site)).code == 0
    folder = NightFolder(_nights(tmp_path)[0])
    plan = folder.plan()
    assert (plan.matrix, plan.matrix_file) == ("little", str(matrix))
    assert (plan.site, plan.cluster) == (str(site), "localhost")
    bad, good = ({"r2": [0.2, 0.2, 0.2]}, {"r2": [0.5, 0.5, 0.5]})
    found = Finding("seeds", "r2", Verdict.REGRESSED, "lower", "", bad["r2"], 0.5)
    folder.write(Night(plan, {"seeds": Result("seeds", True, figures=bad)}, [found]))
    begun: list[NightRun] = []
    monkeypatch.setattr("slurm.night_bisect.run_here", begun.append)
    for figures, code in ((good, 0), (bad, 1)):
        here = Result("seeds", True, figures=figures)
        monkeypatch.setattr("slurm.night_bisect.result", lambda *_, here=here: here)
        assert nightly("--bisect", "seeds/r2", "--night", str(folder.path)).code == code
    assert [run.path.name for run in begun] == ["seeds-s0", "seeds-s1", "seeds-s2"] * 2
    assert begun[0].plan is not None
    assert begun[0].plan.site.file == site
    assert begun[0].plan.runs[0].config.model.recipe == f"{tmp_path}/pretrain.yaml"


@pytest.mark.parametrize("error", [InputError("damaged"), OSError("gone"), KeyError("entry")])
def test_whatever_keeps_a_bisection_from_an_answer_skips_the_commit(
    nightly: Nightly, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(_: object) -> int:
        raise error

    monkeypatch.setattr("slurm.night_commands.side", fails)
    done = nightly("--bisect", "one/loss")
    assert done.code == 125
    assert done.err.startswith("cannot be tested: ")


def test_the_page_has_thirty_nights_and_marks_regressions(tmp_path: Path) -> None:
    nights = [_night(tmp_path, number).night() for number in range(1, 41)]
    found = nights[-1].findings
    bad = next(one for one in found if one.figure == "speed")
    nights[-1].findings[found.index(bad)] = type(bad)(**vars(bad) | {"verdict": Verdict.REGRESSED})
    text = page(nights)
    speed = text[text.index("speed over") :]
    assert speed.startswith("speed over 30 night(s), from 3.11 to 3.4")
    assert text.count("<line ") == 1  # where it begins
    assert "http" not in text


def test_accepting_needs_a_figure_and_a_reason(nightly: Nightly, tmp_path: Path) -> None:
    _night(tmp_path / "nights")
    accepted = ("--baseline", str(tmp_path / "accepted"))
    assert "nothing moves without one" in nightly("accept", "one/loss", *accepted).err
    done = nightly("accept", "one/loss", "--reason", "looked at", *accepted)
    assert done.code == 0, done.err
    (file,) = (tmp_path / "accepted").iterdir()
    assert file.name == "little_a100_avx512_2.11_none.json"
    stored = json.loads(file.read_text())["figures"]["one/loss"]
    assert (stored["value"], stored["commit"], stored["reason"]) == (
        [0.5, 0.25],
        "abc",
        "looked at",
    )


# Telling


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    received: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path == "/broken" else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as one:
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{one.server_port}", received
        one.shutdown()
        thread.join()


def test_channels_are_told_and_a_failing_one_is_noted(
    server: tuple[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, received = server
    night = _night(tmp_path)
    sent = tmp_path / "sent"
    sendmail = tmp_path / "bin/sendmail"
    sendmail.parent.mkdir()
    sendmail.write_text(f"#!/bin/sh\n/bin/cat > {sent}\n")
    sendmail.chmod(0o755)
    monkeypatch.setenv("PATH", str(sendmail.parent))
    tell(night, Channels(url, "who@where"))
    assert json.loads((night.path / "told.json").read_text()) == {"webhook": None, "mail": None}
    assert received[0]["verdict"] == "no baseline yet"
    assert "Subject: little night 1: no baseline yet" in sent.read_text()
    monkeypatch.setattr("slurm.telling._SENDMAIL", os.devnull)
    monkeypatch.setenv("PATH", "/nowhere")
    tell(night, Channels(f"{url}/broken", "who@where"))
    told = json.loads((night.path / "told.json").read_text())
    assert "500" in told["webhook"]
    assert "no sendmail" in told["mail"]
