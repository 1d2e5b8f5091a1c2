"""Memory and time of loading a base of 2 GB on 1, 2 and 4 ranks.

    python bench/loading.py --out bench/results/loading.json

A language model of random float16 (Meta's layout) and bfloat16 weights (Hugging Face's) is written
to a temporary folder, and read in these ways, each by as many processes as there are ranks:

    Meta, Hugging Face   the product: a critic with every block frozen in bfloat16, in shards, and
                         load_trunk
    ... in place         the same into memory that the process had touched before, as a GPU's is:
                         on a CPU, each page of the shards is got from the system while loading
    from_pretrained      transformers, in bfloat16, by each process for itself; it maps the file and
                         reads nothing, so each weight is then used once (a sum), as a model is
    torch.load           of consolidated.pth and into a model that takes the tensors as they are
                         (assign), by each process for itself

Memory is the most that a process has resident, mapped pages of the file included, less what it had
when loading began: interpreter and packages are left out. Time is from the moment at which all
processes are ready to the moment at which the last has finished. The file leaves the page cache
then: it is flushed, and given back with POSIX_FADV_DONTNEED. The disk's sequential rate is that of
the same file, just before and just after each load, read by one process through the page cache in
blocks of 16 MB, and from the same moment: a virtual machine soon hands free memory back to its
host, and whatever then fills the page cache waits for it. Beside it stands the rate at which one
process gets memory from the system: it fills as much as a rank of one loads. Figures are medians
over rounds. MB are 1e6 bytes.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import OtherLoad, command_line, peak_memory_mb, say, table, write_record
from torch import nn

from job.common.schema import DistributedConfig, FsdpConfig
from job.distributed.fsdp import shard
from job.distributed.world import World, joined_world
from job.model.architecture import TransformerConfig
from job.model.architecture_file import read_architecture
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.shards import local_shard
from job.model.transformer import Transformer
from job.model.weights import load_trunk, save_hugging_face, save_transformer

ARCHITECTURE = TransformerConfig(dim=2048, n_layers=18, n_heads=16, vocab_size=32000)
RANKS = (1, 2, 4)
BLOCK = 16 * 2**20
MEMORY_LIMIT = 1 / 3  # of the others' peak, at most, on the most ranks
SHARE_OF_DISK = 0.8  # of its sequential rate, at least
IN_PLACE = " in place"
META, HUGGING_FACE = "meta/consolidated.pth", "hf/model.safetensors"
OURS = {"Meta": META, "Hugging Face": HUGGING_FACE}
OTHERS = {"from_pretrained": HUGGING_FACE, "torch.load": META}
FILES = OURS | {way + IN_PLACE: file for way, file in OURS.items()} | OTHERS


# One rank


def prepare(way: str, folder: Path, world: World) -> tuple[Callable[[], Any], int, int]:
    """Something to be called that loads; bytes of this rank's shard and of the largest tensor."""
    if way == "from_pretrained":
        from transformers import AutoModelForCausalLM

        load = AutoModelForCausalLM.from_pretrained
        return lambda: _use(load(folder, dtype=torch.bfloat16)), 0, 0
    if way == "torch.load":
        with torch.device("meta"):
            model = Transformer(read_architecture(folder))
        return lambda: _load_plainly(model, folder / "consolidated.pth"), 0, 0
    with torch.device("meta"):
        critic = Critic(read_architecture(folder))
    unfreeze_last_blocks(critic, 0)
    shard(critic, FsdpConfig(), world)
    own_bytes = sum(local_shard(p).nbytes for p in critic.trunk.parameters())
    largest = max(p.numel() * p.element_size() for p in critic.trunk.parameters())
    if way.endswith(IN_PLACE):
        for parameter in critic.trunk.parameters():
            local_shard(parameter).zero_()
    return lambda: load_trunk(critic.trunk, folder), own_bytes, largest


def _use(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.sum()
    return model


def _load_plainly(model: Transformer, file: Path) -> None:
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), assign=True)


def measure_rank(way: str, folder: Path, world: World) -> dict[str, Any] | None:
    """What the ranks found together, on rank 0."""
    load, own_bytes, largest = prepare(way, folder, world)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak_memory_mb()
    world.sum([0.0])
    if world.is_main:
        leave_page_cache(folder / Path(FILES[way]).name)
    world.sum([0.0])
    began = time.time()
    loaded = load()
    ended = time.time()
    in_place = own_bytes / 1e6 if way.endswith(IN_PLACE) else 0
    found = {
        "memory_mb": peak_memory_mb() - before + in_place,
        "process_mb": peak_memory_mb(),
        "shard_mb": own_bytes / 1e6,
        "allowed_mb": (1.1 * own_bytes + largest) / 1e6,
        "began": began,
        "ended": ended,
    }
    del loaded
    ranks = world.gather(found)
    if not world.is_main:
        return None
    fullest = max(ranks, key=lambda rank: rank["memory_mb"])
    first, last = min(r["began"] for r in ranks), max(r["ended"] for r in ranks)
    return {k: v for k, v in fullest.items() if k.endswith("_mb")} | {"seconds": last - first}


def work(way: str, folder: Path) -> None:
    with joined_world(DistributedConfig()) as world:
        found = measure_rank(way, folder, world)
    if found is not None:
        print(json.dumps(found))


# All of them


def write_model(folder: Path, seed: int) -> dict[str, int]:
    """Both layouts; the bytes of a file that a critic uses, by layout."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(ARCHITECTURE).to(torch.float16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    save_transformer(model, folder / "meta")
    save_hugging_face(model.to(torch.bfloat16), folder / "hf", 2048)
    size = sum(p.nbytes for p in model.parameters())
    return {"all": size, "trunk": size - model.output.weight.nbytes}


def leave_page_cache(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(file: Path) -> float:
    """MB a second of a sequential read, with nothing of the file in the page cache."""
    leave_page_cache(file)
    buffer, size = bytearray(BLOCK), 0
    with file.open("rb", buffering=0) as stream:
        began = time.perf_counter()
        while read := stream.readinto(buffer):
            size += read
        return size / 1e6 / (time.perf_counter() - began)


def memory_rate(size: int) -> float:
    """MB a second of filling memory that the system has to give first."""
    block = b"\1" * BLOCK
    with mmap.mmap(-1, size) as memory:
        began = time.perf_counter()
        for _ in range(size // BLOCK):
            memory.write(block)
        return memory.tell() / 1e6 / (time.perf_counter() - began)


def measure(way: str, world: int, folder: Path, needed: dict[str, int]) -> dict[str, Any]:
    """One load by `world` processes, beside the disk's rate before and after."""
    file = folder / FILES[way]
    load = OtherLoad()
    before, others = disk_rate(file), load.share()  # not while its own ranks are the others
    found = _run(way, world, file.parent)
    disk = (before + disk_rate(file)) / 2
    size = needed["all" if way in OTHERS else "trunk"]
    rate = size / 1e6 / found["seconds"]
    found |= {"mb_per_second": rate, "disk_mb_per_second": disk, "of_disk": rate / disk}
    say(
        f"{way}, {world} rank(s): {found['memory_mb']:,.0f} MB, {found['seconds']:.2f} s, "
        f"{rate:,.0f} of the disk's {disk:,.0f} MB/s"
    )
    return found | {"other_load_before": others}


def _run(way: str, world: int, folder: Path) -> dict[str, Any]:
    """Start the processes and wait; what rank 0 printed."""
    shared = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--way", way, "--folder", str(folder)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if codes := [p.returncode for p in processes if p.returncode]:
        raise RuntimeError(f"{way} on {world} rank(s) ended with {codes}")
    return dict(json.loads(outputs[0].splitlines()[-1]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def compare(folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    needed = write_model(folder, seed)
    cells: dict[str, list[dict[str, Any]]] = {}
    given = []
    for _ in range(rounds):
        given.append(memory_rate(needed["trunk"]))
        for world in RANKS:
            for way in FILES:
                cells.setdefault(f"{way}, {world}", []).append(measure(way, world, folder, needed))
    medians = {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for name, found in cells.items()
    }
    return {
        "architecture": asdict(ARCHITECTURE),
        "bytes": needed,
        "rounds": rounds,
        "memory_mb_per_second": statistics.median(given),
        "medians": medians,
        "claims": claims(medians),
        "measured": cells,
    }


def claims(medians: dict[str, dict[str, float]]) -> dict[str, bool]:
    """What the figures bear out."""
    ours = [(way, world) for way in OURS for world in RANKS]
    most = max(RANKS)
    made = {
        f"{way}, {world}: memory within 1.1 shards and a tensor": (
            medians[f"{way}, {world}"]["memory_mb"] <= medians[f"{way}, {world}"]["allowed_mb"]
        )
        for way, world in ours
    }
    for way in OURS:
        for other in OTHERS:
            theirs = medians[f"{other}, {most}"]["memory_mb"]
            small = medians[f"{way}, {most}"]["memory_mb"] <= MEMORY_LIMIT * theirs
            made[f"{way}, {most}: at most a third of {other}'s memory"] = small
    rated = [(way + end, world) for end in (IN_PLACE, "") for way, world in ours]
    for way, world in rated:
        fast = medians[f"{way}, {world}"]["of_disk"] >= SHARE_OF_DISK
        made[f"{way}, {world}: at least {SHARE_OF_DISK:.0%} of the disk's rate"] = fast
    return made


def show(results: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{found['memory_mb']:,.0f}",
            f"{found['seconds']:.2f}",
            f"{found['mb_per_second']:,.0f}",
            f"{found['of_disk']:.0%}",
        ]
        for name, found in results["medians"].items()
    ]
    kept = [f"{name}: {'yes' if kept else 'NO'}" for name, kept in results["claims"].items()]
    header = ["way, ranks", "MB a rank", "seconds", "MB/s", "of the disk"]
    given = f"memory is given at {results['memory_mb_per_second']:,.0f} MB/s"
    return "\n".join([table(header, rows), given, *kept])


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--way", choices=FILES, help="be one rank of this way, started by another")
    parser.add_argument("--folder", type=Path, help="of the model, for --way")
    options = parser.parse_args()
    if options.way is not None:
        work(options.way, options.folder)
        return
    with tempfile.TemporaryDirectory(prefix="loading-") as folder:
        results = compare(Path(folder), options.rounds, options.seed)
    print(show(results))
    if options.out is not None:
        packages = ["safetensors", "transformers"]
        write_record(options.out, results, seed=options.seed, packages=packages)


if __name__ == "__main__":
    main()
