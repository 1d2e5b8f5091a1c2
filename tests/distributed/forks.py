"""Starts Python commands as forks of a process that has made the imports (see fork_server.py)."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

TESTS = Path(__file__).parents[1]
# This checkout, whichever is installed; a test file may be a command, and imports what tests share.
PYTHONPATH = os.pathsep.join([str(TESTS.parent), str(TESTS)])
THREADS = "1"  # the server's, and so its forks'
_SERVER = Path(__file__).with_name("fork_server.py")


class Process(Protocol):
    """What tests use of a process that they have started: of Popen's, and of a fork's."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> Any: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


class Forked:
    """A fork, as subprocess.Popen shows a process."""

    def __init__(self, server: _Server, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server
        self._ended = select.poll()
        self._handle = os.pidfd_open(pid)
        self._ended.register(self._handle, select.POLLIN)

    def poll(self) -> int | None:
        if self.returncode is None and self._ended.poll(0):
            self._reap()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self._ended.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self._reap()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        # Nobody else reaps it: until then its number is given to no other process.
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)

    def _reap(self) -> None:
        answer = self._server.ask({"reap": self.pid})
        self.returncode = answer["code"]
        self._server.cpu_seconds += answer["seconds"]
        os.close(self._handle)


class _Server:
    """The process that forks, with a library before all others, and what its forks have used."""

    def __init__(self, preload: Path | None = None) -> None:
        own = {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": THREADS}
        if preload is not None:
            own["LD_PRELOAD"] = str(preload)
        # In a session of its own: Ctrl-C is for the tests, at whose end it ends.
        self._process = subprocess.Popen(
            [sys.executable, str(_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | own,
            start_new_session=True,
            text=True,
        )
        self._alone = threading.Lock()
        self.cpu_seconds = 0.0
        _SERVERS.append(self)
        atexit.register(self._end)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._alone:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the fork server has ended with {self._process.wait()}")
        return dict(json.loads(answer))

    def _end(self) -> None:
        with self._process:  # which closes its input
            pass


_SERVERS: list[_Server] = []
_server = functools.cache(_Server)


def cpu_seconds() -> float:
    """What all forks that have ended used."""
    return sum(server.cpu_seconds for server in _SERVERS)


def fork(
    command: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    stdout: Path,
    stderr: Path,
    preload: Path | None = None,
) -> Forked:
    """Run `python COMMAND` in a fork; its output is appended to files."""
    if environment.get("OMP_NUM_THREADS") != THREADS:
        raise ValueError(f"a fork has OMP_NUM_THREADS={THREADS}, set before the imports")
    server = _server(preload)
    request = {
        "command": list(command),
        "cwd": str(cwd),
        "environment": dict(environment),
        "stdout": str(stdout),
        "stderr": str(stderr),
    }
    return Forked(server, server.ask(request)["pid"])
