"""A run directory that cannot be used ends in exit code 78; a damaged file counts as absent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from job.common.config import load_config
from job.common.nested import to_dict
from job.common.schema import CriticConfig
from job.training.trainer import train

pytestmark = pytest.mark.slow


def _unfinished(workplace: Path) -> Path:
    """A run directory that an attempt has left in the middle."""
    run = workplace / "runs" / "tiny"
    config = load_config(CriticConfig, "critic.yaml")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 1}))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


@pytest.mark.parametrize("path", ["train.jsonl", "train.jsonl/run"])
def test_run_directory_cannot_be_made(path: str, refused: Callable[..., None]) -> None:
    refused("run.dir: cannot write", path, overrides=(f"run.dir={path}",))


def test_run_directory_of_another_configuration(
    workplace: Path, refused: Callable[..., None]
) -> None:
    _unfinished(workplace)
    overrides = ("training.seed=7", "training.num_unfrozen_layers=0")
    words = ("training.seed: 0 -> 7", "training.num_unfrozen_layers: 1 -> 0", "run.dir")
    refused("runs/tiny", *words, overrides=overrides)


RUN_FILES: dict[str, tuple[str, bytes]] = {
    "configuration is garbage": ("config.yaml", b"{"),
    "configuration is binary": ("config.yaml", b"\xff\xfe"),
    "configuration is empty": ("config.yaml", b""),
    "configuration is a list": ("config.yaml", b"[1]"),
    "status is garbage": ("status.json", b"{"),
    "status is binary": ("status.json", b"\xff\xfe"),
    "status is a list": ("status.json", b"[1]"),
}


@pytest.mark.parametrize("case", RUN_FILES)
def test_a_damaged_file_of_a_run_counts_as_absent_and_is_named(
    case: str, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, content = RUN_FILES[case]
    run = _unfinished(workplace)
    (run / name).write_bytes(content)
    train(load_config(CriticConfig, "critic.yaml", ["report.enabled=false"]))
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert f"runs/tiny/{name}: not readable, and taken as absent" in caplog.text


def test_a_run_that_never_began_may_begin_with_another_configuration(
    workplace: Path, refused: Callable[..., None]
) -> None:
    refused("data.max_length", overrides=("data.max_length=2",))
    assert (workplace / "runs/tiny/config.yaml").exists()
    train(load_config(CriticConfig, "critic.yaml", ["report.enabled=false"]))
    status = json.loads((workplace / "runs/tiny/status.json").read_text())
    assert status["state"] == "finished"
    refused("different configuration", overrides=("data.max_length=2",))


def test_run_directory_with_hardly_any_configuration(
    workplace: Path, refused: Callable[..., None]
) -> None:
    (_unfinished(workplace) / "config.yaml").write_bytes(b"run: {name: tiny}")
    refused("runs/tiny", "different configuration")


def test_an_attempt_on_bad_data_keeps_what_the_last_one_measured(
    workplace: Path, refused: Callable[..., None]
) -> None:
    run = _unfinished(workplace)
    (run / "status.json").unlink()  # this may change
    (workplace / "train.jsonl").unlink()
    refused("train.jsonl", "cannot read the data")
