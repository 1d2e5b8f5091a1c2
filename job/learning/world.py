"""The processes of a job: who they are, and the few things they tell each other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from job.outcome import InputError

Result = TypeVar("Result")
TIMEOUT = timedelta(minutes=10)  # of a collective: longer than any evaluation batch or save


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

    def main_first(self, work: Callable[[], Result]) -> Result:
        """Do work that leaves files on rank 0, then on the others, who find what it left.

        Raises:
            InputError: on every rank, where rank 0 found the input wrong.
        """
        result, problem = None, None
        if self.is_main:
            try:
                result = work()
            except InputError as error:
                problem = str(error)
        problem = self.gather(problem)[0]
        if problem is not None:
            raise InputError(problem)
        return work() if result is None else result

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items


def join_world() -> World:
    """Join the other processes of the job, or be a world of one.

    Ranks come from torchrun's variables, or from srun's.

    Raises:
        InputError: the variables contradict each other, or no address to meet at is known.
    """
    rank, size, local_rank, local_size = _ranks()
    device = _device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        _meet(backend, rank, size, device)
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return World(rank, size, local_size, device, group)


@contextmanager
def joined_world() -> Iterator[World]:
    """Join the world for the length of the body."""
    world = join_world()
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _ranks() -> tuple[int, int, int, int]:
    """Rank, world size, rank on this node, ranks on this node."""
    env = os.environ
    if "RANK" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    else:
        return 0, 1, 0, 1
    size = int(env.get(names[1], "1"))
    values = (int(env[names[0]]), size, int(env.get(names[2], "0")), int(env.get(names[3], size)))
    if not 0 <= values[0] < size:
        raise InputError(f"{names[0]}={values[0]} is no rank among {names[1]}={size}")
    return values


def _device(local_rank: int) -> torch.device:
    """A GPU of its own for each process of a node, or the CPU."""
    count = torch.cuda.device_count()
    if count == 0:
        return torch.device("cpu")
    if count > 1 and local_rank >= count:
        raise InputError(f"process {local_rank} of this node has no GPU: {count} are visible")
    device = torch.device("cuda", local_rank if count > 1 else 0)
    torch.cuda.set_device(device)
    return device


def _meet(backend: str, rank: int, size: int, device: torch.device) -> None:
    host = os.environ.get("MASTER_ADDR") or _first_host()
    port = os.environ.get("MASTER_PORT") or _port_of_job()
    dist.init_process_group(
        backend,
        init_method=f"tcp://{host}:{port}",
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )


def _first_host() -> str:
    """The first host of Slurm's node list, `node[03-05,7]` for instance."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise InputError("MASTER_ADDR is not set: the address of rank 0's node")
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    assert match is not None
    return match.group(1) + (match.group(2) or "")


def _port_of_job() -> int:
    """A port that all processes of a Slurm job derive alike."""
    return 20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000
