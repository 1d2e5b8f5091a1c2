"""Trainings that are interrupted, damaged and started again end as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from micro_job import train_run, write_job, write_recipe
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

import job.train
from job.common.config import load_config
from job.common.errors import Exit, InputError, Stopped, Superseded, UnfitNode, exit_code
from job.common.nested import to_dict
from job.common.schema import CheckpointConfig, CriticConfig, DistributedConfig
from job.data.packing import Batch
from job.distributed.world import World, joined_world
from job.model.architecture_file import read_architecture
from job.model.critic import Critic, unfreeze_last_blocks
from job.run.checkpoint_store import best, retained
from job.run.committed import committed
from job.run.directory import RunDirectory
from job.run.fence import Fence
from job.run.manifest import MANIFEST, DamagedError, Manifest
from job.run.trained import find_weights
from job.training import checkpoint as checkpoint_module
from job.training.checkpoint import Checkpoints, SaveError
from job.training.host_copy import HostCopy
from job.training.learner import Learner, StepResult
from job.training.objective import Counts, Objective
from job.training.out_of_memory import out_of_memory_judged

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
FILES = [".metadata", "__0_0.distcp", "rank-00000.state", "facts.json", "config.yaml", MANIFEST]
_IN_BACKGROUND = checkpoint_module._in_background


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> RunDirectory:
    """A run that nothing disturbed."""
    with environment(folder):
        run_training("whole")
    return RunDirectory(folder / "runs/whole")


@pytest.fixture(scope="module")
def halted(folder: Path) -> RunDirectory:
    """The same run, ended before step 7: with checkpoints at 2, 4 and 6."""
    with environment(folder):
        _crash_before(7, "halted")
    return RunDirectory(folder / "runs/halted")


@pytest.fixture(autouse=True)
def _here(folder: Path, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO, "job")
    with environment(folder):
        yield


def _copy(run: RunDirectory, name: str) -> RunDirectory:
    return RunDirectory(shutil.copytree(run.path, Path("runs") / name))


def _crash_before(step: int, name: str, *overrides: str) -> RunDirectory:
    def crash(current: int) -> float:
        if current >= step:
            raise Crash
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        _factors(patch, crash)
        with pytest.raises(Crash):
            run_training(name, *overrides)
    return RunDirectory(f"runs/{name}")


def _factors(patch: pytest.MonkeyPatch, factor: Callable[[int], float]) -> None:
    """Multiply the loss of each step, counted from 1, by a factor."""
    original = Objective.loss

    def loss(self: Objective, outputs: Tensor, batch: Batch, step: int, whole: Counts) -> Tensor:
        return original(self, outputs, batch, step, whole) * factor(step + 1)

    patch.setattr(Objective, "loss", loss)


def _bad_steps(patch: pytest.MonkeyPatch, steps: Iterable[int]) -> None:
    bad = set(steps)
    _factors(patch, lambda step: math.nan if step in bad else 1.0)


Before = Callable[[int, Learner], None]


def _before_steps(patch: pytest.MonkeyPatch, act: Before) -> None:
    """Call `act` with the number, from 1, of each step that is about to be made."""
    original = Learner.step

    def step(self: Learner, number: int, *arguments: Any) -> StepResult:
        act(number + 1, self)
        return original(self, number, *arguments)

    patch.setattr(Learner, "step", step)


def _at_step(patch: pytest.MonkeyPatch, actions: Mapping[int, Callable[[], object]]) -> None:
    """Do something once, before each of some steps is made for the first time."""
    left = dict(actions)

    def act(step: int, _: Learner) -> None:
        left.pop(step, lambda: None)()

    _before_steps(patch, act)


def _metrics(run: RunDirectory) -> bytes:
    return run.file("metrics.jsonl").read_bytes()


def _weights(run: RunDirectory) -> dict[str, Tensor]:
    return load_file(run.file("critic.safetensors"))


def _same(run: RunDirectory, expected: RunDirectory) -> None:
    """Metrics and trained weights are equal to the bit."""
    assert _metrics(run) == _metrics(expected)
    _equal(_weights(run), _weights(expected))


def _equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


def _steps(run: RunDirectory) -> list[int]:
    """The steps of the checkpoints that count."""
    return _names(committed(run.path))


def _names(folders: Iterable[Path]) -> list[int]:
    return [int(path.name[5:]) for path in folders]


def _good_ones(checkpoints: Path) -> list[int]:
    """The steps of a folder's checkpoints, all of which must be intact."""
    folders = sorted(checkpoints.glob("step-*"))
    for path in folders:
        Manifest.read(path).verify(path)
    return _names(folders)


def _folder(run: RunDirectory, step: int) -> Path:
    return run.file(f"checkpoints/step-{step:08}")


def _log(run: RunDirectory) -> str:
    return run.file("train.log").read_text()


def _content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Everything that torch.distributed.checkpoint has stored."""
    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.full(cast(Any, one).size, math.nan) for name, one in stored.items()}
    with joined_world(DistributedConfig()):
        load(tensors, storage_reader=reader)
    return tensors


def _stored_weights(checkpoint: Path) -> dict[str, Tensor]:
    tensors = _tensors(checkpoint)
    return {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}


# Going on


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 5, 8])
def test_a_run_that_crashed_at_any_step_ends_as_if_it_had_not(
    whole: RunDirectory, step: int
) -> None:
    run = _crash_before(step, f"crashed-{step}")
    assert _steps(run) == [s for s in (2, 4, 6) if s < step]
    assert run.status()["state"] == "failed"
    run_training(f"crashed-{step}")
    _same(run, whole)
    assert _steps(run) == [2, 4, 6, 8]
    assert run.status()["state"] == "finished"


@pytest.mark.slow
def test_a_run_that_crashed_in_every_step_ends_as_if_it_had_not(whole: RunDirectory) -> None:
    for step in range(1, 9):
        run = _crash_before(step, "often", "checkpoint.every_steps=1")
    run_training("often", "checkpoint.every_steps=1")
    _same(run, whole)
    records = [run.file(f"attempts/{n:04}/attempt.json") for n in range(1, 10)]
    assert [json.loads(r.read_text())["resumed_step"] for r in records] == [0, *range(8)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["distributed.fsdp.mixed_precision=true"],
        ["training.num_unfrozen_layers=0"],
        ["training.num_unfrozen_layers=4", "training.lr_decay_factor=0.8"],
        ["objective.target=lambda_return", "objective.lambda_steps=6", "objective.lambda_end=0.5"],
    ],
    ids=" ".join,
)
def test_every_kind_of_training_goes_on_to_the_bit(settings: list[str]) -> None:
    name = settings[0]
    expected = run_training(f"{name}-whole", *settings)
    _crash_before(6, name, *settings)
    _same(run_training(name, *settings), expected)


@pytest.mark.slow
def test_a_run_stopped_inside_an_evaluation_finishes_it_later(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Path("runs/stopped/stop")
    original = Learner.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(
            Learner, "evaluate", lambda *arguments: (stop.touch(), original(*arguments))[1]
        )
        with pytest.raises(Stopped):
            run_training("stopped")
    run = RunDirectory("runs/stopped")
    assert not stop.exists()
    assert run.status()["state"] == "stopped"
    assert [record["step"] for record in run.records()] == [1, 2, 3]
    assert _steps(run) == [2, 4]
    _same(run_training("stopped"), whole)


@pytest.mark.slow
def test_a_longer_run_goes_on_from_the_end_of_a_finished_one(whole: RunDirectory) -> None:
    run = _copy(whole, "longer")
    before = run.records()
    run_training("longer", "training.max_steps=11")
    records = run.records()
    assert [record["step"] for record in records] == list(range(1, 12))
    assert records[:8] == before
    assert run.status()["step"] == 11
    assert _steps(run)[-1] == 11


# Damage


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x01
    file.write_bytes(content)


def _cut(file: Path, keep: Callable[[int], int]) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: keep(len(content))])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": _flip,
    "emptied": lambda file: _cut(file, lambda n: 0),
    "halved": lambda file: _cut(file, lambda n: n // 2),
    "shortened": lambda file: _cut(file, lambda n: n - 1),
    "missing": Path.unlink,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(
    whole: RunDirectory, halted: RunDirectory, name: str, damage: str
) -> None:
    run = _copy(halted, f"{damage}-{name.strip('._')}")
    DAMAGES[damage](_folder(run, 6) / name)
    run_training(run.path.name)
    log = _log(run)
    assert f"damaged checkpoint: {_folder(run, 6) / name}" in log
    assert "set aside as runs/" in log
    assert "going on from step 4" in log
    assert run.file("checkpoints/damaged-step-00000006").is_dir()
    assert _steps(run) == [2, 4, 6, 8]
    Manifest.read(_folder(run, 6)).verify(_folder(run, 6))
    _same(run, whole)


@pytest.mark.slow
def test_with_every_checkpoint_damaged_a_run_starts_over(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = _copy(halted, "all-damaged")
    _flip(_folder(run, 2) / "__0_0.distcp")
    (_folder(run, 4) / MANIFEST).unlink()
    _cut(_folder(run, 6) / "facts.json", lambda n: 0)
    run_training("all-damaged")
    assert _log(run).count("damaged checkpoint") == 3
    assert "going on from" not in _log(run)
    assert len(list(run.file("checkpoints").glob("damaged-step-*"))) == 3
    _same(run, whole)


@pytest.mark.slow
def test_one_step_can_be_set_aside_again_and_again(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = _copy(halted, "again")
    for _ in range(3):
        _flip(_folder(run, 6) / "__0_0.distcp")
        _crash_before(8, "again")
    run_training("again")
    aside = sorted(path.name for path in run.file("checkpoints").glob("damaged-*"))
    assert aside == [f"damaged-step-00000006{suffix}" for suffix in ("", ".2", ".3")]
    _same(run, whole)


@pytest.mark.slow
def test_what_a_killed_attempt_was_writing_is_not_used_and_is_removed(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = _copy(halted, "leftovers")
    checkpoints = run.file("checkpoints")
    _folder(run, 6).rename(checkpoints / ".step-00000006.attempt-0001")
    shutil.copytree(_folder(run, 4), checkpoints / ".removed-step-00000001")
    run_training("leftovers")
    assert "going on from step 4" in _log(run)
    assert list(checkpoints.glob(".*")) == []
    _same(run, whole)


THEIRS = (  # what people keep beside checkpoints
    "step-00000006.bak",
    "step-00000006.bad",
    "step-00000004 keep",
    "step-000000006",
    "step-6",
    "step-99999999x",
    "Step-00000008",
    ".step-00000004.mine",
    ".snapshot",
    ".removed-notes",
    "damaged-step-00000006.mine",
)


@pytest.mark.slow
def test_only_what_is_named_as_ours_is_used_counted_or_removed(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = _copy(halted, "copies")
    checkpoints = run.file("checkpoints")
    for name in THEIRS:
        shutil.copytree(_folder(run, 6), checkpoints / name)
    _folder(run, 6).rename(checkpoints / "step-00000007.bad")  # is to be left out
    kept = {name: _content(checkpoints / name) for name in (*THEIRS, "step-00000007.bad")}
    few = ("checkpoint.keep_every=4", "checkpoint.keep_last=1")
    run_training("copies", *few, "checkpoint.keep_best=validation/value/mse")
    assert "going on from step 4" in _log(run)
    assert run.status()["checkpoint_error"] is None
    assert {name: _content(checkpoints / name) for name in kept} == kept
    assert _steps(run) == [4, 8]
    _same(run, whole)


@pytest.mark.slow
def test_a_new_run_inside_of_another_is_refused_and_writes_nothing(halted: RunDirectory) -> None:
    run = _copy(halted, "outer")
    before = _content(run.path)
    with pytest.raises(InputError, match=r"lies inside another run, .*/runs/outer; choose another"):
        run_training("outer/inner")
    assert _content(run.path) == before


@pytest.mark.slow
def test_a_torn_last_line_of_the_metrics_does_not_matter(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = _copy(halted, "torn")
    with run.file("metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "train/lo')
    run_training("torn")
    _same(run, whole)


TORN = {
    "empty": b"",
    "zeros": bytes(64),
    "cut": b'{"step": 7, "resumed_st',
    "no UTF-8": b"\xff\xfe{}\n",
    "another kind": b'"text"\n',
    "deep": b"[" * 100_000,
}
STATE_FILES = ("config.yaml", "status.json", "bad_steps.json", "attempts/0001/attempt.json")


@pytest.mark.slow
@pytest.mark.parametrize("content", TORN.values(), ids=TORN)
def test_a_run_whose_small_files_are_all_damaged_goes_on_from_its_checkpoint(
    whole: RunDirectory, halted: RunDirectory, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    run = _copy(halted, f"damaged-{len(content)}-{content[:1].hex()}")
    for name in (*STATE_FILES, "parameters.json", "memory.json", "reliability.json"):
        run.file(name).write_bytes(content)
    for name in ("metrics.jsonl", "telemetry.jsonl"):
        with run.file(name).open("ab") as stream:
            stream.write(content + b"\n" + content)
    run_training(run.path.name)
    said = [r.getMessage() for r in caplog.records if "taken as absent" in r.getMessage()]
    for name in STATE_FILES:
        if name != "attempts/0001/attempt.json":  # of the one before nobody asks
            assert sum(text.startswith(f"{run.file(name)}: ") for text in said) == 1
    assert "going on from step 6" in _log(run)
    assert run.config() == whole.config() | {"run": run.config()["run"]}
    _same(run, whole)


@pytest.mark.slow
def test_damage_in_the_metrics_that_stay_costs_these_lines_alone(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = _copy(halted, "damaged-line")
    lines = run.file("metrics.jsonl").read_bytes().splitlines(True)
    lines[2] = bytes(len(lines[2]) - 1) + b"\n"
    run.file("metrics.jsonl").write_bytes(b"".join(lines))
    run_training("damaged-line")
    expected = whole.records()
    assert run.records() == expected[:2] + expected[3:]
    _equal(_weights(run), _weights(whole))
    assert "lacks 1 of 6 steps" in _log(run)


@pytest.mark.slow
def test_a_run_that_lost_everything_but_its_name_starts_over(whole: RunDirectory) -> None:
    run = _crash_before(2, "lost-all")  # without a checkpoint
    for name in ("config.yaml", "status.json", "metrics.jsonl"):
        run.file(name).write_bytes(bytes(300))
    run_training("lost-all")
    _same(run, whole)


# Refusals and what may change


@contextmanager
def _checkpoints(
    run: RunDirectory, identity: dict[str, Any], **config: Any
) -> Iterator[Checkpoints]:
    """The checkpoints of a run as its next attempt sees them."""
    with joined_world(DistributedConfig()) as world:
        run.fence = Fence.take(run.path)
        yield Checkpoints(run, run.fence, CheckpointConfig(**config), identity, world)


def _identity(run: RunDirectory) -> dict[str, Any]:
    facts = json.loads((_folder(run, 6) / "facts.json").read_text())
    return cast(dict[str, Any], facts["identity"])


def _claimed(folder: Path, *overrides: str) -> RunDirectory:
    """A run that has begun: its configuration and its first attempt."""
    run = RunDirectory(folder / "run")
    run.claim(to_dict(load_config(CriticConfig, "critic.yaml", overrides)))
    Fence.take(run.path).record(world_size=1, resumed_step=0)
    return run


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("training.learning_rate=0.002", "training.learning_rate: 0.001 -> 0.002"),
        ("training.value_head.learning_rate=1", "training.value_head.learning_rate: None -> 1.0"),
        ("training.num_unfrozen_layers=2", "training.num_unfrozen_layers: 1 -> 2"),
        ("training.seed=1", "training.seed: 0 -> 1"),
        ("training.batch_size=16", "training.batch_size: 8 -> 16"),
        ("training.warmup_steps=3", "training.warmup_steps: 2 -> 3"),
        ("training.betas=[0.9,0.99]", "training.betas: [0.9, 0.95] -> [0.9, 0.99]"),
        ("objective.loss=bce", "objective.loss: mse -> bce"),
        ("objective.gamma=0.5", "objective.gamma: 1.0 -> 0.5"),
        ("objective.target=lambda_return", "objective.target: monte_carlo -> lambda_return"),
        ("evaluation.every_steps=5", "evaluation.every_steps: 4 -> 5"),
        ("data.max_length=32", "data.max_length: 64 -> 32"),
        ("data.arithmetic.seed=7", "data.arithmetic.seed: 0 -> 7"),
        ("model.init_from=elsewhere", "model.init_from: None -> elsewhere"),
    ],
)
def test_what_changes_the_training_is_refused_with_both_values_and_nothing_changes(
    tmp_path: Path, override: str, difference: str
) -> None:
    run = _claimed(tmp_path)
    before = _content(run.path)
    with pytest.raises(InputError) as caught:
        _claimed(tmp_path, override)
    assert difference in str(caught.value)
    assert str(caught.value).count(" -> ") == 2  # this one, and the sentence before it
    assert _content(run.path) == before


def test_every_difference_is_listed(tmp_path: Path) -> None:
    _claimed(tmp_path)
    with pytest.raises(InputError, match=r"(?s)gamma: 1\.0 -> 0\.5.*seed: 0 -> 1"):
        _claimed(tmp_path, "training.seed=1", "objective.gamma=0.5", "logging.every_steps=1")


@pytest.mark.slow
def test_another_n_is_refused_before_anything_is_touched(halted: RunDirectory) -> None:
    run = _copy(halted, "other-n")
    before = _content(run.path)
    with pytest.raises(InputError, match="num_unfrozen_layers: 1 -> 2") as caught:
        run_training("other-n", "training.num_unfrozen_layers=2")
    assert exit_code(caught.value) == 78
    assert _content(run.path) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"num_unfrozen_layers": 2}, "num_unfrozen_layers: 1 -> 2"),
        ({"base": "f" * 64}, " -> ffffffff)"),
        ({"train_data": "other"}, "-> other"),
        ({"validation_data": "other"}, "-> other"),
        ({"architecture": {"dim": 64}}, "architecture.dim: 32 -> 64"),
        ({"something_new": 1}, "something_new: None -> 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value[:30],
)
def test_a_checkpoint_of_something_else_is_refused_and_left_alone(
    halted: RunDirectory, change: dict[str, Any], difference: str
) -> None:
    run = _copy(halted, f"identity-{next(iter(change))}")
    before = _content(run.file("checkpoints"))
    identity = _identity(run) | change
    with (
        _checkpoints(run, identity) as checkpoints,
        pytest.raises(InputError, match="a checkpoint of something else") as caught,
    ):
        checkpoints.newest_good()
    assert difference in str(caught.value)
    assert str(_folder(run, 6)) in str(caught.value)
    assert _content(run.file("checkpoints")) == before


KEPT_ON_REFUSAL = ("checkpoints", "metrics.jsonl", "telemetry.jsonl", "parameters.json")


def _refused(run: RunDirectory, difference: str, *overrides: str) -> None:
    """Going on is refused with both values; what the run has is as it was."""
    before = _content(run.path)
    with pytest.raises(InputError) as caught:
        run_training(run.path.name, *overrides)
    assert difference in str(caught.value)
    assert exit_code(caught.value) == Exit.BAD_INPUT
    kept = {name: text for name, text in before.items() if name.startswith(KEPT_ON_REFUSAL)}
    after = _content(run.path)
    assert {name: after[name] for name in kept} == kept
    assert set(after) - set(before) <= {"attempts/0002/attempt.json"}
    assert run.status()["state"] == "failed"


def _other_trunk(name: str) -> Path:
    """The same architecture with one weight that differs in its last bit."""
    other = Path(shutil.copytree("trunk", name))
    weights = torch.load(other / "consolidated.pth", weights_only=True)
    weights["layers.0.attention.wq.weight"].view(torch.int32)[0, 0] ^= 1
    torch.save(weights, other / "consolidated.pth")
    return other


@pytest.mark.slow
def test_another_base_is_refused_and_the_right_one_goes_on(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = _copy(halted, "other-base")
    other = _other_trunk("other-trunk")
    ours = _identity(run)["base"]
    _refused(
        run,
        f"the weights of the trunk differ ({ours[:8]} -> ",
        f"model.path={other}",
        "model.recipe=null",
    )
    run_training("other-base")
    _same(run, whole)


@pytest.mark.slow
@pytest.mark.usefixtures("whole")  # which makes the trunk
def test_another_base_put_in_place_of_the_first_is_refused() -> None:
    shutil.copytree("trunk", "in-place")
    here = ("model.path=in-place", "model.recipe=null")
    run = _crash_before(7, "base-in-place", *here)
    ours = _identity(run)["base"]
    shutil.rmtree("in-place")
    _other_trunk("in-place")
    _refused(run, f"the weights of the trunk differ ({ours[:8]} -> ", *here)


@pytest.mark.slow
def test_another_architecture_is_refused(halted: RunDirectory) -> None:
    run = _copy(halted, "other-architecture")
    write_recipe(Path("deeper.yaml"), [*TRUNK, "out=deeper", "architecture.n_layers=5"])
    changed = ("model.path=deeper", "model.recipe=deeper.yaml")
    _refused(run, "architecture.n_layers: 4 -> 5", *changed)


def _write_rows(path: Path, n: int, shift: int = 0) -> None:
    rows = [
        {"prompt": f"{i}+{j}?", "response": f"A{i + j + shift}", "reward": (i + j) % 2}
        for i in range(n)
        for j in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_other_data_at_the_same_path_is_refused_and_a_copy_elsewhere_is_not(folder: Path) -> None:
    paths = ("data.train=train.jsonl", "data.validation=validation.jsonl")
    _write_rows(Path("train.jsonl"), 6)
    _write_rows(Path("validation.jsonl"), 2)
    expected = run_training("data-whole", *paths)
    run = _crash_before(7, "data", *paths)
    for split in ("train", "validation"):
        shutil.copy(f"{split}.jsonl", f"copy.{split}.jsonl")
        ours = _identity(run)[f"{split}_data"]
        _write_rows(Path(f"{split}.jsonl"), 3, shift=1)
        text = (
            f"the rows of data.{split}, or their fields, template or tokens, differ ({ours[:8]} -> "
        )
        _refused(_copy(run, f"data-{split}"), text, *paths)
        shutil.copy(f"copy.{split}.jsonl", f"{split}.jsonl")
    elsewhere = ("data.train=copy.train.jsonl", "data.validation=copy.validation.jsonl")
    run_training("data", *elsewhere)
    assert "going on from step 6" in _log(run)
    _same(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=1",
        "checkpoint.keep_every=4",
        "checkpoint.keep_best=validation/value/mse",
        "distributed.fsdp.sharding_strategy=SHARD_GRAD_OP",
        "distributed.timeout_seconds=300",
        "training.max_bad_steps=7",
        "training.deterministic=false",
        "model.path=copied-trunk",
    ],
)
def test_what_does_not_change_the_training_may_change_on_resume(
    whole: RunDirectory, halted: RunDirectory, override: str
) -> None:
    if not Path("copied-trunk").exists():
        shutil.copytree("trunk", "copied-trunk")
    run = _copy(halted, override.replace("/", "-"))  # a copy: run.name and run.dir differ, too
    run_training(run.path.name, override, *(["model.recipe=null"] * ("model" in override)))
    assert "going on from step 6" in _log(run)
    _same(run, whole)


@pytest.mark.slow
def test_cadence_of_the_log_micro_batches_and_length_may_change_on_resume(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    expected = [record["train/loss"] for record in whole.records()]
    run = run_training(_copy(halted, "log").path.name, "logging.every_steps=1")
    assert [record["train/loss"] for record in run.records()] == expected
    assert all("value/mse" in record for record in run.records()[6:])
    run = run_training(_copy(halted, "micro").path.name, "training.micro_batch_tokens=64")
    assert [r["train/loss"] for r in run.records()] == pytest.approx(expected, rel=1e-4)
    run = run_training(_copy(halted, "length").path.name, "training.max_steps=10")
    assert [r["train/loss"] for r in run.records()][:6] == expected[:6]
    assert run.status()["step"] == len(run.records()) == 10


# Which are kept


def _evaluated(folder: Path, values: Mapping[int, Mapping[str, float]]) -> list[Path]:
    """Checkpoint folders with nothing but the figures of their evaluations."""
    for step, evaluation in values.items():
        path = folder / f"step-{step:08}"
        path.mkdir()
        (path / "facts.json").write_text(json.dumps({"evaluation": dict(evaluation)}))
    return sorted(folder.glob("step-*"))


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    folders = _evaluated(tmp_path, {step: {} for step in range(1, 8)})
    for n in (1, 2, 7, 99):
        assert _names(retained(folders, CheckpointConfig(keep_last=n))) == list(range(1, 8))[-n:]
    assert retained([], CheckpointConfig()) == []


def test_multiples_of_keep_every_are_kept(tmp_path: Path) -> None:
    folders = _evaluated(tmp_path, {step: {} for step in (50, 100, 150, 200, 250)})
    assert _names(retained(folders, CheckpointConfig(keep_last=1, keep_every=100))) == [
        *(100, 200, 250)
    ]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("validation/value/mse", 3),
        ("validation/value/last_token_mse", 3),
        ("validation/value/ece", 3),
        ("validation/value/r2", 2),
        ("validation/value/pairwise_accuracy", 2),
    ],
)
def test_the_best_is_the_smallest_error_or_the_largest_score(
    tmp_path: Path, metric: str, expected: int
) -> None:
    values = {1: 0.2, 2: 0.3, 3: 0.1, 4: 0.2}
    folders = _evaluated(tmp_path, {step: {metric: value} for step, value in values.items()})
    assert _names(best(folders, metric)) == [expected]
    kept = retained(folders, CheckpointConfig(keep_last=1, keep_best=metric))
    assert _names(kept) == [expected, 4]


def test_checkpoints_without_an_evaluation_are_not_the_best(tmp_path: Path) -> None:
    folders = _evaluated(tmp_path, {1: {}, 2: {"r2": -0.5}, 3: {}, 4: {"r2": -0.75}})
    assert _names(best(folders, "r2")) == [2]
    assert best(folders, "mse") == []
    assert _names(retained(folders, CheckpointConfig(keep_last=1, keep_best="mse"))) == [4]


def test_an_evaluation_of_one_label_makes_no_checkpoint_the_best(tmp_path: Path) -> None:
    mse, constant = "validation/value/mse", "validation/value/mse_constant"
    values = {1: {mse: 0.0, constant: 0.0}, 2: {mse: 0.1, constant: 0.2}, 3: {mse: 0.15}}
    folders = _evaluated(tmp_path, values)
    assert _names(best(folders, mse)) == [2]
    assert best(folders[:1], mse) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "choose"), [("validation/value/mse", min), ("validation/value/r2", max)]
)
def test_a_whole_run_keeps_the_last_the_multiples_and_the_best(
    metric: str, choose: Callable[..., int]
) -> None:
    name = metric.rpartition("/")[2]
    run = run_training(
        f"kept-{name}",
        "training.max_steps=16",
        "training.learning_rate=0.05",  # so that the best lies somewhere in between
        "evaluation.every_steps=2",
        "checkpoint.keep_last=1",
        "checkpoint.keep_every=6",
        f"checkpoint.keep_best={metric}",
    )
    values = {r["step"]: r[metric] for r in run.records() if metric in r}
    assert list(values) == list(range(2, 17, 2))
    assert _steps(run) == sorted({6, 12, 16, choose(values, key=values.__getitem__)})
    for step in _steps(run):
        facts = json.loads((_folder(run, step) / "facts.json").read_text())
        assert facts["evaluation"][metric] == values[step]
    assert list(run.file("checkpoints").glob(".*")) == []


@pytest.mark.slow
def test_nothing_is_deleted_if_the_newest_does_not_verify(halted: RunDirectory) -> None:
    run = _copy(halted, "no-clean-up")
    _flip(_folder(run, 6) / "__0_0.distcp")
    before = sorted(_content(run.file("checkpoints")).values())
    with _checkpoints(run, _identity(run), keep_last=1) as checkpoints:
        with pytest.raises(DamagedError, match="__0_0"):
            checkpoints._clean_up(_folder(run, 6))
        assert sorted(_content(run.file("checkpoints")).values()) == before
        assert _steps(run)[:2] == [2, 4]
    run = _copy(halted, "clean-up")
    with _checkpoints(run, _identity(run), keep_last=1) as checkpoints:
        checkpoints._clean_up(_folder(run, 6))
        assert _good_ones(run.file("checkpoints")) == [6]


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 8])
def test_a_checkpoint_damaged_between_commit_and_clean_up_costs_no_other(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = RunDirectory(f"runs/unlucky-{step}")
    monkeypatch.setattr("job.training.loop.LAST_SAVE_PAUSES", (0,))
    flush, report = checkpoint_module.sync, Checkpoints._report
    seen: list[list[int]] = []

    def damage(path: Path) -> None:
        flush(path)
        if path.name == "checkpoints" and _steps(run)[-1] == step and not seen:
            _flip(_folder(run, step) / "__0_0.distcp")
            seen.append(_steps(run))

    def look(self: Checkpoints) -> None:
        report(self)
        if len(seen) == 1:
            seen.append(_steps(run))

    monkeypatch.setattr(checkpoint_module, "sync", damage)
    monkeypatch.setattr(Checkpoints, "_report", look)
    run_training(run.path.name, "checkpoint.keep_last=1")
    assert seen[0] == [step - 2, step]  # before the clean-up
    assert seen[1][0] == step - 2  # and after it
    assert "saving a checkpoint failed" in _log(run)
    assert "__0_0.distcp was changed" in _log(run)
    assert _good_ones(run.file("checkpoints")) == [8]
    assert run.status()["checkpoint_error"] is None
    _same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["emptied", "missing"])
def test_an_older_checkpoint_that_is_damaged_does_not_hinder_saving(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    run = RunDirectory(f"runs/older-{damage}")
    monkeypatch.setattr("job.training.loop.LAST_SAVE_PAUSES", ())
    _at_step(monkeypatch, {4: lambda: DAMAGES[damage](_folder(run, 2) / "facts.json")})
    run_training(run.path.name, "checkpoint.keep_best=validation/value/mse")
    assert "failed" not in _log(run)
    assert run.status()["checkpoint"] == 8
    _same(run, whole)


@pytest.mark.slow
def test_an_old_checkpoint_that_cannot_be_removed_does_not_hinder_saving(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/not-removed")
    monkeypatch.setattr("job.training.loop.LAST_SAVE_PAUSES", ())

    def refuse(folder: Path) -> None:
        raise OSError(39, "Directory not empty", str(folder))  # a file that NFS keeps open

    monkeypatch.setattr(checkpoint_module, "remove", refuse)
    run_training("not-removed", "checkpoint.keep_last=1")
    assert run.status()["checkpoint"] == 8
    assert run.status()["checkpoint_error"] is None
    _same(run, whole)


# What is in a checkpoint


def _trainable(n: int) -> dict[str, int]:
    """Size by name of what is trained when the last n blocks are."""
    with torch.device("meta"):
        critic = Critic(read_architecture("trunk"))
    unfreeze_last_blocks(critic, n)
    return {name: p.numel() for name, p in critic.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("n", [0, 1, 2, 4, 99])
def test_a_checkpoint_holds_what_is_trained_and_nothing_frozen(n: int) -> None:
    settings = (f"training.num_unfrozen_layers={n}", "training.max_steps=2")
    run = run_training(f"content-{n}", *settings)
    checkpoint = _folder(run, 2)
    names = _trainable(n)
    assert FileSystemReader(checkpoint).read_metadata().state_dict_metadata.keys() == {
        *(f"model.{name}" for name in names),
        *(f"optimizer.{name}.exp_avg" for name in names),
        *(f"optimizer.{name}.exp_avg_sq" for name in names),
    }
    _equal(_stored_weights(checkpoint), _weights(run))
    if n == 0:
        assert all(name.startswith("value_head.") for name in names)


@pytest.mark.slow
def test_a_checkpoint_of_the_head_alone_is_small(folder: Path) -> None:
    run = run_training("head", "training.num_unfrozen_layers=0", "training.max_steps=2")
    assert sum(file.stat().st_size for file in _folder(run, 2).iterdir()) < 64 << 10


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "n"), [(32, 1), (128, 2), (128, 4)])
def test_a_checkpoint_takes_twelve_bytes_a_trained_parameter(dim: int, n: int) -> None:
    changes = (*TRUNK, f"out=wide-{dim}", f"architecture.dim={dim}")
    write_recipe(Path(f"wide-{dim}.yaml"), changes)
    run = run_training(
        f"bytes-{dim}-{n}",
        f"model.path=wide-{dim}",
        f"model.recipe=wide-{dim}.yaml",
        f"training.num_unfrozen_layers={n}",
        "training.max_steps=1",
    )
    count = json.loads(run.file("parameters.json").read_text())["model_trainable_params"]
    size = sum(file.stat().st_size for file in _folder(run, 1).glob("*.distcp"))
    assert 12 * count <= size <= 1.02 * 12 * count + (256 << 10)


# Several attempts


@pytest.mark.slow
def test_a_checkpoint_that_a_superseded_attempt_committed_too_late_is_ignored(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = _copy(halted, "late")
    late = _folder(run, 6).rename("late-checkpoint")
    _crash_before(6, "late")  # goes on from 4
    late.rename(_folder(run, 6))  # of attempt 1, committed only now
    assert Manifest.read(_folder(run, 6)).attempt == 1
    run_training("late")
    assert _log(run).count("going on from step 4") == 2
    assert "going on from step 6" not in _log(run)
    assert Manifest.read(_folder(run, 6)).attempt == 3  # it took the late one's place
    _same(run, whole)


@pytest.mark.slow
def test_a_checkpoint_committed_before_the_newer_attempt_went_on_is_used(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = _copy(halted, "in-time")
    Fence.take(run.path)  # an attempt that died before it recorded anything
    _crash_before(7, "in-time")
    run_training("in-time")
    assert _log(run).count("going on from step 6") == 2
    _same(run, whole)


@pytest.mark.slow
def test_an_attempt_that_is_superseded_leaves_and_changes_nothing(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/superseded")
    before: dict[str, bytes] = {}

    def supersede() -> None:
        Fence.take(run.path)
        before.update(_content(run.path))

    with monkeypatch.context() as patch:
        _at_step(patch, {5: supersede})
        with pytest.raises(Superseded) as caught:
            run_training("superseded")
    assert exit_code(caught.value) == 73
    after = _content(run.path)
    lines = after.pop("metrics.jsonl").removeprefix(before.pop("metrics.jsonl"))
    assert lines.count(b"\n") <= 1  # of the step that was being made; the newer one drops it
    assert after.pop("train.log", b"").startswith(before.pop("train.log", b""))
    assert after == before
    run_training("superseded")
    _same(run, whole)


@pytest.mark.slow
def test_an_attempt_superseded_while_it_saves_commits_nothing(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/overtaken")
    save = checkpoint_module.save

    def overtaken(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        if len(_steps(run)) == 2:
            Fence.take(run.path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save", overtaken)
        with pytest.raises(Superseded):
            run_training("overtaken")
    assert _steps(run) == [2, 4]
    run_training("overtaken")
    _same(run, whole)


# Beginning with the weights of another run


FROZEN_RATES = ("training.learning_rate=0", "training.max_steps=1")  # ends as it began


@pytest.mark.slow
def test_a_new_run_begins_with_exactly_the_trained_weights_of_a_run(whole: RunDirectory) -> None:
    run = run_training("from-run", f"model.init_from={whole.path}", *FROZEN_RATES)
    _equal(_weights(run), _weights(whole))
    fresh = run_training("from-nothing", *FROZEN_RATES)
    assert not _weights(fresh)["value_head.weight"].equal(_weights(whole)["value_head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6])
def test_a_new_run_begins_with_exactly_the_trained_weights_of_a_checkpoint(
    whole: RunDirectory, step: int
) -> None:
    checkpoint = _folder(whole, step)
    run = run_training(f"from-{step}", f"model.init_from={checkpoint}", *FROZEN_RATES)
    _equal(_weights(run), _stored_weights(checkpoint))
    assert (run.status()["step"], len(run.records())) == (1, 1)  # it counts from 1 again


@pytest.mark.slow
def test_weights_go_on_under_other_settings_and_with_more_blocks(whole: RunDirectory) -> None:
    source = f"model.init_from={whole.path}"
    run = run_training("deeper", source, "training.num_unfrozen_layers=2", *FROZEN_RATES)
    weights, given = _weights(run), _weights(whole)
    assert weights.keys() > given.keys()
    _equal({name: weights[name] for name in given}, given)
    base = torch.load("trunk/consolidated.pth", weights_only=True)
    added = {name.removeprefix("trunk."): weights[name] for name in weights.keys() - given.keys()}
    _equal(added, {name: base[name] for name in added})
    other = run_training("faster", source, "training.learning_rate=0.01", "objective.loss=bce")
    assert len(other.records()) == 8


@pytest.mark.slow
def test_the_command_line_names_the_run_to_begin_with(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--init-from", str(whole.path), "--override", "run.name=from-cli", *FROZEN_RATES]
    monkeypatch.setattr(sys, "argv", ["train", "--config", "critic.yaml", *options])
    monkeypatch.setattr(job.train, "set_up_logging", lambda: None)  # of the test's process
    job.train.main()
    run = RunDirectory("runs/from-cli")
    _equal(_weights(run), _weights(whole))
    assert run.config()["model"]["init_from"] == str(whole.path)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume", "never"])
    with pytest.raises(InputError, match="there is a run already"):
        job.train.main()


@pytest.mark.slow
def test_weights_of_another_base_are_refused(whole: RunDirectory) -> None:
    other = _other_trunk("init-trunk")
    ours = _identity(whole)["base"][:8]
    with pytest.raises(InputError, match=rf"the weights of the trunk differ \({ours} -> "):
        run_training(
            "init-base",
            f"model.path={other}",
            "model.recipe=null",
            f"model.init_from={whole.path}",
        )


@pytest.mark.slow
def test_weights_of_blocks_that_would_be_frozen_are_refused(folder: Path) -> None:
    run_training("two-blocks", "training.num_unfrozen_layers=2", "training.max_steps=2")
    with pytest.raises(InputError, match=r"(?s)frozen here; raise .*trunk\.layers\.1\.") as caught:
        run_training("one-block", "model.init_from=runs/two-blocks")
    assert exit_code(caught.value) == Exit.BAD_INPUT
    assert not RunDirectory("runs/one-block").records()


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_beginning_with_nothing_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=f"{place}: no intact checkpoint here"):
        find_weights(tmp_path / place, torch.nn.Module(), {})


@pytest.mark.slow
def test_weights_come_from_the_newest_intact_checkpoint_which_is_left_alone(
    halted: RunDirectory,
) -> None:
    source = _copy(halted, "half-damaged")
    _flip(_folder(source, 6) / "__0_0.distcp")
    before = _content(source.path)
    run = run_training("from-intact", f"model.init_from={source.path}", *FROZEN_RATES)
    _equal(_weights(run), _stored_weights(_folder(source, 4)))
    assert _content(source.path) == before
    for step in (2, 4):
        _flip(_folder(source, step) / "__0_0.distcp")
    for place in (source.path, _folder(source, 6)):
        with pytest.raises(InputError, match="no intact checkpoint here"):
            run_training("from-damaged", f"model.init_from={place}")
        shutil.rmtree("runs/from-damaged")


@pytest.mark.slow
def test_weights_of_a_run_are_not_those_that_a_superseded_attempt_committed_too_late(
    halted: RunDirectory,
) -> None:
    source = _copy(halted, "late-source")
    Fence.take(source.path).record(1, resumed_step=4)  # so that step 6 of attempt 1 came too late
    run = run_training("from-late", f"model.init_from={source.path}", *FROZEN_RATES)
    _equal(_weights(run), _stored_weights(_folder(source, 4)))


@pytest.mark.slow
def test_a_resumed_run_does_not_begin_again_with_the_other_ones_weights(
    whole: RunDirectory,
) -> None:
    source = _copy(whole, "source")
    setting = f"model.init_from={source.path}"
    expected = run_training("init-whole", setting)
    _crash_before(5, "init-resumed", setting)
    shutil.rmtree(source.path)
    _same(run_training("init-resumed", setting), expected)
    assert _log(RunDirectory("runs/init-resumed")).count("trained tensors from") == 1


# Steps that are not finite


def _train_steps(run: RunDirectory) -> list[int]:
    return [record["step"] for record in run.records()]


@pytest.mark.slow
def test_a_bad_step_changes_no_weight_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, whole: RunDirectory
) -> None:
    seen: dict[int, list[Tensor]] = {}

    def copy(step: int, learner: Learner) -> None:
        moments = [learner.moments(p) for p in learner.trainable]
        tensors = [*learner.trainable, *(t for moment in moments for t in moment.values())]
        seen[step] = [tensor.detach().clone() for tensor in tensors]

    _before_steps(monkeypatch, copy)
    _bad_steps(monkeypatch, [5])
    run = run_training("one-bad")
    assert all(a.equal(b) for a, b in zip(seen[5], seen[6], strict=True))
    assert not all(a.equal(b) for a, b in zip(seen[6], seen[7], strict=True))
    records, expected = run.records(), whole.records()
    assert _train_steps(run) == list(range(1, 9))
    assert records[:4] == expected[:4]
    assert records[4]["train/loss"] is None
    assert records[4]["train/skipped_steps"] == 1
    later = [r["train/loss"] for r in records[5:]]
    assert all(math.isfinite(loss) for loss in later)
    assert not any("train/skipped_steps" in r for r in records[5:])
    assert "step 5 is skipped: loss nan" in _log(run)
    assert run.status()["state"] == "finished"


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_a_bad_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Objective.loss

    def loss(self: Objective, outputs: Tensor, batch: Batch, step: int, whole: Counts) -> Tensor:
        loss = original(self, outputs, batch, step, whole)
        if step + 1 != 5:
            return loss
        return loss + 0 * (outputs - outputs.detach()).abs().sqrt().sum()  # 0, with slope nan

    monkeypatch.setattr(Objective, "loss", loss)
    run = run_training("bad-gradient")
    record = run.records()[4]
    assert record["train/loss"] is not None
    assert record["train/grad_norm"] is None
    assert record["train/skipped_steps"] == 1
    assert all(t.isfinite().all() for t in _weights(run).values())


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
def test_a_run_with_a_bad_step_goes_on_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    bad = [3, 5]  # the optimizer has made fewer updates than there were steps
    with monkeypatch.context() as patch:
        _bad_steps(patch, bad)
        expected = run_training(f"bad-whole-{step}")
    name = f"bad-resumed-{step}"
    with monkeypatch.context() as patch:
        _factors(patch, lambda s: _raise() if s == step else math.nan if s in bad else 1.0)
        with pytest.raises(Crash):
            run_training(name)
    with monkeypatch.context() as patch:
        _bad_steps(patch, bad)
        _same(run_training(name), expected)


def _raise() -> float:
    raise Crash


@pytest.mark.slow
@pytest.mark.parametrize("max_bad", [1, 2, 3])
def test_too_many_bad_steps_go_back_once_and_are_passed_over(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch, max_bad: int
) -> None:
    bad = list(range(5, 5 + max_bad))
    made: list[int] = []
    _before_steps(monkeypatch, lambda step, _: made.append(step))
    _bad_steps(monkeypatch, bad)
    run = run_training(f"back-{max_bad}", f"training.max_bad_steps={max_bad}")
    rest = list(range(bad[-1] + 1, 9))
    assert made == [*range(1, 5), *bad, *rest]
    assert json.loads(run.file("bad_steps.json").read_text()) == bad
    assert f"{max_bad} bad steps in a row: went back to step 4" in _log(run)
    records = run.records()
    assert _train_steps(run) == list(range(1, 9))
    assert records[:4] == whole.records()[:4]
    for count, step in enumerate(bad, 1):
        assert records[step - 1]["train/loss"] is None
        assert records[step - 1]["train/skipped_steps"] == count
    assert all(math.isfinite(records[step - 1]["train/loss"]) for step in rest)
    assert run.status()["state"] == "finished"


@pytest.mark.slow
def test_going_back_equals_leaving_the_bad_steps_out(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _bad_steps(monkeypatch, [5, 6])
    skipping = run_training("skipping", "training.max_bad_steps=3")
    back = run_training("going-back", "training.max_bad_steps=2")
    losses = [[r["train/loss"] for r in run.records()] for run in (skipping, back)]
    assert losses[0] == losses[1]
    _equal(_weights(back), _weights(skipping))


@pytest.mark.slow
def test_a_run_that_went_back_and_crashed_goes_on_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting = "training.max_bad_steps=2"
    with monkeypatch.context() as patch:
        _bad_steps(patch, [5, 6])
        expected = run_training("back-whole", setting)
    with monkeypatch.context() as patch:
        _factors(patch, lambda s: _raise() if s == 8 else math.nan if s in (5, 6) else 1.0)
        with pytest.raises(Crash):
            run_training("back-resumed", setting)
    _same(run_training("back-resumed", setting), expected)


@pytest.mark.slow
def test_a_second_streak_ends_the_run_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _bad_steps(monkeypatch, [3, 4, 7, 8])
    with pytest.raises(InputError, match=r"2 step\(s\) in a row; also after going back") as caught:
        run_training("second", "training.max_bad_steps=2")
    assert exit_code(caught.value) == 78
    assert "step 8: loss nan" in str(caught.value)
    assert "Lower training.learning_rate" in str(caught.value)
    run = RunDirectory("runs/second")
    assert run.status()["state"] == "failed"
    assert str(caught.value) in run.status()["error"]
    assert _train_steps(run) == list(range(1, 8))


@pytest.mark.slow
def test_a_streak_before_the_first_checkpoint_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _bad_steps(monkeypatch, [2, 3])
    settings = ("training.max_bad_steps=2", "checkpoint.every_steps=4")
    with pytest.raises(InputError, match=r"step 3: loss nan.*in 2 step") as caught:
        run_training("early", *settings)
    assert exit_code(caught.value) == 78
    assert "also after" not in str(caught.value)
    assert not RunDirectory("runs/early").file("bad_steps.json").exists()


@pytest.mark.slow
def test_no_checkpoint_is_committed_during_a_streak(monkeypatch: pytest.MonkeyPatch) -> None:
    _bad_steps(monkeypatch, [4, 5, 6])
    seen: dict[int, list[int]] = {}
    run = RunDirectory("runs/streak")
    _before_steps(monkeypatch, lambda step, _: seen.__setitem__(step, _steps(run)))
    run_training("streak")
    assert seen[7] == [2]
    assert _steps(run) == [2, 7, 8]


@pytest.mark.slow
def test_a_stop_during_a_streak_goes_on_from_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory("runs/stopped-streak")
    _bad_steps(monkeypatch, [5, 6, 7])
    expected = run_training("whole-streak")
    with monkeypatch.context() as patch:
        _at_step(patch, {6: run.file("stop").touch})
        with pytest.raises(Stopped):
            run_training("stopped-streak")
    assert _steps(run) == [2, 4]
    _same(run_training("stopped-streak"), expected)


def _spoil(learner: Learner) -> None:
    with torch.no_grad():
        learner.trainable[0].view(-1)[0] = math.nan


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 5, 6])
def test_weights_damaged_in_memory_are_healed_by_going_back(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    damaged: list[int] = []

    def spoil(current: int, learner: Learner) -> None:
        if current == step and not damaged:
            damaged.append(step)
            _spoil(learner)

    _before_steps(monkeypatch, spoil)
    run = run_training(f"healed-{step}", "training.max_bad_steps=2")
    last_good = (step - 1) // 2 * 2
    assert f"2 bad steps in a row: went back to step {last_good}" in _log(run)
    records = run.records()
    assert _train_steps(run) == list(range(1, 9))
    assert records[: step - 1] == whole.records()[: step - 1]
    lost = [record["step"] for record in records if record["train/loss"] is None]
    assert lost == [step, step + 1]
    assert all(math.isfinite(v) for v in records[-1].values())
    assert "validation/value/mse" in records[-1]
    assert all(tensor.isfinite().all() for tensor in _weights(run).values())
    assert all(tensor.isfinite().all() for tensor in _tensors(_folder(run, 8)).values())


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 8])
def test_a_run_does_not_finish_with_weights_damaged_shortly_before_its_end(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = RunDirectory(f"runs/end-{step}")
    damaged: list[int] = []

    def spoil(current: int, learner: Learner) -> None:
        if current == step and not damaged:
            damaged.append(step)
            _spoil(learner)

    _before_steps(monkeypatch, spoil)
    try:
        run_training(run.path.name)
    except InputError as error:
        assert "finite" in str(error)  # noqa: PT017 - either of two ends is right
        return
    assert all(tensor.isfinite().all() for tensor in _weights(run).values())


@pytest.mark.slow
def test_a_run_whose_last_step_is_bad_is_saved_and_evaluated_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _bad_steps(monkeypatch, [8])
    run = run_training("bad-end")
    assert run.status()["state"] == "finished"
    assert "validation/value/mse" in run.records()[-1]
    assert _steps(run)[-1] == 8


@pytest.mark.slow
def test_going_back_with_every_checkpoint_damaged_ends_with_a_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunDirectory("runs/no-way-back")
    _bad_steps(monkeypatch, [5, 6])

    def damage() -> None:
        for step in _steps(run):
            _flip(_folder(run, step) / "__0_0.distcp")

    _at_step(monkeypatch, {5: damage})
    with pytest.raises(InputError, match="step 6: loss nan"):
        run_training("no-way-back", "training.max_bad_steps=2")


@pytest.mark.slow
def test_going_back_past_a_damaged_checkpoint_takes_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunDirectory("runs/further-back")
    _bad_steps(monkeypatch, [5, 6])
    _at_step(monkeypatch, {5: lambda: _flip(_folder(run, 4) / "__0_0.distcp")})
    run_training("further-back", "training.max_bad_steps=2")
    assert "went back to step 2" in _log(run)
    assert _train_steps(run) == list(range(1, 9))
    assert _steps(run) == [2, 4, 6, 8]


# A file system that is slow, away or full


@pytest.fixture
def _background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are saved by their own thread, as in earnest."""
    monkeypatch.setattr(checkpoint_module, "_in_background", _IN_BACKGROUND)


@pytest.mark.slow
@pytest.mark.usefixtures("_background")
def test_training_goes_on_while_a_slow_file_system_takes_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    length = "training.max_steps=40"
    expected = run_training("fast", length, "checkpoint.every_steps=1000")
    current = 0
    spans: list[tuple[int, int]] = []
    under_way = threading.Lock()
    save = checkpoint_module.save

    def slow(*arguments: Any, **options: Any) -> None:
        assert under_way.acquire(blocking=False), "two saves at once"
        began = current
        limit = time.monotonic() + 10
        while current < min(began + 5, 39) and time.monotonic() < limit:
            time.sleep(0.005)
        save(*arguments, **options)
        spans.append((began, current))
        under_way.release()

    def count(step: int, _: Learner) -> None:
        nonlocal current
        current = step

    monkeypatch.setattr(checkpoint_module, "save", slow)
    _before_steps(monkeypatch, count)
    run = run_training("slow", length)
    assert len(spans) >= 2
    assert all(later[0] >= earlier[1] for earlier, later in itertools.pairwise(spans))
    assert max(end - began for began, end in spans) >= 5
    assert "failed" not in _log(run)
    assert _steps(run)[-1] == 40
    _same(run, expected)
    saved = _good_ones(run.file("checkpoints"))
    between = saved[len(saved) // 2]
    for later in saved:
        if later > between:
            shutil.rmtree(_folder(run, later))
    run.set_status(state="failed")
    run_training("slow", length)  # what was copied while training went on is of one step
    _same(run, expected)


def _aside(run: RunDirectory) -> Path:
    return run.path.with_name(f"{run.path.name}.away")


def _take_away(run: RunDirectory) -> None:
    run.file("checkpoints").rename(_aside(run))


def _block(run: RunDirectory) -> None:
    """A file where the folder was: nobody, root neither, can write below it."""
    _take_away(run)
    run.file("checkpoints").write_text("")


def _put_back(run: RunDirectory) -> None:
    run.file("checkpoints").unlink()
    _aside(run).rename(run.file("checkpoints"))


@pytest.mark.slow
def test_a_checkpoints_folder_that_cannot_be_written_for_a_while_costs_nothing(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/blocked")
    errors: dict[int, str | None] = {}
    actions = {5: lambda: _block(run), 8: lambda: _put_back(run)}

    def act(step: int, _: Learner) -> None:
        errors[step] = run.status()["checkpoint_error"]
        if step in actions:
            actions[step]()

    _before_steps(monkeypatch, act)
    run_training("blocked")
    assert errors[6] is None
    assert "checkpoints" in cast(str, errors[8])
    assert _log(run).count("the last good one is step 4") == 2  # tried at 6 and 7
    assert run.status()["checkpoint_error"] is None
    assert _steps(run) == [2, 4, 8]
    _same(run, whole)


@pytest.mark.slow
def test_a_copy_for_a_checkpoint_that_fails_costs_only_this_one(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/uncopied")
    update, steps = HostCopy.update, [0]

    def fail_at_six(self: HostCopy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if steps[-1] == 6:
            raise RuntimeError("CUDA error: out of memory")
        return update(self, tensors)

    monkeypatch.setattr(HostCopy, "update", fail_at_six)
    _before_steps(monkeypatch, lambda step, _: steps.append(step))
    run_training(run.path.name)
    assert "saving a checkpoint failed: rank 0: CUDA error: out of memory" in _log(run)
    assert _steps(run) == [2, 4, 7, 8]
    _same(run, whole)


def test_the_memory_that_saving_needs_is_taken_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places: list[set[int]] = []
    update = HostCopy.update

    def look(self: HostCopy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = update(self, tensors)
        places.append({copy.data_ptr() for copy in copies.values()})
        return copies

    def at_step(step: int, _: Learner) -> None:
        if step == 1:
            assert len(places) == 1

    monkeypatch.setattr(HostCopy, "update", look)
    _before_steps(monkeypatch, at_step)
    run_training("reserved", "training.max_steps=2")
    assert len(places) == 2
    assert places[0] == places[1]


@pytest.mark.slow
def test_a_checkpoints_folder_that_vanishes_while_it_is_written_is_made_anew(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/vanishing")
    save = checkpoint_module.save

    def vanish(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        if _steps(run) == [2, 4]:
            _take_away(run)

    monkeypatch.setattr(checkpoint_module, "save", vanish)
    errors: dict[int, str | None] = {}
    _before_steps(monkeypatch, lambda s, _: errors.update({s: run.status()["checkpoint_error"]}))
    run_training("vanishing")
    # the save of step 6 is reported after step 7, which is saved in its place
    assert "No such file" in _log(run)
    assert "the last good one is step 4" in _log(run)
    assert _steps(run) == [7, 8]
    assert _good_ones(_aside(run)) == [2, 4]
    assert run.status()["checkpoint_error"] is None
    _same(run, whole)


@pytest.mark.slow
@pytest.mark.usefixtures("_background")
def test_an_error_of_the_disk_inside_the_background_thread_ends_nothing(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/background")
    _at_step(monkeypatch, {4: lambda: _block(run), 7: lambda: _put_back(run)})
    run_training("background")
    assert _steps(run)[-1] == 8
    assert run.status()["checkpoint_error"] is None
    _same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["rank-00000.state", "facts.json", "config.yaml", MANIFEST])
def test_a_disk_that_fills_up_at_any_file_of_a_checkpoint_costs_only_this_one(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run = RunDirectory(f"runs/full-{place}")
    flush = checkpoint_module.sync
    left = [place]

    def full(path: Path) -> None:
        if path.name in left and "step-00000006" in path.parent.name:
            left.remove(path.name)
            raise OSError(28, "No space left on device", str(path))
        flush(path)

    monkeypatch.setattr(checkpoint_module, "sync", full)
    run_training(run.path.name)
    assert left == []
    assert "saving a checkpoint failed: rank 0: [Errno 28] No space left on device" in _log(run)
    assert _steps(run) == [2, 4, 7, 8]
    assert list(run.file("checkpoints").glob(".*")) == []
    _same(run, whole)


def test_a_status_that_a_full_disk_did_not_take_is_written_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    run.set_status(state="running", step=1)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("job.run.directory.write_atomic", full)
        run.set_status(checkpoint_error="no space")
    run.set_status(step=2)
    status = run.status()
    assert (status["state"], status["step"]) == ("running", 2)
    assert status["checkpoint_error"] == "no space"


@pytest.mark.slow
def test_metrics_that_cannot_be_written_keep_no_checkpoint_from_being_saved(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/metrics-lost")
    dead = os.open("/dev/full", os.O_WRONLY)  # like a handle that has become stale

    def die(step: int, _: Learner) -> None:
        if step == 3:
            for file in _opened(run.file("metrics.jsonl")):
                os.dup2(dead, file)

    _before_steps(monkeypatch, die)
    run_training("metrics-lost")
    assert _steps(run) == [2, 4, 6, 8]
    assert "metrics.jsonl: No space left on device; lines are kept in memory" in _log(run)
    assert "metrics.jsonl: No space left on device; making it anew" in _log(run)
    _same(run, whole)


def _opened(path: Path) -> list[int]:
    """This process's descriptors of a file."""
    numbers = [int(link.name) for link in Path("/proc/self/fd").iterdir()]
    places = {n: Path(f"/proc/self/fd/{n}") for n in numbers}
    return [n for n, link in places.items() if link.exists() and link.samefile(path)]


@pytest.mark.slow
def test_a_last_save_that_fails_for_good_ends_the_run_and_loses_no_other_checkpoint(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/last")
    monkeypatch.setattr("job.training.loop.LAST_SAVE_PAUSES", (0, 0, 0))
    with monkeypatch.context() as patch:
        _at_step(patch, {7: lambda: _block(run)})
        with pytest.raises(SaveError, match="step 8 could not be saved") as caught:
            run_training("last")
    assert exit_code(caught.value) == Exit.IO_FAILED
    assert "runs/last/checkpoints" in str(caught.value)
    assert "(disk /" in str(caught.value)
    assert _log(run).count("trying again in 0 s") == 3
    assert run.status()["state"] == "failed"
    assert "could not be saved" in run.status()["error"]
    assert "checkpoints" in run.status()["checkpoint_error"]
    assert _metrics(run) == _metrics(whole)
    assert not run.file("critic.safetensors").exists()
    assert _good_ones(_aside(run)) == [2, 4, 6]
    _put_back(run)
    run_training("last")
    assert "going on from step 6" in _log(run)
    assert run.status()["state"] == "finished"
    _same(run, whole)


@pytest.mark.slow
def test_a_last_save_that_fails_once_is_tried_again(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/last-but-one")
    _at_step(monkeypatch, {8: lambda: _block(run)})
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            _put_back(run)

    clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)  # other threads sleep as ever
    monkeypatch.setattr("job.training.loop.time", clock)
    run_training("last-but-one")
    assert pauses == [1, 10]
    assert run.status()["checkpoint_error"] is None
    assert _steps(run) == [2, 4, 6, 8]
    _same(run, whole)


# A GPU whose memory runs out


def _out_of_memory(step: int) -> Callable[[int, Learner], None]:
    def act(current: int, _: Learner) -> None:
        if current == step:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"
            )

    return act


def test_memory_that_runs_out_before_anything_is_saved_is_wrong_input_that_says_what_to_lower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _before_steps(monkeypatch, _out_of_memory(2))
    with pytest.raises(InputError) as ended:
        run_training("too-large")
    assert exit_code(ended.value) is Exit.BAD_INPUT
    assert str(ended.value) == (
        "the GPU's memory ran out (Tried to allocate 2.00 GiB): lower training.micro_batch_tokens "
        "(128), set distributed.fsdp.activation_checkpointing, unfreeze fewer blocks than 1 "
        "(training.num_unfrozen_layers), or take more GPUs"
    )


@pytest.mark.usefixtures("_background")
def test_memory_that_runs_out_after_a_checkpoint_is_a_crash_that_goes_on_from_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _before_steps(monkeypatch, _out_of_memory(3))
    with pytest.raises(torch.OutOfMemoryError):
        run_training("too-large-later")
    with pytest.raises(InputError, match="memory ran out"):  # the second attempt comes no further
        run_training("too-large-later")


def test_a_gpu_that_other_processes_fill_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    config, world = load_config(CriticConfig, "critic.yaml"), World(device=torch.device("cuda", 0))
    sizes = {"free": 1, "reserved": 20}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (sizes["free"] * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: sizes["reserved"] * 10**9)

    def run_out() -> None:
        with out_of_memory_judged(config, world, lambda: True):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UnfitNode, match=r"other processes have 58\.4 of its 80\.0 GB"):
        run_out()
    sizes["reserved"] = 77
    with pytest.raises(torch.OutOfMemoryError):
        run_out()
