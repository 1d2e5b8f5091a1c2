"""The report on synthetic run directories: what it says, and what it does with what is missing."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from job.common.errors import InputError, run_command
from job.report import main
from job.run.figure import STEPS, draw_line, panels, png
from job.run.plots import draw_memory, draw_plots, write_plots
from job.run.reader import Snapshot
from job.run.report_page import verdict, write_report

pytestmark = pytest.mark.slow

NONE = "\N{EN DASH}"  # in a cell without a value
ALL_PLOTS = [
    "loss",
    "value_mse",
    "value_std",
    "value_r2",
    "achievable_share",
    "reliability",
    "value_by_position",
    "optimizer",
    "speed",
    "memory",
]


# --- synthetic runs --------------------------------------------------------------------------


def write_run(path: Path, n: int = 4, steps: int = 200, share: float = 0.93, **status: Any) -> Path:
    """A run that has ended, or as `status` says, at the given share of the achievable variance."""
    path.mkdir(parents=True)
    write_config(path, n)
    write_json(path / "status.json", finished(steps) | status)
    write_json(path / "parameters.json", parameters(n))
    write_lines(path / "metrics.jsonl", [metrics(s, steps, share) for s in range(1, steps + 1)])
    write_lines(path / "telemetry.jsonl", [telemetry(s) for s in range(10, steps + 1, 10)])
    write_json(path / "reliability.json", reliability(share))
    write_json(path / "memory.json", memory())
    lines = [f"2026-01-01 00:00:{s % 60:02} INFO step {s}\n" for s in range(1, steps + 1)]
    (path / "train.log").write_text("".join(lines))
    return path


def finished(steps: int) -> dict[str, Any]:
    ended = {"state": "finished", "step": steps, "max_steps": steps, "error": None}
    return ended | {"alarm": None, "updated": 1767225600.0}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_config(path: Path, n: int, name: str | None = None, **training: Any) -> None:
    config = {
        "run": {"name": name or path.name, "dir": str(path)},
        "training": {"num_unfrozen_layers": n, "learning_rate": 1e-4, **training},
        "data": {"train": "embedded", "max_length": 2048},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def parameters(n: int) -> dict[str, Any]:
    block = 218_112_000
    sizes = {
        "value_head": (4097, 4097),
        "norm": (4096, 4096 if n else 0),
        "trunk_blocks": (32 * block, n * block),
        "embeddings": (525_336_576, 0),
    }
    trainable = sum(t for _, t in sizes.values())
    return {
        "model_num_unfrozen_layers": n,
        "model_num_layers": 32,
        "model_trainable_params": trainable,
        "model_trainable_trunk_params": n * block,
        "components": [component(name, *counts) for name, counts in sizes.items()],
    }


def component(name: str, total: int, trainable: int) -> dict[str, Any]:
    return {
        "name": name,
        "total": total,
        "trainable": trainable,
        "weight_bytes": 2 * (total - trainable) + 4 * trainable,
        "gradient_bytes": 4 * trainable,
        "optimizer_bytes": 8 * trainable,
    }


def metrics(step: int, steps: int, share: float) -> dict[str, Any]:
    """One line of metrics.jsonl: the share is approached exponentially, with a wiggle."""
    wiggle = math.sin(2.3 * step) + math.sin(5.1 * step)
    reached = share * (1 - math.exp(-6 * step / steps))
    record: dict[str, Any] = {
        "step": step,
        "train/loss": 0.24 - 0.14 * reached + 0.015 * wiggle,
        "train/grad_norm": 0.4 + 2 * math.exp(-12 * step / steps) + 0.1 * abs(wiggle),
        "train/learning_rate": 1e-4 * min(step / 20, 1) * (1 - 0.9 * step / steps),
    }
    if step % 10 == 0:
        record |= prefixed("value/", values(reached + 0.04 * wiggle))
    if step % 20 == 0:
        record |= prefixed("validation/value/", values(reached))
    return record


def prefixed(prefix: str, figures: Mapping[str, float | None]) -> dict[str, float | None]:
    return {prefix + name: value for name, value in figures.items()}


def values(share: float) -> dict[str, float]:
    """An evaluation whose labels have mean 0.6 and variance 0.24, of which 0.15 is achievable."""
    return {
        "mean_prediction": 0.61,
        "std_prediction": math.sqrt(0.15 * max(share, 0)),
        "mse": 0.24 - 0.15 * share,
        "mse_constant": 0.24,
        "mse_optimal": 0.09,
        "std_optimal": math.sqrt(0.15),
        "r2": 0.15 * share / 0.24,
        "achievable_share": share,
        "mean_target": 0.6,
        "std_target": math.sqrt(0.24),
        "ece": 0.0123,
        "last_token_mse": 0.0456,
        "last_token_auc": 0.5 + 0.4 * share,
        "pairwise_accuracy": 0.5 + 0.35 * share,
        "pairwise_pairs": 1234.0,
        "length_correlation": -0.087,
        "length_auc": 0.55,
        "prompt/mse": 0.2345,
        "prompt/mse_constant": 0.24,
        "prompt/mse_optimal": 0.2301,
        "prompt/auc": 0.612,
        "prompt/distance_to_optimal": 0.0321,
    }


def telemetry(step: int) -> dict[str, Any]:
    speed = 12_345.0 + 200 * math.sin(step)
    return {"step": step, "time": 1e9 + step, "tokens_per_second": speed, "memory_bytes": 61.5e9}


def memory(backend: str = "nvml", ranks: int = 1) -> dict[str, Any]:
    """As a run of 40 seconds records it, on a GPU or a CPU."""
    cycle = ("forward", "backward", "optimizer")
    phases = ["load"] * 5 + [cycle[i % 3] for i in range(95)]
    sizes = [1e9 * i for i in range(5)] + [20e9 + 3e9 * (i % 3) for i in range(95)]
    known = {"process": sizes} if backend == "process" else {"allocated": sizes}
    if backend == "nvml":
        known |= {"reserved": [1.1 * s for s in sizes], "device_used": [s + 4e9 for s in sizes]}
    columns = ("device_used", "process", "allocated", "reserved", "inactive")
    series = {name: known.get(name, [None] * 100) for name in columns}
    series |= {"seconds": [0.4 * i for i in range(100)], "phase": phases}
    peaks = {
        phase: {
            name: max(v for v, p in zip(values, phases, strict=True) if p == phase)
            for name, values in known.items()
        }
        for phase in ("load", *cycle)
    }
    peak = {name: max(values) for name, values in known.items()}
    rank = {"backend": backend, "device": "D", "peak": peak, "peaks": peaks, "series": series}
    return {"predicted": {"peak_bytes": 27e9}, "ranks": [rank] * ranks}


def reliability(share: float) -> dict[str, Any]:
    centres = [(k + 0.5) / 15 for k in range(15)]
    seen = [abs(c - 0.6) < 0.05 + 0.5 * share for c in centres]
    spread = [(k - 4.5) / 30 for k in range(10)]
    return {
        "bin_mean_prediction": [c if s else None for c, s in zip(centres, seen, strict=True)],
        "bin_mean_label": [
            c + 0.03 * math.sin(9 * c) if s else None for c, s in zip(centres, seen, strict=True)
        ],
        "bin_count": [
            round(1000 * (1 + 8 * c**4)) if s else 0 for c, s in zip(centres, seen, strict=True)
        ],
        "position_mean_prediction": [0.6 + share * x / 3 for x in spread],
        "position_mean_label": [0.6 for _ in spread],
    }


# --- reading the page ------------------------------------------------------------------------


class Page(HTMLParser):
    """Tables as rows of cell texts, and the text of everything."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[str] = []
        self.words = ""
        self._in_style = self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in_style = tag == "style"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_style:
            return
        self.words += data + "\n"
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def rows(self, head: str) -> dict[str, list[str]]:
        """The rows, by their first cell, of the table whose head begins with `head`."""
        table = next(t for t in self.tables if t[0][0] == head)
        return {first: rest for first, *rest in table}


def report(*runs: Path, out: Path | None = None) -> Page:
    return Page(write_report(runs, out).read_text(encoding="utf-8"))


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.run.report_page.draw_plots", lambda runs: {})


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    try:
        run_command(main)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


# --- one run ---------------------------------------------------------------------------------


def test_report_of_one_run_says_how_good_it_is(tmp_path: Path, no_plots: None) -> None:
    page = report(write_run(tmp_path / "critic"))
    assert page.words.lstrip().startswith("critic\ncritic\n")  # title and headline
    assert "explains 93 % of the achievable variance (R² 0.58)" in page.words
    for fact in (
        "finished",
        "N = 4 unfrozen blocks of 32",
        "step 200 of 200",
        "872,456,193 trainable parameters",
        "61.5 GB peak memory",
        "updated 2026-01-01 00:00 UTC",
        "At step 200. Labels: mean 0.600, std 0.490.",
    ):
        assert f"{fact}\n" in page.words
    assert re.search(r"\n12,3\d\d tokens/s\n", page.words)
    assert "Alarm" not in page.words
    assert "INFO step" not in page.words


def test_single_table_sets_the_run_beside_constant_and_optimum(
    tmp_path: Path, no_plots: None
) -> None:
    rows = report(write_run(tmp_path / "critic")).rows("metric")
    assert rows["metric"] == ["this run", "best constant", "optimal predictor", "meaning"]
    assert rows["MSE"][:3] == ["0.1008", "0.2400", "0.0900"]
    assert rows["R²"][:3] == ["0.580", "0.000", "0.625"]
    assert rows["achievable share"][:3] == ["92.8 %", "0.0 %", "100.0 %"]
    assert rows["std"][:3] == ["0.373", "0.000", "0.387"]
    assert rows["mean"][:3] == ["0.610", "0.600", NONE]
    assert rows["last-token AUC"][:3] == ["0.871", "0.500", NONE]
    assert rows["pairwise accuracy"][:3] == ["82.5 % of 1,234", "50.0 %", NONE]
    assert rows["length correlation"][:3] == ["-0.087", NONE, NONE]
    assert rows["V₀ MSE"][:3] == ["0.2345", "0.2400", "0.2301"]
    assert rows["V₀ AUC"][:3] == ["0.612", "0.500", NONE]
    assert rows["V₀ to optimum"][:3] == ["0.0321", NONE, "0.0000"]
    assert "R² between problems" not in rows


def test_parameters_are_listed_by_component(tmp_path: Path, no_plots: None) -> None:
    rows = report(write_run(tmp_path / "critic")).rows("component")
    assert list(rows)[1:] == ["value head", "norm", "trunk blocks", "embeddings", "total"]
    assert rows["value head"][:4] == ["4,097", "4,097", "100.00 %", "16.4 kB"]
    assert rows["trunk blocks"] == [
        *("6,979,584,000", "872,448,000", "12.50 %"),
        *("15.7 GB", "3.5 GB", "7.0 GB", "26.2 GB"),
    ]
    assert rows["embeddings"][2:] == ["0.00 %", "1.1 GB", "0 B", "0 B", "1.1 GB"]
    assert rows["total"][:3] == ["7,504,928,769", "872,456,193", "11.63 %"]


def test_the_page_says_where_a_run_comes_from(tmp_path: Path, no_plots: None) -> None:
    run = write_run(tmp_path / "critic")
    first, last = run / "attempts" / "0001", run / "attempts" / "0002"
    for attempt in (first, last):
        attempt.mkdir(parents=True)
    write_json(first / "attempt.json", {"commit": "b" * 40, "version": "0.1.0"})
    write_json(last / "attempt.json", {"commit": "a" * 40, "version": "0.2.0", "world_size": 4})
    write_json(last / "machine.json", {"device": "A100", "instructions": "AVX2", "torch": "2.13.0"})
    words = report(run).words
    for line in (
        "code\n0.2.0, commit aaaaaaaaaaaa\n",
        "training data\nembedded\n",
        "torch\n2.13.0\n",
        "device\nA100, AVX2\n",
        "ranks\n4\n",
    ):
        assert line in words


def test_the_calibrations_bins_say_how_many_tokens_they_have(
    tmp_path: Path, no_plots: None
) -> None:
    run = write_run(tmp_path / "critic")
    curves = {"bin_mean_prediction": [0.25, None], "bin_mean_label": [0.5, None]}
    write_json(run / "reliability.json", curves | {"bin_count": [1234.0, 0.0]})
    words = report(run).words
    assert "tokens\n0.00 to 0.50\n0.250\n0.500\n1,234\n" in words
    assert "0.50 to 1.00" not in words


def test_configuration_is_folded_and_whole(tmp_path: Path, no_plots: None) -> None:
    run = write_run(tmp_path / "critic")
    page = report(run)
    assert (run / "config.yaml").read_text() in page.words
    assert page.tags.count("details") == 2  # and the calibration's numbers


def test_undefined_metrics_are_left_out(tmp_path: Path, no_plots: None) -> None:
    run = write_run(tmp_path / "real")
    known = ("mse", "mse_constant", "r2", "mean_target", "std_target", "std_prediction")
    final: dict[str, float | None] = {
        name: value for name, value in values(0.5).items() if name in known
    }
    final["ece"] = None  # what the trainer writes for a number that is not finite
    write_lines(run / "metrics.jsonl", [{"step": 9, **prefixed("validation/value/", final)}])
    page = report(run)
    rows = page.rows("metric")
    assert list(rows) == ["metric", "MSE", "R²", "std"]
    assert rows["metric"] == ["this run", "best constant", "meaning"]
    assert "explains 31 % of the variance (R² 0.31)" in page.words


def test_last_evaluation_counts_not_the_best(tmp_path: Path, no_plots: None) -> None:
    run = write_run(tmp_path / "critic")
    later = {"step": 220, **prefixed("validation/value/", values(0.5))}
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(later) + "\n" + json.dumps({"step": 221, "train/loss": 0.1}) + "\n")
        stream.write('{"step": 222, "validation/value/mse": 0.')
    page = report(run)
    assert "explains 50 % of the achievable variance" in page.words
    assert "At step 220." in page.words


# --- states ----------------------------------------------------------------------------------


def test_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    write_config(run, n=2)
    page = report(run)
    assert "no evaluation yet" in page.words
    assert "not started" in page.words
    assert "N = 2 unfrozen blocks\n" in page.words
    assert "There is nothing to plot yet." in page.words
    assert "There is no parameter report yet." in page.words
    (origin,) = page.tables  # what the configuration says of it
    assert origin[0] == ["", "new"]


def test_running_run_shows_how_far_it_is(tmp_path: Path, no_plots: None) -> None:
    page = report(write_run(tmp_path / "critic", state="running", step=1500, max_steps=20_000))
    assert "running\n" in page.words
    assert "step 1,500 of 20,000\n" in page.words
    assert "Failed" not in page.words


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "status.json",
        "parameters.json",
        "metrics.jsonl",
        "telemetry.jsonl",
        "reliability.json",
        "memory.json",
        "train.log",
    ],
)
def test_any_file_may_be_missing(tmp_path: Path, no_plots: None, name: str) -> None:
    run = write_run(tmp_path / "critic", steps=20, state="failed", error="killed")
    (run / name).unlink()
    page = report(run)
    assert "critic\n" in page.words
    assert ("There is no train.log." in page.words) == (name == "train.log")
    assert ("There is no config.yaml." in page.words) == (name == "config.yaml")


def test_failed_run_shows_error_and_last_log_lines(tmp_path: Path, no_plots: None) -> None:
    run = write_run(tmp_path / "critic", state="failed", error="RuntimeError: out of memory")
    with (run / "train.log").open("ab") as stream:
        stream.write(b"last words \xff\n")
    page = report(run)
    assert "Failed: critic\nRuntimeError: out of memory\nlast 40 log lines\n" in page.words
    assert "last words \N{REPLACEMENT CHARACTER}\n" in page.words
    assert "step 162\n" in page.words
    assert "step 161\n" not in page.words


def test_alarm_stands_out(tmp_path: Path, no_plots: None) -> None:
    path = write_report([write_run(tmp_path / "probe", n=0, alarm="CONSTANT PREDICTOR: try N=2")])
    text = path.read_text(encoding="utf-8")
    assert (
        '<p class="alarm" role="alert"><strong>Alarm: </strong>CONSTANT PREDICTOR: try N=2</p>'
        in text
    )


def test_everything_is_escaped(tmp_path: Path, no_plots: None) -> None:
    evil = '<script>alert("x")</script>&amp;'
    run = write_run(tmp_path / "critic", steps=20, state="failed", error=evil, alarm=evil)
    write_config(run, 4, name=evil)
    (run / "train.log").write_text(evil)
    text = write_report([run]).read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;amp;") == 9
    other = write_run(tmp_path / "other", steps=20)
    assert "<script" not in write_report([run, other]).read_text(encoding="utf-8")


# --- comparison ------------------------------------------------------------------------------


def three_runs(folder: Path) -> list[Path]:
    return [
        write_run(folder / "probe", n=0, share=0.02, alarm="CONSTANT PREDICTOR"),
        write_run(folder / "critic", n=4),
        write_run(folder / "broken", n=8, steps=10, state="failed", error="RuntimeError"),
    ]


def test_comparison_has_a_row_per_run_and_reference(tmp_path: Path, no_plots: None) -> None:
    page = report(*three_runs(tmp_path))
    rows = page.rows("run")
    assert rows["run"][:6] == ["N", "step", "MSE", "R²", "achievable share", "std"]
    assert rows["probe"][:6] == ["0", "200", "0.2370", "0.012", "2.0 %", "0.055"]
    assert rows["critic"][:6] == ["4", "200", "0.1008", "0.580", "92.8 %", "0.373"]
    assert rows["best constant"][:6] == [NONE, NONE, "0.2400", "0.000", "0.0 %", "0.000"]
    assert rows["optimal predictor"][:6] == [NONE, NONE, "0.0900", "0.625", "100.0 %", "0.387"]
    assert list(rows)[1:] == ["probe", "critic", "best constant", "optimal predictor"]
    assert "broken: no evaluation yet." in page.words
    assert "Labels: mean 0.600, std 0.490." in page.words


def test_comparison_has_a_verdict_alarm_and_failure_per_run(tmp_path: Path, no_plots: None) -> None:
    words = report(*three_runs(tmp_path)).words
    assert "Comparison of 3 runs" in words
    assert "probe\npredicts almost a constant (std 0.05, R² 0.01)\nfinished\nN = 0" in words
    assert "critic\nexplains 93 % of the achievable variance (R² 0.58)\n" in words
    assert "broken\nno evaluation yet\nfailed\n" in words
    assert words.count("Alarm: \nCONSTANT PREDICTOR\n") == 1
    assert "Failed: broken\nRuntimeError\nlast 10 log lines\n" in words


def test_only_differing_keys_are_compared(tmp_path: Path, no_plots: None) -> None:
    runs = three_runs(tmp_path)[:2]
    write_config(runs[0], 0, warmup_steps=7)
    page = report(*runs)
    rows = page.rows("differing key")
    assert list(rows) == [
        *("differing key", "run.name", "run.dir"),
        *("training.num_unfrozen_layers", "training.warmup_steps"),
    ]
    assert rows["training.num_unfrozen_layers"] == ["0", "4"]
    assert rows["training.warmup_steps"] == ["7", NONE]
    for run in runs:
        assert f"full configuration of {run.name}\n" in page.words
        assert (run / "config.yaml").read_text() in page.words


def test_equal_names_are_told_apart_by_path(tmp_path: Path, no_plots: None) -> None:
    first = write_run(tmp_path / "a", steps=20)
    second = tmp_path / "b"
    shutil.copytree(first, second)
    page = report(first, second)
    assert list(page.rows("run"))[1:3] == [str(first), str(second)]
    assert "The configurations are equal." in page.words


def test_different_validation_labels_are_pointed_out(tmp_path: Path, no_plots: None) -> None:
    runs = three_runs(tmp_path)[:2]
    other = values(0.5) | {"mse_constant": 0.2, "mean_target": 0.7}
    write_lines(runs[1] / "metrics.jsonl", [{"step": 1, **prefixed("validation/value/", other)}])
    page = report(*runs)
    rows = page.rows("run")
    assert "different labels: compare R², not MSE." in page.words
    assert list(rows)[3:] == [
        *("best constant for probe", "optimal predictor for probe"),
        *("best constant for critic", "optimal predictor for critic"),
    ]
    assert rows["best constant for critic"][2] == "0.2000"


# --- verdict ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r2", "std", "others", "expected"),
    [
        (0.012, 0.03, {}, "predicts almost a constant (std 0.03, R² 0.01)"),
        (-0.001, 0.03, {}, "predicts almost a constant (std 0.03, R² 0.00)"),
        (-0.3, 0.3, {}, "is no better than a constant, though it varies (std 0.30, R² -0.30)"),
        (0.41, 0.3, {}, "explains 41 % of the variance (R² 0.41)"),
        (
            0.05,
            0.1,
            {"achievable_share": 0.9},
            "explains 90 % of the achievable variance (R² 0.05)",
        ),
    ],
)
def test_verdict(r2: float, std: float, others: dict[str, float], expected: str) -> None:
    assert verdict({"r2": r2, "std_prediction": std, "std_target": 0.49} | others) == expected


def test_verdict_without_evaluation_or_variance_of_the_labels() -> None:
    assert verdict({}) == "no evaluation yet"
    assert verdict({"mse": 0.1, "std_prediction": 0.1}).startswith("cannot be judged")


# --- plots and the page as a file ------------------------------------------------------------


def size_of_png(image: bytes) -> tuple[int, int]:
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", image[16:24])
    return width, height


def assert_shows_something(path: Path, height: int = 633) -> None:
    from matplotlib.image import imread

    assert size_of_png(path.read_bytes()) == (921, height)
    pixels = imread(path)[..., :3]
    inked = (pixels < 0.95).any(axis=2)
    assert inked.mean() > 0.01
    assert (pixels.max(axis=2) - pixels.min(axis=2) > 0.3).sum() > 300  # a coloured line


@pytest.mark.parametrize("count", [1, 7])
def test_every_plot_shows_something(tmp_path: Path, count: int) -> None:
    # Neither the underscore nor the formula may change or hide a name.
    names = [f"_{i} $x^$" for i in range(count)]
    runs = [write_run(tmp_path / name, steps=40, share=i / 7) for i, name in enumerate(names)]
    paths = write_plots(runs, tmp_path / "plots")
    assert paths == [tmp_path / "plots" / f"{name}.png" for name in ALL_PLOTS]
    for path in paths:
        by_phase = path.stem == "memory" and count == 1  # has a second panel
        assert_shows_something(path, 806 if by_phase else 633)


def test_a_line_of_one_point_is_seen() -> None:
    _, (axes,) = panels("a run with one log line so far")
    draw_line(axes, [20], [0.5], {"color": "black"})
    draw_line(axes, [10, 20], [0.5, 0.6], {"color": "black"})
    assert [line.get_marker() for line in axes.get_lines()] == [".", "None"]


def test_the_axis_of_steps_has_whole_numbers_alone() -> None:
    figure, (axes,) = panels("a short run")
    axes.set(xlabel=STEPS)
    draw_line(axes, [1, 2, 3], [0.5, 0.6, 0.7], {})
    png(figure)
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_plots_without_data_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "critic", steps=5)
    (run / "telemetry.jsonl").unlink()
    (run / "memory.json").unlink()
    write_json(run / "reliability.json", {"bin_count": [0, 0]})
    write_lines(run / "metrics.jsonl", [{"step": 1, "train/loss": 0.3, "train/grad_norm": None}])
    assert [path.stem for path in write_plots([run], tmp_path / "plots")] == ["loss"]


def test_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "critic", steps=40)
    path = write_report([run])
    text = path.read_text(encoding="utf-8")
    assert path == run / "report.html"
    assert "http" not in text
    assert set(re.findall(r'(?:src|href)="(.{14})', text)) == {"data:image/png"}
    assert text.count("data:image/png;base64,iVBOR") == len(ALL_PLOTS)
    assert sorted(p.stem for p in (run / "plots").iterdir()) == sorted(ALL_PLOTS)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert not list(run.glob(".*")), "scratch files are left"


def test_pages_go_where_they_are_expected(tmp_path: Path, no_plots: None) -> None:
    first = write_run(tmp_path / "x" / "first", steps=5)
    second = write_run(tmp_path / "x" / "deep" / "second", steps=5)
    assert write_report([first, second]) == tmp_path / "x" / "report.html"
    assert write_report([first], tmp_path / "my.html") == tmp_path / "my.html"
    assert not (first / "report.html").exists()
    assert not (first / "plots").exists()


# --- command line ----------------------------------------------------------------------------


def test_command_names_the_page(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_plots: None,
) -> None:
    runs = three_runs(tmp_path)
    out = tmp_path / "comparison.html"
    assert run_main(monkeypatch, *runs, "--out", out) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    assert "Comparison of 3 runs" in out.read_text(encoding="utf-8")


def test_of_several_paths_those_without_a_run_are_left_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_plots: None,
) -> None:
    """As `runs/*` gives them: a cache and a database lie there too."""
    runs = three_runs(tmp_path)
    others = [tmp_path / "cache", tmp_path / "mlflow.db"]
    others[0].mkdir()
    others[1].touch()
    assert run_main(monkeypatch, *runs, *others) == 0
    out, err = capsys.readouterr()
    assert out == f"report: {tmp_path / 'report.html'}\n"
    assert err == f"left out, for they hold no run: {others[0]}, {others[1]}\n"
    assert run_main(monkeypatch, *others) == 78
    assert "mlflow.db: none of them is a run directory\n" in capsys.readouterr().err
    assert run_main(monkeypatch, *runs, tmp_path / "nowhere") == 78
    assert "nowhere: does not exist" in capsys.readouterr().err


def test_bad_path_ends_with_78_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "job.report", str(tmp_path / "nowhere")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 78
    assert ended.stderr.startswith(f"error: {tmp_path / 'nowhere'}: does not exist; give a folder")
    assert "Traceback" not in ended.stderr


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run directory; give a folder"):
        write_report([tmp_path])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"step": 1, "train/l\n{"step": 2}\n'),
        ("status.json", "{"),
        ("parameters.json", ""),
    ],
)
def test_a_damaged_file_counts_as_absent_and_is_named(
    tmp_path: Path, name: str, content: str, no_plots: None, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "critic", steps=5)
    (run / name).write_text(content)
    assert write_report([run]).exists()
    assert f"{run / name}: not readable, and taken as absent" in caplog.text


def test_a_run_without_a_readable_configuration_is_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "critic", steps=5)
    (run / "config.yaml").write_text("{")
    with pytest.raises(InputError, match=str(run)):
        write_report([run])


def test_page_that_cannot_be_written_is_an_input_error(tmp_path: Path, no_plots: None) -> None:
    run = write_run(tmp_path / "critic", steps=5)
    with pytest.raises(InputError, match=r"no/page\.html: cannot write the report: No such file"):
        write_report([run], tmp_path / "no" / "page.html")


def mirror_that_fails_on(name: str, seen: list[str]) -> ModuleType:
    def sync_run(run_dir: Path) -> str:
        seen.append(run_dir.name)
        if run_dir.name == name:
            raise RuntimeError("server is down")
        return "12 metrics sent"

    module = ModuleType("job.run.mlflow_sync")
    module.sync_run = sync_run  # type: ignore[attr-defined]
    return module


def test_sync_goes_on_after_a_failure_and_exits_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_plots: None,
) -> None:
    seen: list[str] = []
    runs = three_runs(tmp_path)
    monkeypatch.setitem(sys.modules, "job.run.mlflow_sync", mirror_that_fails_on("probe", seen))
    assert run_main(monkeypatch, "--sync", *runs) == 1
    assert seen == ["probe", "critic", "broken"]
    out, err = capsys.readouterr()
    assert f"{runs[1]}: 12 metrics sent\n{runs[2]}: 12 metrics sent\n" in out
    assert err == f"{runs[0]}: not synchronised: server is down\n"
    assert run_main(monkeypatch, "--sync", *runs[1:]) == 0


def test_nothing_is_synchronised_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None
) -> None:
    seen: list[str] = []
    monkeypatch.setitem(sys.modules, "job.run.mlflow_sync", mirror_that_fails_on("critic", seen))
    assert run_main(monkeypatch, write_run(tmp_path / "critic", steps=5)) == 0
    assert seen == []


def test_help_teaches_by_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "--help") == 0
    assert "python -m job.report runs/probe runs/critic " in capsys.readouterr().out


def test_import_stays_light() -> None:
    heavy = "{'matplotlib', 'numpy', 'torch', 'mlflow'}"
    check = f"import sys, job.report; print(sorted({heavy} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True) == "[]\n"


@pytest.mark.parametrize("backend", ["nvml", "allocator", "process"])
def test_memory_is_drawn_by_phase_from_what_there_is(tmp_path: Path, backend: str) -> None:
    write_json(tmp_path / "memory.json", memory(backend, ranks=2))
    figure = draw_memory([Snapshot.read(tmp_path, "critic")])
    course, peaks = figure.axes
    assert "fullest of 2 ranks" in course.get_title()
    lines = {line.get_label(): line for line in course.get_lines()}
    expected = {"predicted peak"}
    if backend == "nvml":
        expected |= {"reserved by the allocator", "in use on the device (NVML)"}
        assert max(lines["in use on the device (NVML)"].get_ydata()) == 30
    assert lines.keys() == expected
    assert list(lines["predicted peak"].get_ydata()) == [27, 27]
    filled = [patch.get_data().values for patch in course.patches]
    assert max(np.nanmax(values) for values in filled[:4]) == 26  # one for each phase
    assert len(filled) == (6 if backend == "nvml" else 4)
    names = [label.get_text() for label in peaks.get_yticklabels()]
    assert names == ["load", "forward", "backward", "optimizer"]
    assert [text.get_text() for text in peaks.texts] == ["4.00", "20.00", "23.00", "26.00"]


def test_memory_of_several_runs_is_laid_over_one_another(tmp_path: Path) -> None:
    curves = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "memory.json", memory())
        curves.append(Snapshot.read(tmp_path / name, name))
    (tmp_path / "c").mkdir()  # without a record
    (axes,) = draw_memory([*curves, Snapshot.read(tmp_path / "c", "c")]).axes
    assert [line.get_label() for line in axes.get_lines()] == ["a", "b"]


def test_an_empty_record_of_memory_draws_nothing(tmp_path: Path) -> None:
    empty = {"seconds": [], "phase": [], "allocated": []}
    rank = {"backend": "nvml", "device": "D", "peak": {}, "peaks": {}, "series": empty}
    write_json(tmp_path / "memory.json", {"ranks": [rank]})
    assert draw_plots([Snapshot.read(tmp_path, "critic")]) == {}


def test_phases_of_a_long_run_lie_upon_one_another(tmp_path: Path) -> None:
    record = memory()
    series = record["ranks"][0]["series"]
    for name, values in series.items():
        series[name] = [0.4 * i for i in range(9500)] if name == "seconds" else values[5:] * 100
    write_json(tmp_path / "memory.json", record)
    course = draw_memory([Snapshot.read(tmp_path, "critic")]).axes[0]
    bands = [patch.get_data() for patch in course.patches[:3]]
    ends = {(float(min(b.baseline)), float(max(b.values))) for b in bands}
    assert ends == {(0, 20), (20, 23), (23, 26)}
    assert {len(band.values) for band in bands} == {150}
