"""Cluster profiles: the shipped ones load, and a wrong one says what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from job.common.errors import InputError
from slurm.cluster import PROFILES, load_profile

GOOD = "gpu: {memory_gb: 85, per_node: 4}\n"


@pytest.mark.parametrize("name", ["a100-80gb", "a100-40gb", "localhost"])
def test_a_shipped_profile_has_four_gpus_a_node(name: str) -> None:
    assert (PROFILES / f"{name}.yaml").exists()
    assert load_profile(name).gpu.per_node == 4


def test_a_profile_of_ones_own_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD + "environment: {NCCL_SOCKET_IFNAME: ib0}\nsetup: [module load x]\n")
    profile = load_profile(str(file))
    assert profile.environment == {"NCCL_SOCKET_IFNAME": "ib0"}
    assert profile.setup == ["module load x"]
    assert (profile.gpu.memory_gb, profile.time) == (85, "24:00:00")


def test_an_unknown_profile_lists_those_there_are() -> None:
    with pytest.raises(InputError, match=r"a100-40gb, a100-80gb, localhost"):
        load_profile("nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no value for gpu.memory_gb, gpu.per_node"),
        (GOOD + "partitions: a\n", "partitions: unknown key .*nearest: partition"),
        (GOOD + "time: tomorrow\n", "time: 'tomorrow' is no time"),
        (GOOD + "cpus_per_gpu: 0\n", "cpus_per_gpu: 0 is below 1"),
        (GOOD.replace("4", "0"), "gpu.per_node: 0 is below 1"),
        (GOOD.replace("85", "-1"), "gpu.memory_gb: -1 is below 0"),
        (GOOD + "binds: a\n", "binds"),
    ],
)
def test_a_wrong_profile_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_profile(str(file))


@pytest.mark.parametrize("time", ["30", "30:00", "1:00:00", "2-0", "2-12:00", "2-12:00:00"])
def test_times_as_sbatch_reads_them(tmp_path: Path, time: str) -> None:
    file = tmp_path / "time.yaml"
    file.write_text(GOOD + f'time: "{time}"\n')
    assert load_profile(str(file)).time == time


def test_profiles_need_no_torch() -> None:
    code = "import sys, slurm.cluster; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
