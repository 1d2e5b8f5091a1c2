"""States that come from the disk while earlier micro-batches are computed."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from job.data.state_shards import EVALUATION, Stored

READERS = 4
AHEAD = 4  # micro-batches that are read ahead

Known = tuple[Tensor, Tensor]  # states of which some are known, and bool [rows], which


class ReadAhead:
    """Reads states in threads, some micro-batches before they are asked for.

    As many of an evaluation's as of training's: what has been read waits for its own kind alone.
    """

    def __init__(self, read: Callable[[Stored, int], Known | None]) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(READERS, "prefix cache")
        self._lanes: defaultdict[bool, _Lane] = defaultdict(_Lane)

    def expect(self, coming: Iterable[Stored | None], step: int) -> None:
        """Have the states of these micro-batches read after those that are expected already."""
        lane = self._lanes[step == EVALUATION]
        lane.coming.extend((stored, step) for stored in coming if stored is not None)
        self._read_on(lane)

    def get(self, stored: Stored, step: int) -> Known | None:
        lane = self._lanes[step == EVALUATION]
        future = lane.begun.pop((step, stored.keys.tobytes()), None)
        self._read_on(lane)
        return self._read(stored, step) if future is None else future.result()

    def forget(self, step: int) -> None:
        """Expect nothing any more, of evaluations, or of the training that `step` is one of."""
        lane = self._lanes.pop(step == EVALUATION, _Lane())
        for future in lane.begun.values():
            future.cancel()

    def close(self) -> None:
        self._lanes.clear()
        self._pool.shutdown(cancel_futures=True)

    def _read_on(self, lane: _Lane) -> None:
        while lane.coming and len(lane.begun) < AHEAD:
            stored, step = lane.coming.popleft()
            lane.begun[step, stored.keys.tobytes()] = self._pool.submit(self._read, stored, step)


@dataclass
class _Lane:
    """What is expected, and what of it is being read or has been."""

    coming: deque[tuple[Stored, int]] = field(default_factory=deque)
    begun: dict[tuple[int, bytes], Future[Known | None]] = field(default_factory=dict)
