"""When one rank ends, all end, and each says which was the first and why.

Every rank keeps a TCP connection to rank 0. The kernel closes it when a process dies, whichever
way, and keep-alive closes it when a node does; so no heartbeat can be late. Rank 0 collects what
went wrong for a moment, names the first cause to all, and every process leaves with its code.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import IO

from job.common.errors import Exit, NoProgress, exit_code, first_line
from job.common.files import try_for
from job.common.progress import has_own_terminal, keep_in_files

GRACE_SECONDS = 1.0  # a cause and its consequences arrive within this
CAUSE_SECONDS = 30.0  # how long a failed rank waits to learn who failed first
LAST_WORDS_SECONDS = 5.0  # for status and logs, on a file system that may hang
_DEATH = "it died without a word"
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """How a rank ended; a consequence is an error that another rank's end explains."""

    rank: int
    error: str
    code: int
    consequence: bool

    @classmethod
    def death(cls, rank: int) -> Failure:
        return cls(rank, _DEATH, Exit.CRASHED, consequence=False)

    @property
    def died(self) -> bool:
        return self.error == _DEATH

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        text = first_line(error, named=True)
        return cls(rank, text, exit_code(error), consequence=_is_of_a_collective(error))

    def __str__(self) -> str:
        return f"rank {self.rank} failed first: {self.error}"


def _is_of_a_collective(error: BaseException) -> bool:
    """Peers of a dead rank fail in the collective that it left."""
    names = (
        *("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer"),
        "successfully reached monitoredBarrier, but",  # another did not
    )
    named = isinstance(error, RuntimeError) and any(name in str(error) for name in names)
    return named or isinstance(error, NoProgress)


class Lifeline:
    """One rank's end of the connections."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.on_failure: Callable[[str], None] = lambda text: None
        self._cause: Failure | None = None
        self._decided = threading.Event()
        self._leaving = threading.Lock()  # two threads may come to it at once
        self._failing = self._closed = False

    def fail(self, error: BaseException) -> None:
        """Tell the others of this rank's failure and wait until it is clear who was first.

        Does not return if that was another rank: the process ends with that rank's code.
        """
        if self._failing:
            return  # told already
        self._failing = True
        self._send(Failure.of(self.rank, error))
        if self._decided.wait(CAUSE_SECONDS) and self._cause is not None:
            self._leave_unless_first(self._cause)

    def close(self) -> None:
        raise NotImplementedError

    def _send(self, failure: Failure) -> None:
        raise NotImplementedError

    def _decide(self, cause: Failure) -> None:
        self._cause = cause
        self._decided.set()
        if not self._failing:
            self._leave_unless_first(cause)

    def _say(self, cause: Failure) -> None:
        """Name the first cause: in the log, and on a terminal of all ranks once.

        There the rank that failed says itself what happened, and for one that died another does.
        """
        speaks = cause.died and self.rank == (1 if cause.rank == 0 else 0)
        if speaks or has_own_terminal() or not keep_in_files(str(cause)):
            _log.error("%s", cause)

    def _leave_unless_first(self, cause: Failure) -> None:
        if cause.rank == self.rank:
            return
        with self._leaving:
            self._say(cause)
            try_for(LAST_WORDS_SECONDS, lambda: self.on_failure(str(cause)))
            try_for(LAST_WORDS_SECONDS, logging.shutdown)
            os._exit(cause.code)


class Listener(Lifeline):
    """Rank 0's end: hears of every failure and names the first."""

    def __init__(self, host: str, size: int) -> None:
        super().__init__(0)
        self._server = socket.create_server((host, 0), backlog=size)
        self.port: int = self._server.getsockname()[1]
        self._size = size
        self._peers: list[socket.socket] = []
        self._failures: queue.Queue[Failure] = queue.Queue()

    def connect(self, seconds: float) -> None:
        """Wait for every other rank, then listen to them in the background."""
        self._server.settimeout(seconds)
        for _ in range(self._size - 1):
            peer, _ = self._server.accept()
            peer.settimeout(None)
            _keep_alive(peer)
            self._peers.append(peer)
            _thread(self._listen, peer)
        self._server.close()
        _thread(self._judge)

    def close(self) -> None:
        self._closed = True
        for peer in self._peers:
            _send_line(peer, None)

    def _send(self, failure: Failure) -> None:
        self._failures.put(failure)

    def _listen(self, peer: socket.socket) -> None:
        rank = -1
        for line in _lines(peer):
            if line is None:
                return  # an orderly goodbye
            if isinstance(line, int):
                rank = line
            else:
                self._failures.put(line)
        if not self._closed:
            self._failures.put(Failure.death(rank))

    def _judge(self) -> None:
        heard = [self._failures.get()]
        threading.Event().wait(GRACE_SECONDS)
        while not self._failures.empty():
            heard.append(self._failures.get())
        cause = min(heard, key=lambda failure: failure.consequence)
        for peer in self._peers:
            _send_line(peer, cause)
        self._decide(cause)


class Caller(Lifeline):
    """Any other rank's end."""

    def __init__(self, rank: int, host: str, port: int, seconds: float) -> None:
        super().__init__(rank)
        self._socket = socket.create_connection((host, port), timeout=seconds)
        self._socket.settimeout(None)
        _keep_alive(self._socket)
        _send_line(self._socket, rank)
        _thread(self._listen)

    def close(self) -> None:
        self._closed = True
        _send_line(self._socket, None)

    def _send(self, failure: Failure) -> None:
        _send_line(self._socket, failure)

    def _listen(self) -> None:
        for line in _lines(self._socket):
            if line is None:
                return
            if isinstance(line, Failure):
                self._decide(line)
                return
        threading.Event().wait(GRACE_SECONDS)  # this rank may be about to leave in order as well
        if not self._closed:
            self._decide(Failure.death(0))


def _thread(work: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, name="lifeline", daemon=True).start()


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _send_line(peer: socket.socket, content: Failure | int | None) -> None:
    """Send a failure, a rank (the greeting) or None (goodbye); a peer that is gone needs none."""
    plain = asdict(content) if isinstance(content, Failure) else content
    try:
        peer.sendall(json.dumps(plain).encode() + b"\n")
    except OSError:
        _log.debug("a peer has left already")


def _lines(peer: socket.socket) -> Iterator[Failure | int | None]:
    stream: IO[str] = peer.makefile("r", encoding="utf-8")
    try:
        for line in stream:
            content = json.loads(line)
            yield Failure(**content) if isinstance(content, dict) else content
    except (OSError, ValueError):
        return  # as if closed
