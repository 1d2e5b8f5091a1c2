"""Lets one call fail by which a process changes files: faulty_calls.c, compiled, and its orders."""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

_ORDER = "FAULTY_CALL"
_FLAGS = ("-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-pthread")
_SHORT = -1
_REACHES = ("once", "descriptor", "disk")


@dataclass(frozen=True)
class Call:
    """One of the calls that a process makes: the n-th of its kind on a path below the folder."""

    name: str
    path: str
    number: int

    def __str__(self) -> str:
        return f"{self.name} {self.path} {self.number}"


@dataclass(frozen=True)
class Fault:
    """How a call fails: with an errno, or by writing only half ("SHORT").

    It fails `once`; or all later calls on its `descriptor` do; or all on this `disk` from then on.
    """

    kind: str
    reach: str = "once"

    @property
    def code(self) -> int:
        return _SHORT if self.kind == "SHORT" else int(getattr(errno, self.kind))

    def __str__(self) -> str:
        return f"{self.kind} {self.reach}"


@functools.cache
def library() -> Path | None:
    """The library to start the fork server with; None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    built = Path(tempfile.mkdtemp(prefix="faulty-calls-"), "faulty_calls.so")
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, *_FLAGS, source, "-o", built, "-ldl"], check=True)
    return built


def order(folder: Path, log: Path, call: Call | None, fault: Fault | None) -> dict[str, str]:
    """The environment of a fork in which a call below `folder` fails; all of them are logged."""
    asked = {
        "folder": str(folder),
        "log": str(log),
        "call": asdict(call or Call("", "", 0)),
        "fault": fault.code if fault else 0,
        "reach": _REACHES.index(fault.reach) if fault else 0,
    }
    return {_ORDER: json.dumps(asked)}


def if_asked() -> None:
    """Do what $FAULTY_CALL orders, in a process that has the library."""
    if text := os.environ.pop(_ORDER, None):
        asked = json.loads(text)
        call = Call(**asked["call"])
        texts = (asked["folder"], asked["log"], call.name, call.path)
        numbers = (call.number, asked["fault"], asked["reach"])
        ctypes.CDLL(None).faulty_calls_arm(*map(str.encode, texts), *numbers)


def logged(log: Path) -> list[Call]:
    """The calls of a process, in their order."""
    seen: Counter[str] = Counter()
    calls = []
    for line in log.read_text().splitlines():
        seen[line] += 1
        calls.append(Call(*line.split("\t"), seen[line]))
    return calls
