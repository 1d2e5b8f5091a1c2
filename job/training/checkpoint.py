"""Checkpoints of what is trained: sharded, verified, committed as a whole or not at all.

    checkpoints/step-00000200/       committed: its manifest names every file with a checksum
        __R_0.distcp, .metadata      parameters and optimizer state, by torch.distributed.checkpoint
        rank-RRRRR.state             each rank's TrainingState
        facts.json                   step, identity of trunk and data, last evaluation
        config.yaml
        manifest.json
    checkpoints/.step-..attempt-..   being written, or left by an attempt that was killed
    checkpoints/damaged-step-..      set aside

Saving copies the state to host memory and writes it in the background. The rename of the folder is
the one and only commit. A checkpoint can be read by any number of ranks.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from job.common.errors import Ending, Exit, StorageError, exit_code, first_line
from job.common.files import named, sync
from job.common.places import disk
from job.common.schema import CheckpointConfig
from job.common.version import commit
from job.distributed.world import World
from job.model.shards import local_shard
from job.run.checkpoint_store import (
    read_facts,
    refuse_other,
    remove,
    retained,
    set_aside,
)
from job.run.committed import committed, folders
from job.run.directory import RunDirectory
from job.run.fence import Fence
from job.run.manifest import FACTS, MANIFEST, DamagedError, FileSum, Manifest
from job.run.names import checkpoint_name, is_leftover, unfinished_name
from job.training.host_copy import HostCopy
from job.training.learner import Learner
from job.training.state import TrainingState

RETRIES_PER_PERIOD = 10  # a failed save is tried again after this part of checkpoint.every_steps
_TIMEOUT = timedelta(hours=2)  # of a rank that waits for the slowest one's files
_log = logging.getLogger(__name__)
Result = TypeVar("Result")
Tensors = dict[str, Tensor]


class SaveError(StorageError):
    """A checkpoint could not be written; the ones before it are as they were."""

    def __init__(self, text: str, code: Exit = Exit.IO_FAILED) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Snapshot:
    """One rank's copy of everything that a checkpoint holds; `problem` is why it is none."""

    tensors: Tensors
    state: bytes
    facts: dict[str, Any]
    step: int
    problem: Exception | None = None


class Checkpoints:
    """The checkpoints of a run, as one of its ranks writes and reads them.

    Args:
        identity: what a checkpoint must agree with, as nested names and values.

    Attributes:
        newest: the last committed step; 0 if there is none.
        has_saved: whether this attempt has committed one.
        logs_written: makes metrics up to now durable, as far as that is possible.
        states_written: the same for what each rank has kept of frozen blocks' states, which later
            steps rely on.
    """

    def __init__(
        self,
        run: RunDirectory,
        fence: Fence,
        config: CheckpointConfig,
        identity: dict[str, Any],
        world: World,
    ) -> None:
        self._run, self._fence, self._config = run, fence, config
        self._identity, self._world = identity, world
        self._folder = run.file("checkpoints")
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._copy = HostCopy()
        self._saving: Future[int] | None = None
        self._failed: SaveError | None = None  # how the last save ended
        self._next = config.every_steps
        self.newest, self.has_saved = 0, False
        self.logs_written: Callable[[], None] = lambda: None
        self.states_written: Callable[[], None] = lambda: None

    # Saving

    def reserve(self, learner: Learner) -> None:
        """Take the host memory that saving needs, so that no step has to wait for it.

        Raises:
            SaveError: there is too little of it.
        """
        try:
            self._copy.update(trained_tensors(learner))
        except RuntimeError as error:
            text = f"no host memory for the copy that checkpoints are written from: {error}"
            raise SaveError(text) from error

    def save_if_due(self, learner: Learner, state: TrainingState, figures: Figures) -> None:
        """Begin to save where it is time to; every rank must call this after every step."""
        self._report()
        if not self._wanted(state.step) or state.bad_steps:
            return
        busy, failed = self._world.sum([self._saving is not None, self._failed is not None])
        if busy or (state.step < self._next and not failed):
            return
        self._begin(learner, state, figures)

    def save_now(self, learner: Learner, state: TrainingState, figures: Figures) -> None:
        """Return when this step is committed.

        Raises:
            SaveError: it could not be saved.
        """
        self.wait()
        if state.step in (0, self.newest) or state.bad_steps:
            return
        self._begin(learner, state, figures)
        self.wait()
        if self._failed is not None:
            newer = self._world.is_main and self._fence.superseded()
            if self._world.sum([newer])[0]:
                raise self._fence.ending().everywhere()
            text = f"step {state.step} could not be saved in {self._folder}: {self._failed}"
            raise SaveError(f"{text} ({disk(self._folder)})", self._failed.code).everywhere()

    def wait(self) -> None:
        """Wait for the save that is under way."""
        if self._saving is not None:
            self._saving.exception()
            self._report()

    def _wanted(self, step: int) -> bool:
        """Whether to ask the other ranks about saving: a function of agreed values alone."""
        retry = max(1, self._config.every_steps // RETRIES_PER_PERIOD)
        return step >= self._next or step % retry == 0

    def _begin(self, learner: Learner, state: TrainingState, figures: Figures) -> None:
        every = self._config.every_steps
        self._next = (state.step // every + 1) * every
        facts = {
            "step": state.step,
            "attempt": self._fence.number,
            "world_size": self._world.size,
            "identity": self._identity,
            "evaluation": dict(figures),
            "commit": commit(),
        }
        tensors, problem = Tensors(), None
        try:
            tensors = self._copy.update(trained_tensors(learner))
        except Exception as error:  # the others, who write together with this rank, must hear it
            problem = error
        snapshot = Snapshot(tensors, state.to_bytes(), facts, state.step, problem)
        self._saving = _in_background(lambda: self._write(snapshot))

    def _report(self) -> None:
        """Take note of how a background save has ended."""
        if self._saving is None or not self._saving.done():
            return
        error, saving, self._saving = self._saving.exception(), self._saving, None
        if error is None:
            self._failed, self.newest, self.has_saved = None, saving.result(), True
            self._run.set_status(checkpoint=self.newest, checkpoint_error=None)
            return
        self._failed = error if isinstance(error, SaveError) else SaveError(str(error))
        text = f"saving a checkpoint failed: {error}"
        _log.error("%s; training goes on, the last good one is step %d", text, self.newest)
        self._run.set_status(checkpoint_error=text)

    def _write(self, snapshot: Snapshot) -> int:
        """Write and commit a checkpoint; the work of the background thread."""
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)  # a new thread begins at the first GPU
        scratch = self._folder / unfinished_name(snapshot.step, self._fence.number)
        self._together(lambda: self._prepare(scratch, snapshot))
        try:
            save(snapshot.tensors, storage_writer=_writer(scratch), process_group=self._group)
        except (CheckpointException, Exception) as error:  # of whichever rank; the first is odd
            self._together(lambda: self._discard(scratch))
            raise SaveError(f"{_cause(error)} (in {scratch})") from None
        try:
            parts = self._together(lambda: self._write_state(scratch, snapshot))
            sums = {name: one for part in parts for name, one in part.items()}
            self._together(lambda: self._commit(scratch, snapshot, sums))
        except SaveError:
            self._together(lambda: self._discard(scratch))
            raise
        return snapshot.step

    def _together(self, work: Callable[[], Result]) -> list[Result]:
        """Every rank's result of `work`, or the same SaveError on every rank."""
        result, problem = None, None
        try:
            result = work()
        except Exception as error:  # of any kind: the other ranks wait for this one's word
            code = exit_code(error) if isinstance(error, Ending) else Exit.IO_FAILED
            problem = (f"rank {self._world.rank}: {error}", code)
        outcomes: list[Any] = [None] * self._world.size
        dist.all_gather_object(outcomes, (result, problem), group=self._group)
        problems = [problem for _, problem in outcomes if problem is not None]
        if problems:
            raise SaveError(*problems[0])
        return [result for result, _ in outcomes]

    def _prepare(self, scratch: Path, snapshot: Snapshot) -> None:
        """Refuse what is not worth saving, and make the folder."""
        if snapshot.problem is not None:
            raise snapshot.problem
        damaged = [
            n for n, tensor in snapshot.tensors.items() if not local_shard(tensor).isfinite().all()
        ]
        if damaged:
            raise Ending(f"{damaged[0]} is not finite")  # no disk's fault
        if self._world.is_main:
            self._refuse_if_superseded()
            self._folder.mkdir(exist_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()

    def _refuse_if_superseded(self) -> None:
        if self._fence.superseded():
            raise OSError("a newer attempt of this run has taken over")

    def _discard(self, scratch: Path) -> None:
        if self._world.is_main:
            shutil.rmtree(scratch, ignore_errors=True)

    def _write_state(self, scratch: Path, snapshot: Snapshot) -> dict[str, FileSum]:
        """Write this rank's state; checksums of all files that this rank wrote, read back."""
        self.states_written()
        _write_durably(scratch / f"rank-{self._world.rank:05}.state", snapshot.state)
        names = [f"rank-{self._world.rank:05}.state"]
        names += [file.name for file in scratch.glob(f"__{self._world.rank}_*")]
        if self._world.is_main:
            _write_durably(scratch / FACTS, json.dumps(snapshot.facts, indent=2).encode())
            _write_durably(scratch / "config.yaml", self._run.file("config.yaml").read_bytes())
            names += [FACTS, "config.yaml", ".metadata"]
        return {name: FileSum.of(scratch / name) for name in names}

    def _commit(self, scratch: Path, snapshot: Snapshot, sums: dict[str, FileSum]) -> None:
        if not self._world.is_main:
            return
        self.logs_written()
        Manifest(snapshot.step, self._fence.number, sums).write(scratch)
        sync(scratch / MANIFEST)
        sync(scratch)
        self._refuse_if_superseded()
        target = self._folder / checkpoint_name(snapshot.step)
        if target.exists():
            if target in self._committed():  # this attempt has slept, and the newer one is through
                raise OSError(f"{target} is there already")
            remove(target)  # an attempt that was superseded has committed it too late
        scratch.rename(target)
        try:
            sync(self._folder)
            self._clean_up(target)
        except OSError as error:  # it is committed all the same
            _log.warning("step %d is saved, but: %s", snapshot.step, error)

    def _clean_up(self, newest: Path) -> None:
        """Remove what is not to be kept, once the newest is known to be good on disk."""
        there = self._committed()
        kept = retained(there, self._config)
        surplus = [folder for folder in there if folder not in kept]
        if surplus:
            try:
                Manifest.read(newest).verify(newest)
            except DamagedError:
                set_aside(newest)  # out of the way of the next attempt to save this step
                raise
        for folder in surplus:
            try:
                remove(folder)
            except OSError as error:  # the newest is committed all the same
                _log.warning("cannot remove %s: %s", folder, error.strerror)

    # Reading

    def newest_good(self) -> Path | None:
        """The newest committed and intact checkpoint; damaged ones are set aside. For rank 0.

        Raises:
            InputError: it belongs to another trunk, architecture, data or number of blocks.
        """
        for folder in reversed(self._committed()):
            try:
                Manifest.read(folder).verify(folder)
            except DamagedError as defect:
                aside = set_aside(folder)
                _log.error("damaged checkpoint: %s; set aside as %s", defect, aside)
                continue
            refuse_other(folder, self._identity)
            return folder
        return None

    def restore(self, folder: Path, learner: Learner) -> TrainingState:
        """Put a checkpoint into the learner, on every rank."""
        tensors = trained_tensors(learner)
        load(tensors, storage_reader=FileSystemReader(folder), process_group=self._group)
        facts = read_facts(folder)
        stored = [_state_file(folder, rank).read_bytes() for rank in range(facts["world_size"])]
        state = TrainingState.of_rank(stored, self._world.rank, self._world.size)
        learner.set_updates(state.step, state.skipped_steps, state.skipped_at)
        self.newest = state.step
        self._next = (state.step // self._config.every_steps + 1) * self._config.every_steps
        return state

    def remove_leftovers(self) -> None:
        """Remove what killed attempts were writing or removing, or have committed too late."""
        if not self._run.writes:
            return
        for entry in self._folder.glob(".*"):
            if is_leftover(entry.name):
                shutil.rmtree(entry, ignore_errors=True)
        for folder in set(folders(self._folder)) - set(self._committed()):
            remove(folder)

    def _committed(self) -> list[Path]:
        return committed(self._run.path)


Figures = Mapping[str, float]


def trained_tensors(learner: Learner) -> Tensors:
    """Parameters and AdamW's moments by name: the tensors themselves, sharded as they are."""
    tensors = {}
    for name, parameter in learner.critic.named_parameters():
        if parameter.requires_grad:
            moments = learner.moments(parameter)
            tensors[f"model.{name}"] = parameter.detach()
            tensors |= {f"optimizer.{name}.{kind}": moment for kind, moment in moments.items()}
    return tensors


def _state_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05}.state"


def _writer(scratch: Path) -> FileSystemWriter:
    return FileSystemWriter(scratch, sync_files=True)


def _cause(error: BaseException) -> str:
    """The first rank's error within torch.distributed.checkpoint's own."""
    failures = getattr(error, "failures", None)
    if not failures:
        return first_line(error, named=True)
    rank, (cause, _) = next(iter(failures.items()))
    return f"rank {rank}: {first_line(cause)}"


def _in_background(work: Callable[[], Result]) -> Future[Result]:
    """A daemon thread, so that a disk that hangs does not keep a process from ending."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _write_durably(file: Path, content: bytes) -> None:
    with named(file):
        file.write_bytes(content)
        sync(file)
