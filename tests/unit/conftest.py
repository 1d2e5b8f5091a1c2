"""What unit tests share: benchmarks as modules, and what Slurm and NVML answer as tests say."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from fake_nvml import FakeNvml, compiled
from fake_slurm import FakeSlurm

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="session")
def bench() -> Iterator[Callable[[str], ModuleType]]:
    """Import a benchmark by name; they import each other from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module


@pytest.fixture(scope="session", autouse=True)
def _no_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The site file of who runs the tests is none of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        patch.delenv("CRITIC_SITE", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _roomy_disk() -> Iterator[None]:
    """Checkpoints of 7B, which no test writes, fit on the disk of who runs the tests."""
    real = shutil.disk_usage

    def roomy(path: Path) -> shutil._ntuple_diskusage:
        usage = real(path)
        return usage._replace(free=1 << 50) if usage.total else usage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", roomy)
        yield


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A machine where no Slurm is installed, until a test lets a client speak."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return FakeSlurm(folder)


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def nvml(nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    """NVML's stand-in behind the real bindings, until the test ends."""
    yield from FakeNvml.loaded(nvml_library, tmp_path, monkeypatch)
