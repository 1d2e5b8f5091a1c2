"""Steps of a critic of any size on random weights: memory, speed, where time goes, and saving.

Operations are counted for the linear layers only: 2 a parameter and token on the way forward, 4 a
trained one on the way back, 2 more where it is computed again (Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from job.common.schema import (
    CheckpointConfig,
    CriticConfig,
    DistributedConfig,
    FsdpConfig,
    ObjectiveConfig,
    ShardingStrategy,
    TrainingConfig,
)
from job.data.packing import Batch, assemble
from job.data.token_cache import TokenizedSet
from job.distributed.fsdp import shard
from job.distributed.world import World, joined_world
from job.memory.fit import prediction
from job.memory.footprint import Setting
from job.memory.recorder import Recorder
from job.memory.settings import SHAPES
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.parameters import count_parameters
from job.model.shards import local_shard
from job.run.alarm import ConstantPredictorAlarm
from job.run.directory import RunDirectory
from job.run.fence import Fence
from job.run.value_metrics import ValueMetrics
from job.training.checkpoint import Checkpoints
from job.training.compilation import choose_compilation
from job.training.learner import Learner
from job.training.measurement import warm_up
from job.training.objective import Objective
from job.training.preparation import set_up_torch
from job.training.state import TrainingState

ALL_SHAPES = SHAPES | {
    "micro": TransformerConfig(dim=64, n_layers=9, n_heads=2, vocab_size=512, multiple_of=32)
}
MICRO_BATCHES = 2
WARM_UP, STEPS = 2, 5
KINDS = {  # of kernels, by what is in their names; the first that fits
    "attention": "flash|fmha|attention",
    "matrix products": "gemm|cutlass|xmma|nvjet|cublas|gemv|splitk",
    "collectives": "nccl",
    "optimizer": "adam|multi_tensor|foreach|lpnorm",
    "norms": "norm",
    "copies": "memcpy|copy|cat",
    "compiled": "triton",
    "fills": "memset|fill",
}


@dataclass(frozen=True)
class Case:
    """One training: `tokens` a micro-batch in sequences of `sequence`, half of them response."""

    n: int
    tokens: int = 8192
    sequence: int = 512
    compiled: bool = False
    activation_checkpointing: bool = False
    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD
    saves: bool = False
    profiled: bool = False

    @property
    def name(self) -> str:
        changed = {
            f"{self.tokens} tokens": self.tokens != Case.tokens,
            f"sequences of {self.sequence}": self.sequence != Case.sequence,
            "compiled": self.compiled,
            "recomputed": self.activation_checkpointing,
            self.strategy.name: self.strategy is not Case.strategy,
        }
        return ", ".join([f"N={self.n}", *(name for name, differs in changed.items() if differs)])

    @property
    def lengths(self) -> list[int]:
        whole, rest = divmod(self.tokens, self.sequence)
        return [self.sequence] * whole + [rest] * bool(rest)


def measure(case: Case, shape: str, seed: int, scratch: Path | None) -> dict[str, Any]:
    """Everything that is asked of a case, in a process of its own."""
    config = CriticConfig()
    config.training.compile = case.compiled
    set_up_torch(config)  # as a training does it: with the same bits each time
    with joined_world(DistributedConfig()) as world, Recorder(world.device) as recorder:
        choose_compilation(config, world)
        warm_up(world.device)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        training = GpuTraining(case, ALL_SHAPES[shape], seed, world, recorder)
        seconds = training.steps()
        found = training.measured() | training.speed(seconds)
        if case.profiled:
            found["profile"] = training.profile()
        if case.saves:
            print(json.dumps(found), flush=True)  # a slow disk may take longer than there is time
            found["saving"] = training.saving(scratch)
    return found


class GpuTraining:
    """A critic with random weights, and the stages of its memory."""

    def __init__(
        self,
        case: Case,
        architecture: TransformerConfig,
        seed: int,
        world: World,
        recorder: Recorder,
    ) -> None:
        self.case, self.world, self.recorder = case, world, recorder
        self.architecture, self.on_gpu = architecture, world.device.type == "cuda"
        self.fsdp = FsdpConfig(
            sharding_strategy=case.strategy,
            mixed_precision=self.on_gpu,  # many CPUs are slow in bf16
            activation_checkpointing=case.activation_checkpointing,
        )
        self.stages = {"before": self._now()}
        with recorder.phase("load"):
            critic = self._critic(seed)
        self.stages["loaded"] = self._now()
        training = TrainingConfig(num_unfrozen_layers=case.n, warmup_steps=0)
        objective = Objective(ObjectiveConfig())
        self.learner = Learner(critic, objective, training, world, recorder.phase)
        self.learner.optimizer.register_step_pre_hook(lambda *_: self._note("backward"))
        rng = np.random.default_rng(seed)
        self.batches = [self._batch(rng) for _ in range(MICRO_BATCHES)]
        self._step = 0

    def _critic(self, seed: int) -> Critic:
        with torch.device("meta"):
            critic = Critic(self.architecture)
        unfreeze_last_blocks(critic, self.case.n)
        if self.case.activation_checkpointing:
            critic.trunk.recompute_trainable_blocks()
        if self.case.compiled:
            critic.trunk.compile_blocks()
        shard(critic, self.fsdp, self.world)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in critic.named_parameters():
                local = local_shard(parameter)
                local.fill_(1.0) if "norm" in name else local.normal_(std=0.02)
        critic.initialise_head(0.5, seed)
        return critic

    def _batch(self, rng: np.random.Generator) -> Batch:
        rewards = rng.integers(2, size=len(self.case.lengths)).astype(float)
        tokens = rng.integers(self.architecture.vocab_size, size=self.case.tokens)
        return packed(self.case.lengths, tokens, rewards, self.world.device)

    # Measurements

    def steps(self) -> list[float]:
        """Seconds of each measured step."""
        return [self._timed_step() for _ in range(WARM_UP + STEPS)][WARM_UP:]

    def _timed_step(self) -> float:
        began = time.perf_counter()
        self.learner.step(self._step, self.batches, ValueMetrics())
        self._wait()
        seconds = time.perf_counter() - began
        self._step += 1
        self._note("update")
        return seconds

    def measured(self) -> dict[str, Any]:
        """What `job.memory.validation` holds against each other, with the allocator's retries."""
        summary = self.recorder.summary()
        self.stages["peak"] = dict(summary["peak"])
        found: dict[str, Any] = {
            "num_unfrozen_layers": self.case.n,
            "predicted": prediction(self._setting()),
            "stages": dict(self.stages),
            "recorder": summary,
        }
        if self.on_gpu:
            found["retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
        return found

    def _setting(self) -> Setting:
        return Setting(
            architecture=self.architecture,
            num_unfrozen_layers=self.case.n,
            fsdp=self.fsdp,
            micro_batch_tokens=self.case.tokens,
            response_tokens=len(self.batches[0].positions),
            accumulates=MICRO_BATCHES > 1,
            cuda=self.on_gpu,
            compiled=self.case.compiled,
        )

    def speed(self, seconds: Sequence[float]) -> dict[str, Any]:
        blocks = count_parameters(self.architecture, self.case.n).trunk_blocks
        again = 2 if self.case.activation_checkpointing else 0
        operations = 2 * blocks.total + (4 + again) * blocks.trainable
        per_second = MICRO_BATCHES * self.case.tokens / statistics.median(seconds)
        return {
            "seconds_per_step": list(seconds),
            "tokens_per_second": per_second,
            "operations_per_second": operations * per_second,
        }

    def profile(self) -> dict[str, Any]:
        """Where the time of a step goes, by kind of kernel, and how much of it nothing ran."""
        activity = ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profiler:
            wall = self._timed_step()
        events = [e for e in profiler.events() or () if str(e.device_type).endswith(activity.name)]
        spans = [(e.time_range.start, e.time_range.end) for e in events]
        times: Counter[str] = Counter()
        names: Counter[str] = Counter()
        for event in events:
            spent = event.self_device_time_total if self.on_gpu else event.self_cpu_time_total
            times[kind_of(event.name)] += spent / 1e6
            names[event.name[:100]] += spent / 1e6
        return {
            "seconds": wall,
            "kernels": len(events),
            "seconds_by_kind": dict(times.most_common()),
            "seconds_of_the_longest": dict(names.most_common(15)),
            "idle_share": 1 - covered(spans) / 1e6 / wall,
        }

    def saving(self, scratch: Path | None) -> dict[str, Any]:
        """Seconds that a save stops the training for, twice, and until it is committed; bytes."""
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            run = RunDirectory(folder)
            run.claim({})
            run.fence = Fence(run.file("attempts"), Fence.take(run.path).number)
            config = CheckpointConfig(every_steps=1)
            checkpoints = Checkpoints(run, run.fence, config, {}, self.world)
            began = time.perf_counter()
            checkpoints.reserve(self.learner)
            reserved = time.perf_counter() - began
            saves = [self._save(checkpoints, step) for step in (1, 2)]
            files = [file for file in run.file("checkpoints").rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files) // len(saves)
        return {"reserve_seconds": reserved, "saves": saves, "bytes": size}

    def _save(self, checkpoints: Checkpoints, step: int) -> dict[str, float]:
        state = TrainingState(ConstantPredictorAlarm(1, 0), step=step)
        began = time.perf_counter()
        checkpoints.save_if_due(self.learner, state, {})
        stopped = time.perf_counter() - began
        beside = self._timed_step()  # a step while the file is written
        checkpoints.wait()
        assert checkpoints.newest == step, "the checkpoint was not written; the reason is above"
        committed = time.perf_counter() - began
        return {"stops": stopped, "step_beside": beside, "committed": committed}

    def _note(self, stage: str) -> None:
        self.stages[stage] = self._now()

    def _now(self) -> dict[str, float]:
        self._wait()
        return self.recorder.now()

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def packed(
    lengths: Sequence[int], tokens: Iterable[int], rewards: Iterable[float], device: torch.device
) -> Batch:
    """A micro-batch as the packer makes it: the second half of each sequence is its response."""
    b, ends = len(lengths), np.cumsum([0, *lengths])
    data = SimpleNamespace(
        offsets=ends,
        tokens=np.asarray(tokens, np.uint32),
        response_starts=np.array(lengths) // 2,
        rewards=np.asarray(rewards, np.float32),
        problems=np.arange(b, dtype=np.uint64),
        optimal=None,
        targets=None,
    )
    return assemble(cast(TokenizedSet, data), np.arange(b), None, device)


def kind_of(kernel: str) -> str:
    for kind, pattern in KINDS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return "other"


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, end = 0.0, float("-inf")
    for begin, stop in sorted(spans):
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total
