"""The SIF under Apptainer, started as the Slurm side starts it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from built import Built
from launch import free_port, run_ranks
from micro_job import CHANGES, MicroRun, write_job
from tools import Tools

from slurm.submission import Submission
from slurm.trainer import Trainer, rank_environment

pytestmark = pytest.mark.slow

_TRAP = "raise SystemExit('this must not be imported')\n"


def _write_job(folder: Path, *settings: str) -> Path:
    write_job(folder, [*CHANGES, *settings], ["architecture.n_layers=3"])
    return folder / "critic.yaml"


def _start(
    tools: Tools, sif: Path, config: Path, inside: Mapping[str, str], name: str = "log"
) -> Trainer:
    """A task's trainer, by the command and with the signals of the supervisor."""
    folder = config.parent
    submission = Submission(
        "here",
        {"scratch": None},
        1,
        1,
        "test",
        str(folder),
        str(folder),
        str(sif),
        binds=[str(folder)],
    )
    command = submission.command("train", "--config", str(config))
    environment = submission.task_environment({"OMP_NUM_THREADS": "1"} | dict(inside))
    return Trainer(command, environment | tools.environment, folder, folder / f"{name}.txt")


def _code(trainer: Trainer, seconds: float = 300) -> int:
    if not trainer.wait(seconds):
        trainer.send(signal.SIGKILL)
        raise AssertionError(f"still there after {seconds} s: {trainer.outcome(0, '').last_lines}")
    return trainer.outcome(0, "").code


def test_its_own_test_passes(tools: Tools, sif: Path) -> None:
    assert "tested with torch" in tools.output("apptainer", "test", "--containall", sif)


def test_its_labels_name_commit_and_version(tools: Tools, packed: Built) -> None:
    said = json.loads(tools.output("apptainer", "inspect", "--json", packed.sif))
    labels = said["data"]["attributes"]["labels"]
    assert labels["org.opencontainers.image.revision"] == packed.facts["commit"]
    assert labels["org.opencontainers.image.version"] == packed.facts["version"]


def test_its_help_shows_how_to_run_it(tools: Tools, sif: Path) -> None:
    assert "apptainer run --nv" in tools.output("apptainer", "run-help", sif)


def test_two_ranks_inside_train_the_same_bits_as_two_outside(
    tools: Tools, sif: Path, tmp_path: Path
) -> None:
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    folders = tmp_path / "inside", tmp_path / "outside"
    for folder in folders:
        folder.mkdir()
        _write_job(folder)
    ranks = [
        _start(
            tools, sif, folders[0] / "critic.yaml", shared | rank_environment(r, 2, r, 2), f"{r}"
        )
        for r in range(2)
    ]
    assert [_code(rank) for rank in ranks] == [0, 0]
    run_ranks(["-m", "job.train", "--config", "critic.yaml"], 2, folders[1])
    inside, outside = (MicroRun(folder / "runs/critic") for folder in folders)
    inside.assert_equals(outside)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=pytest.mark.all)],
    ids=lambda number: number.name,
)
def test_a_signal_reaches_the_trainer_and_its_exit_code_comes_back(
    tools: Tools, sif: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = _write_job(tmp_path, "training.max_steps=100000")
    run = MicroRun(tmp_path / "runs/critic")
    trainer = _start(tools, sif, config, {})
    limit = time.monotonic() + 120
    while run.step < 3:
        assert time.monotonic() < limit
        assert not trainer.wait(0.1), trainer.outcome(0, "")
    trainer.send(number)
    assert _code(trainer, 60) == 75
    assert run.status["state"] == "stopped"
    assert run.checkpoints


def test_a_wrong_key_ends_with_the_code_for_wrong_input_from_a_folder_of_any_name(
    tools: Tools, sif: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run_12:30:00,lr=1e-5"  # Apptainer's own signs in --bind
    folder.mkdir()
    config = _write_job(folder)
    config.write_text(config.read_text().replace("max_steps", "maxsteps"))
    assert _code(_start(tools, sif, config, {})) == 78


# What the host has lying about


def test_packages_in_the_callers_home_are_not_picked_up(
    tools: Tools, sif: Path, tmp_path: Path
) -> None:
    planted = tmp_path / ".local/lib/python3.11/site-packages/torch/__init__.py"
    planted.parent.mkdir(parents=True)
    planted.write_text(_TRAP)
    home = ["--containall", "--home", f"{tmp_path}:/home/someone"]
    tools.output("apptainer", "run", *home, sif, "train", "--help")
    # neither the virtual environment nor the variable, each of which is enough
    python = ["/usr/bin/python3", "-c", "import torch"]
    unprotected = ["apptainer", "exec", *home, "--env", "PYTHONNOUSERSITE=", sif, *python]
    assert "must not be imported" in tools.run(*unprotected).stderr, "the trap is none"


def test_neither_a_checkout_nor_the_hosts_python_path_is_picked_up(
    tools: Tools, sif: Path, tmp_path: Path
) -> None:
    planted = tmp_path / "job/__init__.py"
    planted.parent.mkdir()
    planted.write_text(_TRAP)
    here = ["--bind", str(tmp_path), "--pwd", str(tmp_path), "--env", f"PYTHONPATH={tmp_path}"]
    tools.output("apptainer", "run", *here, sif, "train", "--help")
