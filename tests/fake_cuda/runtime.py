"""torch's own CUDA wheel on a machine without a GPU: the wheel, cuda.c compiled for it, processes.

The wheel is taken once from where pip finds packages (half a gigabyte), without NVIDIA's packages,
into a cache outside the checkout, and stands before the installed torch on a process's path. What
it needs of NVIDIA's libraries is read out of it: what cuda.c has not is made of functions that end
the process and name themselves, so that nothing is pretended by accident. Where any of this cannot
be had, tests skip and say why.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_nvml
import pytest

VERSIONS = ("2.13.0", "2.12.0", "2.11.0")
NEWEST = VERSIONS[0]
_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_SOURCE = _HERE / "cuda.c"
_NVML = (_HERE / "nvml.c", Path(fake_nvml.__file__).with_name("nvml.c"))  # torch's part, the job's
_NVIDIA = re.compile(r"lib(cu|nccl|nvrtc|nvshmem)")
_OF_NVIDIA = re.compile(r"(cu[A-Z]|cuda|cufile|curand|cusparse|nccl|nvshmem)")
_COMPILER = ("gcc", "-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread")
_END = """
#include <stdio.h>
#include <stdlib.h>
static void end(const char *name) {
    fprintf(stderr, "fake CUDA: %s is not in cuda.c\\n", name);
    abort();
}
"""
_STRICT = ("-Wall", "-Wextra", "-Werror")


@dataclass(frozen=True)
class Gpu:
    """What the processes see; sizes in bytes."""

    capability: int = 80
    memory: int = 85_028_700_160  # an A100's with 80 GB, as CUDA says it
    count: int = 1
    outside: int = 600_000_000  # of the memory, what the context has taken

    @property
    def environment(self) -> dict[str, str]:
        return {
            "FAKE_CUDA_CAPABILITY": str(self.capability),
            "FAKE_CUDA_MEMORY": str(self.memory),
            "FAKE_CUDA_GPUS": str(self.count),
            "FAKE_CUDA_OUTSIDE": str(self.outside),
        }


@dataclass(frozen=True)
class FakeCuda:
    """A torch with CUDA whose GPUs are pretended."""

    packages: Path
    libraries: Path

    @classmethod
    def of(cls, version: str = NEWEST, *, fetch: bool = True) -> FakeCuda:
        """The torch of that version; what is not in the cache yet is only taken if `fetch`."""
        packages = _packages(version, fetch)
        return cls(packages, _libraries(packages))

    def environment(self, gpu: Gpu = Gpu()) -> dict[str, str]:
        path = [str(_HERE / "start"), str(_HERE), str(self.packages), str(_ROOT)]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "FAKE_"))}
        return (
            kept
            | gpu.environment
            | {
                "PYTHONPATH": os.pathsep.join(path),
                "LD_LIBRARY_PATH": str(self.libraries),
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
                "FAKE_NVML": str(self.libraries / "nvml.txt"),
                "TRITON_LIBCUDA_PATH": str(self.libraries),
                "TRITON_CACHE_DIR": str(self.libraries / "triton"),
                "TORCHINDUCTOR_CACHE_DIR": str(self.libraries / "inductor"),
            }
        )

    def run(
        self, command: Sequence[str], gpu: Gpu = Gpu(), **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """A Python process that has ended, with what it wrote."""
        env = self.environment(gpu) | more.pop("env", {})
        return subprocess.run(
            [sys.executable, *command], env=env, capture_output=True, text=True, **more
        )

    def ask(self, script: str, given: object, gpu: Gpu = Gpu(), **more: Any) -> Any:
        """What a script beside this file answers: JSON on its last line."""
        done = self.run([str(_HERE / script), json.dumps(given)], gpu, **more)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
        return json.loads(done.stdout.splitlines()[-1])


def _cache(version: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return base / "critic-torch" / f"torch-{version}-python-{python}"


def is_there(version: str = NEWEST) -> bool:
    return _cache(version).exists()


def _packages(version: str, fetch: bool) -> Path:
    folder = _cache(version)
    if not folder.exists():
        if not fetch:
            pytest.skip(f"no torch {version} with CUDA in {folder}: `make test-all` takes it there")
        _once(folder, lambda target: _install(target, version))
    return folder


def _install(target: Path, version: str) -> None:
    """The wheel, and the Triton that it names, which compiles for GPUs."""
    _pip(target, f"torch==={version}")  # === leaves out builds for the CPU, 2.13.0+cpu
    about = next(target.glob("torch-*.dist-info/METADATA")).read_text()
    triton = re.search(r"^Requires-Dist: (triton==[\d.]+)", about, re.MULTILINE)
    if triton is None:
        pytest.skip(f"the torch {version} that pip finds is built without CUDA")
    _pip(target, triton[1])


def _pip(target: Path, what: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"]
    command = [*pip, "--only-binary", ":all:", "--target", str(target), what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"{what} with CUDA cannot be had: {last}")


def _once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder as a whole, also when another process makes it too."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        target = Path(scratch) / "made"
        target.mkdir()
        make(target)
        if not folder.exists():
            target.rename(folder)


# The libraries


def _libraries(packages: Path) -> Path:
    if not (shutil.which("gcc") and shutil.which("readelf")):
        pytest.skip("no C compiler (gcc, and readelf of binutils)")
    sources = (_SOURCE, *_NVML, Path(__file__))
    state = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12]
    folder = packages / f"fake-cuda-{state}"
    if not folder.exists():
        _once(folder, lambda target: _compile(packages / "torch" / "lib", target))
    return folder


def _compile(torch_lib: Path, target: Path) -> None:
    """One library under the name of each that torch's own need, and NVML's stand-in."""
    names, symbols = _needed(torch_lib)
    library = target / "libfakecuda.so"
    missing, versions = target / "missing.c", target / "versions.map"
    missing.write_text(_missing_functions(symbols))
    versions.write_text(_version_script(symbols))
    objects = [str(_SOURCE), str(missing), "-o", str(library), "-ldl"]
    script = f"-Wl,--version-script={versions}"
    subprocess.run([*_COMPILER, *_STRICT, script, *objects], check=True)
    for name in names | {"libcuda.so.1"}:
        (target / name).symlink_to(library.name)
    nvml = [*map(str, _NVML), "-o", str(target / fake_nvml.NAME)]
    subprocess.run([*_COMPILER, *_STRICT, *nvml], check=True)
    (target / "nvml.txt").write_text("")


def _needed(torch_lib: Path) -> tuple[set[str], dict[str, str]]:
    """Libraries of NVIDIA's, and what is asked of them: symbols with their versions, or ""."""
    names: set[str] = set()
    symbols: dict[str, str] = {}
    for file in torch_lib.glob("*.so"):
        names |= set(re.findall(r"\(NEEDED\).*\[(.*)\]", _readelf("-d", file)))
        for line in _readelf("--dyn-syms", file).splitlines():
            fields = line.split()
            if len(fields) < 8 or fields[6] != "UND":
                continue
            name, _, version = fields[7].partition("@")
            if _NVIDIA.match(version) or version == "NVSHMEM":
                symbols[name] = version
            elif not version and _OF_NVIDIA.match(name):
                symbols.setdefault(name, "")
    return {name for name in names if _NVIDIA.match(name)}, symbols


def _readelf(what: str, file: Path) -> str:
    command = ["readelf", "-W", what, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _missing_functions(symbols: dict[str, str]) -> str:
    """For each symbol a function, weak, so that cuda.c's own stands where it has one."""
    lines = ["#include <stdio.h>", "#include <stdlib.h>", "static void end(const char *name) {"]
    lines += [
        '    fprintf(stderr, "fake CUDA: %s is not in cuda.c\\n", name);',
        "    abort();",
        "}",
    ]
    weak = "__attribute__((weak)) void"
    lines += [f'{weak} {name}(void) {{ end("{name}"); }}' for name in sorted(symbols)]
    return "\n".join(lines) + "\n"


def _version_script(symbols: dict[str, str]) -> str:
    by_version: dict[str, list[str]] = {}
    for name, version in symbols.items():
        if version:
            by_version.setdefault(version.lstrip("@"), []).append(name)
    nodes = [f"{v} {{ global: {'; '.join(sorted(n))}; }};" for v, n in sorted(by_version.items())]
    return "\n".join([*nodes, "FAKE { global: *; };"]) + "\n"
