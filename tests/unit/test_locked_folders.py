"""Paths that are not for this user, and names that no file can have, end a command in a line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import job.data.__main__ as data
import slurm.commands as submit
from job import cache, evaluate, report, score
from job.common.errors import Exit, exit_code, run_command

NOBODY = 65534


def test_a_refused_path_is_wrong_input_also_of_a_rank() -> None:
    assert exit_code(PermissionError(errno.EACCES, "no", "/some/where")) is Exit.BAD_INPUT
    assert exit_code(PermissionError(errno.EPERM, "no")) is Exit.CRASHED  # of a process, say


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder in which this process may look at nothing."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0)
    root = os.geteuid() == 0  # who may look into any folder
    if root:
        os.seteuid(NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o700)


COMMANDS: dict[str, tuple[Callable[[], None], list[str]]] = {
    "job.score": (score.main, ["--critic", "c", "--data", "d", "--out", "FILE.parquet"]),
    "job.evaluate": (evaluate.main, ["--values", "FILE.parquet"]),
    "job.evaluate --critic": (evaluate.main, ["--critic", "FILE", "--data", "d"]),
    "job.report": (report.main, ["FILE"]),
    "job.cache": (cache.main, ["status", "--dir", "FILE"]),
    "job.data": (data.main, ["FILE.jsonl"]),
    "slurm/submit.py": (submit.main, ["status", "FILE"]),
}


def said(
    command: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    main, options = COMMANDS[command]
    named = [option.replace("FILE", str(file)) for option in options]
    monkeypatch.setattr(sys, "argv", [command, *named])
    with pytest.raises(SystemExit) as left:
        run_command(main)
    assert left.value.code == Exit.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}")
    return error


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_may_not_be_looked_at_is_named(
    command: str, locked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "ermission denied" in said(command, locked / "a", monkeypatch, capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_is_too_long_for_a_file_is_named(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "ile name too long" in said(command, tmp_path / ("a" * 300), monkeypatch, capsys)
