"""Nodes, ranks, supervisors and controllers that die under a run, and runs that cannot go on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster_job import ClusterJob, Submitted
from lab import Lab
from micro_job import MicroRun

from job.common.errors import Exit

pytestmark = pytest.mark.slow

STEPS = 240
EVERY = 50  # steps between two checkpoints
SETTINGS = (
    f"training.max_steps={STEPS}",
    f"checkpoint.every_steps={EVERY}",
    "evaluation.every_steps=100",
)
# Enough to be still under way when a second copy has been loaded.
LONG = ("training.max_steps=2000", "evaluation.every_steps=1000")
AWAY_SECONDS = 30
MAX_ATTEMPTS = 3  # of the test cluster's profile
# Which rank dies by which signal, one death an attempt.
DEATHS = [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSEGV)]
_SHOWN_STEPS = 60  # of progress between two of them
_BAD_LINE = 27  # behind those that a submission looks at


@pytest.fixture(scope="module")
def job(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> ClusterJob:
    lab.cancel_all()
    return ClusterJob.prepare(lab, tmp_path_factory.mktemp("failures"), *SETTINGS)


@pytest.fixture(scope="module")
def one_rank(job: ClusterJob) -> MicroRun:
    """Undisturbed, on this machine without Slurm."""
    return job.micro.finish("one-rank", world=1)


@pytest.fixture(scope="module")
def two_ranks(job: ClusterJob) -> MicroRun:
    return job.micro.finish("two-ranks", world=2)


@pytest.fixture(autouse=True)
def _whole_again(lab: Lab) -> Iterator[None]:
    yield
    lab.start_controller()
    for node in lab.nodes:
        lab.start_node(node)
    lab.cancel_all()


# What is lost, and how long it takes to be made up for


@dataclass(frozen=True)
class Loss:
    """The end of an attempt that nobody wanted, as it stands once all its trainers are dead."""

    run: Submitted
    time: float
    step: int
    checkpoint: int
    starts: int

    @classmethod
    def of(cls, run: Submitted, since: float) -> Loss:
        results = run.results
        checkpoint = max(results.checkpoints, default=0)
        return cls(run, since, results.step, checkpoint, run.count("started"))

    @property
    def steps(self) -> int:
        """How many are to be done again."""
        return self.step - self.checkpoint

    def make_up(self, event: str, seconds: float = 90) -> None:
        """Wait for the next attempt's first step: it went on from the last checkpoint."""
        run, results = self.run, self.run.results
        run.wait_until(lambda: run.count("started") > self.starts, "another start", seconds)
        run.wait_until(lambda: len(results.attempts) > self.starts, "another attempt")
        run.wait_until(lambda: results.attempts[-1], "a checkpoint that is read")
        attempt = results.attempts[-1]
        assert attempt["resumed_step"] == self.checkpoint
        assert self.steps <= EVERY
        began = _newest(run, "started")["time"]
        metrics = results.path / "metrics.jsonl"
        begun = run.path / "attempts" / f"{self.starts + 1:04}" / "attempt.json"
        run.wait_until(
            lambda: (
                metrics.stat().st_mtime_ns > begun.stat().st_mtime_ns
                and results.step > self.checkpoint
            ),
            "a new step",
        )
        figures = {"slurm_seconds": began - self.time, "start_seconds": time.time() - began}
        _measured(event, **figures, lost_steps=self.steps)
        assert max(figures.values()) < seconds


def _measured(event: str, **figures: float) -> None:
    if file := os.environ.get("SLURM_MEASUREMENTS"):
        with Path(file).open("a") as stream:
            stream.write(json.dumps({"event": event, **figures}) + "\n")


def _newest(run: Submitted, event: str) -> dict[str, Any]:
    return [one for one in run.events if one["event"] == event][-1]


def _freeze(run: Submitted, step: int) -> None:
    """Halt its trainers from this step on, where no checkpoint is being written."""
    results = run.results
    run.freeze_when(lambda: results.step >= step and not results.hidden, f"step {step}, at rest")


def _facts(run: Submitted) -> dict[str, str]:
    """What the controller knows of its job."""
    words = run.lab.run("scontrol", "show", "job", "-o", run.job_id).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def _trainer(run: Submitted, rank: int) -> int:
    (pid,) = (pid for pid, its in run.trainers().items() if its["RANK"] == str(rank))
    return pid


def _parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("\nPPid:")[1].split()[0])


def _is_there(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty: a zombie
    except OSError:
        return False


# Nodes


def test_a_dead_node_costs_at_most_the_steps_since_the_last_checkpoint(
    job: ClusterJob, one_rank: MicroRun, two_ranks: MicroRun
) -> None:
    lab, one = job.lab, job.submit("--name", "one")
    one.wait_until(lambda: one.count("started"), "a start")
    dead = _newest(one, "started")["node"]
    (alive,) = set(lab.nodes) - {dead}
    two = job.submit("--name", "two", "--nodes", "2")
    for run in (one, two):
        _freeze(run, STEPS // 2)
    since = time.time()
    lab.kill_node(dead)
    two.send(signal.SIGCONT)  # for the rank on the other node
    one_lost, two_lost = Loss.of(one, since), Loss.of(two, since)
    assert (one.status["state"], two.status["state"]) == ("running", "running")  # to Slurm too

    one_lost.make_up("node lost, another one free")
    assert _newest(one, "started")["node"] == alive
    two.wait_until(lambda: two.queue.startswith("PENDING"), "a requeue")
    status = two.status
    assert (status["state"], status["attempts"], status["nodes"]) == ("pending", 1, None)
    lab.start_node(dead)
    two_lost.make_up("one of two nodes lost, and back when Slurm had noticed")

    for run, undisturbed in ((one, one_rank), (two, two_ranks)):
        status = run.wait_for("finished")
        run.results.assert_equals(undisturbed)
        assert (status["state"], status["attempts"]) == ("finished", 2)
        assert _facts(run)["JobState"] == "COMPLETED"


def test_a_copy_that_slurm_takes_for_dead_ends_by_itself_and_touches_nothing(
    job: ClusterJob,
) -> None:
    lab, run = job.lab, job.submit(settings=LONG)
    with job.micro.start("long", *LONG, world=1) as ranks:
        _freeze(run, EVERY)  # the node hangs
        trainer = _trainer(run, 0)
        supervisor, node = _parent(trainer), _newest(run, "started")["node"]
        since = time.time()
        lab.kill_slurmd(node)
        run.wait_until(lambda: run.count("started") == 2, "a second copy")
        began = time.time()
        os.kill(trainer, signal.SIGCONT)  # and sees what number the second copy has taken
        first_copy = (trainer, supervisor)
        run.wait_until(lambda: not any(map(_is_there, first_copy)), "the first copy's end")
        assert ranks.wait() == [0], ranks.log()

    first, second = run.attempts
    outcome = json.loads((first / "outcome-00000.json").read_text())
    assert outcome["code"] == Exit.SUPERSEDED
    status = run.wait_for("finished")
    run.results.assert_equals(job.micro.run("long"))
    assert (status["state"], status["attempts"]) == ("finished", 2)
    own = json.loads((run.path / "slurm" / "status.json").read_text())
    assert f"{own['attempt']:04}" == second.name
    events = [(one["event"], one.get("restart")) for one in run.events]
    assert events == [
        ("submitted", None),
        ("started", 0),
        ("started", 1),
        ("ended", 1),
        ("finished", 1),
    ]
    assert {one["node"] for one in run.events if "node" in one} == set(lab.nodes)
    assert _facts(run)["JobState"] == "COMPLETED"
    start_seconds = run.results.attempts[-1]["time"] - began
    _measured("slurmd lost", slurm_seconds=began - since, start_seconds=start_seconds)


# The controller


def test_a_run_waits_for_a_controller_that_is_away(job: ClusterJob, one_rank: MicroRun) -> None:
    lab, run = job.lab, job.submit()
    _freeze(run, EVERY + EVERY // 2)
    lab.run("scancel", "-s", "USR2", run.job_id)
    lab.stop_controller()
    back = time.monotonic() + AWAY_SECONDS
    run.send(signal.SIGCONT)
    run.wait_until(lambda: run.count("ended"), "the first attempt's end")
    stopped = run.results.checkpoints[-1]
    assert stopped == run.results.step
    status = run.status
    assert status["state"] == "running"
    assert "Slurm does not answer" in status["reason"]
    time.sleep(max(0.0, back - time.monotonic()))
    assert run.count("requeued") == 0
    lab.start_controller()

    status = run.wait_for("finished")
    run.results.assert_equals(one_rank)
    assert (status["state"], status["attempts"], run.count("requeued")) == ("finished", 2, 1)
    assert run.results.attempts[-1]["resumed_step"] == stopped
    log = next((run.path / "slurm").glob("*_0_log.out")).read_text()
    assert "trying again in" in log


# Ranks


@pytest.fixture(scope="module")
def killed(job: ClusterJob, two_ranks: MicroRun) -> Submitted:
    """A run of two ranks of which one dies in each attempt but the last, always after progress."""
    run = job.submit("--gpus", "2", max_attempts=MAX_ATTEMPTS)
    for number, (rank, how) in enumerate(DEATHS, 1):
        _freeze(run, number * _SHOWN_STEPS)
        since = time.time()
        os.kill(_trainer(run, rank), how)
        run.send(signal.SIGCONT)
        run.wait_until(lambda: run.count("ended") == number, "the attempt's end")  # noqa: B023
        Loss.of(run, since).make_up(f"rank killed by {how.name}")
    with contextlib.suppress(AssertionError):  # for the tests to report
        run.wait_for("finished")
    return run


def test_a_run_outlives_more_crashes_than_attempts_if_each_comes_after_progress(
    killed: Submitted, two_ranks: MicroRun
) -> None:
    assert len(DEATHS) >= MAX_ATTEMPTS
    status = killed.status
    assert (status["state"], status["attempts"]) == ("finished", len(DEATHS) + 1)
    killed.results.assert_equals(two_ranks)
    assert _facts(killed)["JobState"] == "COMPLETED"


@pytest.mark.parametrize("number", range(len(DEATHS)), ids=[f"{r}-{h.name}" for r, h in DEATHS])
def test_the_reason_is_the_rank_that_died_and_not_what_its_peer_made_of_it(
    killed: Submitted, number: int
) -> None:
    rank, how = DEATHS[number]
    ends = [one for one in killed.events if one["event"] == "ended"]
    node = killed.events[1]["node"]
    assert ends[number]["reason"] == f"rank {rank} on {node}: killed by {how.name}"
    codes = {}
    for file in killed.attempts[number].glob("outcome-*.json"):
        outcome = json.loads(file.read_text())
        codes[outcome["rank"]] = outcome["code"]
    assert codes == {rank: -how, 1 - rank: Exit.CRASHED}


# The supervisor


def test_trainers_whose_supervisor_is_killed_save_and_end_and_the_run_can_be_resumed(
    job: ClusterJob, two_ranks: MicroRun
) -> None:
    run = job.submit("--gpus", "2")
    run.wait_for_step(EVERY)
    os.kill(_parent(_trainer(run, 0)), signal.SIGKILL)
    run.wait_until(lambda: not run.trainers(), "the end of both trainers", 30)
    run.wait_until(lambda: not run.queue, "the job's end", 60)
    stopped = run.results.step
    assert stopped < STEPS
    assert run.results.checkpoints[-1] == stopped
    status = run.status
    assert status["state"] == "failed"
    assert "ended as FAILED without a word" in status["reason"]
    assert run.command("--resume", "--json").returncode == 0
    run.wait_for("finished")
    run.results.assert_equals(two_ranks)
    assert run.results.attempts[-1]["resumed_step"] == stopped


# Runs that cannot go on, and one that only has to leave its node; all at the same time


@pytest.fixture(scope="module")
def ended(job: ClusterJob, one_rank: MicroRun) -> dict[str, Submitted]:
    """Runs by what is wrong with them, when all have come to their ends."""
    lab, folder = job.lab, job.folder
    runs = {"one unfit node": _submit_where_the_first_node_is_unfit(job)}
    for node in lab.nodes:
        (folder / f"no-scratch-{node}").write_text("a file where a folder should be")
    scratch = f"{folder}/no-scratch-$SLURMD_NODENAME"
    runs["unfit nodes"] = job.submit("--name", "unfit", scratch=scratch)
    data = _write_bad_data(folder / "bad.jsonl")
    files = (f"data.train={data}", f"data.validation={data}")
    runs["bad data"] = job.submit("--name", "bad", settings=files)
    path = {"PYTHONPATH": str(_write_broken_torch(folder / "broken"))}
    runs["no torch"] = job.submit(
        "--name", "crash", environment=os.environ | lab.environment | path
    )
    if "task/cgroup" in lab.run("scontrol", "show", "config"):
        greedy = ("training.batch_size=20000", "training.micro_batch_tokens=2000000")
        small = {"memory_per_gpu_gb": 1, "max_attempts": 2}
        runs["little memory"] = job.submit("--name", "greedy", settings=greedy, **small)
    for name, run in runs.items():
        with contextlib.suppress(AssertionError):  # for the tests to report
            run.wait_for("finished" if name == "one unfit node" else "failed", 300)
    return runs


def _submit_where_the_first_node_is_unfit(job: ClusterJob) -> Submitted:
    lab = job.lab
    unfit, fit = lab.nodes
    (job.folder / f"scratch-{unfit}").write_text("a file where a folder should be")
    take = ("sbatch", "--parsable", "--exclusive", "-o", "/dev/null", "-w", fit)
    other = lab.run(*take, "--wrap", "exec sleep 600").strip()
    taken = ("squeue", "-h", "-t", "R", "-j", other)
    lab.wait_until(lambda: lab.run(*taken), f"a job on {fit}")
    run = job.submit("--name", "moved", scratch=f"{job.folder}/scratch-$SLURMD_NODENAME")
    run.wait_until(lambda: run.count("requeued"), "a requeue")
    lab.run("scancel", other)
    return run


def _write_bad_data(file: Path) -> Path:
    row = {"prompt": "1+1=", "response": "2", "reward": 1}
    rows = [row | ({"reward": "good"} if line == _BAD_LINE else {}) for line in range(1, 30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _write_broken_torch(folder: Path) -> Path:
    """A torch that does not load, for a PYTHONPATH."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").write_text("raise ImportError('libcudart.so: no such file')\n")
    return folder


@dataclass(frozen=True)
class End:
    """How a run must have ended."""

    attempts: int
    code: int  # as Slurm has it
    reason: str
    last_line: str = ""


NODE = r"rank 0 on critic\d+: "
LAST = r"{} attempts in a row without progress; the last: " + NODE
ENDS = {
    "bad data": End(
        1,
        Exit.BAD_INPUT,
        rf"{NODE}wrong input.* \S+/bad\.jsonl:{_BAD_LINE}: field 'reward' must be a number.*'good'",
        rf"bad\.jsonl:{_BAD_LINE}: field 'reward' must be a number",
    ),
    "no torch": End(
        MAX_ATTEMPTS,
        Exit.CRASHED,
        LAST.format(MAX_ATTEMPTS) + r"a crash \(exit code 1\): ImportError: libcudart\.so: no such",
        r"^ImportError: libcudart\.so",
    ),
    "unfit nodes": End(
        MAX_ATTEMPTS,
        Exit.UNFIT_NODE,
        LAST.format(MAX_ATTEMPTS) + r"scratch \S+/no-scratch-critic\d+: File exists",
    ),
    "little memory": End(
        2,
        1,  # whatever the task's, where the kernel has killed in the step
        LAST.format(2) + r"the host's memory ran out \(killed by the kernel\).* memory_per_gpu_gb",
    ),
}


@pytest.fixture
def small_disk(job: ClusterJob) -> Iterator[Path]:
    """A file system of its own, which can be filled up."""
    folder = job.folder / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], check=True)
    yield folder
    job.lab.cancel_all()
    subprocess.run(["umount", "-l", folder], check=True)


def _fill(file: Path) -> None:
    """Leave no byte free."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(512))


def test_a_run_waits_for_a_full_disk_and_comes_back(
    job: ClusterJob, one_rank: MicroRun, small_disk: Path
) -> None:
    settings = (f"run.dir={small_disk}/run", "checkpoint.keep_last=1")
    run = job.submit("--gpus", "1", settings=settings, partition="low")
    run.freeze_at(60)
    job.preempt()
    run.wait_until(lambda: run.count("signal"), "the signal")
    run.send(signal.SIGCONT)
    run.wait_until(lambda: run.results.status["state"] == "stopped", "the end of the attempt")
    saved = run.results.checkpoints[-1]
    assert saved >= 60
    _fill(small_disk / "full")
    run.wait_until(lambda: len(run.attempts) == 2, "its second attempt")
    run.wait_until(lambda: run.queue == "PENDING BeginTime", "the wait for the disk")
    facts = _facts(run)
    assert facts["Restarts"] == "2", run.describe()
    reason = run.status["reason"]
    assert "No space left on device" in reason
    assert f"disk {small_disk}: 0.000 of 0.013 GB free" in reason
    start = time.mktime(time.strptime(facts["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    assert start - time.time() > 10
    (small_disk / "full").unlink()
    job.lab.run("scontrol", "update", f"JobId={run.job_id}", "StartTime=now")
    status = run.wait_for("finished")
    assert status["attempts"] == 3, run.describe()
    assert run.results.attempts[-1]["resumed_step"] == saved
    run.results.assert_equals(one_rank)


@pytest.mark.parametrize("wrong", ENDS)
def test_a_run_that_cannot_go_on_ends_with_the_reason(
    ended: dict[str, Submitted], wrong: str
) -> None:
    if wrong not in ended:
        pytest.skip("Slurm does not limit memory here: no writable cgroups")
    run, end = ended[wrong], ENDS[wrong]
    status, facts = run.status, _facts(run)
    assert status["state"] == "failed", run.describe()
    assert re.match(end.reason, status["reason"])
    assert status["attempts"] == run.count("started") == end.attempts
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", f"{end.code}:0")
    assert any(re.search(end.last_line, line) for line in status["last_lines"] or [""])


def test_a_run_whose_node_is_unfit_goes_to_another_one(
    ended: dict[str, Submitted], job: ClusterJob, one_rank: MicroRun
) -> None:
    run = ended["one unfit node"]
    unfit, fit = job.lab.nodes
    status, facts = run.status, _facts(run)
    assert (status["state"], status["attempts"]) == ("finished", 2), run.describe()
    run.results.assert_equals(one_rank)
    assert [one["node"] for one in run.events if one["event"] == "started"] == [unfit, fit]
    moved = next(one for one in run.events if one["event"] == "ended")
    scratch = f"{job.folder}/scratch-{unfit}"
    assert (moved["code"], moved["reason"]) == (
        Exit.UNFIT_NODE,
        f"rank 0 on {unfit}: scratch {scratch}: File exists",
    )
    assert (facts["JobState"], facts["ExcNodeList"]) == ("COMPLETED", unfit)
