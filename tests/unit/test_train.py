"""A whole small training, in its run directory."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from micro_job import train_run, write_job
from safetensors.torch import load_file

from job.common.errors import InputError, Stopped
from job.common.signals import DEADLINE
from job.compare import compare
from job.run.comparison import steps_to_half, summarise
from job.run.directory import RunDirectory
from job.run.metrics_log import Tracker

CHANGES = (
    "run.name=n${training.num_unfrozen_layers}",
    "data.arithmetic.validation_examples=40",
    "training.max_steps=8",
    "training.batch_size=16",
    "training.micro_batch_tokens=256",
    "evaluation.every_steps=4",
    "logging.every_steps=2",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_job(tmp_path, CHANGES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_run_directory_tells_the_whole_run(folder: Path) -> None:
    run = train_run("report.enabled=true")
    status = run.status()
    assert (status["state"], status["step"], status["max_steps"]) == ("finished", 8, 8)
    records = run.records()
    assert [r["step"] for r in records] == list(range(1, 9))
    assert all(next(iter(r)) == "step" and math.isfinite(r["train/loss"]) for r in records)
    assert [r["step"] for r in records if "value/mse" in r] == [2, 4, 6, 8]
    assert [r["step"] for r in records if "validation/value/mse" in r] == [4, 8]
    named = {"value/mean_prediction", "value/std_prediction", "value/mse"}
    assert named <= records[-1].keys()
    assert json.loads(run.file("parameters.json").read_text())["model_num_unfrozen_layers"] == 1
    *_, telemetry, memory = run.records("telemetry.jsonl")
    assert telemetry["step"] == memory["step"] == 8
    assert telemetry["tokens_per_second"] > 0
    assert memory["memory/predicted_peak"] > 0
    page = run.file("report.html").read_text()
    assert f"{records[-1]['validation/value/mse']:.4f}" in page


@pytest.mark.slow
def test_every_file_has_the_modes_of_the_umask(folder: Path) -> None:
    before = os.umask(0o027)  # for a group that shares its runs
    try:
        run = train_run("report.enabled=true", "checkpoint.every_steps=4", "run.dir=new/run")
    finally:
        os.umask(before)
    written = [path for place in ("new", "trunk", "cache") for path in Path(place).rglob("*")]
    assert {run.file("critic.safetensors"), Path("trunk/hf/model.safetensors")} < set(written)
    modes = {path: path.stat().st_mode & 0o777 for path in written}
    wrong = {p: oct(m) for p, m in modes.items() if m != (0o750 if p.is_dir() else 0o640)}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("grouped", ["false", "true"])
def test_a_slice_shorter_than_the_save_interval_still_makes_progress(
    folder: Path, monkeypatch: pytest.MonkeyPatch, grouped: str
) -> None:
    order = f"data.group_by_problem={grouped}"
    whole = train_run("run.name=whole", order)
    slices = ["run.name=slices", "checkpoint.every_steps=1000000", order]
    run, reached, metrics = RunDirectory("runs/slices"), [0], Tracker.metrics

    def until_the_second_step(tracker: Tracker, step: int, figures: Any) -> None:
        metrics(tracker, step, figures)
        if step == reached[-1] + 2:
            monkeypatch.setenv(DEADLINE, str(time.time()))

    monkeypatch.setattr(Tracker, "metrics", until_the_second_step)
    while reached[-1] < 6:
        monkeypatch.setenv(DEADLINE, "inf")
        with pytest.raises(Stopped, match="the deadline"):
            train_run(*slices)
        reached.append(run.newest_checkpoint())
    assert reached == [0, 2, 4, 6]
    monkeypatch.setenv(DEADLINE, "inf")
    monkeypatch.setattr(Tracker, "metrics", metrics)
    train_run(*slices)
    assert run.records() == whole.records()


@pytest.mark.slow
def test_only_trained_parameters_are_saved_and_they_have_moved(folder: Path) -> None:
    run = train_run()
    saved = load_file(run.file("critic.safetensors"))
    base = torch.load(folder / "trunk/consolidated.pth", weights_only=True)
    assert {n.split(".")[0] for n in saved} == {"trunk", "value_head"}
    blocks = {n.split(".")[2] for n in saved if ".layers." in n}
    assert blocks == {"2"}
    moved = [n for n in saved if n.startswith("trunk.") and not saved[n].equal(base[n[6:]])]
    assert len(moved) == len(saved) - 2


@pytest.mark.slow
def test_two_equal_runs_write_the_same_metrics_to_the_bit(folder: Path) -> None:
    first, second = train_run("run.dir=runs/a"), train_run("run.dir=runs/b")
    a, b = (run.file("metrics.jsonl").read_bytes() for run in (first, second))
    assert a == b
    other = train_run("run.dir=runs/c", "training.seed=1").file("metrics.jsonl").read_bytes()
    assert other != a


@pytest.mark.slow
@pytest.mark.parametrize("grouped", ["false", "true"])
def test_the_micro_batch_size_changes_only_rounding(folder: Path, grouped: str) -> None:
    losses, order = [], f"data.group_by_problem={grouped}"
    for tokens in (128, 4096):  # where few solutions share a prompt, and where all of a problem do
        run = train_run(f"run.dir=runs/{tokens}", f"training.micro_batch_tokens={tokens}", order)
        losses.append([r["train/loss"] for r in run.records()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(folder: Path) -> None:
    run = train_run()
    before = run.file("metrics.jsonl").stat()
    train_run()
    assert run.file("metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.slow
def test_a_finished_run_keeps_its_configuration_whatever_is_asked_for(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train_run()
    before = run.file("config.yaml").read_bytes()
    caplog.clear()
    train_run("model.path=nowhere")
    assert run.file("config.yaml").read_bytes() == before
    assert "changes nothing\n  model.path: " in caplog.text
    assert caplog.text.rstrip().endswith("-> nowhere")


@pytest.mark.slow
def test_a_refused_resumption_leaves_the_configuration_as_it_is(folder: Path) -> None:
    run = train_run("checkpoint.every_steps=4")
    before = run.file("config.yaml").read_bytes()
    recipe = (folder / "pretrain.yaml").read_text().replace("max_steps: 5", "max_steps: 6")
    (folder / "other.yaml").write_text(recipe)
    with pytest.raises(InputError, match="a checkpoint of something else"):
        train_run("training.max_steps=12", "model.path=other", "model.recipe=other.yaml")
    assert run.file("config.yaml").read_bytes() == before


@pytest.mark.slow
def test_an_unfinished_run_starts_over(folder: Path) -> None:
    complete = train_run("run.dir=runs/whole").file("metrics.jsonl").read_bytes()
    run = RunDirectory("runs/n1")
    run.claim(json.loads(json.dumps(RunDirectory("runs/whole").config())))
    run.file("metrics.jsonl").write_text('{"step": 1, "train/loss": 9.0}\n')
    train_run()
    assert run.file("metrics.jsonl").read_bytes() == complete


@pytest.mark.slow
def test_another_configuration_in_the_same_directory_is_refused(folder: Path) -> None:
    run = train_run()
    before = run.file("metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"training.learning_rate: 0\.001 -> 0\.002"):
        train_run("training.learning_rate=0.002")
    assert run.file("metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["objective.loss=bce"],
        ["objective.loss=huber", "objective.gamma=0.99"],
        ["objective.target=lambda_return", "objective.lambda_end=0.8"],
        ["objective.loss=pairwise"],
        ["objective.loss=hl_gauss", "training.num_unfrozen_layers=0"],
        ["objective.terms={monte_carlo: 1.0, td: 0.5, pairwise: 0.5}"],
        ["training.num_unfrozen_layers=0"],
        ["training.num_unfrozen_layers=4", "training.lr_decay_factor=0.8"],
        ["training.value_head.bias=false"],
        ["distributed.fsdp.mixed_precision=true"],
        ["distributed.fsdp.activation_checkpointing=true"],
    ],
    ids=" ".join,
)
def test_every_objective_and_depth_trains(folder: Path, settings: list[str]) -> None:
    records = train_run(*settings, "run.dir=runs/x").records()
    assert len(records) == 8
    assert all(math.isfinite(r["train/loss"]) for r in records)
    assert records[-1]["validation/value/mse"] < 1.0


def test_a_loss_that_is_not_finite_ends_the_run_and_says_so(folder: Path) -> None:
    with pytest.raises(InputError, match=r"step \d+: loss .*Lower training.learning_rate"):
        train_run("training.learning_rate=1e30", "training.max_grad_norm=1e30")
    status = RunDirectory("runs/n1").status()
    assert status["state"] == "failed"
    assert "Lower training.learning_rate" in status["error"]


def test_predictions_that_are_not_finite_in_an_evaluation_end_the_run(folder: Path) -> None:
    huge = ("training.learning_rate=1e38", "training.value_head.learning_rate=1e38")
    with pytest.raises(InputError, match=r"not finite|gradient norm"):
        train_run(*huge, "training.warmup_steps=0", "evaluation.every_steps=1")
    assert "Lower training.learning_rate" in RunDirectory("runs/n1").status()["error"]


@pytest.mark.slow
def test_a_report_that_fails_does_not_undo_a_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(runs: object) -> Path:
        raise RuntimeError("no ink")

    monkeypatch.setattr("job.training.trainer.write_report", fail)
    assert train_run("report.enabled=true").status()["state"] == "finished"
    assert "finished, without a report: no ink" in caplog.text


@pytest.mark.slow
def test_a_training_without_a_report_says_that_it_is_finished(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = train_run("report.enabled=false", "training.max_steps=1")
    assert f"finished: {run.path}" in caplog.text
    assert not run.file("report.html").exists()


@pytest.mark.slow
def test_the_logged_learning_rate_is_the_trunks(folder: Path) -> None:
    run = train_run("training.value_head.learning_rate=0.5", "training.max_steps=3")
    rates = [r["train/learning_rate"] for r in run.records()]
    assert rates[1] == 0.001


@pytest.mark.slow
def test_the_alarm_reaches_the_status_file(folder: Path) -> None:
    run = train_run(
        "training.num_unfrozen_layers=0",
        "evaluation.every_steps=1",
        "training.value_head.learning_rate=0",
        "report.enabled=true",
    )
    assert "CONSTANT PREDICTOR" in run.status()["alarm"]
    assert "CONSTANT PREDICTOR" in run.file("train.log").read_text()
    assert "CONSTANT PREDICTOR" in run.file("report.html").read_text()


@pytest.mark.slow
def test_a_trunk_that_another_recipe_made_is_refused(folder: Path) -> None:
    train_run()
    write_job(folder, CHANGES, ["training.max_steps=6"])
    with pytest.raises(InputError, match=r"training\.max_steps: 5 -> 6"):
        train_run("run.dir=runs/other")


@pytest.mark.slow
def test_validation_problems_in_the_training_data_are_counted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"{i}+1?", "response": f"A{i + 1}", "reward": i % 2} for i in range(8)]
    _write(folder / "train.jsonl", rows[:6])
    _write(folder / "validation.jsonl", rows[4:])
    train_run("data.train=train.jsonl", "data.validation=validation.jsonl")
    assert "2 problem(s) are in both training and validation data" in caplog.text


@pytest.mark.slow
def test_skipped_rows_are_listed_beside_the_run(folder: Path) -> None:
    good = [{"prompt": "1+1?", "response": "A2", "reward": i % 2} for i in range(6)]
    _write(folder / "train.jsonl", [*good, {"prompt": "1+1?", "response": "A2", "reward": 7}])
    _write(folder / "validation.jsonl", good)
    run = train_run(
        "data.train=train.jsonl", "data.validation=validation.jsonl", "data.bad_rows=skip"
    )
    (row,) = map(json.loads, run.file("bad_rows.train.jsonl").read_text().splitlines())
    assert (row["line"], row["reason"]) == (7, "reward 7 lies outside [0, 1]")
    assert not run.file("bad_rows.validation.jsonl").exists()


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_a_comparison_trains_each_n_and_sums_up(folder: Path) -> None:
    runs = compare("critic.yaml", [], [0, 1])
    rows = json.loads((folder / "runs/comparison.json").read_text())
    assert [row["num_unfrozen_layers"] for row in rows] == [0, 1]
    for row, path in zip(rows, runs, strict=True):
        run = RunDirectory(path)
        last = run.records()[-1]
        assert row == summarise(run)
        assert row["mse"] == last["validation/value/mse"]
        assert row["std"] == last["validation/value/std_prediction"]
        assert row["mse_optimal"] < row["mse_constant"]
        assert row["seconds"] > 0


def test_steps_to_half_is_the_first_evaluation_at_half_of_the_achievable() -> None:
    name = "validation/value/achievable_share"
    evaluations = [{"step": s, name: v} for s, v in ((100, 0.2), (200, 0.5), (300, 0.4))]
    assert steps_to_half(evaluations) == 200
    assert steps_to_half(evaluations[:1]) is None
    assert steps_to_half([{"step": 5}]) is None
