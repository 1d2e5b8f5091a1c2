"""What all ranks agree on: stopping, counts of a step, and which files they all see."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from job.common.errors import NoProgress, Stopped
from job.common.signals import STOP_FILE, reason
from job.distributed.watchdog import Watchdog
from job.distributed.world import World
from job.run.fence import Fence

Key = TypeVar("Key")
Mask = NDArray[np.bool_]


def stop_together(world: World, kept: str) -> None:
    """Raise Stopped on every rank if one was asked to stop; `kept` says what is not lost."""
    why = reason()
    if world.sum([why is not None])[0]:
        raise Stopped(f"stopped by {why or 'another rank'}; {kept}").everywhere()


def seen_by_all(world: World, masks: Mapping[Key, Mask]) -> dict[Key, Mask]:
    """What this rank sees, as far as every other one does: of what it has no mask, it sees nothing.

    Files may come meanwhile, and a node's own disk has others.
    """
    each = world.gather(dict(masks))
    return {
        key: np.logical_and.reduce([one.get(key, np.zeros_like(mask)) for one in each])
        for key, mask in masks.items()
    }


class Agreement:
    """What all ranks agree on at the boundaries between two steps or batches.

    Under `watchdog` these must not be more than `seconds` apart.
    """

    def __init__(
        self,
        world: World,
        fence: Fence,
        run: Path,
        seconds: float,
        report: Callable[[NoProgress], None] = lambda error: None,
    ) -> None:
        self._world, self._fence = world, fence
        self._stop_file = run / STOP_FILE
        stacks = fence.folder / f"stacks.rank-{world.rank:05}.txt"
        self.watchdog = Watchdog(seconds, stacks, report)

    def check(self) -> None:
        """Raise Superseded or Stopped on every rank where one of them has a reason to."""
        self.all_reduce([])

    def all_reduce(self, counts: Sequence[float]) -> list[float]:
        """The sums of all ranks' counts; the flags travel with them, through host memory.

        Raises:
            Superseded: a newer attempt has begun.
            Stopped: some rank was asked to stop.
        """
        self.watchdog.beat()
        newer = self._world.is_main and self._fence.superseded()
        flags = [self._why() is not None, newer]
        *totals, stops, newer_ones = self._world.sum([*counts, *flags])
        if newer_ones:
            raise self._fence.ending().everywhere()
        if stops:
            raise Stopped(f"stopped by {self._why() or 'another rank'}").everywhere()
        return totals

    def _why(self) -> str | None:
        if self._world.is_main and os.path.exists(self._stop_file):  # noqa: PTH110 - never raises
            return f"the file {self._stop_file}"
        return reason()
