"""How a training scales: 1 and 2 ranks measured here, 4 to 512 GPUs on paper.

    python bench/scaling.py --out bench/results/scaling.json
    python bench/scaling.py --links 1600 3200 --rounds 0

Measured: the product's critic, Packer and Learner over gloo, on CPU in float32, each rank with one
thread and as many sequences of a step as alone (weak scaling), in turns with one rank; and the
rate at which gloo gathers a block. From one rank's times and that rate the model says what two
ranks should take, with everything overlapped and with nothing; a CPU's cores also do gloo's work.

On paper: scaling_model.py, for each distributed.fsdp.sharding_strategy, with and without the prefix
from a cache. Block times come from a record of bench/gpu.py where there is one (--gpu), else from
stated rates: 170 (A100) and 400 TFLOP/s (H100). Links between nodes are of a whole node: 200 and
400 Gb/s are one adapter a node, 1600 and 3200 eight. Of the strategies that fit into a GPU's memory
the fastest is named, with its efficiency: the time of computing over a step's.
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import OtherLoad, command_line, say, table, write_record
from scaling_model import STRATEGIES, Cluster, Job, described, rates, step_seconds
from throughput import SHAPES, TRAINING, make_packer, write_examples

from job.common.schema import DistributedConfig, FsdpConfig, ObjectiveConfig, ShardingStrategy
from job.data.packing import Packer
from job.distributed.fsdp import shard
from job.distributed.world import World, joined_world
from job.memory.settings import SHAPES as LARGE
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.parameters import block_parameters
from job.model.shards import fill
from job.run.value_metrics import ValueMetrics
from job.training.learner import Learner
from job.training.objective import Objective

GB = 1e9
A100 = Cluster(
    forward=170e12,
    backward=170e12,
    memory=80 * GB,
    memory_rate=1700 * GB,
    inside=230 * GB,
    between=0,
)
H100 = replace(A100, forward=400e12, backward=400e12, memory_rate=2800 * GB, inside=350 * GB)
CLUSTERS = {"A100": A100, "H100": H100}
GPUS = (4, 8, 16, 32, 64, 128, 256, 512)
UNFROZEN = (1, 4, 8)
TOKENS = 8192  # of a GPU's micro-batch
PICTURED = ("7b", 4)
N = 4  # unfrozen blocks of what is measured
WARM_UP = 1  # steps of a process
TRANSFERS = 10
MEASURED = (
    ShardingStrategy.NO_SHARD,
    ShardingStrategy.REPLICATE_FROZEN,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.FULL_SHARD,
)


# Measured: what each rank does


def rank_times(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step, and bytes a second of gathering a block; in one rank of some."""
    torch.set_num_threads(1)
    with joined_world(DistributedConfig()) as world, tempfile.TemporaryDirectory() as folder:
        config, strategy = SHAPES[options.shape], ShardingStrategy[options.strategy]
        data = write_examples(Path(folder), config.vocab_size, options.seed)
        training = replace(
            TRAINING,
            num_unfrozen_layers=options.unfrozen,
            batch_size=TRAINING.batch_size * world.size,
        )
        critic = _critic(config, options.unfrozen, strategy, world, options.seed)
        learner = Learner(critic, Objective(ObjectiveConfig()), training, world)
        packer = Packer(
            *(data, make_packer(data, config).units),
            dim=config.dim,
            budget=training.token_budget,
            device=world.device,
            rank=world.rank,
            world=world.size,
        )
        seconds, tokens = [], []
        for step in range(WARM_UP + options.steps):
            began = time.perf_counter()
            batches = packer.step(step, training.batch_size, options.seed)
            learner.step(step, batches, ValueMetrics())
            seconds.append(time.perf_counter() - began)
            tokens.append(sum(len(batch.tokens) for batch in batches))
        return {
            "seconds": seconds[WARM_UP:],
            "tokens": world.gather(sum(tokens[WARM_UP:])),
            "gathering": _gathering_rate(config, world),
        }


def _critic(
    config: TransformerConfig, n: int, strategy: ShardingStrategy, world: World, seed: int
) -> Critic:
    with torch.device("meta"):
        critic = Critic(config)
    unfreeze_last_blocks(critic, n)
    shard(critic, FsdpConfig(sharding_strategy=strategy, mixed_precision=False), world)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in critic.trunk.named_parameters():
        random = torch.randn(parameter.shape, generator=generator) * 0.02
        fill(parameter, random + 1 if "norm" in name else random)
    critic.initialise_head(0.5, seed)
    return critic


def _gathering_rate(config: TransformerConfig, world: World) -> float | None:
    """Bytes a second that a rank receives while a block is gathered."""
    if world.size == 1:
        return None
    mine = torch.zeros(block_parameters(config) // world.size)
    parts = [torch.empty_like(mine) for _ in range(world.size)]
    seconds = []
    for _ in range(TRANSFERS):
        began = time.perf_counter()
        dist.all_gather(parts, mine)
        seconds.append(time.perf_counter() - began)
    received = (world.size - 1) * mine.nbytes
    return received / statistics.median(seconds)


# Measured: all of it


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, each of every way in turn."""
    ways = [(1, 0, MEASURED[0]), (1, N, MEASURED[0]), *((2, N, one) for one in MEASURED)]
    rounds = []
    for number in range(options.rounds):
        load = OtherLoad()
        found = [_run(*way, options) for way in ways]
        rounds.append({"ways": found, "other_load": load.share()})
        say(f"round {number + 1}: others {rounds[-1]['other_load']:.0%}")
    table_of = {
        way: [one["ways"][index] for one in rounds]  # type: ignore[index]
        for index, way in enumerate(ways)
    }
    return _compared(table_of, options) | {
        "largest_other_load": max(float(str(one["other_load"])) for one in rounds)
    }


def _run(
    ranks: int, n: int, strategy: ShardingStrategy, options: argparse.Namespace
) -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={ranks}", __file__, "--rank-times"]
    command += ["--shape", options.shape, "--steps", str(options.steps), "--unfrozen", str(n)]
    command += ["--strategy", strategy.name, "--seed", str(options.seed)]
    # two ranks share the cores that one could have alone
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _compared(
    found: dict[tuple[int, int, ShardingStrategy], list[dict[str, Any]]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Two ranks beside one, and beside what the model makes of one."""
    config = SHAPES[options.shape]
    seconds = {
        way: statistics.median(s for one in runs for s in one["seconds"])
        for way, runs in found.items()
    }
    speed = {
        way: statistics.median(sum(one["tokens"]) / sum(one["seconds"]) for one in runs)
        for way, runs in found.items()
    }
    alone = (1, N, MEASURED[0])
    tokens = round(seconds[alone] * speed[alone])
    gathering = statistics.median(
        one["gathering"] for way, runs in found.items() if way[0] == 2 for one in runs
    )
    forward, backward = rates(config, tokens, {n: seconds[1, n, MEASURED[0]] for n in (0, N)})
    here = Cluster(
        forward, backward, memory=0, memory_rate=10 * GB, inside=gathering, between=gathering
    )
    compared = []
    for strategy in MEASURED:
        job = Job(config, N, tokens, 2, strategy, weight_bytes=4)
        ways = [step_seconds(job, here, overlap=overlap).step for overlap in (True, False)]
        compared.append(
            {
                "strategy": strategy.name,
                "seconds": seconds[2, N, strategy],
                "tokens_per_second": speed[2, N, strategy],
                "efficiency": speed[2, N, strategy] / (2 * speed[alone]),
                "predicted_seconds": ways,
            }
        )
    return {
        "one_rank": {"seconds": seconds[alone], "tokens_per_second": speed[alone]},
        "gathering_bytes_per_second": gathering,
        "two_ranks": compared,
    }


# On paper


def on_paper(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every job, by cluster and link."""
    return [
        {"cluster": name, "link": link, "shape": shape, "n": n, "cached": cached}
        | {"ways": [described(_job(shape, n, gpus, one, cached), cluster) for one in STRATEGIES]}
        | {"gpus": gpus}
        for name, cluster in _clusters(options)
        for link in options.links
        for cluster in [replace(cluster, between=link * GB / 8)]
        for shape in LARGE
        for n in UNFROZEN
        for cached in (False, True)
        for gpus in GPUS
    ]


def _job(shape: str, n: int, gpus: int, strategy: ShardingStrategy, cached: bool) -> Job:
    return Job(LARGE[shape], n, TOKENS, gpus, strategy, cached=cached)


def _clusters(options: argparse.Namespace) -> list[tuple[str, Cluster]]:
    if options.gpu is None:
        return list(CLUSTERS.items())
    record = json.loads(options.gpu.read_text())
    forward, backward = measured_rates(record)
    gpu = record["sections"]["machine"]["found"].get("gpu", "?")
    known = CLUSTERS["A100" if "A100" in gpu else "H100"]
    return [(gpu, replace(known, forward=forward, backward=backward))]


def measured_rates(record: dict[str, Any]) -> tuple[float, float]:
    """Operations a second forward and backward in a record of bench/gpu.py.

    Raises:
        ValueError: it has not the trainings that are needed.
    """
    seconds = {}
    for n in (0, 4, 8):
        found = record["sections"].get(f"training, N={n}, compiled", {}).get("found")
        if found is not None:
            seconds[n] = TOKENS / found["tokens_per_second"]
    return rates(LARGE[record["shape"]], TOKENS, seconds)


def best(ways: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest of those that fit; of equals the one that needs least memory is the last."""
    fitting = [way for way in ways if way["fits"]]
    return min(reversed(fitting), key=lambda way: way["seconds"]) if fitting else None


# Report

_SHORT = {
    "NO_SHARD": "whole",
    "REPLICATE_FROZEN": "frozen whole",
    "HYBRID_SHARD": "hybrid",
    "SHARD_GRAD_OP": "grad op",
    "FULL_SHARD": "full",
}


def show_measured(found: dict[str, Any]) -> str:
    one = found["one_rank"]
    rows = [
        [
            way["strategy"],
            f"{way['seconds']:.3f}",
            f"{way['tokens_per_second']:.0f}",
            f"{way['efficiency']:.2f}",
            "{:.3f}-{:.3f}".format(*way["predicted_seconds"]),
        ]
        for way in found["two_ranks"]
    ]
    rows.insert(
        0, ["one rank", f"{one['seconds']:.3f}", f"{one['tokens_per_second']:.0f}", "1", "-"]
    )
    gathering = found["gathering_bytes_per_second"] / GB
    return (
        table(["MEASURED", "s", "tok/s", "efficiency", "model: all to nothing overlapped"], rows)
        + f"\ngloo gathers {gathering:.2f} GB/s; other processes used at most "
        f"{found['largest_other_load']:.1%} of the machine in a round"
    )


def show_paper(jobs: Sequence[dict[str, Any]]) -> str:
    """For each cluster and link, the best strategy of each trunk and number of GPUs."""
    parts = []
    for place in dict.fromkeys((job["cluster"], job["link"]) for job in jobs):
        of_place = [job for job in jobs if (job["cluster"], job["link"]) == place]
        kinds = dict.fromkeys((job["shape"], job["n"], job["cached"]) for job in of_place)
        rows = [
            [
                f"{shape} N={n}{', cached' if cached else ''}",
                *(
                    _cell(best(job["ways"]))
                    for job in of_place
                    if (job["shape"], job["n"], job["cached"]) == (shape, n, cached)
                ),
            ]
            for shape, n, cached in kinds
        ]
        title = f"MODEL, {place[0]}, {place[1]} Gb/s a node"
        parts.append(table([title, *(str(gpus) for gpus in GPUS)], rows))
    return "\n\n".join(parts)


def _cell(way: dict[str, Any] | None) -> str:
    return "none fits" if way is None else f"{_SHORT[way['strategy']]} {way['efficiency']:.0%}"


def draw(jobs: Sequence[dict[str, Any]]) -> bytes:
    """Efficiency over GPUs of each strategy that fits, without and with the cache, as a PNG."""
    from job.run.figure import draw_line, look, panels, png, run_colour

    first = jobs[0]
    shape, n = PICTURED
    with look():
        title = f"MODEL: {shape}, N={n}, {first['cluster']}, {first['link']} Gb/s a node"
        figure, axes = panels(title, (1, 1))
        for cached, below in zip((False, True), axes, strict=True):
            mine = [
                job
                for job in jobs
                if (job["cluster"], job["link"]) == (first["cluster"], first["link"])
                and (job["shape"], job["n"], job["cached"]) == (shape, n, cached)
            ]
            for index, strategy in enumerate(STRATEGIES):
                ways = [(job["gpus"], job["ways"][index]) for job in mine]
                there = [(gpus, way["efficiency"]) for gpus, way in ways if way["fits"]]
                x, y = zip(*there, strict=True) if there else ((), ())
                style = {"color": run_colour(index), "marker": "o", "label": strategy.name}
                draw_line(below, x, y, style)
            below.set_xscale("log", base=2)
            below.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
            below.set_ylim(0, 1.05)
            below.set_ylabel("efficiency, cached" if cached else "efficiency")
        axes[-1].set_xlabel("GPUs")
        return png(figure)


def recorded(job: dict[str, Any]) -> dict[str, Any]:
    """A job as it is written down: the rest can be computed again (--rounds 0)."""
    ways = job["ways"]
    efficiency = {way["strategy"]: round(way["efficiency"], 4) for way in ways if way["fits"]}
    kept = {name: value for name, value in job.items() if name != "ways"}
    return kept | {"gpus": ways[0]["gpus"], "efficiency": efficiency}


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="of what is measured; 0 for paper alone (3)")
    add("--steps", type=int, default=8, help="of each process in a round (8)")
    add("--shape", choices=SHAPES, default="small", help="of what is measured (small)")
    add("--links", type=int, nargs="+", default=[200, 400], help="Gb/s of a node (200 400)")
    add("--gpu", type=Path, metavar="RECORD", help="of bench/gpu.py, for block times")
    add("--rank-times", action="store_true", help=argparse.SUPPRESS)
    add("--unfrozen", type=int, help=argparse.SUPPRESS)
    add("--strategy", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_times:
        found = rank_times(options)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    jobs = on_paper(options)
    results: dict[str, Any] = {"clusters": {name: asdict(c) for name, c in _clusters(options)}}
    results["links"] = options.links
    results["tokens"] = TOKENS
    if options.rounds:
        results["measured"] = measured(options)
        print(show_measured(results["measured"]), end="\n\n")
    print(show_paper(jobs))
    results["model"] = [recorded(job) for job in jobs]
    if options.out:
        write_record(options.out, results, seed=options.seed, packages=["numpy"])
        options.out.with_suffix(".png").write_bytes(draw(jobs))


if __name__ == "__main__":
    main()
