"""The links between ranks: how fast each pair of them talks, and over what."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from job.distributed.world import World

_PAIR_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


@contextmanager
def library_log() -> Iterator[None]:
    """Have the library that carries tensors between GPUs write down what it does.

    It looks for this when its first group is made, and `interface` reads it.
    """
    with tempfile.NamedTemporaryFile(prefix="nccl-") as log:
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": log.name}
        yield


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


def interface(world: World) -> str:
    """What the library that carries tensors has chosen to talk over."""
    if world.device.type == "cpu":
        name = os.environ.get("GLOO_SOCKET_IFNAME")
        return f"gloo over {name or 'the interface of the host name'}"
    text = Path(os.environ["NCCL_DEBUG_FILE"]).read_text(errors="replace")
    chosen = re.findall(r"NET/\S+ : Using (.*)", text) or re.findall(r"Using network (\S+)", text)
    return f"NCCL over {chosen[-1].strip() if chosen else 'shared memory or NVLink alone'}"
