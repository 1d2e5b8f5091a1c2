"""Runs Python commands in forks of one process that has imported what a training imports.

Imports are most of a small training's time. `forks.py` starts this file and speaks to it: one JSON
object a line each way. At the end of its input it kills what it has started, and ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import dwell
import faulty_calls

# What a training imports, and what torch imports when an optimizer is made and takes a step.
_IMPORTS = ("job.train", "torch._dynamo", "torch.onnx", "tokenizers", "numpy.random")
_OWN_THREADS = Path("/proc/self/task")


def _next_command() -> list[str]:
    """Serve until the end of input; returns in a fork, with the words of its command."""
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            answer = _reap(request["reap"])
            children.discard(request["reap"])
        else:
            pid = os.fork()
            if pid == 0:
                _become(request)
                return list(request["command"])
            children.add(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _reap(pid: int) -> dict[str, Any]:
    """The exit code of a child that has ended, negative for a signal, and its CPU seconds."""
    _, status, used = os.wait4(pid, 0)
    seconds = used.ru_utime + used.ru_stime
    return {"code": os.waitstatus_to_exitcode(status), "seconds": seconds}


def _become(request: dict[str, Any]) -> None:
    """Make this fork what a new process would be, but for its imports."""
    os.setsid()
    streams = [os.open(os.devnull, os.O_RDONLY)]
    for key in ("stdout", "stderr"):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        streams.append(os.open(request[key], flags, 0o644))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    dwell.if_asked()
    faulty_calls.if_asked()


def _run(command: list[str]) -> None:
    """As `python COMMAND` does."""
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(command[1], "<string>", "exec"), main.__dict__)
    elif command[0] == "-m":
        sys.argv = command[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")


def _import_all() -> None:
    for name in _IMPORTS:
        importlib.import_module(name)
    del sys.modules["job.train"]  # each fork runs it as its main module
    # A fork has the one thread that made it; locks that another one held would stay locked.
    threads = len(list(_OWN_THREADS.iterdir()))
    if threads != 1:
        raise RuntimeError(f"{threads} threads after the imports: not to be forked")
    gc.freeze()  # collections in a fork leave the pages of the imports shared


if __name__ == "__main__":
    del sys.path[0]  # this file's folder, which a command would not have
    _import_all()
    _run(_next_command())
