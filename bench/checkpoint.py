"""What a checkpoint costs a training: pauses of its loop, time and bytes.

    python bench/checkpoint.py --out bench/results/checkpoint.json
    python -m torch.distributed.run --nproc_per_node 2 bench/checkpoint.py --out FILE

One critic with random weights is trained on CPU in float32, the last N blocks unfrozen, always on
the same batch, so that all steps are equal. In each round it is saved in three ways, which begin in
turns:

    asynchronous  the product, as the training loop calls it: a call that begins the save, then
                  steps while a thread writes, reads back for checksums, commits and cleans up
    synchronous   the product's save_now, which returns when the same has been done
    full state    torch.distributed.checkpoint.save of all parameters, frozen ones too, and the
                  moments: flushed to the disk, without checksums or commit

The slow-down is what the steps under a save take longer than as many undisturbed ones of the same
round. Figures are medians over rounds. MB are 1e6 bytes.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import OtherLoad, command_line, say, table, write_record
from throughput import ARCHITECTURE, CPU, TRAINING, write_examples
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from job.common.nested import to_dict
from job.common.schema import CheckpointConfig, DistributedConfig, FsdpConfig, ObjectiveConfig
from job.data.packing import Packer, single_units
from job.data.token_cache import TokenizedSet
from job.distributed.fsdp import shard
from job.distributed.world import World, joined_world
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.shards import fill
from job.run.alarm import ConstantPredictorAlarm
from job.run.directory import RunDirectory
from job.run.fence import Fence
from job.run.value_metrics import ValueMetrics
from job.training.checkpoint import Checkpoints, Tensors, trained_tensors
from job.training.learner import Learner
from job.training.objective import Objective
from job.training.state import TrainingState

N = 4  # unfrozen blocks
SEQUENCES = 2  # of a step, few so that several steps pass during a save
CHECKPOINT = CheckpointConfig(every_steps=1000, keep_last=2)
WARM_UP = 1  # rounds that are not counted: buffers are allocated, old checkpoints come to be
UNDISTURBED = 5  # steps of a round
PATIENCE = 1000  # steps that a save may take
BYTES_PER_PARAMETER = 12  # a master and two moments in float32
STALL_LIMIT = 0.15  # of a synchronous save
SIZE_TOLERANCE, SIZE_ALLOWANCE = 0.02, 256 * 1024  # relative, and bytes on top of that


# A training


def make_critic(config: TransformerConfig, n: int, world: World, seed: int) -> Critic:
    """A critic with random weights, in shards, its last `n` blocks unfrozen."""
    with torch.device("meta"):
        critic = Critic(config)
    unfreeze_last_blocks(critic, n)
    shard(critic, FsdpConfig(mixed_precision=False), world)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in critic.trunk.named_parameters():
        random = torch.randn(parameter.shape, generator=generator) * 0.02
        fill(parameter, random + 1 if "norm" in name else random)
    critic.initialise_head(0.5, seed)
    return critic


class Loop:
    """A training and its checkpoints in `folder`, without evaluations and logs."""

    def __init__(
        self, folder: Path, config: TransformerConfig, n: int, world: World, seed: int
    ) -> None:
        self.world = world
        training = replace(TRAINING, num_unfrozen_layers=n, batch_size=SEQUENCES)
        critic = make_critic(config, n, world, seed)
        self.learner = Learner(critic, Objective(ObjectiveConfig()), training, world)
        self.state = TrainingState(ConstantPredictorAlarm(1, 0))
        folder.mkdir(exist_ok=True)
        self.checkpoints = _checkpoints(folder / f"run-{n}", world)
        self.folder = folder / f"run-{n}/checkpoints"
        data = _data(folder / f"data-{n}", config, world, seed)
        packer = Packer(
            *(data, single_units(len(data))),
            dim=config.dim,
            budget=training.token_budget,
            device=CPU,
            rank=world.rank,
            world=world.size,
        )
        self._batches = packer.step(0, SEQUENCES, seed)

    def step(self) -> None:
        """What the product's loop does in a step at which no save is due."""
        self.learner.step(0, self._batches, ValueMetrics())
        self.state.step += 1
        self.save_if_due()

    def save_if_due(self) -> None:
        self.checkpoints.save_if_due(self.learner, self.state, {})

    def save_now(self) -> None:
        self.checkpoints.save_now(self.learner, self.state, {})

    def go_to_next_save(self) -> None:
        """Let the next step at which a save is due be the current one."""
        every = CHECKPOINT.every_steps
        self.state.step = (self.state.step // every + 1) * every

    def has_committed(self, step: int) -> bool:
        """Whether all ranks know that `step` is committed."""
        (known,) = self.world.sum([self.checkpoints.newest == step])
        return known == self.world.size

    def bytes(self) -> int:
        """Of the newest committed checkpoint."""
        return size_of(max(self.folder.glob("step-*")))


def _checkpoints(run_folder: Path, world: World) -> Checkpoints:
    run = RunDirectory(run_folder, is_main=world.is_main)
    number = world.main_decides(lambda: _first_attempt(run))
    run.fence = Fence(run.file("attempts"), number)
    return Checkpoints(run, run.fence, CHECKPOINT, {}, world)


def _first_attempt(run: RunDirectory) -> int:
    run.claim({})
    return Fence.take(run.path).number


def _data(folder: Path, config: TransformerConfig, world: World, seed: int) -> TokenizedSet:
    def write() -> None:
        folder.mkdir()
        write_examples(folder, config.vocab_size, seed)

    world.main_decides(write)
    return TokenizedSet(folder)


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def full_state(learner: Learner) -> Tensors:
    """Every parameter, and the moments of the trainable ones."""
    parameters = {f"model.{n}": p.detach() for n, p in learner.critic.named_parameters()}
    return parameters | trained_tensors(learner)


# Measurement


@dataclass(frozen=True)
class Round:
    """Seconds of each part of a round, and the share of the machine that others used."""

    undisturbed_steps: list[float]
    call: float
    disturbed_steps: list[float]
    synchronous: float
    full_state: float
    other_load: float

    @property
    def slow_down(self) -> float:
        """Seconds that the steps under a save took longer than undisturbed ones."""
        expected = statistics.median(self.undisturbed_steps) * len(self.disturbed_steps)
        return sum(self.disturbed_steps) - expected


def seconds_of(work: Callable[[], object], world: World) -> float:
    """How long some work takes on this rank, begun by all ranks at once."""
    world.sum([0.0])
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def save_asynchronously(loop: Loop) -> tuple[float, list[float]]:
    """Seconds of the call that begins a save, and of the steps until it is known as committed."""
    loop.go_to_next_save()
    step = loop.state.step
    call = seconds_of(loop.save_if_due, loop.world)
    steps: list[float] = []
    while not loop.has_committed(step):
        assert len(steps) < PATIENCE, f"step {step} is not committed: see the log"
        steps.append(seconds_of(loop.step, loop.world))
    return call, steps


def save_synchronously(loop: Loop) -> float:
    loop.go_to_next_save()
    seconds = seconds_of(loop.save_now, loop.world)
    assert loop.has_committed(loop.state.step)
    return seconds


def save_full_state(loop: Loop, folder: Path) -> float:
    """Leaves the checkpoint in `folder`, in place of the one before."""
    tensors = full_state(loop.learner)
    loop.world.main_decides(lambda: shutil.rmtree(folder, ignore_errors=True))
    writer = FileSystemWriter(folder, sync_files=True)
    return seconds_of(lambda: save(tensors, storage_writer=writer), loop.world)


def take_turns(loop: Loop, number: int, full: Path) -> Round:
    """One round; in each another way begins, and none inherits another's unwritten data."""
    load = OtherLoad()
    undisturbed = [seconds_of(loop.step, loop.world) for _ in range(UNDISTURBED)]
    ways: list[Callable[[], Any]] = [
        lambda: save_asynchronously(loop),
        lambda: save_synchronously(loop),
        lambda: save_full_state(loop, full),
    ]
    taken: dict[int, Any] = {}
    for turn in range(len(ways)):
        os.sync()
        way = (number + turn) % len(ways)
        taken[way] = ways[way]()
    call, disturbed = taken[0]
    finished = Round(undisturbed, call, disturbed, taken[1], taken[2], load.share())
    if loop.world.is_main:
        say(f"round {number + 1}: {_line(finished)}")
    return finished


def _line(taken: Round) -> str:
    return (
        f"call {taken.call:.3f} s, {len(taken.disturbed_steps)} steps {taken.slow_down:+.3f} s, "
        f"synchronous {taken.synchronous:.3f} s, full state {taken.full_state:.3f} s; "
        f"others {taken.other_load:.0%}"
    )


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk of a checkpoint, for so many trainable parameters."""

    trainable: int
    bytes: int

    @property
    def expected(self) -> int:
        return BYTES_PER_PARAMETER * self.trainable

    @property
    def is_as_expected(self) -> bool:
        allowed = SIZE_TOLERANCE * self.expected + SIZE_ALLOWANCE
        return abs(self.bytes - self.expected) <= allowed

    def to_dict(self) -> dict[str, Any]:
        return {
            "trainable_parameters": self.trainable,
            "bytes": self.bytes,
            "bytes_of_parameters_and_moments": self.expected,
            "ratio": self.bytes / self.expected,
            "surplus_bytes": self.bytes - self.expected,
        }


def sizes_of(loop: Loop) -> Sizes:
    return Sizes(sum(p.numel() for p in loop.learner.trainable), loop.bytes())


def compare(
    folder: Path, config: TransformerConfig, rounds: int, world: World, seed: int
) -> dict[str, Any]:
    """Measure everything, with files in `folder`."""
    loop = Loop(folder, config, N, world, seed)
    full = folder / "full"
    warm = [take_turns(loop, number, full) for number in range(WARM_UP)]
    counted = [take_turns(loop, WARM_UP + number, full) for number in range(rounds)]
    sizes = sizes_of(loop)
    head = Loop(folder, config, 0, world, seed)
    save_synchronously(head)
    results = {
        "settings": settings(config, rounds, world, loop),
        **summarise(counted, sizes, sizes_of(head), size_of(full)),
        "first_call_seconds": warm[0].call,
        # of several ranks, each is another process to the others
        "largest_other_load": max(r.other_load for r in counted) if world.size == 1 else None,
        "rounds": [asdict(r) for r in counted],
    }
    world.sum([0.0])  # nobody removes files that another still reads
    return results


def settings(config: TransformerConfig, rounds: int, world: World, loop: Loop) -> dict[str, Any]:
    return {
        "architecture": asdict(config),
        "parameters": sum(p.numel() for p in loop.learner.critic.parameters()),
        "training": to_dict(loop.learner.config),
        "checkpoint": to_dict(CHECKPOINT),
        "dtype": "float32",
        "processes": world.size,
        "rounds": rounds,
        "warm_up_rounds": WARM_UP,
    }


def summarise(rounds: Sequence[Round], n: Sizes, head: Sizes, full_bytes: int) -> dict[str, Any]:
    """Medians over rounds, their ratios, and which claims they bear out."""
    call = statistics.median(r.call for r in rounds)
    pause = statistics.median(r.call + r.slow_down for r in rounds)
    synchronous = statistics.median(r.synchronous for r in rounds)
    full = statistics.median(r.full_state for r in rounds)
    step = statistics.median(s for r in rounds for s in r.undisturbed_steps)
    disturbed = statistics.median(s for r in rounds for s in r.disturbed_steps)
    return {
        "seconds": {
            "asynchronous_call": call,
            "asynchronous_slow_down": statistics.median(r.slow_down for r in rounds),
            "asynchronous_call_and_slow_down": pause,
            "synchronous": synchronous,
            "full_state": full,
            "undisturbed_step": step,
            "step_during_a_save": disturbed,
        },
        "ratios": {
            "call_to_synchronous": call / synchronous,
            "call_and_slow_down_to_synchronous": pause / synchronous,
            "step_during_a_save_to_undisturbed": disturbed / step,
            "full_state_to_synchronous_seconds": full / synchronous,
            "full_state_to_checkpoint_bytes": full_bytes / n.bytes,
        },
        "bytes": {
            f"n{N}": n.to_dict(),
            "n0": head.to_dict(),
            "full_state": full_bytes,
        },
        "claims": {
            f"call_under_{STALL_LIMIT:.0%}_of_synchronous": call < STALL_LIMIT * synchronous,
            f"n{N}_bytes_as_expected": n.is_as_expected,
            "n0_bytes_as_expected": head.is_as_expected,
        },
    }


# Report


def show(results: dict[str, Any]) -> str:
    seconds, ratios, sizes = (results[name] for name in ("seconds", "ratios", "bytes"))
    own, head = sizes[f"n{N}"], sizes["n0"]

    def row(name: str, key: str, size: int | None) -> list[str]:
        share = seconds[key] / seconds["synchronous"]
        written = "-" if size is None else f"{size / 1e6:.1f}"
        return [name, f"{seconds[key]:.3f}", f"{share:.1%}", written]

    rows = [
        row("asynchronous: the call", "asynchronous_call", own["bytes"]),
        row("asynchronous: call and slow-down", "asynchronous_call_and_slow_down", own["bytes"]),
        row("synchronous", "synchronous", own["bytes"]),
        row("full state, no checksums", "full_state", sizes["full_state"]),
    ]
    claims = [f"{name}: {'yes' if kept else 'NO'}" for name, kept in results["claims"].items()]
    return "\n".join(
        [
            table(["", "seconds", "of synchronous", "MB"], rows),
            f"a step takes {seconds['undisturbed_step']:.3f} s, during a save "
            f"{ratios['step_during_a_save_to_undisturbed']:.2f} times that; "
            f"the first call, which allocates, {results['first_call_seconds']:.3f} s",
            f"{own['ratio']:.4f} times the bytes of {own['trainable_parameters']:,} parameters "
            f"and moments; N=0: {head['bytes']:,} bytes for {head['trainable_parameters']:,}",
            *claims,
        ]
    )


@contextmanager
def shared_folder(world: World) -> Iterator[Path]:
    """A temporary folder of all ranks, on the disk that TMPDIR names."""
    folder = world.main_decides(lambda: tempfile.mkdtemp(prefix="bench-checkpoint-"))
    try:
        yield Path(folder)
    finally:
        if world.is_main:
            shutil.rmtree(folder)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default: 9)")
    options = parser.parse_args()
    with joined_world(DistributedConfig()) as world, shared_folder(world) as folder:
        results = compare(folder, ARCHITECTURE, options.rounds, world, options.seed)
        is_main = world.is_main
    if is_main:
        print(show(results))
        if options.out:
            write_record(options.out, results, seed=options.seed, packages=["numpy"])


if __name__ == "__main__":
    main()
