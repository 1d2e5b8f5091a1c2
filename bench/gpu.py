"""How much memory of a real GPU does a 7B critic take, and how fast does it train?

    python bench/gpu.py --out bench/results/gpu-NAME.json

A trunk of Llama 2's 7B shape with random weights, made on the GPU: N = 0, 4 and 8, and N = 4 with
activation checkpointing, each in a process of its own. Each holds the predicted peak, the
allocator's and NVML's against each other part by part, and says tokens per second, the share of
the rate that this GPU's own matrix products reach, and what a checkpoint takes. Some minutes;
needs torch >= 2.11, numpy, omegaconf, safetensors and nvidia-ml-py. Without a GPU, `--shape micro`
runs the same on the CPU.

Operations are counted for the linear layers only: 2 a parameter and token on the way forward, 4 a
trained one on the way back, 2 more where it is computed again (Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, command_line, say, write_record
from torch import Tensor

sys.path.insert(0, str(ROOT))

from job.common.schema import (
    CheckpointConfig,
    DistributedConfig,
    FsdpConfig,
    ObjectiveConfig,
    TrainingConfig,
)
from job.data.packing import Batch
from job.distributed.fsdp import shard
from job.distributed.world import World, joined_world
from job.memory.fit import prediction
from job.memory.footprint import Setting
from job.memory.recorder import Recorder
from job.memory.settings import SHAPES
from job.memory.validation import MALLOC, Measured, markdown
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.parameters import count_parameters
from job.model.shards import local_shard
from job.model.transformer import PackedLayout
from job.run.alarm import ConstantPredictorAlarm
from job.run.directory import RunDirectory
from job.run.fence import Fence
from job.run.value_metrics import ValueMetrics
from job.training.checkpoint import Checkpoints
from job.training.learner import Learner
from job.training.measurement import warm_up
from job.training.objective import Objective
from job.training.state import TrainingState

ALL_SHAPES = SHAPES | {
    "micro": TransformerConfig(dim=64, n_layers=9, n_heads=2, vocab_size=512, multiple_of=32)
}
SEQUENCE = 512  # tokens, of which the second half is response
MICRO_BATCHES = 2
WARM_UP, STEPS = 2, 6
MATRIX = {"cuda": 8192, "cpu": 512}
REPEATS = 20


@dataclass(frozen=True)
class Case:
    """One configuration."""

    num_unfrozen_layers: int
    activation_checkpointing: bool = False
    saves: bool = False

    @property
    def name(self) -> str:
        again = ", recomputed" if self.activation_checkpointing else ""
        return f"N={self.num_unfrozen_layers}{again}"


CASES = (Case(0), Case(4, saves=True), Case(8), Case(4, activation_checkpointing=True))


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--shape", choices=sorted(ALL_SHAPES), default="7b", help="of the trunk (7b)")
    add("--tokens", type=int, default=8192, help="of a micro-batch (8192)")
    add("--scratch", type=Path, help="folder for a checkpoint of 10 GB (default: a temporary one)")
    add("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens < SEQUENCE:
        parser.error(f"--tokens: at least {SEQUENCE}")
    if options.case is not None:
        print(json.dumps(_run(CASES[options.case], options)))
        return
    results = [_in_a_process(index, options) for index in range(len(CASES))]
    text = _page(results)
    print(text)
    if options.out is not None:
        record = {"shape": options.shape, "micro_batch_tokens": options.tokens, "cases": results}
        write_record(options.out, record, seed=options.seed, packages=("numpy", "omegaconf"))
        options.out.with_suffix(".md").write_text(text)


def _in_a_process(index: int, options: argparse.Namespace) -> dict[str, Any]:
    say(f"{CASES[index].name} ...")
    given = ["--case", str(index), "--shape", options.shape, "--tokens", str(options.tokens)]
    given += ["--seed", str(options.seed)]
    if options.scratch is not None:
        given += ["--scratch", str(options.scratch)]
    command = [sys.executable, __file__, *given]
    env = os.environ | MALLOC
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    say(f"  {result['tokens_per_second']:,.0f} tokens/s")
    return {"case": CASES[index].name, **result}


def _run(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    with joined_world(DistributedConfig()) as world, Recorder(world.device) as recorder:
        rate = _matmul_rate(world.device)
        warm_up(world.device)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        training = _Training(case, options, world, recorder)
        seconds = training.steps()
        result = training.measured() | training.speed(seconds, rate)
        return result | (training.checkpoint(options.scratch) if case.saves else {})


class _Training:
    """A critic with random weights, and the stages of its memory."""

    def __init__(
        self, case: Case, options: argparse.Namespace, world: World, recorder: Recorder
    ) -> None:
        self.case, self.world, self.recorder = case, world, recorder
        self.architecture = ALL_SHAPES[options.shape]
        self.tokens, self.on_gpu = options.tokens, world.device.type == "cuda"
        self.fsdp = FsdpConfig(
            mixed_precision=self.on_gpu,  # many CPUs are slow in bf16
            activation_checkpointing=case.activation_checkpointing,
        )
        self.stages = {"before": self._now()}
        with recorder.phase("load"):
            critic = self._critic(options.seed)
        self.stages["loaded"] = self._now()
        training = TrainingConfig(num_unfrozen_layers=case.num_unfrozen_layers, warmup_steps=0)
        objective = Objective(ObjectiveConfig())
        self.learner = Learner(critic, objective, training, world, recorder.phase)
        self.learner.optimizer.register_step_pre_hook(lambda *_: self._note("backward"))
        rng = torch.Generator().manual_seed(options.seed)
        self.batches = [self._batch(rng) for _ in range(MICRO_BATCHES)]

    def _critic(self, seed: int) -> Critic:
        with torch.device("meta"):
            critic = Critic(self.architecture)
        unfreeze_last_blocks(critic, self.case.num_unfrozen_layers)
        if self.fsdp.activation_checkpointing:
            critic.trunk.recompute_trainable_blocks()
        shard(critic, self.fsdp, self.world)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in critic.named_parameters():
                local = local_shard(parameter)
                local.fill_(1.0) if "norm" in name else local.normal_(std=0.02)
        critic.initialise_head(0.5, seed)
        return critic

    def _batch(self, rng: torch.Generator) -> Batch:
        b = self.tokens // SEQUENCE
        starts = torch.arange(b)[:, None] * SEQUENCE
        responses = (starts + torch.arange(SEQUENCE // 2, SEQUENCE)).flatten()
        device = self.world.device
        shape = (b * SEQUENCE,)
        return Batch(
            tokens=torch.randint(self.architecture.vocab_size, shape, generator=rng).to(device),
            layout=PackedLayout([SEQUENCE] * b, device),
            positions=responses.to(device),
            lengths=torch.full((b,), SEQUENCE // 2).to(device),
            response_lengths=torch.full((b,), SEQUENCE // 2).to(device),
            weights=torch.ones(len(responses), device=device),
            weight=float(len(responses)),
            rewards=torch.randint(2, (b,), generator=rng).float().to(device),
            problems=np.arange(b, dtype=np.uint64),
            optimal=None,
            pairs=torch.empty(0, 2, dtype=torch.int64, device=device),
        )

    def steps(self) -> list[float]:
        """Seconds of each measured step."""
        seconds = []
        for step in range(WARM_UP + STEPS):
            began = time.perf_counter()
            self.learner.step(step, self.batches, ValueMetrics())
            self._wait()
            seconds.append(time.perf_counter() - began)
            self._note("update")
        return seconds[WARM_UP:]

    def measured(self) -> dict[str, Any]:
        """What `job.memory.validation` holds against each other."""
        summary = self.recorder.summary()
        self.stages["peak"] = dict(summary["peak"])
        return {
            "num_unfrozen_layers": self.case.num_unfrozen_layers,
            "predicted": prediction(self._setting()),
            "stages": self.stages,
            "recorder": summary,
        }

    def _setting(self) -> Setting:
        tokens = self.batches[0].layout.n_tokens
        return Setting(
            architecture=self.architecture,
            num_unfrozen_layers=self.case.num_unfrozen_layers,
            fsdp=self.fsdp,
            micro_batch_tokens=tokens,
            response_tokens=tokens // 2,
            accumulates=MICRO_BATCHES > 1,
            cuda=self.on_gpu,
            sequence_tokens=SEQUENCE,
        )

    def speed(self, seconds: Sequence[float], matmul_rate: float) -> dict[str, Any]:
        counts = count_parameters(self.architecture, self.case.num_unfrozen_layers)
        blocks = counts.trunk_blocks
        again = 2 if self.case.activation_checkpointing else 0
        operations = 2 * blocks.total + (4 + again) * blocks.trainable
        tokens = MICRO_BATCHES * self.batches[0].layout.n_tokens
        per_second = tokens / statistics.median(seconds)
        return {
            "seconds_per_step": list(seconds),
            "tokens_per_second": per_second,
            "matmul_operations_per_second": matmul_rate,
            "share_of_matmul_rate": operations * per_second / matmul_rate,
        }

    def checkpoint(self, scratch: Path | None) -> dict[str, Any]:
        """Seconds and bytes of a save that is waited for."""
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            run = RunDirectory(folder)
            run.claim({})
            run.fence = Fence(run.file("attempts"), Fence.take(run.path).number)
            checkpoints = Checkpoints(run, run.fence, CheckpointConfig(), {}, self.world)
            state = TrainingState(ConstantPredictorAlarm(1, 0), step=1)
            began = time.perf_counter()
            checkpoints.save_now(self.learner, state, {})
            seconds = time.perf_counter() - began
            files = [file for file in run.file("checkpoints").rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files)
        return {"checkpoint_seconds": seconds, "checkpoint_bytes": size}

    def _note(self, stage: str) -> None:
        self.stages[stage] = self._now()

    def _now(self) -> dict[str, float]:
        self._wait()
        return self.recorder.now()

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def _matmul_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product in the compute dtype, a median."""
    size = MATRIX[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = [_timed_product(a) for _ in range(REPEATS)]
    return 2 * size**3 / statistics.median(seconds[REPEATS // 4 :])


def _timed_product(a: Tensor) -> float:
    began = time.perf_counter()
    a @ a
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _page(results: Sequence[dict[str, Any]]) -> str:
    names = ("num_unfrozen_layers", "predicted", "stages", "recorder")
    lines = ["| case | tokens/s | of the matmul rate | peak predicted, GB | measured |"]
    lines += ["|---|---|---|---|---|"]
    plain = []
    for one in results:
        measured = Measured(**{name: one[name] for name in names})
        if "recomputed" not in one["case"]:
            plain.append(measured)
        peak = measured.rows[-1]
        lines.append(
            f"| {one['case']} | {one['tokens_per_second']:,.0f} "
            f"| {one['share_of_matmul_rate']:.1%} "
            f"| {peak.predicted / 1e9:.3f} | {peak.measured / 1e9:.3f} |"
        )
    for one in results:
        if "checkpoint_seconds" in one:
            size, seconds = one["checkpoint_bytes"] / 1e9, one["checkpoint_seconds"]
            lines.append(f"\nA checkpoint at {one['case']}: {size:.2f} GB in {seconds:.1f} s.")
    return markdown(plain) + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
