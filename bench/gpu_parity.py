"""Whether a GPU computes what the CPU computes, and the same bits each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gpu_training import packed
from torch import Tensor

from job.common.schema import (
    DistributedConfig,
    FsdpConfig,
    ObjectiveConfig,
    ShardingStrategy,
    TrainingConfig,
)
from job.data.packing import Batch
from job.distributed.fsdp import shard
from job.distributed.world import World, joined_world
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.packed_layout import PackedLayout
from job.model.shards import full_tensor, local_shard
from job.model.transformer import attend
from job.run.value_metrics import ValueMetrics
from job.training.learner import Learner
from job.training.objective import Objective

CPU = torch.device("cpu")
HEADS = ((32, 32, 128), (32, 8, 128), (14, 2, 64), (8, 2, 256), (4, 4, 32))  # h, k, e
HEADS_OF_CPU = ((4, 2, 32), (4, 4, 16))
LENGTHS = [1, 2, 17, 127, 128, 129, 511, 700]
SMALL = TransformerConfig(
    dim=256, n_layers=4, n_heads=8, n_kv_heads=2, vocab_size=512, qkv_bias=True
)
SEQUENCES = [33, 64, 100, 7, 300]
STEPS = 6


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference, relative to the norm of `theirs`."""
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


# Attention


def attention(device: torch.device, seed: int) -> list[dict[str, Any]]:
    """The job's attention on packed sequences and grouped heads against the CPU's in float64.

    Distances are of the output, and of the gradients of queries, keys and values.
    """
    heads = HEADS if device.type == "cuda" else HEADS_OF_CPU
    return [_attention(one, device, seed) for one in heads]


def _attention(heads: tuple[int, int, int], device: torch.device, seed: int) -> dict[str, Any]:
    h, k, e = heads
    generator = torch.Generator().manual_seed(seed)
    # numbers that bf16 has, so that only the arithmetic differs
    given = [torch.randn(sum(LENGTHS), n, e, generator=generator).bfloat16() for n in (h, k, k, h)]
    exact = _attended(given, CPU, torch.float64)
    row: dict[str, Any] = {"heads": heads}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found = _attended(given, device, dtype)
        row[name] = [distance(a, b) for a, b in zip(found, exact, strict=True)]
        for deterministic in (False, True):
            with _deterministic(deterministic):
                runs = [_attended(given, device, dtype) for _ in range(2)]
            label = "deterministic" if deterministic else "default"
            row[f"{name}, same bits, {label}"] = all(map(torch.equal, *runs))
    return row


def _attended(given: list[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    q, k, v, gradient = (x.to(device, dtype) for x in given)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attend(q, k, v, PackedLayout(LENGTHS, device))
    out.backward(gradient)
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]


# A whole step


def gradients(seed: int) -> dict[str, Any]:
    """Loss and gradients of a micro-batch, against the CPU's in float32."""
    with joined_world(DistributedConfig()) as world:
        loss, exact = _one_step(replace(world, device=CPU), False, seed)
        found: dict[str, Any] = {"loss of the CPU in float32": loss}
        ways = {"float32": False, "bf16": True} if world.device.type == "cuda" else {"again": False}
        for name, mixed in ways.items():
            loss, theirs = _one_step(world, mixed, seed)
            apart = {key: distance(theirs[key], exact[key]) for key in exact}
            worst = max(apart, key=lambda key: apart[key])
            found[name] = {
                "loss": loss,
                "all gradients": distance(_flat(theirs), _flat(exact)),
                "worst gradient": {worst: apart[worst]},
            }
        return found


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def _one_step(world: World, mixed: bool, seed: int) -> tuple[float, dict[str, Tensor]]:
    learner, batch = _learner(world, mixed, seed), _batch(world.device, seed)
    objective, outputs = learner.objective, learner.outputs(batch)
    loss = objective.loss(outputs, batch, 0, objective.counts(batch))
    loss.backward()
    named = {n: p.grad for n, p in learner.critic.named_parameters() if p.grad is not None}
    return float(loss.detach()), {n: full_tensor(g).float().cpu() for n, g in named.items()}


def _learner(world: World, mixed: bool, seed: int) -> Learner:
    """A small critic with the same numbers on each device, in each dtype."""
    with torch.device("meta"):
        critic = Critic(SMALL)
    unfreeze_last_blocks(critic, 2)
    fsdp = FsdpConfig(sharding_strategy=ShardingStrategy.FULL_SHARD, mixed_precision=mixed)
    shard(critic, fsdp, world)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            values = 0.05 * torch.randn(parameter.shape, generator=generator)
            local_shard(parameter).copy_((values + ("norm" in name)).bfloat16())
    critic.initialise_head(0.5, seed)
    config = TrainingConfig(num_unfrozen_layers=2, warmup_steps=0, learning_rate=1e-3)
    return Learner(critic, Objective(ObjectiveConfig()), config, world)


def _batch(device: torch.device, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(SMALL.vocab_size, size=sum(SEQUENCES))
    rewards = rng.integers(2, size=len(SEQUENCES)).astype(float)
    return packed(SEQUENCES, tokens, rewards, device)


# The same bits


def same_bits(seed: int) -> dict[str, Any]:
    """Whether a training of six steps ends with the same bits when it is run again, or resumed."""
    with joined_world(DistributedConfig()) as world:
        found = {}
        for deterministic in (True, False):
            with _deterministic(deterministic):
                found["deterministic" if deterministic else "default"] = _repeated(world, seed)
        return found


def _repeated(world: World, seed: int) -> dict[str, Any]:
    mixed = world.device.type == "cuda"
    runs = []
    for _ in range(2):
        learner = _learner(world, mixed, seed)
        _steps(learner, 0, STEPS)
        runs.append(_state(learner))
    half = _learner(world, mixed, seed)
    _steps(half, 0, STEPS // 2)
    rest = _learner(world, mixed, seed)
    _restore(rest, _state(half))
    rest.set_updates(STEPS // 2, skipped=0, skipped_at=())
    _steps(rest, STEPS // 2, STEPS)
    resumed = _state(rest)
    return {
        "run again": _equal(*runs),
        "resumed": _equal(runs[0], resumed),
        "distance": max(distance(resumed[n], runs[0][n]) for n in resumed),
    }


def _equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def _steps(learner: Learner, start: int, stop: int) -> None:
    for step in range(start, stop):
        learner.step(step, [_batch(learner.world.device, step)], ValueMetrics())


def _tensors(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """Trained parameters and their moments."""
    for name, parameter in learner.critic.named_parameters():
        if parameter.requires_grad:
            yield name, local_shard(parameter)
            for kind, moment in learner.moments(parameter).items():
                yield f"{name}.{kind}", local_shard(moment)


def _state(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(learner)}


@torch.no_grad()
def _restore(learner: Learner, state: Mapping[str, Tensor]) -> None:
    for name, tensor in _tensors(learner):
        tensor.copy_(state[name])
