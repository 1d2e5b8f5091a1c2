"""Nights on this machine, without Slurm: configs/nightly/small.yaml as `--local` runs it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BARE = {"LANG": "C.UTF-8"}  # neither PATH nor HOME


def _nightly(
    folder: Path, *arguments: str, checkout: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    where = ["--folder", str(folder), "--baseline", str(folder / "accepted")]
    words = [sys.executable, str(checkout / "slurm/nightly.py"), *arguments, *where]
    return subprocess.run(
        [*words, "--cluster", "localhost"], cwd="/", env=BARE, capture_output=True, text=True
    )


def _record(folder: Path, night: int) -> dict[str, Any]:
    return dict(json.loads((folder / f"night-{night:06}/record.json").read_text()))


def _verdicts(record: dict[str, Any]) -> dict[str, str]:
    return {
        f"{one['entry']}/{one['figure']}": one["verdict"]
        for one in record["findings"]
        if not one["waits"]
    }


def _in_mlflow(folder: Path) -> list[tuple[str, str, str]]:
    """Each child run, its parent, and how its training has ended."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return database.execute(
            "SELECT child.name, parent.name, state.value FROM runs child"
            " JOIN tags own ON own.run_uuid = child.run_uuid AND own.key = 'mlflow.parentRunId'"
            " JOIN runs parent ON parent.run_uuid = own.value"
            " JOIN tags state ON state.run_uuid = child.run_uuid AND state.key = 'state'"
        ).fetchall()


def test_one_entry_has_the_same_bits_in_the_second_night(tmp_path: Path) -> None:
    night = ("--local", "--only", "n4")
    first = _nightly(tmp_path, *night)
    assert first.returncode == 4, first.stdout + first.stderr
    figures = _record(tmp_path, 1)["results"]["n4"]["figures"]
    assert len(figures["loss"]) == 60
    assert {"mse", "r2", "pairwise_accuracy", "ece", "achievable_share"} <= set(figures)
    assert min(figures[k] for k in ("speed", "startup_seconds", "checkpoint_bytes")) > 0
    assert _in_mlflow(tmp_path) == [("n4", "small-night-1", "finished")]
    accepted = _nightly(tmp_path, "accept", "*", "--reason", "the first night")
    assert accepted.returncode == 0, accepted.stderr
    second = _nightly(tmp_path, *night)
    assert second.returncode == 0, second.stdout + second.stderr
    assert set(_verdicts(_record(tmp_path, 2)).values()) == {"passed"}
    assert (tmp_path / "night-000002/index.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.all
def test_the_whole_of_small_takes_less_than_ten_minutes(tmp_path: Path) -> None:
    began = time.monotonic()
    done = _nightly(tmp_path, "--local")
    seconds = time.monotonic() - began
    assert done.returncode == 4, done.stdout + done.stderr
    record = _record(tmp_path, 1)
    assert all(one["complete"] for one in record["results"].values()), record
    assert set(_verdicts(record).values()) == {"no baseline yet", "passed"}
    resumed, plain = (record["results"][name]["figures"] for name in ("n4-resumed", "n4"))
    assert resumed["loss"] == plain["loss"]
    assert len(record["results"]["n4-seeds"]["figures"]["r2"]) == 3
    assert seconds < 600
    assert _nightly(tmp_path, "accept", "n4/*", "--reason", "looked at").returncode == 0
    assert _nightly(tmp_path, "--local", "--only", "n4").returncode == 0
    bisected = _nightly(tmp_path, "--bisect", "n4/loss", "--night", "2")
    assert bisected.returncode == 0, bisected.stderr
    unknown = _nightly(tmp_path, "--bisect", "n8/loss", "--night", "2")
    assert unknown.returncode == 125


@pytest.mark.all
def test_the_line_of_a_regression_finds_its_commit(tmp_path: Path) -> None:
    checkout, night = tmp_path / "checkout", ("--local", "--only", "n4")

    def git(*words: str) -> str:
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@nowhere"]
        command = ["git", *who, "-C", str(checkout), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def commit(name: str) -> str:
        (checkout / "CHANGELOG.md").write_text(name)
        git("commit", "-qam", name)
        return git("rev-parse", "HEAD").strip()

    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
    commit("as it was")
    assert _nightly(tmp_path, *night, checkout=checkout).returncode == 4
    accept = ("accept", "n4/*", "--reason", "looked at")
    assert _nightly(tmp_path, *accept, checkout=checkout).returncode == 0
    assert _nightly(tmp_path, *night, checkout=checkout).returncode == 0
    commit("nothing")
    optimizer = checkout / "job/training/optimizer.py"
    code = optimizer.read_text()
    assert "(step + 1) / config.warmup_steps" in code
    optimizer.write_text(code.replace("(step + 1) / config.warmup", "(step + 2) / config.warmup"))
    guilty = commit("the planted one")
    commit("nothing again")
    assert _nightly(tmp_path, *night, checkout=checkout).returncode == 1
    findings = _record(tmp_path, 3)["findings"]
    line = next(one["bisect"] for one in findings if one["figure"] == "loss")
    done = subprocess.run(line, shell=True, cwd=checkout, capture_output=True, text=True)
    assert f"{guilty} is the first bad commit" in done.stdout, done.stdout + done.stderr
