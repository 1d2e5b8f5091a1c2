"""Train the same critic at several numbers of unfrozen blocks and compare them.

    python -m job.compare --config configs/critic/critic_local.yaml --unfreeze 0 2

Each run is a process of its own, in a run directory of its own; runs that are finished already
are taken as they are. Writes comparison.json and report.html beside the run directories.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from job.common.config import command_line, load_config
from job.common.errors import InputError, run_and_leave
from job.common.schema import CriticConfig
from job.common.signals import SIGNALS
from job.run.directory import RunDirectory
from job.run.mlflow_sync import tracking_uri
from job.run.report_page import write_report

_PREFIX = "validation/value/"
_COLUMNS = (
    "num_unfrozen_layers",
    "mse",
    "std",
    "r2",
    "achievable_share",
    "steps_to_half",
    "last_token_auc",
)


def compare(config_file: str, overrides: Sequence[str], unfreeze: Sequence[int]) -> list[Path]:
    """Train one critic per number of unfrozen blocks; the run directories.

    Raises:
        InputError: two runs would share a directory.
        SystemExit: a training failed; its exit code is passed on.
    """
    choices = [[*overrides, f"training.num_unfrozen_layers={n}"] for n in unfreeze]
    configs = [load_config(CriticConfig, config_file, choice) for choice in choices]
    runs = [RunDirectory(config.run.dir) for config in configs]
    if len({run.path for run in runs}) < len(runs):
        raise InputError("run.dir: the runs share a directory; build it from the number of blocks")
    with _stop_signals_held_back():
        for choice in choices:
            _train(config_file, choice)
    rows = [summarise(run) for run in runs]
    RunDirectory(runs[0].path.parent).write_json("comparison.json", rows)
    Console().print(comparison_table(rows))
    return [run.path for run in runs]


def _train(config_file: str, overrides: Sequence[str]) -> None:
    command = [sys.executable, "-m", "job.train", "--config", config_file, "--override"]
    with (
        subprocess.Popen([*command, *overrides]) as training,
        _stop_signals_passed_on(training),
    ):
        code = training.wait()
    if code:
        sys.exit(code if code > 0 else 128 - code)


@contextmanager
def _stop_signals_held_back() -> Iterator[None]:
    """Let a stop signal wait for the next moment at which there is a training to tell."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _stop_signals_passed_on(training: subprocess.Popen[bytes]) -> Iterator[None]:
    """The training saves and ends; as a container's first process this one would ignore them."""
    before = {n: signal.signal(n, lambda number, _: training.send_signal(number)) for n in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number, handler in before.items():
            signal.signal(number, handler)


def summarise(run: RunDirectory) -> dict[str, Any]:
    """A finished run's last evaluation, and how fast it got there.

    Raises:
        InputError: the run has no evaluation.
    """
    evaluations = [r for r in run.records() if _PREFIX + "mse" in r]
    if not evaluations:
        raise InputError(
            f"{run.path}: finished, but without an evaluation in metrics.jsonl; remove the folder"
        )
    last = {k.removeprefix(_PREFIX): v for k, v in evaluations[-1].items()}
    return {
        "num_unfrozen_layers": run.config()["training"]["num_unfrozen_layers"],
        "mse": last["mse"],
        "std": last["std_prediction"],
        "r2": last.get("r2"),
        "achievable_share": last.get("achievable_share"),
        "mse_constant": last["mse_constant"],
        "mse_optimal": last.get("mse_optimal"),
        "std_optimal": last.get("std_optimal"),
        "last_token_auc": last.get("last_token_auc"),
        "length_auc": last.get("length_auc"),
        "steps_to_half": steps_to_half(evaluations),
        "seconds": run.status()["seconds"],
    }


def steps_to_half(evaluations: Sequence[dict[str, Any]]) -> int | None:
    """The first evaluated step that explains half of the achievable variance."""
    share = _PREFIX + "achievable_share"
    reached = (int(r["step"]) for r in evaluations if r.get(share, 0.0) >= 0.5)
    return next(reached, None)


def comparison_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The runs between the constant and the optimal predictor, in 80 columns."""
    table = Table(
        title="Validation: critics against the constant and the optimal predictor",
        caption="share: of the variance that the optimal predictor explains; half at: the step",
    )
    for name in ("blocks", "MSE", "std", "R2", "share", "half at", "AUC", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    first = rows[0]
    table.add_row(
        "constant", f"{first['mse_constant']:.4f}", "0.0000", "0.0000", "", "", "0.5000", ""
    )
    for row in rows:
        cells = [_cell(row[name]) for name in _COLUMNS]
        table.add_row(*cells, f"{row['seconds']:.0f}")
    if first["mse_optimal"] is not None:
        r2 = 1 - first["mse_optimal"] / first["mse_constant"]
        best = (first["mse_optimal"], first["std_optimal"], r2, 1.0)
        table.add_row("optimal", *map(_cell, best), "", "", "")
    return table


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def main() -> None:
    parser = command_line(__doc__ or "")
    parser.add_argument("--unfreeze", nargs="+", type=int, required=True, metavar="N")
    options = parser.parse_args()
    runs = compare(options.config, options.override, options.unfreeze)
    page = write_report(runs)
    print(f"\nreport   {page.resolve()}\nnumbers  {runs[0].parent / 'comparison.json'}")
    print(f"MLflow   {_mlflow(RunDirectory(runs[0]).config())}")


def _mlflow(config: dict[str, Any]) -> str:
    """How to see the runs in MLflow."""
    uri = tracking_uri(config)
    if not config["mlflow"]["enabled"]:
        return "off (mlflow.enabled)"
    if uri.startswith("http"):
        return uri
    return f"{sys.executable} -m mlflow ui --backend-store-uri {uri}"


if __name__ == "__main__":
    run_and_leave(main)
