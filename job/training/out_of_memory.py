"""How a training ends whose GPU's memory has run out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from job.common.errors import GPU_OUT_OF_MEMORY, Ending, InputError, UnfitNode
from job.common.schema import CriticConfig
from job.distributed.world import World
from job.memory.fit import MARGIN, outside_allocator
from job.memory.settings import ways_to_lower


@contextmanager
def out_of_memory_judged(
    config: CriticConfig, world: World, has_saved: Callable[[], bool]
) -> Iterator[None]:
    """Tell what memory ran out of, where another attempt would come no further.

    Raises:
        InputError: the GPU was this process's, and `has_saved` says that nothing was saved: the
            next attempt would run out at the same place.
        UnfitNode: other processes have taken much of the GPU.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        ending = _taken_by_others(world)
        if ending is None and has_saved():
            raise
        raise ending or _too_much(config, error) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it is torch's allocator that found none, or CUDA, cuBLAS or NCCL beside it."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in GPU_OUT_OF_MEMORY
    )


def _too_much(config: CriticConfig, error: Exception) -> InputError:
    asked = re.search(r"Tried to allocate [\d.]+ \w+", str(error))
    detail = f" ({asked[0]})" if asked else ""
    return InputError(f"the GPU's memory ran out{detail}: {ways_to_lower(config)}")


def _taken_by_others(world: World) -> Ending | None:
    if world.device.type != "cuda":
        return None
    try:
        free, total = torch.cuda.mem_get_info(world.device)
    except RuntimeError:  # CUDA has ended with what ran out
        return None
    own = torch.cuda.memory_reserved(world.device) + outside_allocator(world.size)
    others = total - free - own
    if others <= MARGIN * total:
        return None
    return UnfitNode(
        f"the GPU's memory ran out: other processes have {others / 1e9:.1f} of its "
        f"{total / 1e9:.1f} GB; nvidia-smi on this node names them"
    )
