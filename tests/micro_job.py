"""A training of seconds on the embedded data: the configuration that many tests vary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from job.common.config import load_config
from job.common.schema import CriticConfig
from job.run.directory import RunDirectory

_PRETRAIN = """
out: trunk
architecture: {dim: 32, n_layers: 4, n_heads: 4, n_future_tokens: 2}
data: {train: embedded, max_length: 64, cache_dir: cache, arithmetic: {train_examples: 256}}
training: {max_steps: 5, batch_size: 16, micro_batch_tokens: 1024, threads: 1}
"""
_CRITIC = """
run: {name: critic, dir: "runs/${run.name}"}
model: {path: trunk, recipe: pretrain.yaml}
data:
  train: embedded
  validation: embedded
  max_length: 64
  cache_dir: cache
  arithmetic: {train_examples: 200, validation_examples: 30}
training:
  num_unfrozen_layers: 1
  max_steps: 20
  batch_size: 10
  micro_batch_tokens: 128
  learning_rate: 0.001
  warmup_steps: 2
  threads: 1
  prefix_cache: none
evaluation: {every_steps: 10}
logging: {every_steps: 5}
distributed: {fsdp: {mixed_precision: false}}
mlflow: {enabled: false}
report: {enabled: false}
"""
# Several micro-batches a step, and log windows that end at other steps than checkpoints.
CHANGES = (
    "training.batch_size=8",
    "training.micro_batch_tokens=512",
    "logging.every_steps=7",
)


def write_job(folder: Path, critic: Sequence[str] = (), trunk: Sequence[str] = ()) -> None:
    """Write critic.yaml, and pretrain.yaml for its trunk, each with some `key=value` changes."""
    _write(folder / "critic.yaml", _CRITIC, critic)
    write_recipe(folder / "pretrain.yaml", trunk)


def write_recipe(file: Path, changes: Sequence[str] = ()) -> None:
    """Write the pre-training configuration of a micro trunk."""
    _write(file, _PRETRAIN, changes)


def train_run(*overrides: str) -> RunDirectory:
    """Train by the working folder's critic.yaml, in this process; the run that it leaves."""
    from job.training.trainer import train

    config = load_config(CriticConfig, "critic.yaml", overrides)
    train(config)
    return RunDirectory(config.run.dir)


def _write(file: Path, text: str, changes: Sequence[str]) -> None:
    OmegaConf.save(
        OmegaConf.merge(OmegaConf.create(text), OmegaConf.from_dotlist([*changes])), file
    )


@dataclass(frozen=True)
class MicroRun:
    """What a run directory shows to those outside, at any moment."""

    path: Path

    @property
    def status(self) -> dict[str, Any]:
        file = self.path / "status.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    @property
    def lines(self) -> list[bytes]:
        """The complete lines of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        lines = file.read_bytes().splitlines(True) if file.exists() else []
        return [line for line in lines if line.endswith(b"\n")]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    @property
    def step(self) -> int:
        """The last step with a line."""
        lines = self.lines
        return int(json.loads(lines[-1])["step"]) if lines else 0

    @property
    def weights(self) -> bytes:
        return (self.path / "critic.safetensors").read_bytes()

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """Where each attempt went on; empty for one that has not come so far."""
        files = [folder / "attempt.json" for folder in sorted(self.path.glob("attempts/*"))]
        return [json.loads(file.read_text()) if file.exists() else {} for file in files]

    @property
    def checkpoints(self) -> list[int]:
        """The committed steps."""
        return sorted(int(p.name[len("step-") :]) for p in self.path.glob("checkpoints/step-*"))

    @property
    def hidden(self) -> list[Path]:
        """What is being written to or removed from the checkpoints."""
        return [p for p in self.path.glob("checkpoints/.*") if p.name not in (".", "..")]

    def saving(self) -> list[Path]:
        """The unfinished checkpoint of the newest attempt; empty or one."""
        attempt = len(list(self.path.glob("attempts/*")))
        return list(self.path.glob(f"checkpoints/.step-*.attempt-{attempt:04}"))

    def tensors(self) -> dict[str, Any]:
        """Checksums of the last checkpoint's parameters and moments."""
        folder = self.path / f"checkpoints/step-{self.checkpoints[-1]:08}"
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return {name: sums for name, sums in files.items() if name.endswith(".distcp")}

    def assert_equals(self, undisturbed: MicroRun) -> None:
        """The same bits: metrics of each step once, trained weights, last checkpoint."""
        assert [record["step"] for record in self.records] == list(range(1, self.step + 1))
        assert self.lines == undisturbed.lines
        assert self.weights == undisturbed.weights
        assert self.tensors() == undisturbed.tensors()
        assert self.checkpoints[-1] == undisturbed.checkpoints[-1] == self.step
        assert not self.hidden
        status = self.status
        assert (status["state"], status["error"], status["step"]) == ("finished", None, self.step)
