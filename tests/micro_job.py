"""A training of seconds on the embedded data: the configuration that many tests vary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

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
evaluation: {every_steps: 10}
logging: {every_steps: 5}
distributed: {fsdp: {mixed_precision: false}}
mlflow: {enabled: false}
"""


def write_job(folder: Path, critic: Sequence[str] = (), trunk: Sequence[str] = ()) -> None:
    """Write critic.yaml, and pretrain.yaml for its trunk, each with some `key=value` changes."""
    _write(folder / "critic.yaml", _CRITIC, critic)
    write_recipe(folder / "pretrain.yaml", trunk)


def write_recipe(file: Path, changes: Sequence[str] = ()) -> None:
    """Write the pre-training configuration of a micro trunk."""
    _write(file, _PRETRAIN, changes)


def _write(file: Path, text: str, changes: Sequence[str]) -> None:
    OmegaConf.save(
        OmegaConf.merge(OmegaConf.create(text), OmegaConf.from_dotlist([*changes])), file
    )
