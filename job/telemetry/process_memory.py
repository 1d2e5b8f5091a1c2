"""The memory of this process: its proportional set size (PSS). Free of torch.

Of a page that several processes share, PSS counts each one's part, so that ranks can be added up.
The kernel finds it by walking the page tables (smaps_rollup: milliseconds, with the memory map
locked), but counts the resident set (RSS) as it goes. What sharing takes off RSS is therefore
measured now and then, and RSS at full rate.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from typing import Any

from job.telemetry.notes import Notes

_ROLLUP_SHARE = 0.001  # of a core that smaps_rollup may cost
_RESTING = 4.0  # as long a pause again while the shared pages hardly change
_CHANGE_BYTES = 8 << 20  # of shared pages, that PSS is measured anew for
_RETRY_SECONDS = 60.0
_CLEAR_REFS = "/proc/self/clear_refs"
_RESET_PEAK = b"5"  # proc(5), clear_refs: VmHWM becomes the present RSS


class ProcessMemory:
    """Bytes in use, as `process`; peaks are exact where the kernel lets this process reset VmHWM.

    A reset also lowers ru_maxrss, which is then the peak since, not that of the process's life.
    """

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._clear_refs = self._open(_CLEAR_REFS, os.O_WRONLY)
        self._rollup = self._open("/proc/self/smaps_rollup", os.O_RDONLY)
        self._sharing = 0  # RSS - PSS
        self._shared = 0  # pages shared with files and others, when that was measured
        self._measured_at = self._pause = 0.0
        self.peaks_of = frozenset({"process"} if self._reset_peak() else ())
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

    def now(self) -> dict[str, float]:
        resident, shared = self._pages()
        self._measure_sharing(shared)
        return {"process": resident - self._sharing}

    def take_peaks(self) -> dict[str, float]:
        """The peak since the last call, where the kernel allows that."""
        if not self.peaks_of:
            return {}
        status = os.pread(self._status, 4096, 0)
        begin = status.index(b"VmHWM:") + len(b"VmHWM:")
        peak = int(status[begin : status.index(b"kB", begin)]) * 1024
        if not self._reset_peak():
            self.peaks_of = frozenset()
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

    def _pages(self) -> tuple[int, int]:
        """Bytes resident, and of these the ones that files or others share."""
        fields = os.pread(self._statm, 256, 0).split()
        return int(fields[1]) * mmap.PAGESIZE, int(fields[2]) * mmap.PAGESIZE

    def _measure_sharing(self, shared: int) -> None:
        """Measure what sharing takes off RSS, when it is time."""
        now = time.monotonic()
        changed = abs(shared - self._shared) > _CHANGE_BYTES
        pause = self._pause if changed else self._pause * _RESTING
        if self._rollup is None or now - self._measured_at < pause:
            return
        began = time.thread_time()
        try:
            lines = os.pread(self._rollup, 4096, 0).splitlines()
        except OSError as error:
            self._notes.add("/proc/self/smaps_rollup", str(error.strerror))
            self._measured_at, self._pause = now, _RETRY_SECONDS
            return
        sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        self._sharing, self._shared = sizes[b"Rss:"] - sizes[b"Pss:"], shared
        self._measured_at, self._pause = now, (time.thread_time() - began) / _ROLLUP_SHARE
