"""What reaches the terminal, and what only the log files."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from job.common import progress
from job.common.progress import ATTEMPT, has_own_terminal, keep_in_files, log_file
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, parameter_report


def test_the_parameters_table_fits_a_terminal_of_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.StringIO()
    logger = logging.getLogger("job")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    monkeypatch.setattr(progress, "_console", lambda: Console(file=shown, width=80))
    progress.set_up_logging()
    architecture = TransformerConfig(dim=64, n_layers=2, n_heads=2, vocab_size=97)
    table = str(parameter_report(Critic(architecture)))
    logger.info("parameters\n%s", table)
    assert [line[20:].rstrip() for line in shown.getvalue().splitlines()][1:] == table.splitlines()


def test_an_error_that_is_said_otherwise_is_kept_in_the_log_files_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not keep_in_files("nobody keeps this")
    with log_file(tmp_path / "train.log"):
        assert keep_in_files("InputError: 100 % wrong")
    assert (tmp_path / "train.log").read_text().endswith(" ERROR InputError: 100 % wrong\n")
    assert caplog.text == ""


def test_a_rank_of_a_supervisor_has_a_terminal_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ATTEMPT, raising=False)
    assert not has_own_terminal()
    monkeypatch.setenv(ATTEMPT, "1")
    assert has_own_terminal()
