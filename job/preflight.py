"""See whether this node, these GPUs and these files can do the job, before it is begun.

    python -m job.preflight --config configs/critic/critic_4gpu.yaml --gpus 4 --scratch /scratch
    torchrun --nproc_per_node 4 -m job.preflight --config FILE      also tries the ranks' network

Each finding is one line, and what is wrong says what to do. Exit code 0: all is well; 71: this
node is unfit, another may be fit; 78: the configuration's files are wrong.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from job.common.config import command_line, load_config
from job.common.errors import Exit, InputError, UnfitNode, run_and_leave
from job.common.progress import set_up_logging
from job.common.schema import EMBEDDED, CriticConfig
from job.distributed.world import World, joined_world
from job.model.weights import check_trunk
from job.training.data import check_sources

_SHARED_MEMORY_BYTES = 64 << 20  # NCCL's buffers between the GPUs of a node
_SCRATCH_BYTES = 1 << 30
_PROBE_BYTES = 1 << 20
_PAIR_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_SLOW = 0.25  # of the median pair: something is wrong with a link


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was seen, and if that is wrong, what to do and whose fault it is."""

    name: str
    seen: str
    advice: str = ""
    fault: Exit = Exit.FINISHED

    def __str__(self) -> str:
        mark = "ok " if self.fault is Exit.FINISHED else "BAD"
        return f"{mark} {self.name}: {self.seen}" + (f"; {self.advice}" if self.advice else "")


def unfit(name: str, seen: str, advice: str) -> Finding:
    return Finding(name, seen, advice, Exit.UNFIT_NODE)


def of_this_node(config: CriticConfig, gpus: int, scratch: Path | None) -> Iterator[Finding]:
    """What each node can be asked without the others; `gpus` of this node are needed."""
    yield _packages()
    yield _driver(gpus)
    yield _visible_gpus(gpus)
    yield _shared_memory()
    if scratch is not None:
        yield _scratch(scratch)
    yield _writable("run.dir", Path(config.run.dir), "see that this node mounts it, and its quota")
    weights = config.model.path if config.model.recipe is None else None
    yield _readable("weights", weights, lambda: _check_trunk(config))
    for name, source in (
        ("data.train", config.data.train),
        ("data.validation", config.data.validation),
    ):
        yield _readable(name, None if source == EMBEDDED else source, lambda: check_sources(config))


def _packages() -> Finding:
    """Packages of the home directory come before the image's own where Python looks for them."""
    where = Path(torch.__file__).parent
    home = Path(site.getusersitepackages())
    if where.is_relative_to(home):
        advice = "set PYTHONNOUSERSITE=1, or remove it there"
        return unfit("packages", f"torch comes from {where}", advice)
    return Finding("packages", f"torch {torch.__version__} from {where}")


def _driver(gpus: int) -> Finding:
    """Whether the driver can run the CUDA that torch was built with."""
    built = torch.version.cuda
    if built is None:
        return Finding("driver", "none needed: torch is built for CPUs")
    try:
        import pynvml

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        supported = pynvml.nvmlSystemGetCudaDriverVersion()
    except Exception as error:
        if not gpus:
            return Finding("driver", "none, and no GPU is asked for")
        advice = "run the container with --nv, on a node with GPUs"
        return unfit("driver", f"no NVIDIA driver answers ({error})", advice)
    newest = f"{supported // 1000}.{supported % 1000 // 10}"
    seen = f"{driver}, up to CUDA {newest}; torch is built with CUDA {built}"
    if int(built.partition(".")[0]) > supported // 1000:
        return unfit("driver", seen, "take an image with an older torch build, or a newer driver")
    return Finding("driver", seen)


def _visible_gpus(gpus: int) -> Finding:
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    seen = f"{count} visible of {gpus} asked for (CUDA_VISIBLE_DEVICES: {visible})"
    if count < gpus:
        advice = "see --gpus-per-node, and --nv of the container; a GPU may have failed: nvidia-smi"
        return unfit("GPUs", seen, advice)
    return Finding("GPUs", seen)


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return unfit("shared memory", f"/dev/shm: {error.strerror}", "mount it in the container")
    seen = f"{free / 1e6:,.0f} MB free in /dev/shm"
    if free < _SHARED_MEMORY_BYTES:
        advice = "give the container more (docker: --shm-size=1g), or remove what is left there"
        return unfit("shared memory", seen, advice)
    return Finding("shared memory", seen)


def _scratch(folder: Path) -> Finding:
    finding = _writable("scratch", folder, "clear it, or name another one in the cluster profile")
    if finding.fault is Exit.FINISHED and shutil.disk_usage(folder).free < _SCRATCH_BYTES:
        return unfit("scratch", finding.seen, "clear it: too little for caches")
    return finding


def _writable(name: str, folder: Path, advice: str) -> Finding:
    """Whether a folder takes files, by writing one; a full disk or a quota shows only then."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return unfit(name, f"cannot write in {folder}: {error.strerror}", advice)
    return Finding(name, f"{folder}: {shutil.disk_usage(folder).free / 1e9:,.1f} GB free")


def _check_trunk(config: CriticConfig) -> None:
    if config.model.recipe is None:
        check_trunk(config.model.path, config.data.max_length)


def _readable(name: str, path: str | None, check: Callable[[], object]) -> Finding:
    """Files that are not there may be elsewhere; files that are wrong are wrong everywhere."""
    if path is not None and not os.access(path, os.R_OK):
        advice = "see that this node mounts its file system (a container: --bind)"
        return unfit(name, f"cannot read {path}", advice)
    try:
        check()
    except InputError as error:
        return Finding(name, str(error), fault=Exit.BAD_INPUT)
    return Finding(name, path or "made here")


def of_all_ranks(world: World) -> Iterator[Finding]:
    """The links between ranks; every rank must take part, and rank 0's findings count."""
    rates = pair_rates(world)
    if not rates:
        return
    median = statistics.median(rates.values())
    (first, second), slowest = min(rates.items(), key=lambda item: item[1])
    seen = (
        f"{len(rates)} pair(s) of ranks, median {median / 1e9:.2f} GB/s, "
        f"slowest {slowest / 1e9:.2f} GB/s: rank {first} and rank {second}{_interface(world)}"
    )
    slow = sorted({rank for pair, rate in rates.items() if rate < _SLOW * median for rank in pair})
    advice = f"look at the links of rank(s) {', '.join(map(str, slow))}" if slow else ""
    yield Finding("network", seen, advice)


def pair_rates(world: World) -> dict[tuple[int, int], float]:
    """Bytes a second from one rank to another and back, for each pair.

    Pairs meet as in a round-robin tournament (the circle method), so that there are as many rounds
    as ranks and all ranks of a round work at once.
    """
    tensor = torch.ones(_PAIR_BYTES[world.device.type] // 4, device=world.device)
    own: dict[tuple[int, int], float] = {}
    for pairs in _rounds(world.size):
        dist.barrier(world.group)
        for first, second in pairs:
            if world.rank in (first, second):
                own[first, second] = _exchange(tensor, world, first, second)
    return {pair: rate for rates in world.gather(own) for pair, rate in rates.items()}


def _rounds(size: int) -> list[list[tuple[int, int]]]:
    players = list(range(size + size % 2))  # with an odd number one pauses
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append([(min(p), max(p)) for p in pairs if max(p) < size])
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def _exchange(tensor: torch.Tensor, world: World, first: int, second: int) -> float:
    """Bytes a second of a tensor's way to the other rank and back; the first way sets it up."""
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        if world.rank == first:
            dist.send(tensor, second)
            dist.recv(tensor, second)
        else:
            dist.recv(tensor, first)
            dist.send(tensor, first)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds = time.perf_counter() - began
    return 2 * tensor.nbytes / seconds


def _interface(world: World) -> str:
    """What the library that carries tensors has chosen to talk over."""
    if world.device.type == "cpu":
        name = os.environ.get("GLOO_SOCKET_IFNAME")
        return f"; gloo over {name or 'the interface of the host name'}"
    text = Path(os.environ["NCCL_DEBUG_FILE"]).read_text(errors="replace")
    chosen = re.findall(r"NET/\S+ : Using (.*)", text) or re.findall(r"Using network (\S+)", text)
    return f"; NCCL over {chosen[-1].strip() if chosen else 'shared memory or NVLink alone'}"


def preflight(config: CriticConfig, gpus: int, scratch: Path | None) -> list[Finding]:
    """All findings of this rank; the network's are on rank 0.

    Raises:
        Ending: ranks do not come, or do not answer; they are named.
    """
    findings = list(of_this_node(config, gpus, scratch))
    if any(finding.fault is not Exit.FINISHED for finding in findings):
        return findings
    with joined_world(config.distributed) as world:
        network = list(of_all_ranks(world))
        return findings + network if world.is_main else findings


def main() -> None:
    parser = command_line(__doc__ or "")
    parser.add_argument("--gpus", type=int, default=0, help="that this node must have (0)")
    parser.add_argument("--scratch", type=Path, help="a folder of this node that must take files")
    options = parser.parse_args()
    set_up_logging()
    config = load_config(CriticConfig, options.config, options.override)
    with tempfile.NamedTemporaryFile(prefix="nccl-") as log:
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": log.name}
        findings = preflight(config, options.gpus, options.scratch)
    for finding in findings:
        print(finding)
    worst = max(findings, key=lambda finding: finding.fault)
    if worst.fault is Exit.BAD_INPUT:
        raise InputError(str(worst))
    if worst.fault is Exit.UNFIT_NODE:
        raise UnfitNode(str(worst))


if __name__ == "__main__":
    run_and_leave(main)
