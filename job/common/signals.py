"""One flag for stopping, of one process: signals or a deadline set it.

Free of heavy imports, so that a command can install the handlers before everything else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

from job.common.errors import InputError, Stopped

# Slurm's warning before the end, schedulers' and users' ways to say stop.
SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)
DEADLINE = "CRITIC_DEADLINE"  # environment: when to stop by itself, in seconds since 1970
STOP_FILE = "stop"  # in the run directory

_received: str | None = None


def install_handlers() -> None:
    """Let the stop signals set the flag; a second one changes nothing, but for Ctrl-C's."""
    for number in SIGNALS:
        signal.signal(number, _receive)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a supervisor may hold them back until now
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell starts what ends in `&`
        _hear_ctrl_c()


def _hear_ctrl_c() -> None:
    """Hear Ctrl-C in a thread: a handler would have to wait for native code that may hang."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))  # in threads to come as well
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_wait_for_ctrl_c, name="Ctrl-C", daemon=True).start()


def _wait_for_ctrl_c() -> None:
    signal.sigwait((signal.SIGINT,))
    _receive(signal.SIGINT, None)
    print("\nstopping, with all saved; Ctrl-C again ends it at once", file=sys.stderr, flush=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    threading.Event().wait()  # for the next one, by which the process ends


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
