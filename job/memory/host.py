"""How much of the host's memory is free for the processes of this job. Linux, free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_UNIT = 1024  # of /proc/meminfo


def free_host_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """What the kernel can give this process: of the host, and of each control group around it.

    Args:
        proc, groups: where procfs and the control groups are mounted.
    """
    lines = (proc / "meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([available * _UNIT, *_free_in_groups(proc, groups)]))


def _free_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _free_up_from(groups / "memory", name, *names)
        elif not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            yield from _free_up_from(groups, name, *names)
            yield from _free_up_from(groups / "unified", name, *names)  # beside version 1


def _free_up_from(root: Path, name: str, limit: str, usage: str, cache: str) -> Iterator[int]:
    """Free bytes of a group and of those that it is in; a container may see the last alone."""
    folder = root / name.lstrip("/")
    for one in (folder, *folder.parents):
        if not one.is_relative_to(root):
            return
        try:
            most, used = (one / limit).read_text().strip(), int((one / usage).read_text())
            if most != "max":
                yield int(most) - used + _counted(one / "memory.stat", cache)
        except OSError:  # the uppermost group has no limit, and other mounts no such files
            continue


def _counted(statistics: Path, name: str) -> int:
    """File pages of a group that the kernel takes back first."""
    counts = dict(line.split() for line in statistics.read_text().splitlines())
    return int(counts.get(name, 0))
