"""What an attempt notes of its machine, and how fast that multiplies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from micro_job import write_job

from job.common.config import load_config
from job.common.schema import CriticConfig
from job.run.directory import RunDirectory
from job.training import machine
from job.training.trainer import train

CPU = torch.device("cpu")


def test_a_machine_is_described_by_what_its_bits_hang_on() -> None:
    found = machine.describe(CPU)
    assert list(found) == ["device", "instructions", "torch", "image"]
    assert found["torch"] == torch.__version__
    assert found["image"] == "none"


def test_an_image_is_known_by_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_OF_THE_IMAGE", tmp_path)
    named = machine.describe(CPU)["image"]
    assert len(named) == 12
    monkeypatch.setattr(machine, "distributions", lambda: iter(()))
    assert machine.describe(CPU)["image"] != named


def test_the_rate_of_products_is_one_that_a_processor_has() -> None:
    rate = machine.product_rate(CPU)
    assert 1e8 < rate < 1e14


@pytest.mark.slow
def test_a_run_notes_its_machine_the_rate_if_asked_and_the_time_of_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["training.max_steps=6", "logging.every_steps=2", "checkpoint.every_steps=2"]
    write_job(tmp_path, [*changes, "evaluation.every_steps=6"])
    monkeypatch.chdir(tmp_path)
    for name, asked in (("with", True), ("without", False)):
        given = [f"logging.product_rate={str(asked).lower()}", f"run.name={name}"]
        config = load_config(CriticConfig, "critic.yaml", given)
        train(config)
        run = RunDirectory(config.run.dir)
        noted = json.loads(run.file("attempts/0001/machine.json").read_text())
        assert noted == machine.describe(CPU)
        lines = [one for one in run.records("telemetry.jsonl") if "tokens_per_second" in one]
        assert [one["step"] for one in lines] == [2, 4, 6]
        assert all(("product_rate" in one) is asked for one in lines)
        assert lines[1]["save_seconds"] > 0
