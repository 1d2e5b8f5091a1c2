"""The machine that a training runs on: what its bits depend on, and how fast it multiplies."""

from __future__ import annotations

import hashlib
import platform
import time
from importlib.metadata import distributions
from pathlib import Path

import torch

_OF_THE_IMAGE = Path("/opt/critic")
_SECONDS = 0.05
_SIZE_CPU, _SIZE_GPU = 512, 4096


def describe(device: torch.device) -> dict[str, str]:
    """Kind of device, instruction set, torch and image: with these the same, so are the bits."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "image": _packages() if _OF_THE_IMAGE.is_dir() else "none",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _packages() -> str:
    """An image by its packages: one with newer code of this project is the same kind of place."""
    listed = {f"{one.name}=={one.version}" for one in distributions() if one.name != "critic-job"}
    return hashlib.sha256("\n".join(sorted(listed)).encode()).hexdigest()[:12]


def product_rate(device: torch.device) -> float:
    """Floating-point operations per second of matrix products, in the type that trains there."""
    cuda = device.type == "cuda"
    size, dtype = (_SIZE_GPU, torch.bfloat16) if cuda else (_SIZE_CPU, torch.float32)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    out = matrix @ matrix  # libraries and clocks come with the first
    _wait(device)
    count, began = 0, time.monotonic()
    while time.monotonic() - began < _SECONDS:
        torch.mm(matrix, matrix, out=out)
        _wait(device)
        count += 1
    return 2 * size**3 * count / (time.monotonic() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
