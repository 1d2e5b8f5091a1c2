"""Fills a prefix cache before any training: forward passes of the frozen blocks alone.

A rank holds all of them, and nothing of what is trained: with one GPU of a trunk that is too large
for training, the cache can be built, and the training that reads it needs less.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import nn

from job.common.errors import InputError, StorageError
from job.common.progress import only_warnings, progress
from job.common.schema import CriticConfig, PrefixCacheMode
from job.data.packing import Batch, Indices, Packer
from job.data.state_shards import EVALUATION, Writer
from job.distributed.world import World, joined_world
from job.model.architecture_file import read_architecture
from job.model.fingerprint import fingerprint
from job.model.prefix import Prefix
from job.model.transformer import Trunk
from job.model.weights import load_trunk
from job.run.directory import RunDirectory
from job.training.agreement import seen_by_all, stop_together
from job.training.cache_boundary import Boundary, chosen_rows, wanted
from job.training.cache_folders import touch
from job.training.cache_opening import Opening, refuse_unwritable
from job.training.cache_rows import Rows, put_states
from job.training.data import load_critic_data
from job.training.gpu import check_gpu
from job.training.preparation import prepare_inputs, set_up_torch

_PART = 64  # micro-batches of each rank that are laid out at once
_KEPT = "what is computed is kept"
_log = logging.getLogger("job.cache")


def build(config: CriticConfig, *, verify: bool = False) -> Path:
    """Keep the states that a configuration's training would read; the cache's folder.

    With `training.prefix_cache=validation` those of evaluations alone. What is there already is not
    computed again.

    Raises:
        InputError: something in the input is wrong, or there is no room.
        Stopped: asked to stop; what is computed is kept.
    """
    if config.training.prefix_cache is PrefixCacheMode.none:
        raise InputError("training.prefix_cache=none: such a training reads no states")
    set_up_torch(config)
    with joined_world(config.distributed) as world:
        if not world.is_main:
            only_warnings()
        world.main_first(lambda: prepare_inputs(config, verify=verify))
        check_gpu(config.distributed.fsdp, read_architecture(config.model.path), world.device)
        run = RunDirectory(config.run.dir, is_main=False)
        data = world.main_first(lambda: load_critic_data(config, run, world, verify=verify))
        base = world.main_decides(
            lambda: fingerprint(config.model.path, config.data.cache_dir, verify=verify)
        )
        boundary = Boundary.of(config, read_architecture(config.model.path))
        if boundary.block == 0:
            raise InputError("training.num_unfrozen_layers: no block stays frozen")
        opening = Opening(config, data, base, world)
        return _Building(opening, boundary).run()


class _Building:
    """The frozen blocks on one rank, and what they are still to compute."""

    def __init__(self, opening: Opening, boundary: Boundary) -> None:
        self._opening, self._boundary, self._world = opening, boundary, opening.world
        self._shards = opening.shards(boundary)
        self._shards.refresh()
        opening.name_sequences(boundary)
        stored = opening.stored(boundary)
        self._lacking = self._find_lacking()
        self._bytes = sum(boundary.disk_bytes(stored[n][rows]) for n, rows in self._lacking.items())
        room = min(self._world.gather(opening.room()))
        self._world.main_decides(lambda: self._check_room(room))

    def _find_lacking(self) -> dict[str, Indices]:
        """Each set's sequences whose states some rank does not see; on every rank the same."""
        packers = self._opening.packers
        if self._opening.config.training.prefix_cache is PrefixCacheMode.validation:
            packers = {"validation": packers["validation"]}
        masks = {name: self._shards.find(wanted(p).keys) >= 0 for name, p in packers.items()}
        there = seen_by_all(self._world, masks)
        return {name: chosen_rows(packer)[~there[name]] for name, packer in packers.items()}

    def _check_room(self, room: float) -> None:
        if self._bytes > room:
            raise InputError(
                f"{self._shards.folder}: the states that are not there yet take "
                f"{self._bytes / 1e9:,.3f} GB, and {self._opening.told(room)}"
            )
        if self._bytes:
            refuse_unwritable(self._shards.folder)

    def run(self) -> Path:
        touch(self._shards.folder)
        if not self._bytes:
            _log.info("%s: all states are there already", self._shards.folder)
            return self._shards.folder
        trunk = _frozen_trunk(self._opening.config, self._boundary, self._world)
        facts = self._boundary.facts(self._opening.base, self._world.device)
        name = self._world.main_decides(lambda: uuid.uuid4().hex[:12])
        writer = Writer(
            self._shards.folder,
            f"{name}-0000-{self._world.rank:05}",
            facts,
            may_take=self._opening.room(),  # as all ranks' states together were found to fit
            leave_free=self._opening.reserve(),
        )
        with closing(writer):
            self._fill(trunk, writer)
        errors = [error for error in self._world.gather(writer.error) if error is not None]
        if errors:
            raise StorageError(f"{errors[0]}; what was written before is kept").everywhere()
        _log.info("%.3f GB of states: %s", self._bytes / 1e9, self._shards.folder)
        return self._shards.folder

    @torch.no_grad()
    def _fill(self, trunk: Trunk, writer: Writer) -> None:
        """Compute what is lacking, until that is done or some rank can write no more."""
        plan = list(self._plan())
        with progress("building the cache", len(plan)) as advance:
            for done, (packer, units) in enumerate(plan, 1):
                stop_together(self._world, _KEPT)
                if self._world.sum([writer.error is not None])[0]:
                    return
                batch = packer.assemble(units)
                if batch.stored is not None:
                    states = _states(trunk, batch, self._boundary)
                    none = np.full(len(batch.stored), -1)
                    put_states(writer, batch.stored, states, EVALUATION, none)
                advance(done, "micro-batches")

    def _plan(self) -> Iterator[tuple[Packer, Indices]]:
        """This rank's micro-batches of sequences whose states are not there."""
        for name, left in self._lacking.items():
            packer = self._opening.packers[name]
            if packer.prompts is not None:  # else parts would come between solutions of a problem
                left = left[np.argsort(packer.prompts.problems[left], kind="stable")]
            for part in packer.parts(left[:, None], _PART):
                yield from ((packer, units) for units in packer.split(part))


def _frozen_trunk(config: CriticConfig, boundary: Boundary, world: World) -> Trunk:
    """Embeddings and blocks before the boundary, whole and in the compute dtype."""
    with torch.device("meta"):
        trunk = Trunk(read_architecture(config.model.path))
    trunk.requires_grad_(False)
    trunk.norm = nn.Identity()  # type: ignore[assignment]
    trunk.layers = trunk.layers[: boundary.block]
    trunk.to(boundary.dtype).to_empty(device=world.device)
    load_trunk(trunk, config.model.path, lambda: stop_together(world, _KEPT))
    return trunk


def _states(trunk: Trunk, batch: Batch, boundary: Boundary) -> torch.Tensor:
    """The sequences' states at the boundary, end to end.

    `Trunk.hidden` ends there, since there are no later blocks.
    """
    reads = batch.layout.reads(batch.positions)
    read = reads if boundary.of_read_rows else None
    states = trunk.hidden(batch.tokens, batch.layout, read, Prefix(boundary.block))
    rows = Rows.of(batch, reads, of_read_rows=boundary.of_read_rows)
    return rows.of_sequences(states)
