"""Bad arguments of commands end in exit code 78 and a short message, as a process too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from spoiled_input import (
    CRITIC,
    ROWS,
    Change,
    Command,
    Ended,
    assert_refused,
    hide_code,
    json_lines,
)

import job.compare
import job.pretrain
import job.report
import job.train

pytestmark = pytest.mark.slow


def test_comparison_of_runs_in_one_directory(workplace: Path, command: Command) -> None:
    options = ("--config", "critic.yaml", "--unfreeze", "0", "1")
    assert_refused(lambda: command(job.compare.main, *options), ("run.dir", "share a directory"))


def test_comparison_of_impossible_runs(workplace: Path, command: Command) -> None:
    options = ("--config", "critic.yaml", "--unfreeze", "0", "-1")
    words = ("training.num_unfrozen_layers: -1 is below 0",)
    assert_refused(lambda: command(job.compare.main, *options), words)


@pytest.mark.parametrize(
    ("run", "reason"), [("trunk", "is no run dir"), ("none", "does not exist")]
)
def test_report_on_no_run(run: str, reason: str, workplace: Path, command: Command) -> None:
    assert_refused(lambda: command(job.report.main, run), (run, reason, "job.train"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("--config", "usage: ", "--help")),
        (("--config",), ("--config", "expected one argument")),
        (("--config", "critic.yaml", "--overide", "training.seed=1"), ("--overide",)),
        (("--config", "critic.yaml", "training.seed=1"), ("training.seed=1",)),
    ],
)
def test_options(
    options: tuple[str, ...], words: tuple[str, ...], workplace: Path, command: Command
) -> None:
    assert_refused(lambda: command(job.train.main, *options), words)


@pytest.mark.parametrize("name", ["train", "pretrain", "compare", "report"])
def test_help_teaches(name: str, command: Command) -> None:
    main = {
        "train": job.train.main,
        "pretrain": job.pretrain.main,
        "compare": job.compare.main,
        "report": job.report.main,
    }[name]
    ended = command(main, "--help")
    assert ended.code == 0
    assert f"\n    python -m job.{name} " in ended.out
    if name != "report":
        assert "--config FILE" in ended.out
        assert "KEY=VALUE" in ended.out
        assert f"python -m job.{name} --config configs/" in ended.out


SUBPROCESSES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "configuration": (
        lambda place: (place / "critic.yaml").write_text(CRITIC.replace("max_steps", "max_step")),
        ("training.max_step: unknown key",),
    ),
    "row": (
        lambda place: (place / "train.jsonl").write_text(json_lines(*ROWS, {"prompt": "1?"})),
        ("train.jsonl:5: ", "'response' is missing"),
    ),
    "code": (
        lambda place: hide_code(place / "trunk"),
        ("consolidated.pth", "never run"),
    ),
}


@pytest.mark.parametrize("case", SUBPROCESSES)
def test_as_a_process(case: str, workplace: Path) -> None:
    change, words = SUBPROCESSES[case]
    change(workplace)

    def run() -> Ended:
        line = [sys.executable, "-m", "job.train", "--config", "critic.yaml"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
        return Ended(done.returncode, done.stdout, done.stderr)

    assert_refused(run, words)
    assert not (workplace / "executed").exists()
