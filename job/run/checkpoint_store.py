"""A run's committed checkpoints on disk: which there are, which count, which are kept."""

from __future__ import annotations

import difflib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from job.common.errors import InputError
from job.common.nested import refuse_differences
from job.common.schema import CheckpointConfig
from job.common.state_files import read_json
from job.model.trunk_folder import CONFIG, PARAMS, WEIGHTS
from job.run.committed import committed
from job.run.manifest import FACTS, MANIFEST, DamagedError, Manifest
from job.run.names import checkpoint_step, removed_name
from job.run.value_metrics import metric_names

HEAD = "value_head.safetensors"  # of a critic exported in Meta's layout
_LOWER_IS_BETTER = ("mse", "ece", "distance_to_optimal")
_log = logging.getLogger(__name__)


def retained(folders: Sequence[Path], config: CheckpointConfig) -> list[Path]:
    """Which of a run's checkpoints to keep, the newest always among them."""
    kept = set(folders[-config.keep_last :])
    if config.keep_every is not None:
        kept |= {path for path in folders if checkpoint_step(path) % config.keep_every == 0}
    if config.keep_best is not None:
        kept |= set(best(folders, config.keep_best))
    return [path for path in folders if path in kept]


def best(folders: Sequence[Path], metric: str) -> list[Path]:
    """The checkpoint with the best value of an evaluation's metric; none if none has one.

    Evaluations on solutions that all have one reward are none: the best would be a constant.
    """
    values = {path: _evaluation(path).get(metric) for path in folders}
    known = {path: value for path, value in values.items() if value is not None}
    choose = min if metric.endswith(_LOWER_IS_BETTER) else max
    return [choose(known, key=known.__getitem__)] if known else []


def _evaluation(folder: Path) -> dict[str, Any]:
    """The figures of a checkpoint's evaluation; none if they cannot be read or tell nothing."""
    try:
        figures = dict(read_facts(folder)["evaluation"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    constant = figures.get("validation/value/mse_constant", 1.0)
    return figures if constant > 1e-12 else {}


def check_metric(metric: str | None) -> None:
    """Raise InputError if no evaluation will ever give this metric."""
    known = [f"validation/value/{name}" for name in metric_names()]
    if metric is not None and metric not in known:
        near = difflib.get_close_matches(metric, known, 3, 0) or known
        raise InputError(f"checkpoint.keep_best: no metric {metric}; nearest: {', '.join(near)}")


def newest_intact(source: Path) -> Path:
    """The newest good checkpoint of a run, or `source` itself if it is a good one.

    Raises:
        InputError: there is none.
    """
    one = (source / MANIFEST).exists()
    there = [source] if one else committed(source)
    for folder in reversed(there):
        try:
            Manifest.read(folder).verify(folder)
        except DamagedError as defect:
            _log.error("damaged checkpoint: %s", defect)
            continue
        return folder
    what = "damaged" if there else _what_is(source)
    raise InputError(
        f"{source}: no intact checkpoint here: {what}; name a run, one of its checkpoints, or a "
        "delta (job.export --format delta)"
    )


def _what_is(source: Path) -> str:
    """What stands where neither a checkpoint nor a delta is."""
    if not source.exists():
        return "no such file or folder"
    if not source.is_dir():
        return "a file"
    if (source / HEAD).exists() or _has_classifier(source):
        return "an export: it has no record of its training"
    if any((source / name).exists() for name in (PARAMS, CONFIG, WEIGHTS)):
        return "a trunk"
    if (source / "config.yaml").exists():
        return "a run that has not saved any yet"
    return "none of a critic's files"


def _has_classifier(source: Path) -> bool:
    config = read_json(source / CONFIG, dict) or {}
    return any(str(name).endswith("Classification") for name in config.get("architectures") or ())


def refuse_other(folder: Path, identity: dict[str, Any]) -> None:
    """Raise InputError, with both values, unless a checkpoint agrees with `identity`."""
    stored = read_facts(folder)["identity"]
    problem = (
        f"{folder}: a checkpoint of something else (there -> here); choose another run.dir, "
        "or begin a new run from its weights with --init-from"
    )
    refuse_differences({name: stored.get(name) for name in identity}, identity, problem)


def read_facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    return facts


def set_aside(folder: Path) -> Path:
    """Give a damaged folder a name under which it is not used but can be looked at."""
    aside = folder.with_name(f"damaged-{folder.name}")
    number = 2
    while aside.exists():
        aside, number = folder.with_name(f"damaged-{folder.name}.{number}"), number + 1
    return folder.rename(aside)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that no half of it can be taken for a whole."""
    hidden = folder.with_name(removed_name(folder.name))
    shutil.rmtree(hidden, ignore_errors=True)
    shutil.rmtree(folder.rename(hidden))
