"""Where memory is read without a driver that may hang: torch's allocator, and this process."""

from __future__ import annotations

import math
import mmap
import os
import platform
import time
from typing import Any

import torch

from job.memory.ledger import Figures, Notes

_STATISTICS = {
    "allocated": "allocated_bytes",
    "reserved": "reserved_bytes",
    "inactive": "inactive_split_bytes",  # free parts of blocks that are partly in use
}

_ROLLUP_SHARE = 0.0005  # of a core that smaps_rollup may cost in the long run,
_RESTING_SHARE = 0.0001  # and while the shared pages hardly change
_ROLLUP_SECONDS = 0.1  # what it may cost beyond that: at the beginning much is loaded
_CHANGE_BYTES = 8 << 20  # of shared pages, that PSS is measured anew for
_ROLLUP = "/proc/self/smaps_rollup"
_CLEAR_REFS = "/proc/self/clear_refs"
_RESET_PEAK = b"5"  # proc(5), clear_refs: VmHWM becomes the present RSS


class CudaAllocator:
    """torch's caching allocator on one CUDA device: bytes allocated, reserved and inactive.

    Nothing before CUDA is initialised. Peaks are exact, since the allocator keeps them itself.
    `take_peaks` resets them: torch.cuda.max_memory_allocated and its like then speak of what came
    after.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda.current_device() if device.index is None else device.index

    def describe(self) -> dict[str, Any]:
        """Name, UUID as CUDA says it, without NVML's prefix, and size."""
        found = torch.cuda.get_device_properties(self._device)
        return {"device": found.name, "uuid": str(found.uuid), "total_bytes": found.total_memory}

    def close(self) -> None:
        """Nothing is kept open."""

    def now(self) -> Figures:
        return self._statistics("current")

    def take_peaks(self) -> Figures:
        """Peaks since the last call."""
        peaks = self._statistics("peak")
        if peaks:
            torch.cuda.reset_peak_memory_stats(self._device)
        return peaks

    def _statistics(self, kind: str) -> Figures:
        found = torch.cuda.memory_stats_as_nested_dict(self._device)
        return {name: found[key]["all"][kind] for name, key in _STATISTICS.items() if key in found}


class ProcessMemory:
    """This process's proportional set size (PSS) in bytes, as `process`.

    Of a page that several processes share, PSS counts each one's part, so that ranks can be added
    up. The kernel finds it by walking the page tables (smaps_rollup: milliseconds, with the memory
    map locked), but counts the resident set (RSS) as it goes. What sharing takes off RSS is
    therefore measured now and then, and RSS at full rate.

    Peaks are exact where the kernel lets this process reset VmHWM. That also lowers ru_maxrss,
    which is then the peak since, not that of the process's life.
    """

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._clear_refs = self._open(_CLEAR_REFS, os.O_WRONLY)
        self._rollup = self._open(_ROLLUP, os.O_RDONLY)
        self._sharing = 0  # RSS - PSS
        self._shared = 0  # pages shared with files and others, when that was measured
        self._began = time.monotonic()
        self._spent = 0.0  # CPU seconds on smaps_rollup
        self._is_exact = self._reset_peak()
        self.now()

    def close(self) -> None:
        for file in (self._statm, self._status, self._clear_refs, self._rollup):
            if file is not None:
                os.close(file)

    def _open(self, path: str, mode: int) -> int | None:
        try:
            return os.open(path, mode)
        except OSError as error:
            self._notes.add(path, str(error.strerror))
            return None

    def describe(self) -> dict[str, Any]:
        total = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
        return {"device": f"CPU ({platform.machine()})", "total_bytes": total}

    def now(self) -> Figures:
        fields = os.pread(self._statm, 256, 0).split()
        resident, shared = (int(pages) * mmap.PAGESIZE for pages in fields[1:3])
        self._measure_sharing(shared)
        return {"process": resident - self._sharing}

    def take_peaks(self) -> Figures:
        """The peak since the last call, where the kernel allows that."""
        if not self._is_exact:
            return {}
        status = os.pread(self._status, 4096, 0)
        begin = status.index(b"VmHWM:") + len(b"VmHWM:")
        peak = int(status[begin : status.index(b"kB", begin)]) * 1024
        self._is_exact = self._reset_peak()
        return {"process": peak - self._sharing}

    def _reset_peak(self) -> bool:
        if self._clear_refs is None:
            return False
        try:
            os.write(self._clear_refs, _RESET_PEAK)
        except OSError as error:
            self._notes.add(_CLEAR_REFS, str(error.strerror))
            return False
        return True

    def _measure_sharing(self, shared: int) -> None:
        """Measure what sharing takes off RSS, when it is time."""
        elapsed = time.monotonic() - self._began
        changed = abs(shared - self._shared) > _CHANGE_BYTES
        allowed = _ROLLUP_SECONDS + _ROLLUP_SHARE * elapsed if changed else _RESTING_SHARE * elapsed
        if self._rollup is None or self._spent > allowed:
            return
        began = time.thread_time()
        try:
            lines = os.pread(self._rollup, 4096, 0).splitlines()
        except OSError as error:
            self._notes.add(_ROLLUP, str(error.strerror))
            self._spent = math.inf
            return
        sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        self._sharing, self._shared = sizes[b"Rss:"] - sizes[b"Pss:"], shared
        self._spent += time.thread_time() - began
