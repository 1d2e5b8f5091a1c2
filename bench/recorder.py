"""What recording its memory costs a training.

    python bench/recorder.py --out bench/results/recorder.json

One critic with random weights is trained on CPU in float32, always on the same batch. In each round
it takes some steps with the recorder running, each of their phases marked, and as many without, in
turns which come first. Compared are the wall time of a step and the CPU time of the process in it,
each of the fastest of some steps: what other processes take is taken from all the others, and the
recorder samples several times in every one. Figures are medians over rounds.

The CPU time of the recorder's own threads, and the time of a change of phase, are also measured by
themselves.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import OtherLoad, command_line, say, table, write_record
from throughput import ARCHITECTURE, CPU, TRAINING, make_critic, make_packer, write_examples

from job.common.schema import ObjectiveConfig
from job.data.packing import Batch
from job.distributed.world import World
from job.memory.recorder import Recorder
from job.training.learner import Learner
from job.training.objective import Counts, Objective

SMALL = replace(ARCHITECTURE, dim=256, n_layers=4, ffn_hidden=688)  # phases change often
SEQUENCES = 2  # of a step
STEPS = 15  # of a block with or without the recorder
HERTZ = 25.0
CHANGES = 200  # of phase, in a row
WARM_UP = 1  # rounds that are not counted


@dataclass(frozen=True)
class Block:
    """The least over some steps, in seconds, and the share of the machine that others took."""

    wall: float
    cpu: float
    others: float


class Loop:
    """A training whose steps mark their phases, where there is a recorder."""

    def __init__(self, folder: Path, seed: int) -> None:
        data = write_examples(folder, SMALL.vocab_size, seed)
        packer = make_packer(data, SMALL)
        critic = make_critic(SMALL, seed)
        self._learner = Learner(critic, Objective(ObjectiveConfig()), TRAINING, World())
        self._batches: Sequence[Batch] = packer.step(0, SEQUENCES, seed)

    def step(self, recorder: Recorder | None) -> None:
        def phase(name: str) -> AbstractContextManager[None]:
            return nullcontext() if recorder is None else recorder.phase(name)

        learner = self._learner
        objective = learner.objective
        whole = Counts.of([objective.counts(batch) for batch in self._batches])
        for batch in self._batches:
            with phase("forward"):
                loss = objective.loss(learner.outputs(batch), batch, 0, whole)
            with phase("backward"):
                loss.backward()
        with phase("optimizer"):
            learner.optimizer.step()
            learner.optimizer.zero_grad()


def block(loop: Loop, recorder: Recorder | None) -> Block:
    walls, cpus, load = [], [], OtherLoad()
    for _ in range(STEPS):
        wall, cpu = time.perf_counter(), time.process_time()
        loop.step(recorder)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return Block(min(walls), min(cpus), load.share())


def take_turns(loop: Loop, turn: int) -> tuple[Block, Block, dict[str, float]]:
    """Blocks with and without the recorder, and its own figures."""
    if turn % 2:
        without = block(loop, None)
        with_it, own = recorded(loop)
    else:
        with_it, own = recorded(loop)
        without = block(loop, None)
    return with_it, without, own


def recorded(loop: Loop) -> tuple[Block, dict[str, float]]:
    with Recorder(CPU, HERTZ) as recorder:
        began, cpu_began = time.monotonic(), cpu_seconds()
        taken = block(loop, recorder)
        share = (cpu_seconds() - cpu_began) / (time.monotonic() - began)
        hertz: float = recorder.summary()["sampling"]["hertz"]
        change = seconds_of_a_change(recorder)
    own = {"hertz": hertz, "share_of_a_core": share, "seconds_per_phase_change": change}
    return taken, own


def cpu_seconds() -> float:
    """CPU time that the recorder's threads have taken; None of them has ended."""
    threads = [t.ident for t in threading.enumerate() if t.name in ("memory", "nvml")]
    clocks = [time.pthread_getcpuclockid(ident) for ident in threads if ident is not None]
    return sum(map(time.clock_gettime, clocks))


def seconds_of_a_change(recorder: Recorder) -> float:
    began = time.perf_counter()
    for _ in range(CHANGES // 2):
        with recorder.phase("forward"):
            pass
    return (time.perf_counter() - began) / CHANGES


def summarise(rounds: Sequence[tuple[Block, Block, dict[str, float]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for kind in ("wall", "cpu"):
        pairs = [(getattr(a, kind), getattr(b, kind)) for a, b, _ in rounds]
        ratios = [a / b for a, b in pairs]
        lower, middle, upper = statistics.quantiles(ratios, n=4)
        figures[kind] = {
            "seconds_with": statistics.median(a for a, _ in pairs),
            "seconds_without": statistics.median(b for _, b in pairs),
            "ratio": middle,
            "ratio_quartiles": [lower, upper],
        }
    own = [own for _, _, own in rounds]
    figures["recorder"] = {name: statistics.median(one[name] for one in own) for name in own[0]}
    figures["share_of_other_processes"] = statistics.median(
        (a.others + b.others) / 2 for a, b, _ in rounds
    )
    return figures


def show(figures: dict[str, Any]) -> str:
    rows = []
    for kind, name in (("wall", "wall time"), ("cpu", "CPU time")):
        own = figures[kind]
        low, high = own["ratio_quartiles"]
        sizes = [f"{own[key] * 1e3:.2f}" for key in ("seconds_with", "seconds_without")]
        rows.append([f"{name} of a step", *sizes, f"{own['ratio']:.4f}", f"{low:.4f}-{high:.4f}"])
    own = figures["recorder"]
    return (
        table(["", "with ms", "without ms", "ratio", "quartiles"], rows)
        + f"\n{own['hertz']:.1f} samples/s in {own['share_of_a_core']:.3%} of a core; "
        f"{own['seconds_per_phase_change'] * 1e6:.1f} us a change of phase"
    )


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the sampler runs beside it, as beside a GPU
    with tempfile.TemporaryDirectory() as name:
        loop = Loop(Path(name), options.seed)
        rounds = []
        for turn in range(WARM_UP + options.rounds):
            with_it, without, own = take_turns(loop, turn)
            say(f"round {turn}: {with_it.wall * 1e3:.1f} and {without.wall * 1e3:.1f} ms a step")
            rounds.append((with_it, without, own))
    figures = summarise(rounds[WARM_UP:])
    print(show(figures))
    if options.out:
        settings = {"rounds": options.rounds, "steps": STEPS, "hertz": HERTZ}
        write_record(options.out, {"settings": settings, **figures}, seed=options.seed, packages=[])


if __name__ == "__main__":
    main()
