"""What the benchmarks share: command line, progress, table, and records that say whence they come.

Notation: MB are 1e6 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a record here")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: 0)")
    return parser


def say(text: str) -> None:
    """Report progress; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def write_record(
    file: Path, results: dict[str, Any], *, seed: int, packages: Sequence[str]
) -> None:
    """Write results with everything that is needed to judge and repeat them."""
    record = {**origin(seed, packages), **results}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n")
    say(f"wrote {file}")


def origin(seed: int, packages: Sequence[str]) -> dict[str, Any]:
    """Command, commit, machine, versions and seed of this process."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", ".", ":!bench/results")),
        "machine": machine(),
        # torch's own word names its build too, for a CPU or a CUDA
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: metadata.version(name) for name in packages},
        "seed": seed,
    }


def machine() -> dict[str, Any]:
    """The computer, and how many of its cores torch uses."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": platform.platform(),
        "torch_threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str | None:
    """What git says about this checkout; None where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def peak_memory_mb() -> float:
    """Most memory that this process has had resident."""
    # not getrusage: a child's ru_maxrss starts at what its parent had resident
    status = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(kilobytes) * 1024 / 1e6


class OtherLoad:
    """Share of the machine's CPU time that went to other processes since construction.

    Args:
        own: processes besides this one, and its children that have ended, that are none of the
            others.
    """

    def __init__(self, own: Sequence[int] = ()) -> None:
        self._own = own
        self._started, self._others = time.perf_counter(), self._cpu_seconds_of_others()

    def share(self) -> float:
        used = self._cpu_seconds_of_others() - self._others
        return max(0.0, used / (time.perf_counter() - self._started) / (os.cpu_count() or 1))

    def _cpu_seconds_of_others(self) -> float:
        # user, nice, system, idle, iowait, irq, softirq, steal, and guest, which user includes
        first = Path("/proc/stat").read_text().split("\n")[0]
        ticks = [int(field) for field in first.split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4] - sum(map(_ticks, self._own))
        return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _ticks(pid: int) -> int:
    """Clock ticks of CPU that a process has used."""
    # after the name, which is in brackets and may be anything: the 12th and 13th field
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def cell_text(value: float | str | None) -> str:
    """A figure as it stands in a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, all but the first aligned right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(_line(cells, widths) for cells in [header, ["-" * w for w in widths], *rows])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = cells
    numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
    return "  ".join([first.ljust(widths[0]), *numbers]).rstrip()
