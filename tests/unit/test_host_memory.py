"""The host's free memory, as procfs and control groups of both versions tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.memory.host import free_host_bytes
from job.memory.ledger import Notes
from job.memory.sources import ProcessMemory

MB = 1 << 20
_MEMINFO = "MemTotal: 8192 kB\nMemFree: 100 kB\nMemAvailable: {} kB\nBuffers: 1 kB\n"
Groups = dict[str, dict[str, str]]


def _free(tmp_path: Path, cgroup: str, groups: Groups, available: int = 4096) -> int:
    proc, mounted = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(_MEMINFO.format(available))
    (proc / "self/cgroup").write_text(cgroup)
    for name, files in groups.items():
        (mounted / name).mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (mounted / name / file).write_text(content)
    return free_host_bytes(proc, mounted)


def _second(limit: object, used: int, cache: int = 0) -> dict[str, str]:
    counts = f"anon {used}\ninactive_file {cache}\nactive_file 7\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": counts}


def _first(limit: int, used: int, cache: int = 0) -> dict[str, str]:
    counts = f"inactive_file 1\ntotal_inactive_file {cache}\n"
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{used}\n",
        "memory.stat": counts,
    }


JOB = "system.slice/slurmstepd.scope/job_7"


def test_without_a_limit_it_is_what_the_host_has_available(tmp_path: Path) -> None:
    assert _free(tmp_path, "0::/\n", {}) == 4 * MB


@pytest.mark.parametrize(
    ("groups", "free"),
    [
        pytest.param({f"{JOB}/step_0": _second("max", 5)}, 4 * MB, id="none"),
        pytest.param({f"{JOB}/step_0": _second(3 * MB, 2 * MB)}, MB, id="the step's"),
        pytest.param(
            {f"{JOB}/step_0": _second("max", 5), JOB: _second(3 * MB, MB)}, 2 * MB, id="the job's"
        ),
        pytest.param({JOB: _second(3 * MB, 2 * MB, cache=MB)}, 2 * MB, id="with files' pages"),
        pytest.param({JOB: _second(99 * MB, 2 * MB)}, 4 * MB, id="more than the host has"),
        pytest.param({JOB: _second(MB, 2 * MB)}, 0, id="used up"),
        pytest.param({"": _second(3 * MB, 2 * MB)}, MB, id="a container's root"),
    ],
)
def test_version_2_has_the_least_of_all_groups(tmp_path: Path, groups: Groups, free: int) -> None:
    assert _free(tmp_path, f"0::/{JOB}/step_0\n", groups) == free


@pytest.mark.parametrize(
    ("groups", "free"),
    [
        pytest.param({"memory/slurm/job_7": _first(3 * MB, 2 * MB, cache=5)}, MB + 5, id="job"),
        pytest.param({"memory/slurm/job_7": _first((1 << 63) - 4096, 2)}, 4 * MB, id="none"),
        pytest.param({"memory": _first(3 * MB, 2 * MB)}, MB, id="a container's root"),
    ],
)
def test_version_1_has_the_least_of_all_groups(tmp_path: Path, groups: Groups, free: int) -> None:
    of_all = "9:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n1:name=systemd:/a:b\n0::/\n"
    assert _free(tmp_path, of_all, groups) == free


def test_of_this_machine_it_is_some_and_not_all() -> None:
    assert 0 < free_host_bytes() < ProcessMemory(Notes()).describe()["total_bytes"]
