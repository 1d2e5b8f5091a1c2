"""The lab is a real Slurm: it runs, preempts, requeues and accounts for jobs; things can die."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, LabError

pytestmark = pytest.mark.slow

WAITS = """
echo $SLURMD_NODENAME $$ >> {runs}
until test -e {release}; do sleep 0.1; done
"""
NAMES_ITS_SIGNAL = """
trap 'echo USR2 >> {runs}; exit' USR2
trap 'echo TERM >> {runs}; exit' TERM
echo started >> {runs}
while true; do sleep 0.1; done
"""


@pytest.fixture(autouse=True)
def _nothing_left(lab: Lab) -> Iterator[None]:
    lab.cancel_all()
    yield
    lab.cancel_all()
    lab.send_user_signal(True)


class Job:
    """A job that leaves a line in a file each time it starts and waits for another file."""

    def __init__(self, lab: Lab, folder: Path, script: str, *options: str) -> None:
        self.lab = lab
        self.runs = folder / "runs"
        self.release = folder / "release"
        file = folder / "job.sh"
        file.write_text("#!/bin/bash\n" + script.format(runs=self.runs, release=self.release))
        output = ("-o", str(folder / "job.log"))
        self.id = lab.run("sbatch", "--parsable", *output, *options, str(file)).strip()

    def state(self) -> str:
        return self.lab.run("sacct", "-X", "-n", "-P", "-o", "State", "-j", self.id).strip()

    def lines(self) -> list[list[str]]:
        """What its runs have written so far."""
        text = self.runs.read_text() if self.runs.exists() else ""
        return [line.split() for line in text.splitlines()]

    def wait_for_lines(self, count: int, seconds: float = 30) -> list[list[str]]:
        with contextlib.suppress(LabError):
            self.lab.wait_until(lambda: len(self.lines()) >= count, "a start", seconds)
        assert len(self.lines()) >= count, self.lab.run("scontrol", "show", "job", self.id)
        return self.lines()

    def wait_for_state(self, state: str) -> None:
        with contextlib.suppress(LabError):
            self.lab.wait_until(lambda: self.state() == state, state)
        assert self.state() == state, self.lab.run("scontrol", "show", "job", self.id)


def _there(pid: str) -> bool:
    command_line = Path(f"/proc/{pid}/cmdline")
    return command_line.exists() and bool(command_line.read_bytes())  # empty: a zombie


def test_a_job_with_gpus_sees_them_and_is_accounted_for(lab: Lab, tmp_path: Path) -> None:
    job = Job(lab, tmp_path, "echo $CUDA_VISIBLE_DEVICES > {runs}", "--gpus-per-node=4")
    job.wait_for_state("COMPLETED")
    assert job.lines() == [["0,1,2,3"]]
    assert "gres/gpu=4" in lab.run("sacct", "-X", "-n", "-P", "-o", "AllocTRES", "-j", job.id)


@pytest.mark.parametrize(
    "option", ["--nodes=3", "--gpus-per-node=5", "--time=2-0", "--mem=99G", "--partition=none"]
)
def test_an_impossible_request_is_refused(lab: Lab, option: str) -> None:
    with pytest.raises(LabError, match="sbatch --test-only"):
        lab.run("sbatch", "--test-only", option, "--wrap", "true")


def test_too_much_memory_ends_the_step(lab: Lab, tmp_path: Path) -> None:
    if "task/cgroup" not in lab.run("scontrol", "show", "config"):
        pytest.skip("no writable cgroups here")
    script = f"srun {sys.executable} -c 'len(b\"1\" * 2**30)'"
    job = Job(lab, tmp_path, script, "--mem=200M")
    job.wait_for_state("FAILED")
    assert "OUT_OF_MEMORY" in lab.run("sacct", "-n", "-P", "-o", "State", "-j", job.id)


@pytest.mark.parametrize(("on", "first"), [(False, "TERM"), (True, "USR2")])
def test_preemption_sends_the_signal_asked_for_only_where_it_is_set_to(
    lab: Lab, tmp_path: Path, on: bool, first: str
) -> None:
    lab.send_user_signal(on)
    where = ("-w", lab.nodes[0], "--exclusive", "-t", "10")
    script = "srun bash -c \"$(cat <<'END'" + NAMES_ITS_SIGNAL + 'END\n)"\n'
    job = Job(lab, tmp_path, script, "-p", "low", "--signal=USR2@30", *where)
    job.wait_for_lines(1)
    lab.run("sbatch", "-o", "/dev/null", "-p", "high", *where, "--wrap", "sleep 60")
    assert job.wait_for_lines(2)[1] == [first]


def test_without_slurmd_the_job_goes_on(lab: Lab, tmp_path: Path) -> None:
    node = lab.nodes[0]
    job = Job(lab, tmp_path, WAITS, "-w", node)
    (_, pid), *_ = job.wait_for_lines(1)
    lab.kill_slurmd(node)
    assert _there(pid)
    lab.start_node(node)
    job.release.touch()
    job.wait_for_state("COMPLETED")
    assert len(job.lines()) == 1


def test_the_job_of_a_dead_node_runs_again_on_another(lab: Lab, tmp_path: Path) -> None:
    job = Job(lab, tmp_path, WAITS)
    (node, pid), *_ = job.wait_for_lines(1)
    lab.kill_node(node)
    assert not _there(pid)
    again = job.wait_for_lines(2, 60)[1][0]
    assert {node, again} == set(lab.nodes)
    job.release.touch()
    job.wait_for_state("COMPLETED")
    lab.start_node(node)


def test_the_job_of_a_node_that_comes_back_runs_again(lab: Lab, tmp_path: Path) -> None:
    node = lab.nodes[0]
    job = Job(lab, tmp_path, WAITS, "-w", node)
    job.wait_for_lines(1)
    lab.kill_node(node)
    lab.start_node(node)
    job.wait_for_lines(2)


def test_a_job_outlives_the_controller(lab: Lab, tmp_path: Path) -> None:
    job = Job(lab, tmp_path, WAITS)
    job.wait_for_lines(1)
    lab.stop_controller()
    job.release.touch()
    lab.start_controller()
    job.wait_for_state("COMPLETED")
    assert len(job.lines()) == 1
