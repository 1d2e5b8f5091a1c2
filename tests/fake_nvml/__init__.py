"""A stand-in of NVML for nvidia-ml-py's own bindings: nvml.c, compiled, and what it answers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

_SOURCE = Path(__file__).parent / "nvml.c"
NAME = "libnvidia-ml.so.1"


def compiled(folder: Path) -> Path:
    """The library, made in `folder`; without a C compiler the test is skipped."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc)")
    library = folder / NAME
    flags = ["-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(_SOURCE), "-o", str(library)], check=True)
    return library


class FakeNvml:
    """NVML as the bindings have it loaded; each has a state of its own."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.library = Path(shutil.copy(library, folder))
        self.file = folder / "nvml.txt"

    def says(self, *lines: str) -> None:
        """Set what it answers, before its first use; nvml.c has the language."""
        self.file.write_text("\n".join(lines) + "\n")

    def let_go(self) -> None:
        """Have calls return that hang."""
        self.file.with_name(self.file.name + ".free").touch()

    @classmethod
    def loaded(
        cls, library: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[FakeNvml]:
        fake = cls(library, folder)
        monkeypatch.setenv("FAKE_NVML", str(fake.file))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(fake.library)))
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        yield fake
        fake.let_go()


def without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the bindings without a library, as on a machine without a driver."""

    def refuse(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(pynvml, "CDLL", refuse)
