"""Whether keeping the frozen blocks' states pays: the choice of `training.prefix_cache: auto`.

It is made by what was measured: how long a step and an evaluation take, and what the disk does.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PROBE_BYTES = 128 * 2**20
LEAST_SECONDS = 10.0  # that evaluations must save together
_CHUNK = 2**21  # bytes that are read at once, about a sequence's


@dataclass(frozen=True)
class DiskRates:
    """Bytes a second that one process can write and read, of several at once."""

    write: float
    read: float

    @classmethod
    def measured(cls, folder: Path, processes: int) -> DiskRates:
        """Write and read a file, past the host's memory.

        Raises:
            OSError: the disk refuses.
        """
        content = os.urandom(_CHUNK)  # what compresses well would be faster than states are
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            began = time.perf_counter()
            for _ in range(PROBE_BYTES // _CHUNK):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter() - began
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            for offset in range(0, PROBE_BYTES, _CHUNK):
                os.preadv(file.fileno(), [bytearray(_CHUNK)], offset)
            read = time.perf_counter() - began
        return cls(PROBE_BYTES / written / processes, PROBE_BYTES / read / processes)


@dataclass(frozen=True)
class Work:
    """What the rest of a training is, as one rank sees it.

    Attributes:
        seconds: of a step without states of its own.
        prefix_share: of it that the frozen blocks take which are run then.
        step_bytes: of a step's states.
        writes: steps whose states would be written.
        reads: steps after them, whose states would be read.
    """

    seconds: float
    prefix_share: float
    step_bytes: float
    writes: int
    reads: int

    def saved(self, disk: DiskRates) -> float:
        """Seconds that reading saves, less those by which writing is too slow."""
        cached = max(self.seconds * (1 - self.prefix_share), self.step_bytes / disk.read)
        late = max(0.0, self.step_bytes / disk.write - self.seconds)
        return self.reads * (self.seconds - cached) - self.writes * late

    def told(self, disk: DiskRates) -> str:
        """The numbers behind it."""
        return (
            f"{self.seconds:.2f} s a step, of which frozen blocks take {self.prefix_share:.0%}; "
            f"{self.step_bytes / 1e6:,.1f} MB of states a step, which the disk writes in "
            f"{self.step_bytes / disk.write:.2f} s and reads in {self.step_bytes / disk.read:.2f} s"
            f"; {self.reads} of {self.reads + self.writes} steps left could read: "
            f"{self.saved(disk):+,.0f} s saved"
        )


def training_share(n_frozen: int, n_trained: int) -> float:
    """The part of a training step's operations that frozen blocks take.

    A block takes 2 P operations a token in its forward pass, and 4 P more in its backward pass.
    """
    return 2 * n_frozen / (2 * n_frozen + 6 * n_trained) if n_trained else 1.0


def work_left(
    *, step: int, last: int, epoch: int, seconds: float, prefix_share: float, step_bytes: float
) -> Work:
    """From `step` on to `last`, of epochs of so many steps.

    What was seen before is written in the next epoch: nothing is kept of it.
    """
    writes = max(0, min(epoch, last - step))
    return Work(seconds, prefix_share, step_bytes, writes, max(0, last - step - writes))
