"""The processes of a job: who they are, how they meet, and the few things they tell each other."""

from __future__ import annotations

import itertools
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from job.common.errors import Ending, UnfitNode, first_line, listing
from job.common.progress import has_own_terminal
from job.common.schema import DistributedConfig
from job.distributed.failure import Lifeline
from job.distributed.rendezvous import (
    ADVICE,
    address,
    meet,
    part_together,
    places,
    probe,
    ranks,
    tie,
)

Result = TypeVar("Result")
_FOREVER = timedelta(days=30)  # a death ends it through the lifeline, a hang the watchdog
_PATIENCE = timedelta(minutes=1)  # of rank 0 with ranks that have not yet read its last word
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
    store: Store | None = None
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

    def report_failure(self, error: BaseException) -> None:
        """Let the others know why this rank ends; it ends here if another failed first."""
        if self.lifeline is not None and not (isinstance(error, Ending) and error.of_all_ranks):
            self.lifeline.fail(error)

    @contextmanager
    def failures_reported(self) -> Iterator[None]:
        """Report how the body fails, before anything else is made of it.

        A failure that follows from another rank's ends the process here, and so takes the place of
        that one nowhere.
        """
        try:
            yield
        except BaseException as error:
            self.report_failure(error)
            raise

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
            part_together(key, self.store, self.rank, range(self.size), _PATIENCE)
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
def joined_world(config: DistributedConfig, *, watched: bool = False) -> Iterator[World]:
    """Join the other processes of the job for the length of the body, or be a world of one.

    Ranks come from torchrun's variables, or from srun's. If the body fails on one rank, all end.

    Args:
        watched: a watchdog ends what hangs. Collectives have no time-out of their own, whose clock
            would go on while the processes are suspended.

    Raises:
        InputError: the variables contradict each other, or no address to meet at is known.
        UnfitNode: this node cannot reach the others, or has no GPU for this process.
    """
    world = _join(config, watched)
    try:
        yield world
    except BaseException as error:
        world.report_failure(error)
        if isinstance(error, Ending) and error.of_all_ranks:
            error.said = not (world.is_main or has_own_terminal())
        if world.size == 1 or (isinstance(error, Ending) and error.of_all_ranks):
            _part(world)  # else collectives may be under way, and taking them down would hang
        raise
    _part(world)


def _part(world: World) -> None:
    if world.lifeline is not None:
        world.lifeline.close()
    dist.destroy_process_group()


def _join(config: DistributedConfig, watched: bool) -> World:
    rank, size, local_rank, local_size = ranks()
    device = _device(local_rank)
    if size == 1:
        return _alone(device)
    patience = timedelta(seconds=config.start_timeout_seconds)
    host, port = address()
    store = meet(host, port, rank, size, patience)
    lifeline = tie(store, host, rank, size, patience)
    timeout = _FOREVER if watched else timedelta(seconds=config.timeout_seconds)
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
        # a group of its own: ranks other than 0 wait in a barrier for the group's time-out
        probe(dist.new_group(backend="gloo", timeout=patience), device, patience)
    except RuntimeError as error:
        reason = first_line(error)
        where = listing(places(store, size))  # while rank 0, which holds the store, is there
        lifeline.fail(error)  # ends it here if another rank is named
        raise Ending(f"rank {rank}: {reason}. {ADVICE}{where}") from error
    return World(rank, size, local_size, device, group, store, lifeline)


def _alone(device: torch.device) -> World:
    dist.init_process_group(_backend(device), store=HashStore(), rank=0, world_size=1)
    return World(device=device, group=dist.new_group(backend="gloo"))


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


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
