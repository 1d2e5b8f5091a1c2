"""Prediction held against measurement: the arithmetic, the pages, and the real thing on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from micro_job import write_job

from job.common.errors import InputError, exit_code
from job.memory import __main__ as command
from job.memory import validation
from job.memory.fit import GPU_TOLERANCE
from job.memory.validation import (
    CPU_BASE_BYTES,
    Disagreement,
    Measured,
    differences,
    disagreements,
    markdown,
    outside,
    write,
)

pytestmark = pytest.mark.slow

MB = 1_000_000
_AFTER = {
    "frozen_weights": 600 * MB,
    "masters": 100 * MB,
    "gradients": 100 * MB,
    "optimizer": 200 * MB,
    "value_head": 16 * MB,
}
_STAGES = {"before": 50, "loaded": 760, "update": 965, "backward": 1070, "peak": 1560}


def measured(n: int = 4, *, gpu: bool = True, peak: float = 1516 * MB) -> Measured:
    """Predicted 1516 MB at the peak; measured 1510 beyond the 50 before."""
    figure = "allocated" if gpu else "process"
    stages: dict[str, dict[str, float]] = {
        name: {figure: size * MB} for name, size in _STAGES.items()
    }
    if gpu:
        for name, size in _STAGES.items():
            stages[name] |= {"reserved": (size + 40) * MB, "device_used": (size + 700) * MB}
    predicted: dict[str, Any] = {"after_backward": _AFTER, "world_size": 1}
    # what cuBLAS works in is there before the first stage
    predicted |= {"peak_bytes": peak + 33, "peak": {"workspaces": 33}}
    recorder = {"backend": "nvml" if gpu else "process"}
    return Measured(n, predicted, stages, recorder)


def with_peak(one: Measured, **figures: float) -> Measured:
    return replace(one, stages=one.stages | {"peak": one.stages["peak"] | figures})


@pytest.mark.parametrize("gpu", [True, False])
def test_parts_add_up_to_the_peak(gpu: bool) -> None:
    *parts, peak = measured(gpu=gpu).rows
    assert [row.part for row in parts] == [
        "weights",
        "optimizer state",
        "gradients",
        "activations and buffers",
    ]
    assert [row.predicted / MB for row in parts] == [704, 208, 104, 500]
    assert [row.measured / MB for row in parts] == [710, 205, 105, 490]
    assert sum(row.predicted for row in parts) == peak.predicted == 1516 * MB
    assert sum(row.measured for row in parts) == peak.measured == 1510 * MB
    assert peak.difference == 6 * MB
    expected = [row.measured if gpu else None for row in (*parts, peak)]
    assert [row.nvml for row in (*parts, peak)] == expected


def test_what_nvml_shows_beyond_the_allocator_is_split_up() -> None:
    one = with_peak(measured(), device_used=2300 * MB)
    assert dict(outside(one)) == {
        "reserved and not allocated": 40 * MB,
        "context, and others, before the critic": 660 * MB,
        "more since: kernels, NCCL, others": 40 * MB,
    }
    total = sum(size for _, size in outside(one)) + one.stages["peak"]["allocated"]
    assert total == 2300 * MB
    assert outside(measured(gpu=False)) == []


def test_growth_is_that_of_peaks_as_they_are() -> None:
    first = with_peak(measured(0, gpu=False, peak=900 * MB), process=1000 * MB)
    (row,) = differences([first, measured(4, gpu=False)])
    assert row.part == "peak of N=4 above that of N=0"
    assert (row.predicted, row.measured) == (616 * MB, 560 * MB)


@pytest.mark.parametrize(("excess", "found"), [(-1, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_on_a_gpu_the_peak_may_differ_by_its_tolerance(sign: int, excess: int, found: int) -> None:
    peak = 1510 * MB + sign * (round(GPU_TOLERANCE * 1510 * MB) + excess)
    assert len(disagreements([measured(peak=peak)])) == found


@pytest.mark.parametrize(("excess", "found"), [(-1, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_on_a_cpu_the_growth_may_differ_by_its_tolerance(
    sign: int, excess: int, found: int
) -> None:
    first = with_peak(measured(0, gpu=False, peak=900 * MB), process=1000 * MB)
    allowed = 56 * MB + int(CPU_BASE_BYTES)  # a tenth of 560 MB, and the base
    peak = 900 * MB + 560 * MB + sign * (allowed + excess)
    assert len(disagreements([first, measured(gpu=False, peak=peak)])) == found


def test_the_result_is_written_as_json_page_and_plot(tmp_path: Path) -> None:
    pair = [measured(0, peak=900 * MB), measured()]
    write(pair, tmp_path / "new")
    file = tmp_path / "new/memory-validation"
    result = json.loads(file.with_suffix(".json").read_text())
    assert [one["rows"][-1]["measured"] for one in result["measured"]] == [1510 * MB] * 2
    assert len(result["disagreements"]) == 1
    assert file.with_suffix(".md").read_text() == markdown(pair)
    assert "Out of tolerance: peak: 0.9000 GB predicted, 1.51 measured" in markdown(pair)
    assert "Within the tolerance." in markdown(pair[1:])
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", ["memory", *given])
    command.main()


def test_a_disagreement_ends_the_command_after_its_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = [measured(0, peak=900 * MB)]
    monkeypatch.setattr(validation, "validate", lambda *_: pair)
    given = ("--config", "critic.yaml", "--unfreeze", "0", "1", "--out", "out")
    with pytest.raises(Disagreement, match=r"peak: 0\.9000 GB predicted, 1\.51 measured") as ending:
        run(monkeypatch, "validate", *given)
    assert exit_code(ending.value) != 0
    assert (folder / "out/memory-validation.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["guess"], "guess: no such command"),
        (["predict", "--config", "critic.yaml", "--gpus", "0"], "--gpus"),
        (["validate", "--config", "critic.yaml", "--unfreeze", "0", "--gpus", "0"], "--gpus"),
        (["validate", "--config", "critic.yaml", "--unfreeze", "0"], "--unfreeze: two or more"),
    ],
)
def test_bad_input_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(monkeypatch, *given)


def test_offloaded_weights_are_not_simulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["predict", "--config", "critic.yaml", "--shape", "7b", "--simulate", "--override"]
    with pytest.raises(InputError, match="cpu_offload"):
        run(monkeypatch, *given, "distributed.fsdp.cpu_offload=true")


def test_a_prediction_is_a_table_or_json(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["predict", "--config", "critic.yaml", "--shape", "7b", "--gpus", "4", "--override"]
    given += ["training.num_unfrozen_layers=4", "distributed.fsdp.mixed_precision=true"]
    run(monkeypatch, *given, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["world_size"] == 4
    assert found["peak_bytes"] == sum(found["peak"].values())
    assert found["after_backward"]["masters"] == pytest.approx(809.5e6, rel=1e-3)  # 4 bytes / 4
    assert found["fits"]["85"] is True
    run(monkeypatch, *given)
    shown = capsys.readouterr().out
    assert "memory of each of 4 GPU(s), N=4" in shown
    assert "85.0 GB: fits" in shown


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.all)])
def test_a_real_growth_is_predicted_within_a_tenth(tmp_path: Path, gpus: int) -> None:
    changes = ("training.batch_size=400", "training.micro_batch_tokens=16384")
    changes += ("data.arithmetic.train_examples=2000",)
    write_job(tmp_path, changes, ("architecture.dim=128", "training.max_steps=2"))
    given = ["--config", "critic.yaml", "--unfreeze", "0", "3", "--gpus", str(gpus), "--out", "out"]
    module = [sys.executable, "-m", "job.memory", "validate"]
    subprocess.run([*module, *given], check=True, cwd=tmp_path, timeout=600)
    result = json.loads((tmp_path / "out/memory-validation.json").read_text())
    (growth,) = result["differences"]
    assert growth["measured"] > 150 * MB
    assert growth["predicted"] == pytest.approx(growth["measured"], rel=0.1)
