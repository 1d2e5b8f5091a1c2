"""What a piece of code asks of the fake GPU (see cuda.c), and where it waits for it.

For scripts that run under torch's CUDA wheel.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]
LAUNCHES = ("K", "Z")  # and copies within the device
_ON_WAIT = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@dataclass(frozen=True)
class Event:
    """Kinds are cuda.c's; `size` is bytes, or blocks of a kernel."""

    kind: str
    name: str
    size: int

    @property
    def is_launch(self) -> bool:
        return self.kind in LAUNCHES or (self.kind == "C" and self.name == "within device")


@dataclass
class Recording:
    """The events, and for each wait the phase in which it was and the function of the job's."""

    phase: str = ""
    events: list[Event] = field(default_factory=list)
    waits: list[tuple[str, str]] = field(default_factory=list)

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    @contextmanager
    def running(self) -> Iterator[None]:
        library = ctypes.CDLL("libcudart.so.13")
        heard = _ON_WAIT(lambda name: self.waits.append((self.phase, _place(name.decode()))))
        library.fake_cuda_on_wait(heard)
        library.fake_cuda_record(1)
        try:
            yield
        finally:
            library.fake_cuda_record(0)
            library.fake_cuda_on_wait(None)
            self.events = _events(library)


def _events(library: ctypes.CDLL) -> list[Event]:
    with tempfile.NamedTemporaryFile() as file:
        assert library.fake_cuda_write(file.name.encode()) == 0
        lines = Path(file.name).read_text(errors="replace").splitlines()
    rows = [line.split("\t") for line in lines]
    return [Event(row[0], row[1], int(row[2])) for row in rows]


def _place(call: str) -> str:
    """The innermost function of the job's own, or the call where there is none."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT / "job"):
            return f"{file.relative_to(ROOT).as_posix()}: {frame.f_code.co_qualname}"
        frame = frame.f_back
    return call
