"""The memory recorder: on this process for real, on a GPU with NVML's and CUDA's stand-ins."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_nvml import FakeNvml, without_nvml
from waiting import wait_for

from job.memory import nvml as nvml_module
from job.memory import recorder as memory_recorder
from job.memory.ledger import Notes
from job.memory.recorder import PHASES, Recorder
from job.memory.sources import ProcessMemory

pytestmark = pytest.mark.slow

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MB, GB = 10**6, 10**9
UUID = "11111111-2222-3333-4444-555555555555"
ONE_GPU = f"gpu GPU-{UUID} NVIDIA A100-SXM4-80GB"
MEMORY = f"nvmlDeviceGetMemoryInfo_v2 * {5 * GB},{80 * GB},{GB}"
PROCESSES = f"nvmlDeviceGetComputeRunningProcesses_v3 * self:{4 * GB}"


def fill(megabytes: int) -> np.ndarray:
    return np.ones(megabytes * MB // 8)


# --- this process ----------------------------------------------------------------------------


@pytest.fixture(params=["exact", "sampled"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """On this process's memory, with and without leave to reset the kernel's peak."""
    if request.param == "sampled":
        monkeypatch.setattr("job.memory.sources._CLEAR_REFS", "/proc/none/clear_refs")
    return Recorder(CPU)


def test_an_allocation_counts_for_its_phase_and_not_for_the_next(recorder: Recorder) -> None:
    with recorder:
        with recorder.phase("load"):
            time.sleep(0.1)
        with recorder.phase("forward"):
            block = fill(200)
            time.sleep(0.1)
            del block
        with recorder.phase("backward"):
            time.sleep(0.1)
    peaks = {phase: figures["process"] for phase, figures in recorder.summary()["peaks"].items()}
    assert peaks["forward"] - peaks["load"] == pytest.approx(200 * MB, rel=0.05)
    assert peaks["backward"] - peaks["load"] < 10 * MB
    assert recorder.summary()["peak"]["process"] == peaks["forward"]


def test_what_is_shorter_than_a_sample_is_caught() -> None:
    with Recorder(CPU, hertz=1.0) as recorder:
        with recorder.phase("load"):
            pass
        for _ in range(3):
            with recorder.phase("optimizer"):
                fill(100)  # gone at once
        with recorder.phase("save"):
            pass
        summary = recorder.summary()
    peaks = {phase: figures["process"] for phase, figures in summary["peaks"].items()}
    assert summary["sampling"]["samples"] <= 2
    assert peaks["optimizer"] - peaks["load"] == pytest.approx(100 * MB, rel=0.05)
    assert peaks["save"] - peaks["load"] < 5 * MB


def test_where_the_peak_cannot_be_reset_that_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/proc/none/clear_refs"
    monkeypatch.setattr("job.memory.sources._CLEAR_REFS", path)
    with Recorder(CPU) as recorder:
        pass
    ((note),) = recorder.summary()["notes"]
    assert note["call"] == path
    assert note["problem"] == "No such file or directory"
    json.dumps(recorder.summary())


def test_shared_pages_count_for_the_part_of_each(tmp_path: Path) -> None:
    """A file that two processes map counts half in PSS, and whole in the resident set."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(64 * MB))
    touch = (
        "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1);"
        "sum(m[::4096]); print(flush=True); sys.stdin.read()"
    )
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ) as memory:
        before = ProcessMemory(Notes()).now()["process"]
        assert sum(memory[:: mmap.PAGESIZE]) == 0
        alone = ProcessMemory(Notes()).now()["process"]
        command = [sys.executable, "-c", touch, str(file)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            shared = ProcessMemory(Notes()).now()["process"]
            other.communicate()
    assert alone - before == pytest.approx(64 * MB, rel=0.05)
    assert shared - before == pytest.approx(32 * MB, rel=0.1)


def test_inner_phases_count_and_outer_ones_go_on_after_them() -> None:
    with Recorder(CPU) as recorder:
        with recorder.phase("evaluate"):
            with recorder.phase("forward"):
                fill(100)
            with pytest.raises(ZeroDivisionError), recorder.phase("cache"):
                1 / 0  # noqa: B018
            assert recorder._place[0] == "evaluate"
        assert recorder._place[0] == "other"
    peaks = recorder.summary()["peaks"]
    assert peaks.keys() == {"other", "evaluate", "forward", "cache"}
    assert peaks["forward"]["process"] - peaks["evaluate"]["process"] > 90 * MB


def test_a_window_has_its_own_peak_and_the_run_the_highest() -> None:
    with Recorder(CPU) as recorder:
        fill(100)
        first = recorder.telemetry()
        second = recorder.telemetry()
        highest = recorder.peak_bytes()
    assert first.keys() == second.keys() == {"memory/process_bytes"}
    assert first["memory/process_bytes"] - second["memory/process_bytes"] > 90 * MB
    assert highest == first["memory/process_bytes"]


def test_a_summary_says_what_was_recorded_and_it_costs_little() -> None:
    with Recorder(CPU, hertz=50) as recorder:
        began, cpu_began = time.monotonic(), time.process_time()
        while time.monotonic() - began < 0.5:
            with recorder.phase("forward"):
                time.sleep(0.01)
        cpu_seconds = time.process_time() - cpu_began
    summary = recorder.summary()
    assert summary["backend"] == "process"
    assert summary["process_figure"] == "pss"
    assert summary["total_bytes"] == os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    assert 0 < summary["baseline"]["process"] <= summary["peak"]["process"]
    assert 40 <= summary["sampling"]["hertz"] <= 56
    assert 0 < cpu_seconds < 0.1  # of half a second, on a machine that does other work too
    series = summary["series"]
    assert series["seconds"] == sorted(series["seconds"])
    assert "forward" in series["phase"]
    assert len(series["process"]) == len(series["seconds"])
    assert set(series["device_used"]) == {None}
    json.dumps(summary)


def test_a_change_of_phase_is_cheap() -> None:
    with Recorder(CPU) as recorder:
        times = []
        for _ in range(200):
            began = time.perf_counter()
            with recorder.phase("forward"):
                pass
            times.append(time.perf_counter() - began)
    assert np.median(times) < 100e-6  # two changes


# --- a GPU -----------------------------------------------------------------------------------


class FakeAllocator:
    """torch's allocator on a machine without CUDA: what a test says is allocated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = {"allocated": 0, "reserved": 0, "inactive_split": 0}
        self.peaks = dict(self.bytes)
        properties = SimpleNamespace(uuid=UUID, name="A100", total_memory=80 * GB)
        for name, function in {
            "get_device_properties": lambda device: properties,
            "memory_stats_as_nested_dict": lambda device: self._statistics(),
            "reset_peak_memory_stats": lambda device: self.peaks.update(self.bytes),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def hold(self, **sizes: int) -> None:
        self.bytes |= sizes
        self.peaks = {name: max(self.peaks[name], size) for name, size in self.bytes.items()}

    def _statistics(self) -> dict[str, Any]:
        return {
            f"{name}_bytes": {"all": {"current": self.bytes[name], "peak": self.peaks[name]}}
            for name in self.bytes
        }


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> FakeAllocator:
    return FakeAllocator(monkeypatch)


def test_a_gpu_is_recorded_by_phase(nvml: FakeNvml, allocator: FakeAllocator) -> None:
    nvml.says(
        ONE_GPU,
        MEMORY,
        PROCESSES,
        "nvmlDeviceGetUtilizationRates * 50,20",
        "nvmlDeviceGetPowerUsage * 300000",
        "nvmlDeviceGetCurrentClocksThrottleReasons * 4",
    )
    with Recorder(GPU, hertz=200) as recorder:
        with recorder.phase("forward"):
            allocator.hold(allocated=2 * GB, reserved=3 * GB, inactive_split=GB)
            wait_for(lambda: "process" in recorder._ledger.peaks().get("forward", {}))
            allocator.hold(allocated=GB)
        with recorder.phase("optimizer"):
            pass
        telemetry = recorder.telemetry()
        assert recorder.peak_bytes() == 2 * GB
    summary = recorder.summary()
    assert (summary["backend"], summary["process_figure"]) == ("nvml", "nvml")
    assert summary["uuid"] == f"GPU-{UUID}"
    assert summary["device"] == "NVIDIA A100-SXM4-80GB"
    assert (summary["total_bytes"], summary["driver_reserved_bytes"]) == (80 * GB, GB)
    assert summary["mig"] is False
    assert summary["baseline"]["device_used"] == 5 * GB
    assert summary["peaks"]["forward"] == {
        "device_used": 5 * GB,
        "process": 4 * GB,
        "allocated": 2 * GB,
        "reserved": 3 * GB,
        "inactive": GB,
    }
    assert summary["peaks"]["optimizer"]["allocated"] == GB
    assert telemetry["memory/device_used_bytes"] == 5 * GB
    assert telemetry["memory/allocated_peak_bytes"] == 2 * GB
    assert telemetry["memory/reserved_peak_bytes"] == 3 * GB
    assert telemetry["gpu/utilization"] == 0.5
    assert telemetry["gpu/power_watts"] == 300
    assert telemetry["gpu/throttle_reasons"] == 4
    assert summary["gpu"]["throttled"] == {"power_cap": 1.0}
    assert summary["gpu"]["power_watts"] == {"mean": 300, "highest": 300}
    # temperature, clocks, ECC, PCIe and NVLink are not supported here
    assert {note["problem"] for note in summary["notes"]} == {"Not Supported"}
    assert len(summary["notes"]) == 5
    json.dumps(summary)


def test_figures_of_this_moment_are_none_that_were_read_before(
    nvml: FakeNvml, allocator: FakeAllocator
) -> None:
    readings = " ".join(f"{n * GB},80,1" for n in range(1, 60))  # each round one more
    nvml.says(ONE_GPU, f"nvmlDeviceGetMemoryInfo_v2 * {readings}", PROCESSES)
    with Recorder(GPU, hertz=5) as recorder:
        known = recorder._device["device_used"]
        assert recorder.now()["device_used"] > known


def test_figures_of_this_moment_do_not_wait_for_an_nvml_that_hangs(
    nvml: FakeNvml, allocator: FakeAllocator
) -> None:
    nvml.says(ONE_GPU, "nvmlDeviceGetMemoryInfo_v2 * 5,80,1 hang", PROCESSES)
    with Recorder(GPU, hertz=50) as recorder:
        began = time.monotonic()
        assert recorder.now()["device_used"] == 5
        assert time.monotonic() - began < 1.0
    nvml.let_go()


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ("999999:5", "does not name this process: a container's pid?"),
        ("self:5", "gives another process's memory under this one's pid"),
    ],
)
def test_a_share_that_cannot_be_this_process_is_not_taken_for_it(
    nvml: FakeNvml, allocator: FakeAllocator, named: str, problem: str
) -> None:
    nvml.says(ONE_GPU, MEMORY, f"nvmlDeviceGetComputeRunningProcesses_v3 * {named}")
    with Recorder(GPU, hertz=200) as recorder:  # at first nothing tells that it is another's
        allocator.hold(reserved=2 * GB)
        wait_for(lambda: any(note["problem"] == problem for note in recorder._notes.rows()))
    summary = recorder.summary()
    assert summary["process_figure"] == "none"
    assert "process" not in summary["peak"]
    assert set(summary["series"]["process"]) == {None}
    call = "nvmlDeviceGetComputeRunningProcesses"
    assert [n["problem"] for n in summary["notes"] if n["call"] == call] == [problem]


def test_a_process_without_cuda_memory_is_not_missed(
    nvml: FakeNvml, allocator: FakeAllocator
) -> None:
    nvml.says(ONE_GPU, MEMORY, f"nvmlDeviceGetComputeRunningProcesses_v3 * none none self:{4 * GB}")
    with Recorder(GPU, hertz=200) as recorder:
        wait_for(lambda: "process" in recorder._ledger.peak())
    assert recorder.summary()["process_figure"] == "nvml"
    calls = [note["call"] for note in recorder.summary()["notes"]]
    assert "nvmlDeviceGetComputeRunningProcesses" not in calls


def test_a_lost_gpu_leaves_the_allocator(
    nvml: FakeNvml, allocator: FakeAllocator, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.says(ONE_GPU, "nvmlDeviceGetMemoryInfo_v2 * 5,80,1 6,80,1 error:15", PROCESSES)
    with Recorder(GPU, hertz=100) as recorder:
        wait_for(lambda: any(n["problem"] == "GPU is lost" for n in recorder._notes.rows()))
        samples = recorder._ledger.samples
        with recorder.phase("backward"):
            allocator.hold(allocated=GB, reserved=GB)
            wait_for(lambda: recorder._ledger.samples > samples + 10)
    summary = recorder.summary()
    assert summary["peak"]["device_used"] == 6
    assert summary["peaks"]["backward"] == {"allocated": GB, "reserved": GB, "inactive": 0}
    lost = [n for n in summary["notes"] if n["problem"] == "GPU is lost"]
    assert len(lost) == 1
    assert [r.message for r in caplog.records if "lost" in r.message] == [
        f"{lost[0]['call']}: GPU is lost; going on without it"
    ]


@pytest.mark.parametrize(
    "hanging", ["nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetTotalEccErrors", "nvmlInit"]
)
def test_a_hanging_call_holds_up_neither_training_nor_the_end(
    nvml: FakeNvml, allocator: FakeAllocator, monkeypatch: pytest.MonkeyPatch, hanging: str
) -> None:
    monkeypatch.setattr(nvml_module, "HANG_SECONDS", 0.1)
    monkeypatch.setattr(memory_recorder, "_START_SECONDS", 0.2)
    monkeypatch.setattr(memory_recorder, "_STOP_SECONDS", 0.3)
    first = "5,80,1 hang" if hanging == "nvmlDeviceGetMemoryInfo_v2" else "hang"
    nvml.says(ONE_GPU, f"{hanging} * {first}", MEMORY, PROCESSES)  # the first line counts
    recorder = Recorder(GPU, hertz=100)
    recorder.start()
    slowest = 0.0
    until = time.monotonic() + 0.6
    while time.monotonic() < until:  # a training that does nothing but change phases
        began = time.perf_counter()
        with recorder.phase("forward"):
            allocator.hold(allocated=GB, reserved=2 * GB)
        recorder.telemetry()
        slowest = max(slowest, time.perf_counter() - began)
        allocator.hold(allocated=0)
        time.sleep(0.005)
    began = time.perf_counter()
    recorder.stop()
    assert time.perf_counter() - began < 0.5
    assert slowest < 0.1
    summary = recorder.summary()
    assert summary["sampling"]["samples"] > 25
    name = hanging.removesuffix("_v2")
    assert f"{name}: has not returned for 0.1 s" in {
        f"{note['call']}: {note['problem']}" for note in summary["notes"]
    }
    assert summary["peaks"]["forward"]["allocated"] == GB
    assert ("device_used" in summary["peak"]) == (hanging != "nvmlInit")
    assert summary["backend"] == ("allocator" if hanging == "nvmlInit" else "nvml")
    times = np.array(summary["series"]["seconds"])
    assert times[-1] > 0.5  # to the end


def test_without_nvml_the_allocator_is_recorded_at_once(
    allocator: FakeAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_nvml(monkeypatch)
    began = time.monotonic()
    with Recorder(GPU, hertz=200) as recorder, recorder.phase("load"):
        assert time.monotonic() - began < 1
        allocator.hold(allocated=GB)
        wait_for(lambda: recorder._ledger.samples > 20)
    summary = recorder.summary()
    assert summary["backend"] == "allocator"
    assert summary["process_figure"] == "none"
    assert [note["problem"] for note in summary["notes"]] == ["NVML Shared Library Not Found"]
    assert summary["peaks"]["load"]["allocated"] == GB
    assert GB in summary["series"]["allocated"]


def test_only_known_phases_are_counted() -> None:
    recorder = Recorder(CPU)
    with pytest.raises(AssertionError, match="lunch"), recorder.phase("lunch"):
        pass
    assert set(PHASES) >= {"load", "forward", "backward", "optimizer"}
