"""Train the same critic at several numbers of unfrozen blocks and compare them.

    python -m job.compare --config configs/critic/critic_local.yaml --unfreeze 0 2

Each run is a process of its own, in a run directory of its own; runs that are finished already
are taken as they are. Writes comparison.json and report.html beside the run directories.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from job.common.config import command_line, load_config
from job.common.errors import InputError, run_and_leave
from job.common.schema import CriticConfig, PrefixCacheMode
from job.common.signals import SIGNALS
from job.run.comparison import comparison_table, summarise
from job.run.directory import RunDirectory
from job.run.mlflow_sync import tracking_uri
from job.run.report_page import write_report

_HEARD = (*SIGNALS, signal.SIGINT)


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
        for choice in _in_order(configs, choices):
            _train(config_file, choice)
    rows = [summarise(run) for run in runs]
    RunDirectory(runs[0].path.parent).write_json("comparison.json", rows)
    Console().print(comparison_table(rows))
    return [run.path for run in runs]


def _in_order(configs: Sequence[CriticConfig], choices: Sequence[list[str]]) -> Iterator[list[str]]:
    """As given; with a cache, first who trains most: all others can read the states it keeps."""
    if configs[0].training.prefix_cache is not PrefixCacheMode.all:
        return iter(choices)
    most = sorted(range(len(choices)), key=lambda k: -configs[k].training.num_unfrozen_layers)
    return (choices[k] for k in most)


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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _stop_signals_passed_on(training: subprocess.Popen[bytes]) -> Iterator[None]:
    """The training saves and ends; as a container's first process this one would ignore them."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGINT or not _in_the_foreground():
            training.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _HEARD}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_the_foreground() -> bool:
    """Whether a terminal gives Ctrl-C to this process and, without a word, to its training."""
    try:
        with open("/dev/tty", "rb") as terminal:  # noqa: PTH123 - no file
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


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
