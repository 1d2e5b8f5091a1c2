"""Trainings of eight steps in this process that tests end, disturb and damage, and what is left."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from micro_job import train_run, write_job
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from job.common.schema import CheckpointConfig, DistributedConfig
from job.data.packing import Batch
from job.distributed.world import joined_world
from job.run.committed import committed
from job.run.directory import RunDirectory
from job.run.fence import Fence
from job.run.manifest import Manifest
from job.training import checkpoint as checkpoint_module
from job.training.checkpoint import Checkpoints
from job.training.learner import Learner, StepResult
from job.training.objective import Counts, Objective

TRUNK = ("data.arithmetic.train_examples=64", "training.max_steps=2", "training.batch_size=8")
CHANGES = (
    "data.arithmetic.train_examples=64",
    "data.arithmetic.validation_examples=16",
    "training.max_steps=8",
    "training.batch_size=8",
    # cadences of three kinds, so that a checkpoint may lie inside a window of the log
    "evaluation.every_steps=4",
    "logging.every_steps=3",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=99",
)
IN_BACKGROUND = checkpoint_module._in_background


class Crash(Exception):  # noqa: N818 - as abrupt as a process can end inside another one
    """An end that nothing foresees."""


# Trainings


def workspace(path: Path) -> Path:
    """A folder with the configurations of a micro trunk and a micro critic."""
    write_job(path, CHANGES, TRUNK)
    return path


@contextmanager
def environment(folder: Path) -> Iterator[None]:
    """Work in a folder; checkpoints are saved between two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(checkpoint_module, "_in_background", _at_once)
        yield


def _at_once(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
    return future


def run_training(name: str, *overrides: str) -> RunDirectory:
    return train_run(f"run.name={name}", *overrides)


def crash_before(step: int, name: str, *overrides: str, bad: Iterable[int] = ()) -> RunDirectory:
    """A run that crashes before a step; in those that are `bad` the loss is not a number."""

    def factor(current: int) -> float:
        if current >= step:
            raise Crash
        return math.nan if current in bad else 1.0

    with pytest.MonkeyPatch.context() as patch:
        multiply_loss(patch, factor)
        with pytest.raises(Crash):
            run_training(name, *overrides)
    return RunDirectory(f"runs/{name}")


def copy_run(run: RunDirectory, name: str) -> RunDirectory:
    return RunDirectory(shutil.copytree(run.path, Path("runs") / name))


def other_trunk(name: str) -> Path:
    """The same architecture with one weight that differs in its last bit."""
    other = Path(shutil.copytree("trunk", name))
    weights = torch.load(other / "consolidated.pth", weights_only=True)
    weights["layers.0.attention.wq.weight"].view(torch.int32)[0, 0] ^= 1
    torch.save(weights, other / "consolidated.pth")
    return other


# What happens to them


def multiply_loss(patch: pytest.MonkeyPatch, factor: Callable[[int], float]) -> None:
    """Multiply the loss of each step, counted from 1, by a factor."""
    original = Objective.loss

    def loss(self: Objective, outputs: Tensor, batch: Batch, step: int, whole: Counts) -> Tensor:
        return original(self, outputs, batch, step, whole) * factor(step + 1)

    patch.setattr(Objective, "loss", loss)


def make_bad(patch: pytest.MonkeyPatch, steps: Iterable[int]) -> None:
    """In these steps the loss is not a number."""
    bad = set(steps)
    multiply_loss(patch, lambda step: math.nan if step in bad else 1.0)


def before_steps(patch: pytest.MonkeyPatch, act: Callable[[int, Learner], None]) -> None:
    """Call `act` with the number, from 1, of each step that is about to be made."""
    original = Learner.step

    def step(self: Learner, number: int, *arguments: Any) -> StepResult:
        act(number + 1, self)
        return original(self, number, *arguments)

    patch.setattr(Learner, "step", step)


def at_steps(patch: pytest.MonkeyPatch, actions: Mapping[int, Callable[[], object]]) -> None:
    """Do something once, before each of some steps is made for the first time."""
    left = dict(actions)

    def act(step: int, _: Learner) -> None:
        left.pop(step, lambda: None)()

    before_steps(patch, act)


def after_saves(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something whenever a checkpoint has been saved."""
    original = checkpoint_module.save

    def save(*arguments: Any, **options: Any) -> None:
        original(*arguments, **options)
        act()

    patch.setattr(checkpoint_module, "save", save)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x01
    file.write_bytes(content)


def cut(file: Path, keep: Callable[[int], int]) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: keep(len(content))])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "emptied": lambda file: cut(file, lambda n: 0),
    "halved": lambda file: cut(file, lambda n: n // 2),
    "shortened": lambda file: cut(file, lambda n: n - 1),
    "missing": Path.unlink,
}


# What they leave


def metrics_of(run: RunDirectory) -> bytes:
    return run.file("metrics.jsonl").read_bytes()


def weights_of(run: RunDirectory) -> dict[str, Tensor]:
    return load_file(run.file("critic.safetensors"))


def log_of(run: RunDirectory) -> str:
    return run.file("train.log").read_text()


def content_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same(run: RunDirectory, expected: RunDirectory) -> None:
    """Metrics and trained weights are equal to the bit."""
    assert metrics_of(run) == metrics_of(expected)
    assert_equal(weights_of(run), weights_of(expected))


def assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


def logged_steps(run: RunDirectory) -> list[int]:
    return [record["step"] for record in run.records()]


def saved_steps(run: RunDirectory) -> list[int]:
    """The steps of the checkpoints that count."""
    return steps_of(committed(run.path))


def steps_of(folders: Iterable[Path]) -> list[int]:
    return [int(path.name[5:]) for path in folders]


def intact_steps(checkpoints: Path) -> list[int]:
    """The steps of a folder's checkpoints, all of which must be intact."""
    folders = sorted(checkpoints.glob("step-*"))
    for path in folders:
        Manifest.read(path).verify(path)
    return steps_of(folders)


def checkpoint_of(run: RunDirectory, step: int) -> Path:
    return run.file(f"checkpoints/step-{step:08}")


def identity_of(run: RunDirectory) -> dict[str, Any]:
    facts = json.loads((checkpoint_of(run, 6) / "facts.json").read_text())
    return cast(dict[str, Any], facts["identity"])


@contextmanager
def checkpoints_of(
    run: RunDirectory, identity: dict[str, Any], **config: Any
) -> Iterator[Checkpoints]:
    """The checkpoints of a run as its next attempt sees them."""
    with joined_world(DistributedConfig()) as world:
        run.fence = Fence.take(run.path)
        yield Checkpoints(run, run.fence, CheckpointConfig(**config), identity, world)


def stored_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Everything that torch.distributed.checkpoint has stored."""
    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.full(cast(Any, one).size, math.nan) for name, one in stored.items()}
    with joined_world(DistributedConfig()):
        load(tensors, storage_reader=reader)
    return tensors


def stored_weights(checkpoint: Path) -> dict[str, Tensor]:
    tensors = stored_tensors(checkpoint)
    return {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
