"""States that come from the disk while earlier micro-batches are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from job.data.state_shards import Stored

READERS = 4
AHEAD = 4  # micro-batches that are read ahead

Known = tuple[Tensor, Tensor]  # states of which some are known, and bool [rows], which


class ReadAhead:
    """Reads states in threads, some micro-batches before they are asked for."""

    def __init__(self, read: Callable[[Stored, int], Known | None]) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(READERS, "prefix cache")
        self._coming: deque[tuple[Stored, int]] = deque()
        self._begun: dict[tuple[int, bytes], Future[Known | None]] = {}

    def expect(self, coming: Iterable[Stored | None], step: int) -> None:
        """Have the states of these micro-batches read after those that are expected already."""
        self._coming.extend((stored, step) for stored in coming if stored is not None)
        self._read_on()

    def get(self, stored: Stored, step: int) -> Known | None:
        future = self._begun.pop((step, stored.keys.tobytes()), None)
        self._read_on()
        return self._read(stored, step) if future is None else future.result()

    def forget(self) -> None:
        """Expect nothing any more."""
        self._coming.clear()
        for future in self._begun.values():
            future.cancel()
        self._begun.clear()

    def close(self) -> None:
        self.forget()
        self._pool.shutdown()

    def _read_on(self) -> None:
        while self._coming and len(self._begun) < AHEAD:
            stored, step = self._coming.popleft()
            future = self._pool.submit(self._read, stored, step)
            self._begun[step, stored.keys.tobytes()] = future
