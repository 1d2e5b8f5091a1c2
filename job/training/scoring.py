"""A trained critic values every token of every response in a file, and the last before it."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from job.common.data_file import Source, check_readable, described
from job.common.errors import InputError
from job.common.progress import only_warnings, progress
from job.common.schema import EMBEDDED, DistributedConfig
from job.data.packing import Batch, Indices, Packer, assemble, single_units
from job.data.shared_prompts import shared_in_evaluations
from job.data.token_cache import TokenizedSet, load_to_score
from job.data.tokenizer import load_tokenizer
from job.data.values_file import ValuesFile
from job.data.values_text import Values
from job.distributed.fsdp import shard
from job.distributed.world import World, joined_world
from job.memory.footprint import copy_share
from job.memory.settings import forward_budget
from job.model.critic import Critic
from job.model.weights import load_trunk
from job.run.manifest import MANIFEST
from job.run.trained import TrainedCritic, load_weights
from job.run.value_metrics import ValueMetrics
from job.training.agreement import stop_together
from job.training.allocator import set_up_allocator
from job.training.data import check_tokens, warn_of_unknown
from job.training.gpu import check_gpu
from job.training.kept_states import KeptStates
from job.training.objective import Objective

MICRO_BATCHES = 16  # of each rank, between two parts that are committed
_KEPT = "what is scored is kept"
_log = logging.getLogger("job.score")


def score(
    find: Callable[[], TrainedCritic], source: Source, out: Path, *, verify: bool = False
) -> bool:
    """Score data as one of the job's processes; returns whether this is the one that writes.

    Args:
        find: finds the critic; called on rank 0 alone.
        verify: look at all of cached data and trunk, not only at samples.

    Raises:
        InputError: something in the input is wrong; nothing is scored yet.
        Stopped: asked to stop; what is scored so far is kept.
    """
    set_up_allocator()
    with joined_world(DistributedConfig()) as world:
        if not world.is_main:
            only_warnings()
        trained = world.main_decides(functools.partial(_found, find, source, verify))
        if trained.config.training.threads is not None:
            torch.set_num_threads(trained.config.training.threads)
        data = world.main_first(lambda: _load_data(trained, source, verify))
        with ExitStack() as stack:
            file = ValuesFile(out, data, _plan(trained, data))
            start = world.main_decides(lambda: stack.enter_context(file.claimed()))
            if start < len(data):
                scorer = stack.enter_context(closing(_Scorer(trained, data, world, start)))
                scorer.score(file)
            if world.is_main:
                _finish(file, trained, data)
        return world.is_main


def _found(find: Callable[[], TrainedCritic], source: Source, verify: bool) -> TrainedCritic:
    if source != EMBEDDED:
        check_readable(source)
    trained = find()
    trained.check(verify=verify)
    return trained


def _load_data(trained: TrainedCritic, source: Source, verify: bool) -> TokenizedSet:
    config = trained.config
    tokenizer = load_tokenizer(config.tokenizer.path or config.model.path)
    trained.check_tokenizer(tokenizer.fingerprint)
    data = load_to_score(config.data, source, tokenizer, verify=verify)
    check_tokens(data, trained.architecture.vocab_size)
    warn_of_unknown(data, tokenizer, described(source))
    if odd := list(data.odd_labels()):
        text = "%d row(s) are scored and left out of the table, for their label: %s"
        _log.warning(text, len(odd), odd[0])
    if data.n_skipped:
        _log.warning(
            "%s: %d row(s) left out; they have no values", described(source), data.n_skipped
        )
    return data


def _plan(trained: TrainedCritic, data: TokenizedSet) -> dict[str, Any]:
    """What the values depend on; the rest changes them by rounding at most."""
    manifest = (trained.folder / MANIFEST).read_bytes()
    return {
        "step": trained.facts["step"],
        "critic": hashlib.sha256(manifest).hexdigest(),
        "data": data.folder.name,
        "mixed_precision": trained.config.distributed.fsdp.mixed_precision,
        "prompt_value": True,  # 0.1.0 wrote none
    }


class _Scorer:
    """A critic on its GPUs, and the data that it values, from the sequence `start` on."""

    def __init__(
        self, trained: TrainedCritic, data: TokenizedSet, world: World, start: int
    ) -> None:
        self._data, self._world, self._start = data, world, start
        self._objective = Objective(trained.config.objective)
        self._packer = Packer(
            data,
            single_units(len(data)),
            dim=trained.architecture.dim,
            budget=forward_budget(trained.config),
            device=world.device,
            rank=world.rank,
            world=world.size,
            prompt_value=True,
            prompts=shared_in_evaluations(data),
            copy_share=copy_share(trained.architecture),
        )
        self._kept = KeptStates.find(trained, self._packer, start, world)
        left_out = 0 if self._kept is None else self._kept.leave_out(start)
        self._critic = _place(trained, world, left_out)

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()

    def score(self, file: ValuesFile) -> None:
        """Value the sequences, a part at a time."""
        n, start = len(self._data), self._start
        with progress("scoring", n) as advance:
            for chosen in self._packer.parts(self._packer.units[start:], MICRO_BATCHES):
                stop_together(self._world, _KEPT)

                def advanced(done: int, first: int = start) -> None:
                    advance(first + done, "sequences")

                values = self._values(chosen, advanced)
                self._world.main_decides(functools.partial(file.add, start, values))
                start += len(chosen)
        if self._kept is not None:
            self._kept.tell(n - self._start)

    @torch.no_grad()
    def _values(self, chosen: Indices, advance: Callable[[int], None]) -> list[Values]:
        """Values of the chosen sequences, from all ranks, in order."""
        own: dict[int, Values] = {}
        for units, kept in self._plan(chosen):
            batch = self._packer.assemble(units)
            parts = self._value(batch, kept).split(batch.lengths.tolist())
            lengths = batch.response_lengths.tolist()
            for row, part, n in zip(units.ravel().tolist(), parts, lengths, strict=True):
                own[row] = Values.of(part.numpy(), n)
            advance(min(len(own) * self._world.size, len(chosen)))
        found = {row: part for one in self._world.gather(own) for row, part in one.items()}
        return [found[row] for row in chosen.ravel().tolist()]

    def _plan(self, chosen: Indices) -> list[tuple[Indices, KeptStates | None]]:
        """This rank's micro-batches, each with what has all of its states, or has to compute all.

        Both kinds are put together apart, so that few states are computed that are there.
        """
        if self._kept is None:
            return [(units, None) for units in self._packer.split(chosen)]
        there = self._kept.there[chosen[:, 0]]
        read, computed = (
            self._packer.split(part) if len(part) else []
            for part in (chosen[there], chosen[~there])
        )
        self._kept.expect(read)
        return [*((units, self._kept) for units in read), *((units, None) for units in computed)]

    def _value(self, batch: Batch, kept: KeptStates | None) -> torch.Tensor:
        reads = batch.layout.reads(batch.positions)
        prefix = None if kept is None else kept.take(batch, reads)
        outputs = self._critic(batch.tokens, batch.layout, reads, prefix)
        if not outputs.isfinite().all():
            raise InputError("values are not finite: the critic is damaged, or bf16 too coarse")
        return self._objective.values(outputs).cpu()


def _place(trained: TrainedCritic, world: World, left_out: int) -> Critic:
    """The critic in shards, its trunk and its trained parameters loaded.

    Without embeddings and the first `left_out` blocks, if there are to be any.
    """
    fsdp = trained.config.distributed.fsdp
    check_gpu(fsdp, trained.architecture, world.device)
    critic = trained.on_meta()
    if left_out:
        critic.trunk.leave_out(left_out)
    shard(critic, fsdp, world)
    load_trunk(critic.trunk, trained.config.model.path, lambda: stop_together(world, _KEPT))
    load_weights(critic, trained.folder, world)
    return critic


def _finish(file: ValuesFile, trained: TrainedCritic, data: TokenizedSet) -> None:
    if file.path.exists():
        _log.info("%s is finished already", file.path)
    else:
        file.finish()
    objective = Objective(trained.config.objective)
    metrics = measure(file, data, objective).compute()
    if metrics["sequences"]:
        _show(metrics, objective)
    _log.info("values of %d sequences: %s", len(data), file.path)


def measure(file: ValuesFile, data: TokenizedSet, objective: Objective) -> ValueMetrics:
    """How well a finished file's values predict the rewards, over the sequences that have one."""
    metrics, start = ValueMetrics(), 0
    for values in file.values():
        rows = np.arange(start, start + len(values))
        start += len(values)
        labelled = rows[~np.isnan(data.rewards[rows])]
        if not len(labelled):
            continue
        batch = assemble(data, labelled, None, torch.device("cpu"), prompt_value=True)
        found = np.concatenate([values[row - rows[0]].in_order for row in labelled])
        objective.record(metrics, found, batch)
    return metrics


def _show(metrics: dict[str, float], objective: Objective) -> None:
    title = "outputs rank solutions of one problem: their scale means nothing"
    table = Table("metric", "", title=title if objective.ranks_only else None)
    for key, value in metrics.items():
        name = f"{key} (of mean values)" if key == "pairwise_accuracy" else key
        whole = float(value).is_integer() and abs(value) >= 1
        table.add_row(name, f"{value:,.0f}" if whole else f"{value:.4f}")
    Console().print(table)
