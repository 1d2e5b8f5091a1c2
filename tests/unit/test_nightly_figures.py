"""Figures as run directories show them, and what is told where they cannot be taken."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from job.nightly.figures import result
from job.nightly.matrix import Entry, Kind
from job.nightly.record import Plan, PlannedRun, Result

BEGAN = 1e9
MACHINE = {"device": "cpu", "instructions": "AVX2", "torch": "2", "image": "none"}


def _write(file: Path, *contents: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(one) + "\n" for one in contents))


def _run(path: Path, *, resumed: bool = False, first_step: float = BEGAN + 7) -> Path:
    """What a training of ten steps leaves that was told to stop at its fourth."""
    _write(path / "config.yaml", {"run": {"name": path.name}})
    _write(path / "status.json", {"state": "finished", "step": 10})
    losses = [{"step": k, "train/loss": 1 / k} for k in range(1, 10)]
    final = {"step": 10, "train/loss": 0.1, "validation/value/mse": 0.2, "validation/value/r2": 0.5}
    _write(path / "metrics.jsonl", *losses, final)
    lines = [
        {"step": k, "time": BEGAN, "tokens_per_second": 100.0 * k, "product_rate": 1e9 * k}
        | {"save_seconds": 0.5}
        for k in (2, 4, 6)
    ]
    peaks = {"step": 10, "memory/predicted_peak": 5e6, "memory/measured_peak": 6e6}
    _write(path / "telemetry.jsonl", *lines, peaks)
    events = [{"time": BEGAN, "event": "started"}, {"time": BEGAN + 9, "event": "told to stop"}]
    _write(path / "slurm/events.jsonl", *events)
    _write(path / "slurm/status.json", {"state": "finished"})
    _write(path / "attempts/0001/attempt.json", {"resumed_step": 0, "time": first_step})
    _write(path / "attempts/0001/machine.json", MACHINE)
    folder = path / "checkpoints/step-00000004"
    sizes = {"__0_0.distcp": {"bytes": 300}, "facts.json": {"bytes": 7}}
    _write(folder / "manifest.json", {"files": sizes})
    _write(folder / "facts.json", {"commit": "abc"})
    os.utime(folder / "manifest.json", (BEGAN + 11, BEGAN + 11))
    if resumed:
        _write(path / "attempts/0002/attempt.json", {"resumed_step": 4, "time": BEGAN + 20})
        _write(path / "attempts/0002/machine.json", MACHINE)
    (path / "critic.safetensors").write_bytes(b"weights")
    return path


def _result(path: Path, *seeds: Path, **entry: Any) -> Result:
    paths = seeds or (path,)
    runs = [PlannedRun("one", str(each), k, "config.yaml") for k, each in enumerate(paths)]
    one = Entry(**{"seeds": [*range(len(paths))]} | entry)
    return result(Plan(1, "small", "abc", BEGAN, {"one": one}, runs, "python"), "one")


def test_the_figures_of_a_training(tmp_path: Path) -> None:
    one = _result(_run(tmp_path / "run"))
    assert one.complete
    assert (one.key, one.commit, one.notes) == (MACHINE, "abc", {})
    figures = one.figures
    assert figures["loss"] == [1 / k for k in range(1, 11)]
    assert (figures["mse"], figures["r2"]) == (0.2, 0.5)
    assert figures["speed"] == pytest.approx(100)  # tokens a billion operations, at each line
    assert (figures["startup_seconds"], figures["save_seconds"]) == (7, 1.5)
    assert (figures["memory_predicted"], figures["memory_measured"]) == (5e6, 6e6)
    assert figures["checkpoint_bytes"] == 300
    assert figures["parameters"] == hashlib.sha256(b"weights").hexdigest()
    assert "signal_to_saved_seconds" not in figures


@pytest.mark.parametrize(
    ("training", "same_bits", "by_memory"),
    [
        ({}, True, False),
        ({"deterministic": True, "micro_batch_tokens": 8192}, True, False),
        ({"deterministic": False, "micro_batch_tokens": 8192}, False, False),
        ({"deterministic": True, "micro_batch_tokens": "auto"}, False, True),
    ],
)
def test_bits_are_the_same_where_neither_kernels_nor_micro_batches_vary(
    tmp_path: Path, training: dict[str, Any], same_bits: bool, by_memory: bool
) -> None:
    run = _run(tmp_path / "run")
    _write(run / "config.yaml", {"run": {"name": "run"}, "training": training})
    one = _result(run)
    assert (one.deterministic, one.chosen_by_memory) == (same_bits, by_memory)


def test_a_training_that_was_stopped(tmp_path: Path) -> None:
    one = _result(_run(tmp_path / "run", resumed=True), stop_at=4)
    assert one.figures["signal_to_saved_seconds"] == pytest.approx(2)


def test_one_that_was_to_be_stopped_and_was_not_is_not_complete(tmp_path: Path) -> None:
    one = _result(_run(tmp_path / "run"), stop_at=4)
    assert not one.complete
    assert one.reason == "it was to be stopped at step 4 and to go on, and was not"


def test_a_clock_that_goes_back_leaves_a_figure_out(tmp_path: Path) -> None:
    one = _result(_run(tmp_path / "run", first_step=BEGAN - 3600))
    assert one.complete
    assert "startup_seconds" not in one.figures
    assert one.notes == {"startup_seconds": "the clock went back by 3600 s or more meanwhile"}


def test_seeds_give_a_quality_each_and_no_losses(tmp_path: Path) -> None:
    one = _result(tmp_path, *(_run(tmp_path / f"s{k}") for k in range(3)))
    assert one.figures["r2"] == [0.5, 0.5, 0.5]
    assert "loss" not in one.figures
    assert one.figures["speed"] == pytest.approx(100)


def test_attempts_on_two_kinds_of_machine_are_a_kind_of_their_own(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", resumed=True)
    _write(run / "attempts/0002/machine.json", MACHINE | {"device": "other"})
    assert _result(run).key == MACHINE | {"device": "cpu and other"}


@pytest.mark.parametrize(
    ("of_job", "of_trainer", "reason"),
    [
        ({"state": "pending"}, {}, "it never started"),
        (
            {"state": "pending", "reason": "preempted"},
            {},
            "given up in the queue, after: preempted",
        ),
        ({"state": "failed", "reason": "rank 0 died"}, {"state": "failed"}, "failed: rank 0 died"),
        ({"state": "running"}, {"state": "running"}, "running, without a word"),
        ({}, {"state": "running", "error": "E"}, "given up in the queue, after: E"),
    ],
)
def test_why_an_entry_is_not_complete(
    tmp_path: Path, of_job: dict[str, str], of_trainer: dict[str, str], reason: str
) -> None:
    run = _run(tmp_path / "run")
    _write(run / "slurm/status.json", of_job)
    _write(run / "status.json", of_trainer)
    one = _result(run)
    assert (one.complete, one.reason) == (False, reason)


def test_a_copy_beside_the_checkpoints_is_not_measured(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    before = _result(run)
    copy = run / "checkpoints/step-00000004.bak"
    _write(copy / "manifest.json", {"files": {"__0_0.distcp": {"bytes": 99}}})
    _write(copy / "facts.json", {"commit": "of another"})
    assert _result(run) == before


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("{\n")
    one = _result(run)
    assert not one.complete
    assert "metrics.jsonl has 0 readable lines of 10 steps" in str(one.reason)


def test_a_validation_of_memory_brings_what_it_has_found(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    _write(run / "memory-validation.json", {"disagreements": ["peak: 1 GB predicted, 2 measured"]})
    one = _result(run, kind=Kind.memory)
    assert one.figures == {"memory_validation": ["peak: 1 GB predicted, 2 measured"]}
