"""Preflight in the SIF, with each fault provoked."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from launch import free_port
from micro_job import write_job
from tools import Tools

from slurm.submission import Submission
from slurm.trainer import Trainer, rank_environment

pytestmark = pytest.mark.slow

_PATIENCE = 8  # seconds for ranks to meet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_job(tmp_path, [f"distributed.start_timeout_seconds={_PATIENCE}"])
    return tmp_path


def _start(
    tools: Tools,
    sif: Path,
    folder: Path,
    *,
    gpus: int = 0,
    scratch: Path | None = None,
    inside: Mapping[str, str] | None = None,
    name: str = "log",
) -> Trainer:
    """Preflight as the supervisor starts it."""
    profile = {"scratch": str(scratch) if scratch else None, "gpu": {"memory_gb": 80}}
    where = str(folder)
    submission = Submission("here", profile, 1, 1, "test", where, where, str(sif), binds=[where])
    command = submission.preflight_command(str(folder / "critic.yaml"), gpus)
    environment = submission.task_environment({"OMP_NUM_THREADS": "1"} | dict(inside or {}))
    return Trainer(command, environment | tools.environment, folder, folder / f"{name}.txt")


def _end(trainer: Trainer) -> tuple[int, list[str]]:
    if not trainer.wait(120):
        trainer.send(9)
    outcome = trainer.outcome(0, "here")
    return outcome.code, outcome.last_lines


def _bad(lines: list[str]) -> list[str]:
    """What is wrong; the worst is said once more at the end, as the reason."""
    return sorted({line for line in lines if line.startswith("BAD")})


def test_a_node_without_fault_passes(tools: Tools, sif: Path, folder: Path) -> None:
    code, lines = _end(_start(tools, sif, folder, scratch=folder))
    assert (code, _bad(lines)) == (0, [])
    assert any("torch" in line and "/opt/venv/lib" in line for line in lines)


def test_too_few_gpus(tools: Tools, sif: Path, folder: Path) -> None:
    code, lines = _end(_start(tools, sif, folder, gpus=4))
    assert code == 71
    (found,) = _bad(lines)
    assert "0 visible of 4 asked for" in found


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system with next to no space."""
    mounted = tmp_path / "tiny"
    mounted.mkdir()
    if os.geteuid():
        pytest.skip("only root can mount a file system that is full")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tiny", mounted], check=True)
    yield mounted
    subprocess.run(["umount", mounted], check=True)


def test_a_full_disk(tools: Tools, sif: Path, folder: Path, tiny: Path) -> None:
    code, lines = _end(_start(tools, sif, folder, scratch=tiny))
    assert code == 71
    (found,) = _bad(lines)
    assert f"scratch: cannot write in {tiny}: No space left on device" in found


def test_a_scratch_folder_that_takes_no_files(tools: Tools, sif: Path, folder: Path) -> None:
    scratch = folder / "scratch"
    scratch.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "full", scratch], check=True)
    try:
        code, lines = _end(_start(tools, sif, folder, scratch=scratch))
    finally:
        subprocess.run(["umount", scratch], check=True)
    assert code == 71
    assert "Read-only file system" in _bad(lines)[0]


def test_a_rank_that_never_answers_is_named(tools: Tools, sif: Path, folder: Path) -> None:
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    inside = shared | rank_environment(0, 2, 0, 2)  # and nobody else
    code, lines = _end(_start(tools, sif, folder, inside=inside))
    assert code == 1
    assert any(f"rank(s) 1 of 2 did not come within {_PATIENCE} s" in line for line in lines)
