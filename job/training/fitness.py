"""Whether this node, these GPUs and these files can do the job, seen before it is begun."""

from __future__ import annotations

import errno
import os
import shutil
import site
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from job.common.data_file import described
from job.common.errors import Exit, InputError, StorageError, UnfitNode, first_line
from job.common.places import SCRATCH_BYTES, disk, free_bytes, read_problem, write_problem
from job.common.schema import EMBEDDED, CriticConfig
from job.distributed.links import interface, library_log, pair_rates
from job.distributed.world import World, joined_world
from job.model.architecture_file import read_architecture
from job.model.weights import check_trunk
from job.training.data import check_sources
from job.training.gpu import gpu_problem, slower_attention

_SHARED_MEMORY_BYTES = 64 << 20  # NCCL's buffers between the GPUs of a node
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # on any node
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
    yield from _capable_gpus(config)
    yield _shared_memory()
    if scratch is not None:
        yield _scratch(scratch)
    yield _run_folder(Path(config.run.dir))
    weights = config.model.path if config.model.recipe is None else None
    found = _readable("weights", weights, lambda: _check_trunk(config))
    yield found
    if torch.cuda.device_count() and weights is not None and found.fault is Exit.FINISHED:
        yield _attention(config)
    for name, source in (
        ("data.train", config.data.train),
        ("data.validation", config.data.validation),
    ):
        named = None if source == EMBEDDED else described(source)
        yield _readable(name, named, lambda: check_sources(config))


def _packages() -> Finding:
    """In an image, packages of the home directory are not those that it was built with."""
    where = Path(torch.__file__).parent
    home = Path(site.getusersitepackages())
    if where.is_relative_to(home) and _in_an_image():
        advice = "set PYTHONNOUSERSITE=1 in the image, or take them out of the home directory"
        return Finding("packages", f"torch comes from {where}", advice, Exit.BAD_INPUT)
    return Finding("packages", f"torch {torch.__version__} from {where}")


def _in_an_image() -> bool:
    """Whether this is Apptainer's container, or one of the project's own image."""
    named = any(name in os.environ for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"))
    return named or Path("/opt/critic/COMMIT").exists()


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


def _capable_gpus(config: CriticConfig) -> Iterator[Finding]:
    """Whether each visible GPU can compute as the configuration wants it."""
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        try:
            problem = gpu_problem(config.distributed.fsdp, device)
        except RuntimeError as error:
            problem = f"it does not answer ({first_line(error)}); see nvidia-smi"
        if problem is not None:
            yield unfit(f"GPU {index}", problem, "")


def _attention(config: CriticConfig) -> Finding:
    """Which attention the trunk's heads get on a GPU."""
    slower = slower_attention(config.distributed.fsdp, read_architecture(config.model.path))
    return Finding("attention", slower or "as CUDA's flash attention takes it")


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
    if finding.fault is Exit.FINISHED and free_bytes(folder) < SCRATCH_BYTES:
        return unfit("scratch", finding.seen, "clear it: too little for caches")
    return finding


def _run_folder(folder: Path) -> Finding:
    problem = write_problem(folder)
    if problem is not None and problem.errno in _NO_ROOM:
        seen = f"cannot write in {folder}: {problem.strerror} ({disk(folder)})"
        return Finding("run.dir", seen, "make room there, or see its quota", Exit.IO_FAILED)
    return _writable("run.dir", folder, "see that this node mounts it")


def _writable(name: str, folder: Path, advice: str) -> Finding:
    if (problem := write_problem(folder)) is not None:
        return unfit(name, f"cannot write in {folder}: {problem.strerror}", advice)
    return Finding(name, f"{folder}: {free_bytes(folder) / 1e9:,.1f} GB free")


def _check_trunk(config: CriticConfig) -> None:
    if config.model.recipe is None:
        check_trunk(config.model.path, config.data.max_length)


def _readable(name: str, path: str | None, check: Callable[[], object]) -> Finding:
    """Files that are not there may be elsewhere; files that are wrong are wrong everywhere."""
    if path is not None and (problem := read_problem(path)) is not None:
        advice = "see that this node mounts its file system (a container: --bind)"
        return unfit(name, problem, advice)
    try:
        check()
    except (InputError, StorageError) as error:
        return Finding(name, str(error), fault=error.code)
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
        f"slowest {slowest / 1e9:.2f} GB/s: rank {first} and rank {second}; {interface(world)}"
    )
    slow = sorted({rank for pair, rate in rates.items() if rate < _SLOW * median for rank in pair})
    advice = f"look at the links of rank(s) {', '.join(map(str, slow))}" if slow else ""
    yield Finding("network", seen, advice)


def findings(config: CriticConfig, gpus: int, scratch: Path | None) -> list[Finding]:
    """All findings of this rank; the network's are on rank 0.

    Raises:
        Ending: ranks do not come, or do not answer; they are named.
    """
    found = list(of_this_node(config, gpus, scratch))
    if any(finding.fault is not Exit.FINISHED for finding in found):
        return found
    with library_log(), joined_world(config.distributed) as world:
        network = list(of_all_ranks(world))
        return found + network if world.is_main else found


def raise_worst(found: Sequence[Finding]) -> None:
    """Raise InputError, StorageError or UnfitNode by the finding that weighs most."""
    worst = max(found, key=lambda finding: finding.fault)
    if worst.fault is Exit.BAD_INPUT:
        raise InputError(str(worst))
    if worst.fault is Exit.IO_FAILED:
        raise StorageError(str(worst))
    if worst.fault is Exit.UNFIT_NODE:
        raise UnfitNode(str(worst))
