"""What Slurm is given: scripts as they were (UPDATE_GOLDEN=1 renews them), without secrets."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm, options, profile, submission, write_inputs

from slurm import submission as submission_module
from slurm.plan import Plan, make_plan
from slurm.record import Record
from slurm.scheduler import ControllerAway, Refused
from slurm.submission import load, script, store, submit

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, dict[str, Any]] = {
    "a100-80gb": {"cluster": "a100-80gb", "gpus": 4},
    "a100-40gb": {"cluster": "a100-40gb", "gpus": 4, "nodes": 2, "time": "2-12", "after": "41"},
    "localhost": {"cluster": "localhost", "gpus": 1},
    "array": {"cluster": "a100-80gb", "unfreeze": [0, 1, 2, 4], "name": "depth"},
}
Planner = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """A plan in which nothing depends on this machine or the time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slurm.plan.time.strftime", lambda _: "20260102-030405")
    monkeypatch.setattr(submission_module, "PROJECT", Path("/PROJECT"))
    given = write_inputs(tmp_path)

    def planned(**others: Any) -> Plan:
        plan = make_plan(options(override=given, **others))
        folder = plan.submission.folder.replace(str(tmp_path), "/HERE")
        return replace(plan, submission=replace(plan.submission, folder=folder, python="/PYTHON"))

    return planned


@pytest.fixture
def slurm(slurm: FakeSlurm) -> FakeSlurm:
    slurm.says("srun")  # submitit wants it to be there
    return slurm


def _script(**changes: Any) -> str:
    return script(submission(Path("/runs/mine"), **changes))


def _flags(text: str) -> dict[str, str]:
    """The options of sbatch in a script, as bash would read them."""
    marker = "#SBATCH --"
    lines = [line.removeprefix(marker) for line in text.splitlines() if line.startswith(marker)]
    pairs = [line.partition("=") for line in lines]
    return {key: "".join(shlex.split(value)) for key, _, value in pairs}


# Scripts


@pytest.mark.parametrize("name", CASES)
def test_a_script_is_as_it_was(plan: Planner, name: str) -> None:
    planned = plan(**CASES[name])
    text, file = script(planned.submission, len(planned.runs)), GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", CASES)
def test_a_script_that_is_kept_is_one_to_bash_and_of_no_machine(name: str) -> None:
    file, bash = GOLDEN / f"{name}.sh", shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", str(file)], check=True)
    text = file.read_text()
    for own in (str(Path.home()), str(Path(__file__).parents[2]), "/tmp"):
        assert f"{own}/" not in text


def test_a_script_may_be_looked_at_without_slurm(slurm: FakeSlurm) -> None:
    assert _script().startswith("#!/bin/bash\n")


def test_what_the_profile_says_is_asked_of_slurm() -> None:
    gpu = {"memory_gb": 85.0, "per_node": 8, "type": None}
    wanted = {"partition": "p", "account": "a", "qos": "q", "constraint": "c&d"}
    settings = {"gpu": gpu, "cpus_per_gpu": 3, "memory_per_gpu_gb": 50, "time": "2-12:30:00"}
    text = _script(gpus=2, nodes=3, profile=profile(**wanted, **settings))
    expected = wanted | {
        "nodes": "3",
        "ntasks-per-node": "2",
        "gpus-per-node": "2",
        "cpus-per-task": "3",
        "mem": "100G",
        "time": "3630",
        "signal": "USR2@120",
        "requeue": "",
    }
    assert expected.items() <= _flags(text).items()
    assert " --cpus-per-task=3 " in text.splitlines()[-1]


def test_what_nobody_says_is_not_asked_of_slurm() -> None:
    flags = _flags(_script())
    unwanted = {
        "partition",
        "account",
        "qos",
        "constraint",
        "dependency",
        "wckey",
        "array",
        "error",
    }
    assert not unwanted & flags.keys()


def test_a_dependency_must_have_ended_well_or_the_job_goes() -> None:
    flags = _flags(_script(after="41_2"))
    assert (flags["dependency"], flags["kill-on-invalid-dep"]) == ("afterok:41_2", "yes")
    run = submission(Path("/runs/mine"), after="41_2").of_one_run()
    assert run == submission(Path("/runs/mine"))


def test_a_limit_below_a_minute_is_one() -> None:
    assert _flags(_script(profile=profile(time="0:30")))["time"] == "1"


def test_the_profiles_shell_lines_come_before_the_job() -> None:
    lines = ["module load cuda", "ulimit -n 4096"]
    text = _script(profile=profile(setup=lines)).splitlines()
    start = text.index("module load cuda")
    assert text[start : start + 2] == lines
    assert start < next(k for k, line in enumerate(text) if line.startswith("srun "))


def test_paths_with_blanks_and_quotes_stay_whole(tmp_path: Path) -> None:
    odd = tmp_path / "it's a folder"
    text = _script(folder=str(odd / "slurm"), python=str(odd / "python"))
    assert _flags(text)["output"] == str(odd / "slurm" / "%j_0_log.out")
    command = shlex.split(text.splitlines()[-1])
    assert command[-6:] == [
        "bash",
        str(odd / "python"),
        "-u",
        "-m",
        "submitit.core._submit",
        str(odd / "slurm"),
    ]


def test_the_task_is_deaf_until_python_has_its_handlers() -> None:
    command = shlex.split(_script().splitlines()[-1])
    start = command.index("bash")
    deaf = subprocess.Popen(
        [*command[start : start + 4], "/bin/sh", "-c", "kill -USR2 $$; kill -TERM $$; echo on"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert deaf.communicate()[0] == "on\n"


def test_a_script_holds_no_value_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("PYTHONPATH", "/of/mine")
    text = _script(profile=profile(environment={"NCCL_DEBUG": "INFO"}))
    assert "hunter2" not in text
    assert "/of/mine" not in text
    assert "NCCL_DEBUG" not in text  # it goes to the trainers alone


# The trainer


def test_without_an_image_the_trainer_is_this_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYTHING", "else")
    given = submission(Path("/runs/mine"))
    command = given.command("train", "--config", "/c.yaml")
    assert command == ["python", "-m", "job.train", "--config", "/c.yaml"]
    assert given.train_command("/c.yaml") == command
    assert replace(given, verify=True).train_command("/c.yaml") == [*command, "--verify"]
    environment = given.task_environment({"RANK": "1"})
    assert (environment["RANK"], environment["ANYTHING"]) == ("1", "else")
    assert not [name for name in environment if name.startswith("APPTAINERENV_")]


def test_in_an_image_the_trainer_sees_its_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST", "/fast")
    own = profile(scratch="$FAST/me", binds=["/a:/b:ro", "$FAST"])
    binds = [*own["binds"], "/data"]
    given = submission(Path("/runs/mine"), image="/critic.sif", binds=binds, profile=own)
    command = given.command("train", "--config", "/c.yaml")
    assert command[:2] == ["apptainer", "run"]
    image = command.index("/critic.sif")
    assert command[image:] == ["/critic.sif", "train", "--config", "/c.yaml"]
    assert {"--nv", "--containall"} <= set(command[:image])
    pairs = list(itertools.pairwise(command))
    for pair in [
        ("--pwd", "/runs"),
        *(("--bind", path) for path in ("/a:/b:ro", "/fast", "/data", "/fast/me")),
    ]:
        assert pair in pairs


def test_paths_with_the_signs_of_apptainers_own_options_are_mounted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JOB", "7:x")
    own = profile(scratch="/fast/$JOB", binds=["/a:/b:ro"])
    binds = ["/a:/b:ro", "/runs/12:30:00", '/runs/"exp",lr=1e-5', "/runs/$JOB"]
    given = submission(Path("/runs/mine"), image="/critic.sif", binds=binds, profile=own)
    pairs = itertools.pairwise(given.command("train"))
    assert [pair for pair in pairs if pair[0] in ("--bind", "--mount")] == [
        ("--bind", "/a:/b:ro"),
        ("--mount", 'type=bind,"source=/runs/12:30:00","destination=/runs/12:30:00"'),
        (
            "--mount",
            'type=bind,"source=/runs/""exp"",lr=1e-5","destination=/runs/""exp"",lr=1e-5"',
        ),
        ("--bind", "/runs/$JOB"),
        ("--mount", 'type=bind,"source=/fast/7:x","destination=/fast/7:x"'),
    ]


def test_in_an_image_the_trainer_gets_its_variables_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "MLFLOW_TRACKING_URI", "SLURM_JOB_ID", "SLURM_NTASKS"):
        monkeypatch.setenv(name, f"its {name}")
    given = submission(Path("/runs/mine"), image="/critic.sif")
    environment = given.task_environment({"RANK": "1", "NCCL_IB_HCA": "mlx5_0,mlx5_1"})
    inside = {k: v for k, v in environment.items() if k.startswith("APPTAINERENV_")}
    assert inside["APPTAINERENV_RANK"] == "1"
    assert inside["APPTAINERENV_NCCL_IB_HCA"] == "mlx5_0,mlx5_1"
    for name in ("CUDA_VISIBLE_DEVICES", "MLFLOW_TRACKING_URI", "SLURM_JOB_ID"):
        assert inside[f"APPTAINERENV_{name}"] == f"its {name}"
    assert "APPTAINERENV_SLURM_NTASKS" not in inside
    assert "APPTAINERENV_HOME" not in inside


# Sending


def test_without_slurm_nothing_is_submitted(slurm: FakeSlurm, tmp_path: Path) -> None:
    with pytest.raises(ControllerAway, match=r"sbatch is not installed here: .* a login node"):
        submit([time.time], submission(tmp_path / "run"))
    slurm.says("sbatch")
    (slurm.folder / "srun").unlink()
    with pytest.raises(ControllerAway, match="srun is not installed here"):
        submit([time.time] * 2, submission(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [1, 3])
def test_the_ids_are_those_that_slurm_gives(slurm: FakeSlurm, tmp_path: Path, count: int) -> None:
    slurm.says("sbatch", "Submitted batch job 41\n")
    ids = submit([time.time] * count, submission(tmp_path / "run"))
    assert ids == (["41"] if count == 1 else ["41_0", "41_1", "41_2"])


def test_a_submission_inherits_nothing_of_the_job_it_is_made_in(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "40")
    slurm.runs("sbatch", 'echo "Submitted batch job 4$SLURM_JOB_ID"')
    assert submit([time.time], submission(tmp_path / "run")) == ["4"]
    assert os.environ["SLURM_JOB_ID"] == "40"


def test_variables_that_the_script_would_lose_against_do_not_reach_sbatch(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SBATCH_TIMELIMIT", "SRUN_CPUS_PER_TASK", "SLURM_TIMELIMIT", "SBATCH_RESERVATION"):
        monkeypatch.setenv(name, "1")
    seen = tmp_path / "seen"
    slurm.runs("sbatch", f'/usr/bin/env > {seen}; echo "Submitted batch job 4"')
    submit([time.time], submission(tmp_path / "run"))
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert names >= {"SBATCH_RESERVATION"}
    assert not {n for n in names if n.startswith(("SRUN_", "SLURM_")) or n.endswith("TIMELIMIT")}
    assert os.environ["SBATCH_TIMELIMIT"] == "1"


def test_steps_have_the_scripts_environment_whatever_sbatch_exports() -> None:
    assert " --export=ALL " in _script().splitlines()[-1]


def test_a_node_without_the_python_that_has_submitted_says_so_and_ends_the_job() -> None:
    command = shlex.split(_script(python="/nowhere/python").splitlines()[-1])
    ended = subprocess.run(command[command.index("bash") :], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (78, "")
    (said,) = ended.stderr.splitlines()
    assert "has no /nowhere/python, the Python that has submitted" in said


@pytest.mark.parametrize(
    ("said", "kind", "text"),
    [
        (
            "sbatch: error: invalid partition specified: nowhere\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            Refused,
            "Batch job submission failed: Invalid partition name specified",
        ),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller "
            "(connect failure)\n",
            ControllerAway,
            "Unable to contact slurm controller",
        ),
        ("lua: no such project\n", Refused, "lua: no such project"),
    ],
)
def test_a_refusal_is_in_slurms_words(
    slurm: FakeSlurm, tmp_path: Path, said: str, kind: type[Exception], text: str
) -> None:
    slurm.says("sbatch", stderr=said, code=1)
    with pytest.raises(kind, match=text):
        submit([time.time], submission(tmp_path / "run"))


def test_an_answer_without_an_id_is_shown(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.says("sbatch", "Thank you\n")
    with pytest.raises(Refused, match="Thank you"):
        submit([time.time], submission(tmp_path / "run"))


# Keeping


def test_a_submission_is_kept(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.folder.mkdir()
    one = submission(tmp_path, after="41", binds=["/data"], nodes=3)
    store(one, record)
    assert load(record) == one
