"""Memory of a rank while it trains, by phase: the device's, this process's and the allocator's.

On a GPU the allocator says its own peaks, exactly, and NVML is read by threads: memory at full
rate, everything else once a second. Without a GPU it is the memory of the process, by the same
names. The thread that trains waits for none of these threads, and none holds a lock during a call:
a call that hangs costs its figures and nothing else.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from job.memory.ledger import Figures, MemoryLedger, Notes
from job.memory.nvml import BOARD_CALLS, MEMORY_CALLS, PROCESS, Gauges, NvmlReader
from job.memory.sources import CudaAllocator, ProcessMemory

PHASES = ("load", "shard", "cache", "forward", "backward", "optimizer", "save", "evaluate")
OTHER = "other"  # what lies between

_START_SECONDS = 5.0  # how long the beginning waits for NVML's first answer
_GLANCE_SECONDS = 0.01  # during that, between two looks
_STOP_SECONDS = 1.0
_BOARD_SECONDS = 1.0
_WATCH_SECONDS = 0.25
_LATE_ROUNDS = 4  # without NVML's memory, until the allocator is sampled alone
_TELEMETRY = {
    "device_used": "memory/device_used_bytes",
    "process": "memory/process_bytes",
    "allocated": "memory/allocated_peak_bytes",
    "reserved": "memory/reserved_peak_bytes",
    "inactive": "memory/inactive_peak_bytes",
}


class Recorder:
    """Records one rank's memory from start() to stop(), or as a context.

    One thread starts and stops it, changes phases, and asks for telemetry and the summary.
    """

    def __init__(self, device: torch.device, hertz: float = 25.0) -> None:
        self._on_gpu, self._period = device.type == "cuda", 1 / hertz
        self._notes, self._gauges = Notes(), Gauges()
        self._source = CudaAllocator(device) if self._on_gpu else ProcessMemory(self._notes)
        self._description = self._source.describe()
        self._ledger = MemoryLedger((*PHASES, OTHER), self._period)
        self._device, self._baseline = Figures(), Figures()  # NVML's last figures; those at start
        self._place = (OTHER, 0)  # the phase, and how many changes there were
        self._names_process: bool | None = None  # whether NVML's pids are this process's, if known
        self._ended = threading.Event()
        self._began, self._answered_at = time.monotonic(), -math.inf
        self._asked_at = -math.inf  # when NVML was asked for the last figures of memory
        self._stopped_at: float | None = None
        self._readers = self._nvml_readers() if self._on_gpu else []
        self._sampler = threading.Thread(target=self._run, name="memory", daemon=True)

    def _nvml_readers(self) -> list[NvmlReader]:
        uuid, lost = self._description["uuid"], threading.Event()
        groups = (
            (MEMORY_CALLS, self._period, self._sample_device),
            (BOARD_CALLS, _BOARD_SECONDS, lambda read: self._gauges.add(read())),
        )
        return [
            NvmlReader(uuid, calls, seconds, self._notes, lost, take)
            for calls, seconds, take in groups
        ]

    def start(self) -> None:
        """Begin; on a GPU wait a little for NVML's first figures, the baseline."""
        self._began = time.monotonic()
        self._source.take_peaks()
        for reader in self._readers:
            reader.start()
        self._await_nvml()
        self._baseline = self._ledger.peak()
        self._sampler.start()

    def _await_nvml(self) -> None:
        """Wait for NVML's first figures, or take a sample without them."""
        until = self._began + _START_SECONDS
        while self._is_alone() and time.monotonic() < until:
            if not any(reader.thread.is_alive() for reader in self._readers[:1]):
                break
            time.sleep(_GLANCE_SECONDS)
        if self._is_alone():
            self._sample()

    def stop(self) -> None:
        """End, within a second or so whatever NVML does."""
        if self._stopped_at is not None:
            return
        self._count_peaks()
        self._stopped_at = time.monotonic()
        self._ended.set()
        for reader in self._readers:
            reader.note_hang()
            reader.end()
        for thread in (self._sampler, *(reader.thread for reader in self._readers)):
            thread.join(max(0.0, self._stopped_at + _STOP_SECONDS - time.monotonic()))
        if not self._sampler.is_alive():
            self._source.close()

    def __enter__(self) -> Recorder:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Phases

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count memory under one of PHASES during the body; of nested ones the inner counts."""
        assert name in PHASES, name
        outer, _ = self._place
        self._change(name)
        try:
            yield
        finally:
            self._change(outer)

    def _change(self, phase: str) -> None:
        self._count_peaks()
        self._place = (phase, self._place[1] + 1)

    def _count_peaks(self) -> None:
        """Count the peaks since the last time for the present phase."""
        if self._stopped_at is not None:
            return
        try:
            peaks = self._source.take_peaks()
        except Exception as error:  # it must not end a training
            self._notes.add("memory peaks", f"{type(error).__name__}: {error}")
            return
        self._ledger.exact(self._place[0], peaks)

    # Samples, in threads

    def _run(self) -> None:
        """Sample what NVML does not, and watch over its threads."""
        alone = self._is_alone()
        while not self._ended.wait(self._period if alone else _WATCH_SECONDS):
            alone = self._is_alone()
            if alone:
                self._sample()
            for reader in self._readers:
                reader.note_hang()

    def _is_alone(self) -> bool:
        """Whether NVML does not say what the memory is."""
        return time.monotonic() - self._answered_at > _LATE_ROUNDS * self._period

    def _sample(self, read: Callable[[], Figures] | None = None) -> None:
        """Take one sample: what the process knows, and what `read` gives of the device."""
        place, figures = self._place, self._source.now()
        if read is not None:
            reserved, asked = figures.get("reserved", 0), time.monotonic()
            device = read()
            self._check_process(device, reserved)
            self._device = self._device | device
            if "device_used" in device:
                self._asked_at = asked
            figures |= device
        now = time.monotonic() - self._began
        self._ledger.sample(now, place[0], figures, sure=place == self._place)

    def _sample_device(self, read: Callable[[], Figures]) -> None:
        self._sample(read)
        self._answered_at = time.monotonic()

    def _check_process(self, device: Figures, reserved: float) -> None:
        """Give up NVML's share of a process that cannot be this one's.

        In a container NVML may say pids as they are outside, where another process may have
        this one's.
        """
        process = device.get("process")
        if process is None:
            if reserved and "processes" in device:
                self._notes.add(PROCESS.name, "does not name this process: a container's pid?")
        elif process < min(reserved, self._source.now().get("reserved", 0)):
            self._names_process = False
            self._ledger.forget("process")
            self._notes.add(PROCESS.name, "gives another process's memory under this one's pid")
        elif self._names_process is None:
            self._names_process = True
            self._notes.settle(PROCESS.name)

    # Results

    def telemetry(self) -> dict[str, float]:
        """Peaks of memory (bytes) and state of the GPU since the last call; what is known."""
        self._count_peaks()
        memory = {_TELEMETRY[name]: value for name, value in self._ledger.take_window().items()}
        return memory | {f"gpu/{name}": v for name, v in self._gauges.take_window().items()}

    def now(self) -> dict[str, float]:
        """Bytes at this moment; the device's too, for which this waits a round, where NVML answers.

        For measurements between steps: within one, nobody waits for NVML.
        """
        called = time.monotonic()
        while self._asked_at < called and not self._is_alone():
            time.sleep(min(_GLANCE_SECONDS, self._period))
        return {**self._device, **self._source.now()}

    def peak_bytes(self) -> float:
        """Most so far: the allocator's on a GPU, the process's memory on a CPU."""
        self._count_peaks()
        return self._ledger.peak().get("allocated" if self._on_gpu else "process", 0.0)

    def summary(self) -> dict[str, Any]:
        """Everything about this rank, for memory.json; sizes are in bytes, times in seconds."""
        self._count_peaks()
        return {
            "backend": self._backend(),
            **self._description,
            **self._nvml_description(),
            "process_figure": self._process_figure(),
            "baseline": self._ledger.known(self._baseline),
            "peak": self._ledger.peak(),
            "peaks": self._ledger.peaks(),
            "gpu": self._gauges.summary(),
            "notes": self._notes.rows(),
            "sampling": self._sampling(),
            "series": self._ledger.series(),
        }

    def _backend(self) -> str:
        if not self._on_gpu:
            return "process"
        return "nvml" if "device_used" in self._device else "allocator"

    def _process_figure(self) -> str:
        """Where the process's share comes from."""
        if not self._on_gpu:
            return "pss"
        return "nvml" if self._names_process else "none"

    def _nvml_description(self) -> dict[str, Any]:
        """Name, UUID and size as NVML says them: of a MIG slice it is the slice's."""
        found: dict[str, Any] = {"mig": False}
        for reader in self._readers[:1]:
            found |= reader.description
        sizes = {"total": "total_bytes", "driver_reserved": "driver_reserved_bytes"}
        return found | {key: self._device[n] for n, key in sizes.items() if n in self._device}

    def _sampling(self) -> dict[str, float]:
        end = time.monotonic() if self._stopped_at is None else self._stopped_at
        seconds, samples = end - self._began, self._ledger.samples
        return {"seconds": seconds, "samples": samples, "hertz": samples / seconds}
