"""The main job as `make run` runs it: what unfreezing two blocks must reach, from nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCAL = "configs/critic/critic_local.yaml"

pytestmark = pytest.mark.slow


def _run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("local")
    (path / "configs").symlink_to(ROOT / "configs")
    return path


@pytest.mark.timeout(2400)  # ten minutes with one thread
def test_two_unfrozen_blocks_explain_what_a_frozen_trunk_cannot(folder: Path) -> None:
    shown = _run(folder, "job.compare", "--config", LOCAL, "--unfreeze", "0", "2")
    probe, critic = json.loads((folder / "runs/local/comparison.json").read_text())
    assert (probe["num_unfrozen_layers"], critic["num_unfrozen_layers"]) == (0, 2)
    assert critic["std"] > 0.2
    assert critic["mse"] < 0.22
    assert critic["achievable_share"] > 0.9
    assert critic["steps_to_half"] <= 700
    assert probe["std"] < critic["std_optimal"] / 2
    assert probe["achievable_share"] < 0.2
    assert str(folder / "runs/local/report.html") in shown
    assert "mlflow ui --backend-store-uri sqlite:///" in shown
    alarm = json.loads((folder / "runs/local/n0/status.json").read_text())["alarm"]
    assert "CONSTANT PREDICTOR" in alarm


def test_two_runs_on_one_machine_write_the_same_bits(folder: Path) -> None:
    settings = ("training.max_steps=120", "evaluation.every_steps=60", "mlflow.enabled=false")
    for name in ("first", "second"):
        _run(folder, "job.train", "--config", LOCAL, "--override", f"run.name={name}", *settings)
    first, second = (folder / f"runs/local/{n}/metrics.jsonl" for n in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
