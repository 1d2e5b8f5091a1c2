"""The processes of a job: who they are, how they meet, and the few things they tell each other."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

from job.config import DistributedConfig
from job.durability.lifeline import Caller, Lifeline, Listener
from job.outcome import Ending, InputError, UnfitNode, listing

Result = TypeVar("Result")
_FOREVER = timedelta(days=30)  # waiting for rank 0's work; a death ends it through the lifeline
_PROBE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of the all-reduce that is timed at start
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among all processes of the job.

    `group` is a gloo group for what is agreed on through host memory; a lone process needs none.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    store: TCPStore | None = None
    lifeline: Lifeline | None = None
    _turns: Iterator[int] = field(default_factory=itertools.count)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all ranks, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return list(tensor.tolist())

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def main_decides(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on rank 0, on every rank, however long it takes.

        Raises:
            Ending: on every rank, what it raised on rank 0.
        """
        if self.store is None:
            return work()
        key = f"main/{next(self._turns)}"
        if self.is_main:
            self.store.set(key, pickle.dumps(_outcome(work)))  # type: ignore[arg-type]
        else:
            self.store.wait([key], _FOREVER)
        result, ending = pickle.loads(self.store.get(key))
        if ending is not None:
            raise ending.everywhere()
        return result

    def main_first(self, work: Callable[[], Result]) -> Result:
        """Do work that leaves files on rank 0, then on the others, who find what it left.

        Raises:
            Ending: on every rank, what it raised on rank 0.
        """
        results: list[Result] = []
        self.main_decides(lambda: results.append(work()))
        return results[0] if results else work()


def _outcome(work: Callable[[], Result]) -> tuple[Result | None, Ending | None]:
    try:
        return work(), None
    except Ending as ending:
        return None, ending


@contextmanager
def joined_world(config: DistributedConfig) -> Iterator[World]:
    """Join the other processes of the job for the length of the body, or be a world of one.

    Ranks come from torchrun's variables, or from srun's. If the body fails on one rank, all end.

    Raises:
        InputError: the variables contradict each other, or no address to meet at is known.
        UnfitNode: this node cannot reach the others, or has no GPU for this process.
    """
    world = _join(config)
    try:
        yield world
    except BaseException as error:
        if world.lifeline is not None and not (isinstance(error, Ending) and error.of_all_ranks):
            world.lifeline.fail(error)
        raise
    finally:
        if world.lifeline is not None:
            world.lifeline.close()
        dist.destroy_process_group()


def _join(config: DistributedConfig) -> World:
    rank, size, local_rank, local_size = _ranks()
    device = _device(local_rank)
    if size == 1:
        return _alone(device)
    patience = timedelta(seconds=config.start_timeout_seconds)
    host, port = _address()
    store = _meet(host, port, rank, size, patience)
    lifeline = _lifeline(store, host, rank, size, patience)
    # the watchdog, which leaves stack traces, comes first
    timeout = timedelta(seconds=config.timeout_seconds + 60)
    try:
        dist.init_process_group(
            _backend(device),
            store=PrefixStore("default", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        group = dist.new_group(backend="gloo", timeout=timeout)
        _probe(group, device, patience)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise Ending(f"rank {rank}: {reason}. {_ADVICE}{listing(_places(store, size))}") from error
    return World(rank, size, local_size, device, group, store, lifeline)


def _alone(device: torch.device) -> World:
    dist.init_process_group(_backend(device), store=HashStore(), rank=0, world_size=1)
    return World(device=device, group=dist.new_group(backend="gloo"))


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _ranks() -> tuple[int, int, int, int]:
    """Rank, world size, rank on this node, ranks on this node."""
    env = os.environ
    if "RANK" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif env.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in env:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    else:
        return 0, 1, 0, 1
    rank, size, local = (_number(name, "0") for name in names[:3])
    # Slurm's is a list such as 4(x2) for two nodes of four; they are all alike here
    per_node = _number(names[3], str(size), re.compile(r"(\d+)(\(x\d+\))?$"))
    if not 0 <= rank < size:
        raise InputError(f"{names[0]}={rank} is no rank among {names[1]}={size}")
    if not per_node or size % per_node:
        raise InputError(f"{names[3]}={per_node}: {size} ranks do not fill whole nodes")
    return rank, size, local, per_node


_WHOLE = re.compile(r"(\d+)$")


def _number(name: str, default: str, form: re.Pattern[str] = _WHOLE) -> int:
    given = os.environ.get(name, default)
    match = form.match(given)
    if match is None:
        raise InputError(f"{name}={given}: not a whole number")
    return int(match[1])


def _device(local_rank: int) -> torch.device:
    """A GPU of its own for each process of a node, or the CPU."""
    count = torch.cuda.device_count()
    if count == 0:
        return torch.device("cpu")
    if count > 1 and local_rank >= count:
        raise UnfitNode(f"process {local_rank} of this node has no GPU: {count} are visible")
    device = torch.device("cuda", local_rank if count > 1 else 0)
    torch.cuda.set_device(device)
    return device


# Meeting

_ADVICE = (
    "If the addresses are of different networks, name one interface for all in "
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; see that no firewall is between the nodes"
)


def _address() -> tuple[str, int]:
    """Where rank 0 can be met."""
    job = os.environ.get("SLURM_JOB_ID", "0")
    port = 20000 + int(job) % 20000 if job.isdigit() else 20000  # all processes derive the same
    return os.environ.get("MASTER_ADDR") or _first_host(), _number("MASTER_PORT", str(port))


def _first_host() -> str:
    """The first host of Slurm's node list, `node[03-05,7]` for instance."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise InputError("MASTER_ADDR is not set: the address of rank 0's node")
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    assert match is not None
    return match.group(1) + (match.group(2) or "")


def _meet(host: str, port: int, rank: int, size: int, patience: timedelta) -> TCPStore:
    """A store that every rank has reached.

    Raises:
        UnfitNode: rank 0 cannot be reached from here.
        Ending: some ranks did not come; they are named.
    """
    try:
        store = TCPStore(host, port, size, rank == 0, timeout=patience, wait_for_workers=False)
    except dist.DistNetworkError as error:
        reason = str(error).partition("\n")[0]
        raise UnfitNode(
            f"rank {rank} ({_whereabouts(host)}) cannot meet the others at {host}:{port} within "
            f"{patience.total_seconds():.0f} s: {reason}. See MASTER_ADDR and MASTER_PORT. "
            f"{_ADVICE}"
        ) from None
    store.set(f"arrived/{rank}", _whereabouts(host))
    arrivals = [f"arrived/{other}" for other in range(size)]
    try:
        store.wait(arrivals, patience)
    except dist.DistStoreError:
        raise Ending(_absence(store, size, patience)) from None
    if rank == 0:
        _log.info("%d ranks have met%s", size, listing(_places(store, size)))
    return store


def _absence(store: TCPStore, size: int, patience: timedelta) -> str:
    missing = [str(rank) for rank in range(size) if not store.check([f"arrived/{rank}"])]
    return (
        f"rank(s) {', '.join(missing)} of {size} did not come within "
        f"{patience.total_seconds():.0f} s; see their own logs"
    )


def _places(store: TCPStore, size: int) -> list[str]:
    """Where each rank is."""
    return [f"rank {rank}: {store.get(f'arrived/{rank}').decode()}" for rank in range(size)]


def _whereabouts(host: str) -> str:
    """This host, the address that it would use to reach rank 0, and its network interfaces."""
    names = [name for _, name in socket.if_nameindex()]
    chosen = [
        f"{variable}={os.environ[variable]}"
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        if variable in os.environ
    ]
    return " ".join([socket.gethostname(), _own_address(host), f"[{','.join(names)}]", *chosen])


def _own_address(host: str) -> str:
    """The local address on the way to `host`; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return "no route"


def _lifeline(store: TCPStore, host: str, rank: int, size: int, patience: timedelta) -> Lifeline:
    if rank > 0:
        port = int(store.get("lifeline"))
        return Caller(rank, host, port, patience.total_seconds())
    loopback = host in ("127.0.0.1", "localhost")  # a host's own name may be 127.0.1.1 to itself
    listener = Listener("127.0.0.1" if loopback else "", size)
    store.set("lifeline", str(listener.port))
    listener.connect(patience.total_seconds())
    return listener


def _probe(group: dist.ProcessGroup, device: torch.device, patience: timedelta) -> None:
    """Time an all-reduce of every rank with every other.

    Raises:
        RuntimeError: ranks do not answer; they are named.
    """
    dist.monitored_barrier(group, timeout=patience, wait_all_ranks=True)
    probe = torch.ones(_PROBE_BYTES[device.type] // 4, device=device)
    dist.all_reduce(probe)  # the first one sets connections up
    _wait(device)
    started = time.perf_counter()
    dist.all_reduce(probe)
    _wait(device)
    seconds = time.perf_counter() - started
    if dist.get_rank() == 0:
        size = probe.nbytes
        speed = f"{size / seconds / 1e9:.2f} GB/s"
        _log.info("all ranks answer: %.1f MB all-reduced in %.4f s, %s", size / 1e6, seconds, speed)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
