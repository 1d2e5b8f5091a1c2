"""One flag for stopping: signals, a deadline or a stop file set it, and all ranks agree on it.

Free of heavy imports, so that a command can install the handlers before everything else.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from job.durability.watchdog import Watchdog
from job.outcome import InputError, NoProgress, Stopped

if TYPE_CHECKING:
    from job.durability.fence import Fence
    from job.learning.world import World

# Slurm's warning before the end, schedulers' and users' ways to say stop.
SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)
DEADLINE = "CRITIC_DEADLINE"  # environment: when to stop by itself, in seconds since 1970
STOP_FILE = "stop"  # in the run directory

_received: str | None = None


def install_handlers() -> None:
    """Let the stop signals set the flag; a second one changes nothing."""
    for number in SIGNALS:
        signal.signal(number, _receive)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a supervisor may hold them back until now


def _receive(number: int, _frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number).name


def reason() -> str | None:
    """Why this process should stop: a signal, or the deadline; None to go on."""
    return "the deadline" if time.time() >= _deadline() else _received


def _deadline() -> float:
    given = os.environ.get(DEADLINE, "inf")
    try:
        return float(given)
    except ValueError:
        raise InputError(f"{DEADLINE}={given}: not a time in seconds since 1970") from None


def stop_if_asked() -> None:
    """Raise Stopped where one process works alone and has nothing to save."""
    if why := reason():
        raise Stopped(f"stopped by {why} before training went on")


class Boundary:
    """The points between two steps or batches, where all ranks agree on stopping.

    Under `watchdog` they must not be more than `seconds` apart.
    """

    def __init__(
        self,
        world: World,
        fence: Fence,
        run: Path,
        seconds: float,
        tell: Callable[[NoProgress], None] = lambda error: None,
    ) -> None:
        self._world, self._fence = world, fence
        self._stop_file = run / STOP_FILE
        stacks = fence.folder / f"stacks.rank-{world.rank:05}.txt"
        self.watchdog = Watchdog(seconds, stacks, tell)

    def agree(self, tokens: float = 0.0) -> float:
        """The sum of all ranks' `tokens`, which carries the flags along through host memory.

        Raises:
            Superseded: a newer attempt has begun.
            Stopped: some rank was asked to stop.
        """
        self.watchdog.beat()
        newer = self._world.is_main and self._fence.superseded()
        total, stops, newer_ones = self._world.sum([tokens, self._why() is not None, newer])
        if newer_ones:
            raise self._fence.ending().everywhere()
        if stops:
            raise Stopped(f"stopped by {self._why() or 'another rank'}").everywhere()
        return total

    def _why(self) -> str | None:
        if self._world.is_main and os.path.exists(self._stop_file):  # noqa: PTH110 - never raises
            return f"the file {self._stop_file}"
        return reason()
