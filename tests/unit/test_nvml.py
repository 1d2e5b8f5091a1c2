"""NVML through its real bindings, on a library that answers what each test says."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from fake_nvml import FakeNvml, without_nvml

from job.memory import nvml as module
from job.memory.ledger import Notes
from job.memory.nvml import BOARD_CALLS, MEMORY_CALLS, Call, NvmlDevice, NvmlReader

GB = 10**9
A, B = "11111111-2222-3333-4444-555555555555", "99999999-8888-7777-6666-555555555555"
ONE_GPU = f"gpu GPU-{A} NVIDIA A100-SXM4-80GB"
MEMORY = f"nvmlDeviceGetMemoryInfo_v2 * {5 * GB},{80 * GB},{GB}"
PROCESSES = f"nvmlDeviceGetComputeRunningProcesses_v3 * self:{4 * GB}"
BOARD = (
    "nvmlDeviceGetUtilizationRates * 87,40",
    "nvmlDeviceGetPowerUsage * 312500",
    "nvmlDeviceGetTemperature * 61",
    "nvmlDeviceGetClockInfo * 1410,1593",
    "nvmlDeviceGetCurrentClocksThrottleReasons * 36",
    "nvmlDeviceGetTotalEccErrors * 2",
    "nvmlDeviceGetPcieThroughput * 1500,250",
    "nvmlDeviceGetFieldValues * 1000,500 3000,900",
)


class Readings:
    """A reader of a GPU, and all that it took."""

    def __init__(self, calls: Sequence[Call], seconds: float = 0.002, uuid: str = A) -> None:
        self.notes, self.rounds = Notes(), list[dict[str, float]]()
        self.lost = threading.Event()
        self.reader = NvmlReader(
            uuid, calls, seconds, self.notes, self.lost, lambda read: self.rounds.append(read())
        )
        self.reader.start()

    def problems(self) -> list[tuple[str, str]]:
        return [(row["call"], row["problem"]) for row in self.notes.rows()]

    def wait_for(self, condition: Callable[[], object]) -> None:
        until = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < until, (self.rounds[-3:], self.notes.rows())
            time.sleep(0.002)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Readings]]:
    """Start a reader; it has ended when the test has."""
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    begun: list[Readings] = []

    def start(*arguments: object, **named: object) -> Readings:
        begun.append(Readings(*arguments, **named))  # type: ignore[arg-type]
        return begun[-1]

    yield start
    for readings in begun:
        readings.reader.end()
        readings.reader.thread.join(5)


def every(calls: Sequence[Call]) -> list[Call]:
    """The same calls, asked for in each round whatever they cost."""
    return [Call(call.name, call.ask, 0.0, float("inf")) for call in calls]


def test_bindings_find_it_by_name(nvml: FakeNvml) -> None:
    nvml.says(ONE_GPU, MEMORY)
    code = f"from job.memory.nvml import NvmlDevice; print(NvmlDevice({A!r}).memory())"
    environment = os.environ | {"LD_LIBRARY_PATH": str(nvml.library.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert eval(done.stdout)["device_used"] == 5 * GB


def test_what_the_driver_keeps_stands_apart(nvml: FakeNvml) -> None:
    nvml.says(ONE_GPU, MEMORY, "nvmlSystemGetDriverVersion * 550.54.15")
    device = NvmlDevice(A)
    assert device.memory() == {
        "device_used": 5 * GB,
        "total": 80 * GB,
        "driver_reserved": GB,
    }
    assert device.describe() == {
        "mig": False,
        "device": "NVIDIA A100-SXM4-80GB",
        "uuid": f"GPU-{A}",
        "driver": "550.54.15",
    }


@pytest.mark.parametrize("code", [3, 13, 25])
def test_an_older_driver_gives_memory_as_it_can(nvml: FakeNvml, code: int) -> None:
    nvml.says(
        ONE_GPU,
        f"nvmlDeviceGetMemoryInfo_v2 * error:{code}",
        f"nvmlDeviceGetMemoryInfo * {6 * GB},{80 * GB}",
    )
    assert NvmlDevice(A).memory() == {"device_used": 6 * GB, "total": 80 * GB}


def test_all_figures_have_their_units(nvml: FakeNvml) -> None:
    nvml.says(ONE_GPU, *BOARD)
    device = NvmlDevice(A)
    device.nvlink()
    time.sleep(0.05)
    figures = {k: v for call in BOARD_CALLS for k, v in call.ask(device).items()}
    sent, received = (figures.pop(f"nvlink_{w}_bytes_per_second") for w in ("sent", "received"))
    assert sent / received == pytest.approx(2000 / 400)
    assert 0 < sent <= 2000 * 1024 / 0.05
    assert figures == {
        "utilization": 0.87,
        "memory_utilization": 0.4,
        "power_watts": 312.5,
        "temperature_celsius": 61,
        "sm_clock_mhz": 1410,
        "memory_clock_mhz": 1593,
        "throttle_reasons": 0x24,
        "ecc_uncorrected_errors": 2,
        "pcie_sent_bytes_per_second": 1.5e6,
        "pcie_received_bytes_per_second": 2.5e5,
    }


@pytest.mark.parametrize(("uuid", "used"), [(A, 7), (f"GPU-{A}", 7), (B, 3)])
def test_a_gpu_is_found_whatever_the_order(nvml: FakeNvml, uuid: str, used: int) -> None:
    nvml.says(
        f"gpu GPU-{B} one",
        f"gpu GPU-{A} two",
        f"nvmlDeviceGetMemoryInfo_v2 GPU-{A} 7,80,1",
        f"nvmlDeviceGetMemoryInfo_v2 GPU-{B} 3,80,1",
    )
    assert NvmlDevice(uuid).memory()["device_used"] == used


SLICES = (
    f"gpu GPU-{A} NVIDIA A100",
    f"mig MIG-aa GPU-{A}",
    f"mig MIG-{B} GPU-{A}",
    f"nvmlDeviceGetMemoryInfo_v2 GPU-{A} 70,80,1",
    "nvmlDeviceGetMemoryInfo_v2 MIG-aa 1,10,1",
    f"nvmlDeviceGetMemoryInfo_v2 MIG-{B} 2,20,1",
    f"nvmlDeviceGetPowerUsage GPU-{A} 250000",
)


@pytest.mark.parametrize(
    ("uuid", "visible"),
    [
        (B, None),  # CUDA gives the slice's UUID
        (f"MIG-{B}", None),
        (A, f"MIG-{B}"),  # CUDA gives the GPU's
        (A, "GPU-77, MIG-9999"),
    ],
)
def test_a_slices_memory_and_its_gpus_power(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, uuid: str, visible: str | None
) -> None:
    nvml.says(*SLICES)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device = NvmlDevice(uuid)
    assert device.memory() == {"device_used": 2, "total": 20, "driver_reserved": 1}
    assert device.power() == {"power_watts": 250}
    assert device.describe()["uuid"] == f"MIG-{B}"
    assert device.is_slice


def test_the_only_slice_is_the_one(nvml: FakeNvml) -> None:
    nvml.says(*(line for line in SLICES if "MIG-aa" not in line))
    assert NvmlDevice(A).memory()["device_used"] == 2


def test_one_slice_of_several_is_not_guessed(nvml: FakeNvml, read: Callable[..., Readings]) -> None:
    nvml.says(*SLICES)
    readings = read(MEMORY_CALLS)
    readings.wait_for(readings.problems)
    ((call, problem),) = readings.problems()
    assert call == "nvmlInit"
    assert "2 MIG slices" in problem
    assert readings.rounds == []


@pytest.mark.parametrize(
    ("named", "figures"),
    [
        ("1:5,self:7", {"processes": 2, "process": 7}),
        ("1:5", {"processes": 1}),
        ("none", {"processes": 0}),
        ("self:18446744073709551615", {"processes": 1}),  # not available
    ],
)
def test_own_share_is_found_by_pid(nvml: FakeNvml, named: str, figures: dict[str, float]) -> None:
    nvml.says(ONE_GPU, f"nvmlDeviceGetComputeRunningProcesses_v3 * {named}")
    assert NvmlDevice(A).process() == figures


def test_growth_is_followed(nvml: FakeNvml, read: Callable[..., Readings]) -> None:
    sizes = range(1, 40)
    steps = " ".join(f"{size},80,1" for size in sizes)
    nvml.says(ONE_GPU, f"nvmlDeviceGetMemoryInfo_v2 * {steps}", PROCESSES)
    readings = read(every(MEMORY_CALLS))
    readings.wait_for(lambda: len(readings.rounds) >= len(sizes))
    assert [r["device_used"] for r in readings.rounds[: len(sizes)]] == list(sizes)
    assert {r["process"] for r in readings.rounds} == {4 * GB}
    assert readings.problems() == []


@pytest.mark.parametrize("code", [15, 16])
def test_a_lost_gpu_is_noted_once_by_all_readers(
    nvml: FakeNvml, read: Callable[..., Readings], code: int
) -> None:
    nvml.says(ONE_GPU, f"nvmlDeviceGetMemoryInfo_v2 * 5,80,1 6,80,1 error:{code}", PROCESSES)
    readings = read(every(MEMORY_CALLS))
    readings.reader.thread.join(5)
    assert not readings.reader.thread.is_alive()
    assert [r.get("device_used") for r in readings.rounds] == [5, 6, None]
    assert readings.lost.is_set()
    ((call, problem),) = readings.problems()
    assert call == "nvmlDeviceGetMemoryInfo"
    assert problem == ("GPU is lost" if code == 15 else "GPU requires restart")


@pytest.mark.parametrize("code", [3, 4])  # not supported, no permission
@pytest.mark.parametrize("failing", range(len(BOARD)))
def test_what_is_not_given_is_left_out_and_the_rest_stays(
    nvml: FakeNvml, read: Callable[..., Readings], failing: int, code: int
) -> None:
    lines = list(BOARD)
    name = lines[failing].split()[0]
    lines[failing] = f"{name} * error:{code}"
    nvml.says(ONE_GPU, *lines)
    readings = read(every(BOARD_CALLS))
    readings.wait_for(lambda: len(readings.rounds) > 3)
    call = BOARD_CALLS[failing]
    problem = "Not Supported" if code == 3 else "Insufficient Permissions"
    assert readings.problems() == [(call.name, problem)]
    for figures in readings.rounds[1:]:
        assert len(figures) == 12 - (2 if failing in (0, 3, 6, 7) else 1)


def test_an_error_that_passes_is_tried_again(nvml: FakeNvml, read: Callable[..., Readings]) -> None:
    nvml.says(ONE_GPU, "nvmlDeviceGetPowerUsage * 1000 error:999 error:999 3000")
    readings = read([call for call in every(BOARD_CALLS) if "Power" in call.name])
    readings.wait_for(lambda: {"power_watts": 3.0} in readings.rounds)
    assert readings.problems() == [("nvmlDeviceGetPowerUsage", "Unknown Error")]
    (note,) = readings.notes.rows()
    assert note["until"] > note["since"]


def test_a_dear_call_is_made_less_often(nvml: FakeNvml, read: Callable[..., Readings]) -> None:
    nvml.says(ONE_GPU, MEMORY, PROCESSES)

    def busy(device: NvmlDevice) -> dict[str, float]:
        until = time.thread_time() + 0.005
        while time.thread_time() < until:
            pass
        return {"dear": 1.0}

    calls = [Call("dear", busy, 0.0, 0.05), *every(MEMORY_CALLS)]
    readings = read(calls, seconds=0.01)
    readings.wait_for(lambda: len(readings.rounds) >= 50)
    assert 2 <= sum("dear" in figures for figures in readings.rounds) <= 7  # once in 0.1 s


def test_a_call_that_hangs_is_noted_and_settled(
    nvml: FakeNvml, read: Callable[..., Readings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HANG_SECONDS", 0.05)
    nvml.says(ONE_GPU, "nvmlDeviceGetMemoryInfo_v2 * 5,80,1 hang 6,80,1", PROCESSES)
    readings = read(every(MEMORY_CALLS))

    def noted() -> bool:
        readings.reader.note_hang()
        return bool(readings.problems())

    readings.wait_for(noted)
    assert readings.problems() == [("nvmlDeviceGetMemoryInfo", "has not returned for 0.05 s")]
    assert [r["device_used"] for r in readings.rounds] == [5]
    nvml.let_go()
    readings.wait_for(lambda: readings.rounds[-1].get("device_used") == 6)
    assert readings.notes.rows()[0]["until"] is not None


@pytest.mark.parametrize(
    ("line", "problem"),
    [("nvmlInit * error:9", "Driver Not Loaded"), ("nvmlInit * error:18", "mismatch")],
)
def test_a_driver_that_does_not_answer_is_noted(
    nvml: FakeNvml, read: Callable[..., Readings], line: str, problem: str
) -> None:
    nvml.says(ONE_GPU, line)
    readings = read(MEMORY_CALLS)
    readings.reader.thread.join(5)
    ((call, seen),) = readings.problems()
    assert call == "nvmlInit"
    assert problem in seen
    assert readings.rounds == []


def test_a_missing_library_is_noted(
    monkeypatch: pytest.MonkeyPatch, read: Callable[..., Readings]
) -> None:
    without_nvml(monkeypatch)
    readings = read(MEMORY_CALLS)
    readings.reader.thread.join(5)
    assert readings.problems() == [("nvmlInit", "NVML Shared Library Not Found")]


def test_an_unknown_gpu_is_noted(nvml: FakeNvml, read: Callable[..., Readings]) -> None:
    nvml.says(ONE_GPU)
    readings = read(MEMORY_CALLS, uuid=B)
    readings.reader.thread.join(5)
    assert readings.problems() == [("nvmlInit", "Not Found")]
