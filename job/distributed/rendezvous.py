"""How the processes of a job find each other, and what is said when some do not come."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from job.common.errors import Ending, InputError, first_line, listing
from job.distributed.failure import Caller, Lifeline, Listener

ADVICE = (
    "If the addresses are of different networks, name one interface for all in "
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; see that no firewall is between the nodes"
)
_MARGIN = timedelta(seconds=5)  # for what rank 0 has found to reach the others
_PROBE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of the all-reduce that is timed at start
_log = logging.getLogger(__name__)


def ranks() -> tuple[int, int, int, int]:
    """Rank, world size, rank on this node, ranks on this node."""
    env = os.environ
    if "RANK" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif env.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # a batch script's own shell is no step
        names = (
            *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
            *("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
        )
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


def address() -> tuple[str, int]:
    """Where rank 0 can be met."""
    job, step = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    start = int(job) if job.isdigit() else 0
    start += 7919 * int(step) if step.isdigit() else 0  # steps may run side by side on one node
    port = 20000 + start % 20000  # all processes derive the same
    return os.environ.get("MASTER_ADDR") or _first_host(), _number("MASTER_PORT", str(port))


def _first_host() -> str:
    """The first host of Slurm's node list, `node[03-05,7]` for instance."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise InputError("MASTER_ADDR is not set: the address of rank 0's node")
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    assert match is not None
    return match.group(1) + (match.group(2) or "")


def meet(host: str, port: int, rank: int, size: int, patience: timedelta) -> Store:
    """A store that every rank has reached.

    Raises:
        Ending: rank 0 cannot be reached from here, or some ranks did not come; they are named.
    """
    # torchrun's agent says so where it serves already
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        tcp = TCPStore(host, port, size, serves, timeout=patience, wait_for_workers=False)
    except dist.DistNetworkError as error:
        reason = first_line(error)
        raise Ending(
            f"rank {rank} ({_whereabouts(host)}) cannot meet the others at {host}:{port} within "
            f"{patience.total_seconds():.0f} s: {reason}. See MASTER_ADDR and MASTER_PORT. "
            f"{ADVICE}"
        ) from None
    # torchrun's store outlives the ranks that it starts again, and so does what they left in it
    store = PrefixStore(f"start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
    store.set(f"arrived/{rank}", _whereabouts(host))
    _all_come_to("arrived", store, rank, size, patience)
    if rank == 0:
        _log.info("%d ranks have met%s", size, listing(places(store, size)))
    return store


def _all_come_to(stage: str, store: Store, rank: int, size: int, patience: timedelta) -> None:
    """Return when every rank has set its key of a stage. Rank 0 decides, so that all say the same.

    Raises:
        Ending: some have not within `patience`; they are named.
    """
    keys = [f"{stage}/{other}" for other in range(size)]
    missing_key = f"{stage}/missing"
    if rank == 0:
        with suppress(dist.DistStoreError):
            store.wait(keys, patience)
        absent = [str(r) for r, key in enumerate(keys) if not store.check([key])]
        store.set(missing_key, ", ".join(absent))
    missing = "0"  # if nothing is heard from it
    with suppress(dist.DistError):
        store.wait([missing_key], patience + _MARGIN)
        missing = store.get(missing_key).decode()
    if missing:
        gone = {int(one) for one in missing.split(", ")}
        part_together(stage, store, rank, set(range(size)) - gone, _MARGIN)
        raise Ending(
            f"rank(s) {missing} of {size} did not come within {patience.total_seconds():.0f} s "
            f"(stage: {stage}); see their own logs"
        )


def part_together(
    key: str, store: Store, rank: int, others: Iterable[int], patience: timedelta
) -> None:
    """Keep the store, which rank 0 holds, until `others` have read from it what `key` is about."""
    with suppress(dist.DistError):
        store.set(f"{key}/heard/{rank}", "")
        if rank == 0:
            store.wait([f"{key}/heard/{other}" for other in others], patience)


def places(store: Store, size: int) -> list[str]:
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


def tie(store: Store, host: str, rank: int, size: int, patience: timedelta) -> Lifeline:
    """This rank's end of the connections that tell of a death.

    Raises:
        Ending: some ranks did not come; they are named.
    """
    if rank > 0:
        caller = None
        with suppress(dist.DistError, OSError):  # it will be named as missing, or rank 0 will
            store.wait(["lifeline"], patience)
            caller = Caller(rank, host, int(store.get("lifeline")), patience.total_seconds())
            store.set(f"connected/{rank}", "")
        try:
            _all_come_to("connected", store, rank, size, patience)
        except Ending:
            if caller is not None:
                caller.close()  # that rank 0 ends as well is no news
            raise
        assert caller is not None
        return caller
    loopback = host in ("127.0.0.1", "localhost")  # a host's own name may be 127.0.1.1 to itself
    listener = Listener("127.0.0.1" if loopback else "", size)
    store.set("connected/0", "")
    store.set("lifeline", str(listener.port))
    _all_come_to("connected", store, rank, size, patience)
    listener.connect(patience.total_seconds())
    return listener


def probe(group: dist.ProcessGroup, device: torch.device, patience: timedelta) -> None:
    """Time an all-reduce of every rank with every other.

    Raises:
        RuntimeError: ranks do not answer; they are named.
    """
    dist.monitored_barrier(group, timeout=patience, wait_all_ranks=True)
    tensor = torch.ones(_PROBE_BYTES[device.type] // 4, device=device)
    dist.all_reduce(tensor)  # the first one sets connections up
    _wait(device)
    started = time.perf_counter()
    dist.all_reduce(tensor)
    _wait(device)
    seconds = time.perf_counter() - started
    if dist.get_rank() == 0:
        size = tensor.nbytes
        speed = f"{size / seconds / 1e9:.2f} GB/s"
        _log.info("all ranks answer: %.1f MB all-reduced in %.4f s, %s", size / 1e6, seconds, speed)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
