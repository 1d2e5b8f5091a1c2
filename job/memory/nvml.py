"""A GPU as NVML sees it: its memory, and gauges of everything else. Free of torch.

A GPU is found by the UUID that CUDA gives it: an index means another GPU as soon as
CUDA_VISIBLE_DEVICES or CUDA_DEVICE_ORDER is set. In MIG mode the memory is that of the slice, and
power, temperature, clocks and errors are those of the GPU it is a part of.

Any call may fail or hang for good, so they are made by threads of their own (NvmlReader).
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

from job.memory.ledger import Figures, Notes

HANG_SECONDS = 5.0  # a call that takes longer is noted; the first one may initialise the driver
RETRY_SECONDS = 1.0  # after an error that may pass
_FRESH_SECONDS = 10.0  # how long a gauge stands for a window in which it was not read
_HIGHEST = ("temperature_celsius", "ecc_uncorrected_errors")  # of other gauges the mean
# errors after which no call will answer any more, and those after which the same call may
_LOST = ("GPU_IS_LOST", "RESET_REQUIRED", "UNINITIALIZED", "DRIVER_NOT_LOADED")
_PASSING = (
    *("TIMEOUT", "IRQ_ISSUE", "INSUFFICIENT_SIZE", "IN_USE", "MEMORY", "NO_DATA"),
    *("INSUFFICIENT_RESOURCES", "NOT_READY", "UNKNOWN"),
)
_ALL_LINKS = 0xFFFFFFFF
_NVLINK_TX, _NVLINK_RX = 138, 139  # NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX and _RX, in KiB
_VALUE_FIELDS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")

# https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
THROTTLE_REASONS = {
    0x1: "idle",
    0x2: "application_clocks",
    0x4: "power_cap",
    0x8: "hardware_slowdown",
    0x10: "sync_boost",
    0x20: "thermal_slowdown",
    0x40: "hardware_thermal_slowdown",
    0x80: "power_brake",
    0x100: "display_clocks",
}


class NvmlDevice:
    """A GPU or a MIG slice of one, by its UUID, with NVML's prefix (GPU-, MIG-) or without.

    Raises:
        Exception: what pynvml raises where there is no NVML, no driver or no such GPU.
        LookupError: a MIG slice is meant, and which cannot be known.
    """

    def __init__(self, uuid: str) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        try:
            self._memory, self._board = self._find(uuid)
        except BaseException:
            pynvml.nvmlShutdown()
            raise
        self._memory_version: int | None = pynvml.nvmlMemory_v2
        self._link_counts: tuple[float, list[int]] | None = None

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _find(self, uuid: str) -> tuple[Any, Any]:
        """Handles of what holds the memory and of the whole GPU."""
        handle = self._handle(uuid)
        if self._nvml.nvmlDeviceIsMigDeviceHandle(handle).value:
            return handle, self._nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        return self._slice_in_use(handle), handle

    def _handle(self, uuid: str) -> Any:
        nvml = self._nvml
        if uuid.startswith(("GPU-", "MIG-")):
            return nvml.nvmlDeviceGetHandleByUUID(uuid)
        try:
            return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
            return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")

    def _slice_in_use(self, board: Any) -> Any:
        """The MIG slice that CUDA uses, where it named the whole GPU; the GPU if it has none.

        CUDA shows a process one slice: the one that CUDA_VISIBLE_DEVICES names.
        """
        slices = dict(self._slices(board))
        if not slices:
            return board
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        named = [v.strip() for v in visible if v.strip().startswith("MIG-")]
        found = [h for u, h in slices.items() if any(u.startswith(v) for v in named)] or (
            list(slices.values()) if not named else []
        )
        if len(found) != 1:
            raise LookupError(
                f"the GPU is divided into {len(slices)} MIG slices, and which one is used cannot "
                "be known: name it in CUDA_VISIBLE_DEVICES"
            )
        return found[0]

    def _slices(self, board: Any) -> Iterator[tuple[str, Any]]:
        """The GPU's MIG slices by UUID."""
        nvml = self._nvml
        try:
            if nvml.nvmlDeviceGetMigMode(board)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
                return
            count = nvml.nvmlDeviceGetMaxMigDeviceCount(board)
        except nvml.NVMLError:  # not a GPU that can be divided
            return
        for index in range(count):
            try:
                handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(board, index)
            except nvml.NVMLError_NotFound:
                continue
            yield nvml.nvmlDeviceGetUUID(handle), handle

    @property
    def is_slice(self) -> bool:
        return self._memory is not self._board

    def describe(self) -> dict[str, Any]:
        """Name, UUID, whether a MIG slice, and driver; what NVML does not say is left out."""
        nvml = self._nvml
        found: dict[str, Any] = {"mig": self.is_slice}
        for key, ask in (
            ("device", lambda: nvml.nvmlDeviceGetName(self._board)),
            ("uuid", lambda: nvml.nvmlDeviceGetUUID(self._memory)),
            ("driver", nvml.nvmlSystemGetDriverVersion),
        ):
            try:
                found[key] = ask()
            except nvml.NVMLError:
                continue
        return found

    def memory(self) -> Figures:
        """Bytes in use by everyone, and in all; what the driver keeps for itself stands apart."""
        nvml = self._nvml
        if self._memory_version is not None:
            try:
                info = nvml.nvmlDeviceGetMemoryInfo(self._memory, version=self._memory_version)
            except (
                nvml.NVMLError_FunctionNotFound,
                nvml.NVMLError_ArgumentVersionMismatch,
                nvml.NVMLError_NotSupported,
            ):  # an older driver; its `used` has the driver's own share in it
                self._memory_version = None
            else:
                figures = {"device_used": info.used, "total": info.total}
                return figures | {"driver_reserved": info.reserved}
        info = nvml.nvmlDeviceGetMemoryInfo(self._memory)
        return {"device_used": info.used, "total": info.total}

    def process(self) -> Figures:
        """Number of processes, and the bytes of this one where NVML names its pid."""
        processes = self._processes()
        own = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
        known = [used for used in own if used is not None]
        return {"processes": len(processes)} | ({"process": sum(known)} if known else {})

    def _processes(self) -> Sequence[Any]:
        return self._first(
            ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"),
            self._memory,
        )

    def _first(self, names: Sequence[str], *arguments: Any) -> Any:
        """What the first of several names gives that this driver knows."""
        for name in names[:-1]:
            try:
                return getattr(self._nvml, name)(*arguments)
            except self._nvml.NVMLError_FunctionNotFound:
                continue
        return getattr(self._nvml, names[-1])(*arguments)

    def utilization(self) -> Figures:
        """Shares of NVML's last period in which a kernel ran, and in which memory was accessed."""
        rates = self._nvml.nvmlDeviceGetUtilizationRates(self._board)
        return {"utilization": rates.gpu / 100, "memory_utilization": rates.memory / 100}

    def power(self) -> Figures:
        return {"power_watts": self._nvml.nvmlDeviceGetPowerUsage(self._board) / 1000}

    def temperature(self) -> Figures:
        names = ("nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV")
        sensor = self._nvml.NVML_TEMPERATURE_GPU
        return {"temperature_celsius": self._first(names, self._board, sensor)}

    def clocks(self) -> Figures:
        ask = self._nvml.nvmlDeviceGetClockInfo
        return {
            "sm_clock_mhz": ask(self._board, self._nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": ask(self._board, self._nvml.NVML_CLOCK_MEM),
        }

    def throttle_reasons(self) -> Figures:
        """Why the clocks are not higher: the bits of THROTTLE_REASONS."""
        names = (
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
        )
        return {"throttle_reasons": self._first(names, self._board)}

    def ecc_errors(self) -> Figures:
        """Uncorrected errors since the driver was loaded."""
        nvml = self._nvml
        kind, counter = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        return {
            "ecc_uncorrected_errors": nvml.nvmlDeviceGetTotalEccErrors(self._board, kind, counter)
        }

    def pcie(self) -> Figures:
        """NVML measures each direction over 20 ms, and says KB."""
        nvml = self._nvml
        sent = nvml.nvmlDeviceGetPcieThroughput(self._board, nvml.NVML_PCIE_UTIL_TX_BYTES)
        received = nvml.nvmlDeviceGetPcieThroughput(self._board, nvml.NVML_PCIE_UTIL_RX_BYTES)
        return {
            "pcie_sent_bytes_per_second": sent * 1000,
            "pcie_received_bytes_per_second": received * 1000,
        }

    def nvlink(self) -> Figures:
        """Rates over all links since the last call: NVML counts KiB."""
        fields = [(_NVLINK_TX, _ALL_LINKS), (_NVLINK_RX, _ALL_LINKS)]
        values = self._nvml.nvmlDeviceGetFieldValues(self._board, fields)
        for value in values:
            if value.nvmlReturn != self._nvml.NVML_SUCCESS:
                raise self._nvml.NVMLError(value.nvmlReturn)
        now = time.monotonic()
        counts = [int(getattr(v.value, _VALUE_FIELDS[v.valueType])) for v in values]
        before, self._link_counts = self._link_counts, (now, counts)
        if before is None:
            return {}
        seconds = now - before[0]
        sent, received = ((b - a) * 1024 / seconds for a, b in zip(before[1], counts, strict=True))
        return {
            "nvlink_sent_bytes_per_second": sent,
            "nvlink_received_bytes_per_second": received,
        }


@dataclass(frozen=True)
class Call:
    """Something to ask NVML for, under the function's name.

    It is asked at most once in `seconds`, and less often where it would cost more than
    `core_share` of a core.
    """

    name: str
    ask: Callable[[NvmlDevice], Figures]
    seconds: float = 1.0
    core_share: float = 0.0002


PROCESS = Call("nvmlDeviceGetComputeRunningProcesses", NvmlDevice.process, 0.25, 0.0005)
MEMORY_CALLS = (Call("nvmlDeviceGetMemoryInfo", NvmlDevice.memory, 0.0, math.inf), PROCESS)
BOARD_CALLS = (
    Call("nvmlDeviceGetUtilizationRates", NvmlDevice.utilization),
    Call("nvmlDeviceGetPowerUsage", NvmlDevice.power),
    Call("nvmlDeviceGetTemperature", NvmlDevice.temperature),
    Call("nvmlDeviceGetClockInfo", NvmlDevice.clocks),
    Call("nvmlDeviceGetCurrentClocksEventReasons", NvmlDevice.throttle_reasons),
    Call("nvmlDeviceGetTotalEccErrors", NvmlDevice.ecc_errors),
    Call("nvmlDeviceGetPcieThroughput", NvmlDevice.pcie),
    Call("nvmlDeviceGetFieldValues", NvmlDevice.nvlink),
)


class NvmlReader:
    """Makes some calls again and again, in a thread of its own since any of them may hang.

    Each round `take` gets a function that makes the calls which are due and returns the figures
    of those that answered.
    """

    def __init__(
        self,
        uuid: str,
        calls: Sequence[Call],
        seconds: float,
        notes: Notes,
        lost: threading.Event,
        take: Callable[[Callable[[], Figures]], None],
    ) -> None:
        """A round begins every `seconds`; readers of one GPU share `lost`: it is gone for good."""
        self._uuid, self._seconds, self._notes, self._take = uuid, seconds, notes, take
        self._due = dict.fromkeys(calls, 0.0)
        self._failing: set[str] = set()
        self._in_call: tuple[str, float] | None = None
        self._lost, self._ended = lost, threading.Event()
        self.thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self.description: dict[str, Any] = {}

    def start(self) -> None:
        self.thread.start()

    def end(self) -> None:
        """Have it end after the call that it is in."""
        self._ended.set()

    def note_hang(self) -> None:
        """Take down a call that has not returned for long."""
        call = self._in_call
        if call is not None and time.monotonic() - call[1] > HANG_SECONDS:
            self._failing.add(call[0])
            self._notes.add(call[0], f"has not returned for {HANG_SECONDS:g} s", since=call[1])

    def _run(self) -> None:
        device = self._open()
        if device is None:
            return
        pause = 0.0
        while not (self._lost.is_set() or self._ended.wait(pause)):
            began = time.monotonic()
            self._take(lambda: self._read(device))
            pause = max(0.0, began + self._seconds - time.monotonic())
        with suppress(Exception):  # of a GPU that is lost by now
            device.close()

    def _open(self) -> NvmlDevice | None:
        name = "nvmlInit"
        self._in_call = (name, time.monotonic())
        try:
            device = NvmlDevice(self._uuid)
            self.description = device.describe()
        except Exception as error:
            self._lost.set()
            self._notes.add(name, _problem(error))
            return None
        finally:
            self._in_call = None
        self._settle(name)
        return device

    def _read(self, device: NvmlDevice) -> Figures:
        now, figures = time.monotonic(), Figures()
        for call in [call for call, due in self._due.items() if due <= now]:
            if not self._lost.is_set():
                figures |= self._make(call, device)
        return figures

    def _make(self, call: Call, device: NvmlDevice) -> Figures:
        began, cpu_began = time.monotonic(), time.thread_time()
        try:
            self._in_call = (call.name, began)
            figures = call.ask(device)
        except Exception as error:
            self._fail(call, error)
            return {}
        finally:
            self._in_call = None
        self._settle(call.name)
        cost = time.thread_time() - cpu_began
        self._due[call] = began + max(call.seconds - self._seconds / 2, cost / call.core_share)
        return figures

    def _settle(self, name: str) -> None:
        if name in self._failing:
            self._failing.discard(name)
            self._notes.settle(name)

    def _fail(self, call: Call, error: Exception) -> None:
        if _is_among(error, _LOST):
            if not self._lost.is_set():
                self._lost.set()
                self._notes.add(call.name, _problem(error))
            return
        self._notes.add(call.name, _problem(error))
        self._failing.add(call.name)
        if _is_among(error, _PASSING):
            self._due[call] = time.monotonic() + RETRY_SECONDS
        else:
            del self._due[call]


def _problem(error: Exception) -> str:
    return str(error) or type(error).__name__


def _is_among(error: Exception, names: Sequence[str]) -> bool:
    import pynvml

    codes = [getattr(pynvml, f"NVML_ERROR_{name}") for name in names]
    return isinstance(error, pynvml.NVMLError) and error.value in codes


class Gauges:
    """What a GPU reports beside its memory about once a second; threads may share it."""

    def __init__(self) -> None:
        self._run, self._window = _Tally(), _Tally()
        self._last: dict[str, tuple[float, float]] = {}  # when, and what
        self._lock = threading.Lock()  # never held while anything is read

    def add(self, figures: Figures) -> None:
        now = time.monotonic()
        with self._lock:
            self._run.add(figures)
            self._window.add(figures)
            self._last |= {name: (now, value) for name, value in figures.items()}

    def take_window(self) -> Figures:
        """Figures since the last call, or the last ones where none were read since."""
        now = time.monotonic()
        with self._lock:
            window, self._window = self._window, _Tally()
            last = {n: v for n, (when, v) in self._last.items() if now - when < _FRESH_SECONDS}
        return last | window.figures()

    def summary(self) -> dict[str, Any]:
        """Mean and highest of each figure, and each throttle reason's share of the readings."""
        with self._lock:
            return self._run.summary()


class _Tally:
    """Gauges counted together; of throttle reasons, how often each set of bits was read."""

    def __init__(self) -> None:
        self._counts, self._reasons = Counter[str](), Counter[int]()
        self._sums, self._highest = defaultdict[str, float](float), Figures()

    def add(self, figures: Figures) -> None:
        for name, value in figures.items():
            if name == "throttle_reasons":
                self._reasons[int(value)] += 1
                continue
            self._counts[name] += 1
            self._sums[name] += value
            self._highest[name] = max(self._highest.get(name, value), value)

    def _mean(self, name: str) -> float:
        return self._sums[name] / self._counts[name]

    def figures(self) -> Figures:
        """What stands for all of them: mean, highest, or every bit that was set."""
        found = {n: self._highest[n] if n in _HIGHEST else self._mean(n) for n in self._counts}
        if self._reasons:
            found["throttle_reasons"] = reduce(or_, self._reasons)
        return found

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: {"mean": self._mean(name), "highest": self._highest[name]}
            for name in self._counts
        }
        if self._reasons:
            found["throttled"] = self._throttled()
        return found

    def _throttled(self) -> Figures:
        """Shares of the readings in which each reason was there, of those that were."""
        counts = {
            name: sum(n for reasons, n in self._reasons.items() if reasons & bit)
            for bit, name in THROTTLE_REASONS.items()
        }
        return {name: n / self._reasons.total() for name, n in counts.items() if n}
