"""A critic's training on the fake GPU, of any size: no weights are read and nothing is computed.

For scripts that run under torch's CUDA wheel (see runtime.py).
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from job.common.errors import run_and_leave
from job.common.schema import (
    CriticConfig,
    FsdpConfig,
    ObjectiveConfig,
    ShardingStrategy,
    TrainingConfig,
)
from job.data.packing import Batch, assemble
from job.data.shared_prompts import SharedPrompts
from job.distributed.fsdp import shard
from job.distributed.world import World
from job.memory.footprint import Setting
from job.memory.settings import SHAPES
from job.model import transformer
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.training.learner import Learner, Phase
from job.training.measurement import warm_up
from job.training.objective import Objective
from job.training.preparation import set_up_torch

logging.disable(logging.WARNING)
DEVICE = torch.device("cuda", 0)
GROUPS_HEADS = transformer.GROUPS_HEADS
TRUNKS = SHAPES | {
    "8b grouped": TransformerConfig(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256, ffn_hidden=14336
    ),
    "small": TransformerConfig(dim=512, n_layers=6, n_heads=8, vocab_size=2000),
    "small grouped": TransformerConfig(
        dim=512, n_layers=6, n_heads=8, n_kv_heads=2, vocab_size=2000, qkv_bias=True, qk_norm=True
    ),
}


@dataclass(frozen=True)
class Case:
    """One training: `tokens` in sequences of `sequence`, whose second halves are responses.

    So many `solutions` in a row are of one problem, and compute its prompt once.
    """

    trunk: str = "7b"
    n: int = 4
    world: int = 1
    per_node: int = 8
    tokens: int = 8192
    sequence: int = 512
    solutions: int = 1
    micro_batches: int = 2
    layers: int | None = None  # other than the trunk's own
    compiled: bool = False
    repeats_keys: bool = False  # for attention, as before torch 2.12
    fsdp: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> TransformerConfig:
        trunk = TRUNKS[self.trunk]
        return trunk if self.layers is None else replace(trunk, n_layers=self.layers)

    @property
    def lengths(self) -> list[int]:
        whole, rest = divmod(self.tokens, self.sequence)
        return [self.sequence] * whole + [rest] * bool(rest)

    @property
    def fsdp_config(self) -> FsdpConfig:
        given = dict(self.fsdp)
        strategy = ShardingStrategy[given.pop("sharding_strategy", "FULL_SHARD")]
        return FsdpConfig(sharding_strategy=strategy, **given)

    @property
    def setting(self) -> Setting:
        """What the closed form is asked."""
        shared = sum(n // 2 for i, n in enumerate(self.lengths) if i % self.solutions)
        return Setting(
            architecture=self.architecture,
            num_unfrozen_layers=self.n,
            fsdp=self.fsdp_config,
            micro_batch_tokens=self.tokens - shared,
            keys_per_token=self.tokens / (self.tokens - shared),
            response_tokens=sum(length - length // 2 for length in self.lengths),
            accumulates=self.micro_batches > 1,
            compiled=self.compiled,
            repeats_keys=self.repeats_keys or not GROUPS_HEADS,
            world_size=self.world,
            per_node=min(self.world, self.per_node),
        )


@contextmanager
def ranks(case: Case) -> Iterator[World]:
    """Rank 0 of so many, whose others answer by themselves."""
    dist.init_process_group("fake", rank=0, world_size=case.world, store=FakeStore())
    try:
        yield World(size=case.world, local_size=min(case.world, case.per_node), device=DEVICE)
    finally:
        dist.destroy_process_group()
        gc.collect()
        torch.cuda.empty_cache()


def learner(case: Case, world: World, phase: Phase = nullcontext) -> Learner:
    with torch.device("meta"):
        critic = Critic(case.architecture)
    transformer.GROUPS_HEADS = GROUPS_HEADS and not case.repeats_keys
    unfreeze_last_blocks(critic, case.n)
    if case.fsdp_config.activation_checkpointing:
        critic.trunk.recompute_trainable_blocks()
    if case.compiled:
        critic.trunk.compile_blocks()
    shard(critic, case.fsdp_config, world)
    config = TrainingConfig(num_unfrozen_layers=case.n, warmup_steps=0, **case.training)
    return Learner(critic, Objective(ObjectiveConfig()), config, world, phase)


def batch(lengths: list[int], solutions: int = 1) -> Batch:
    """As the packer assembles it, of tokens 0; so many sequences in a row are of one problem."""
    n, ends = len(lengths), np.cumsum([0, *lengths])
    data: Any = SimpleNamespace(
        offsets=ends,
        tokens=np.zeros(ends[-1], np.uint32),
        response_starts=np.array(lengths) // 2,
        lengths=np.array(lengths),
        rewards=np.ones(n, np.float32),
        problems=np.arange(n, dtype=np.uint64) // np.uint64(solutions),
        optimal=None,
        targets=None,
    )
    prompts = SharedPrompts(data) if solutions > 1 else None
    return assemble(data, np.arange(n), None, DEVICE, prompts=prompts)


def answer(question: Callable[[Case], Any]) -> None:
    """Print as JSON what is found of each case in a script's argument, and end."""
    set_up_torch(CriticConfig())
    warm_up(DEVICE)  # with what comes with the first use of CUDA
    torch.cuda.empty_cache()
    cases = [Case(**given) for given in json.loads(sys.argv[1])]
    run_and_leave(lambda: print(json.dumps([question(case) for case in cases])))
