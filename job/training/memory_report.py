"""A run's memory: what was predicted before its first step, and what its ranks then took."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from job.common.schema import AUTO, CriticConfig, PrefixCacheMode, ShardingStrategy
from job.distributed.world import World
from job.memory.fit import CONTEXT_BYTES, CPU_TOLERANCE, GPU_TOLERANCE, fit, prediction
from job.memory.footprint import Setting
from job.memory.host import free_host_bytes
from job.memory.recorder import Recorder
from job.memory.settings import once_built, setting_of
from job.model.architecture_file import read_architecture
from job.model.parameters import count_frozen
from job.model.transformer import GROUPS_HEADS
from job.run.directory import RunDirectory
from job.training.allocator import segments_grow
from job.training.data import CriticData

FILE = "memory.json"
# What code, threads and freed memory that is kept may differ by, in a process without a GPU.
_PROCESS_BYTES = 100e6
_STEPS_LOOKED_AT = 200
_HOST_SHARE = 0.5  # of what is free on the host, for the processes of a job without GPUs
_log = logging.getLogger(__name__)


def check_memory(config: CriticConfig, world: World) -> None:
    """See that something fits at best, before data are tokenised: frozen blocks may be left out.

    Raises:
        InputError: on every rank, if nothing fits.
    """
    may_read = config.training.prefix_cache is not PrefixCacheMode.none
    left_out, capacity = _n_frozen(config) if may_read else 0, min(world.gather(_capacity(world)))
    world.main_decides(lambda: _setting(config, world, left_out, capacity))


def choose_by_memory(
    config: CriticConfig, run: RunDirectory, world: World, left_out: int = 0
) -> None:
    """Replace `auto` by what every rank's memory takes: micro-batch and sharding strategy.

    A run that goes on keeps the micro-batch it has begun with, unless that does not fit any more.

    Args:
        left_out: how many blocks, and the embeddings, are not loaded.

    Raises:
        InputError: on every rank, if nothing fits.
    """
    chosen: dict[str, Any] = {}
    capacity = min(world.gather(_capacity(world)))
    setting = world.main_decides(lambda: _setting(config, world, left_out, capacity))
    if world.is_main:
        _warn_where_it_fits_once_built(config, setting, capacity)
    if config.training.micro_batch_tokens == AUTO:
        before = world.main_decides(run.status).get("micro_batch_tokens")
        tokens = min(setting.evaluation_tokens, before or setting.evaluation_tokens)
        chosen["training.micro_batch_tokens"] = config.training.micro_batch_tokens = tokens
        run.set_status(micro_batch_tokens=tokens)
    fsdp = config.distributed.fsdp
    if fsdp.sharding_strategy is ShardingStrategy.auto:
        fsdp.sharding_strategy = setting.fsdp.sharding_strategy
        if world.device.type == "cuda":
            chosen["distributed.fsdp.sharding_strategy"] = fsdp.sharding_strategy.name
    if world.is_main:
        for key, value in chosen.items():
            _log.info("%s: %s, by the memory of %s", key, value, world.device)


def _warn_where_it_fits_once_built(config: CriticConfig, setting: Setting, capacity: int) -> None:
    found = fit(setting, capacity)
    if not found.fits and (built := once_built(config, setting, capacity)):
        text = "memory: %.1f GB predicted, of %.1f GB that are there%s"
        _log.warning(text, found.needed / 1e9, capacity / 1e9, built)


def _n_frozen(config: CriticConfig) -> int:
    n_blocks = read_architecture(config.model.path).n_trunk_layers
    return count_frozen(config.training.num_unfrozen_layers, n_blocks)


def _capacity(world: World) -> int:
    """Bytes that this rank may take, of what others leave."""
    if world.device.type != "cuda":
        return int(free_host_bytes() * _HOST_SHARE / world.local_size)
    free, total = torch.cuda.mem_get_info(world.device)
    # this process's own context is there already, and counted among what is needed
    return min(total, free + torch.cuda.memory_reserved(world.device) + CONTEXT_BYTES)


def _setting(config: CriticConfig, world: World, left_out: int, capacity: int = 0) -> Setting:
    return setting_of(
        config,
        read_architecture(config.model.path),
        world_size=world.size,
        per_node=world.local_size,
        capacity=capacity,
        cuda=world.device.type == "cuda",
        repeats_keys=not GROUPS_HEADS,
        segments_grow=segments_grow(),
        prefix_cached=left_out > 0,
        between=_n_frozen(config) - left_out if left_out else 0,
    )


def heaviest(config: CriticConfig, data: CriticData, world: World, left_out: int = 0) -> Setting:
    """What memory depends on, with the largest micro-batches that the data makes.

    Every rank must take part.

    Args:
        left_out: how many blocks, and the embeddings, are not loaded.
    """
    setting = _setting(config, world, left_out)
    plans = [
        data.train.plan(step, config.training.batch_size, config.training.seed)
        for step in range(min(config.training.max_steps, _STEPS_LOOKED_AT))
    ]
    sizes = [data.train.size(units) for plan in plans for units in plan]
    evaluated = [data.validation.size(units) for units in data.validation.everything]
    # of evaluations only where nothing else is computed: their prompts are shared more often
    counted = sizes if config.training.num_unfrozen_layers else sizes + evaluated
    keys = max((size.of_sequences / size.tokens for size in counted if size.tokens), default=1)
    accumulates = any(len(plan) > 1 for plan in plans)
    gathered = world.gather((max(sizes), max(evaluated).tokens, keys, accumulates))
    heaviest_of_all = max(size for size, *_ in gathered)
    return replace(
        setting,
        micro_batch_tokens=heaviest_of_all.tokens,
        response_tokens=heaviest_of_all.valued,
        keys_per_token=max(k for _, _, k, _ in gathered),
        accumulates=any(a for *_, a in gathered),
        evaluation_tokens=max(e for _, e, _, _ in gathered),
    )


class MemoryAccount:
    """Predicts before the critic is loaded, and compares when the training has ended.

    Every rank must take part in both.
    """

    def __init__(
        self,
        config: CriticConfig,
        data: CriticData,
        run: RunDirectory,
        world: World,
        recorder: Recorder,
        left_out: int = 0,
    ) -> None:
        self._run, self._world, self._recorder = run, world, recorder
        self._setting = heaviest(config, data, world, left_out)
        self._before = recorder.now()
        self._predicted = prediction(self._setting)
        run.write_json(FILE, {"predicted": self._predicted})
        if world.is_main:
            _log.info("memory: %s", _expected(self._predicted, on_gpu=self._setting.cuda))

    def close(self) -> dict[str, float]:
        """Write what was measured beside the prediction; both, for tracking."""
        summary = self._recorder.summary() | {"before": self._before}
        ranks = self._world.gather(summary)
        self._run.write_json(FILE, {"predicted": self._predicted, "ranks": ranks})
        predicted = float(self._predicted["peak_bytes"])
        measured = max((measured_peak(rank) or 0.0 for rank in ranks), default=0.0)
        if measured <= 0:  # not known, or a process that took what it had freed before
            return {"memory/predicted_peak": predicted}
        if self._world.is_main:
            _compare(predicted, measured, on_gpu=self._setting.cuda)
        return {
            "memory/predicted_peak": predicted,
            "memory/measured_peak": measured,
            "memory/error": predicted / measured - 1,
        }


def measured_peak(rank: Mapping[str, Any]) -> float | None:
    """Bytes of a rank's peak that the prediction speaks of.

    On a GPU what the allocator gave; on a CPU what the process grew by since the critic came.
    """
    peak = rank["peak"]
    if rank["backend"] == "process":
        return float(peak["process"] - rank["before"]["process"])
    return peak.get("allocated")


def _expected(predicted: Mapping[str, Any], *, on_gpu: bool) -> str:
    peak, moment = predicted["peak_bytes"] / 1e9, predicted["peak_moment"]
    if not on_gpu:  # a process takes some hundred MB besides, for torch itself
        return f"{peak:.3f} GB predicted for the critic and its training, at the peak ({moment})"
    reserved, outside = predicted["reserved_bytes"] / 1e9, predicted["outside_bytes"] / 1e9
    return (
        f"{peak:.3f} GB predicted at the peak ({moment}), {reserved:.1f} GB reserved for it, "
        f"and {outside:.1f} GB outside torch"
    )


def _compare(predicted: float, measured: float, *, on_gpu: bool) -> None:
    """Say how the prediction did; a process is measured too coarsely to be told that it did."""
    text = f"{predicted / 1e9:.3f} GB predicted, {measured / 1e9:.3f} GB measured at the peak"
    if not within(predicted, measured, on_gpu=on_gpu):
        _log.warning("memory: %s: they part; see %s and docs/memory.md", text, FILE)
    elif on_gpu:
        margin = _tolerance(measured, on_gpu=on_gpu) / 1e9
        _log.info("memory: as predicted, to the %.3f GB that count as equal: %s", margin, text)


def within(predicted: float, measured: float, *, on_gpu: bool) -> bool:
    """Whether prediction and measurement agree within the backend's tolerance."""
    return abs(predicted - measured) <= _tolerance(measured, on_gpu=on_gpu)


def _tolerance(measured: float, *, on_gpu: bool) -> float:
    """Bytes that prediction and measurement may differ by."""
    return GPU_TOLERANCE * measured if on_gpu else CPU_TOLERANCE * measured + _PROCESS_BYTES
