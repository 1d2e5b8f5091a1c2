"""What the other ranks do when one dies, fails, hangs or does not come, and how ranks are found."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forks import THREADS, Process
from launch import free_port, run_ranks, start_process
from micro_job import write_job

from job.common.errors import Exit

pytestmark = pytest.mark.slow

START_SECONDS = 120  # until a training is under way, on a busy machine
END_SECONDS = 60  # until all others have ended
STEP_SECONDS = 5  # distributed.timeout_seconds of a training that hangs
MEET_SECONDS = 4  # distributed.start_timeout_seconds where a rank is missing
# job.train with a third step that raises ERROR (Python) on rank 1, the first time.
RAISING = """
import os
import runpy
import sys
from pathlib import Path
from job.training.learner import Learner
from job.common.errors import InputError

step = Learner.step
raised = Path(sys.argv[sys.argv.index("--override") + 1] + ".raised")

def raising(self, number, *rest):
    if number == 2 and self.world.rank == 1 and not raised.exists():
        raised.touch()
        raise eval(os.environ["ERROR"])
    return step(self, number, *rest)

Learner.step = raising
runpy.run_module("job.train", run_name="__main__")
"""
# job.train where a call of PLACE (a module and its attribute) never returns on rank VICTIM.
HANGING = """
import importlib
import os
import runpy
import time

module, _, name = os.environ["PLACE"].rpartition(".")
if os.environ["RANK"] == os.environ["VICTIM"]:
    setattr(importlib.import_module(module), name, lambda *_, **__: time.sleep(3600))
runpy.run_module("job.train", run_name="__main__")
"""
TRAIN = ("-m", "job.train")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("failures")
    endless = ("training.max_steps=1000000", "evaluation.every_steps=1000000")
    write_job(path, [*endless, "logging.every_steps=2"])
    (path / "raising.py").write_text(RAISING)
    (path / "hanging.py").write_text(HANGING)
    return path


# Jobs


class Job:
    """The processes of one training, their standard error in files, and its run directory."""

    def __init__(self, folder: Path, name: str) -> None:
        self.run = folder / "runs" / name
        self._logs = folder / "logs" / name
        self._logs.mkdir(parents=True)
        self.processes: dict[int, Process] = {}

    def start(
        self,
        rank: int,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        forked: bool = True,
    ) -> None:
        said = self._logs / f"{rank}.out.txt"
        whole, cwd = _plain_environment() | environment, self.run.parents[1]
        process = start_process(arguments, cwd, whole, said, self._log(rank), forked=forked)
        self.processes[rank] = process

    def _log(self, rank: int) -> Path:
        return self._logs / f"{rank}.txt"

    def errors(self, rank: int) -> str:
        """What a rank has written to standard error."""
        return self._log(rank).read_text(errors="replace")

    def blamed(self, rank: int) -> list[str]:
        """Whom a rank's standard error names as the first to fail, and why."""
        return re.findall(r"rank \d+ failed first: .*", self.errors(rank))

    def kept_log(self, rank: int) -> str:
        """A rank's log in the run directory."""
        name = "train.log" if rank == 0 else f"attempts/0001/rank-{rank:05}.log"
        return (self.run / name).read_text()

    @property
    def status(self) -> dict[str, Any]:
        return dict(json.loads((self.run / "status.json").read_text()))

    @property
    def n_steps(self) -> int:
        file = self.run / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def others(self, *ranks: int) -> list[int]:
        return [rank for rank in self.processes if rank not in ranks]

    def wait_for_steps(self, n: int) -> None:
        def seen() -> bool:
            ended = [rank for rank, p in self.processes.items() if p.poll() is not None]
            assert not ended, self.errors(ended[0])[-3000:]
            return self.n_steps >= n

        _wait_until(seen, START_SECONDS)

    def codes(self, ranks: Iterable[int], seconds: float = END_SECONDS) -> list[int]:
        """Exit codes of ranks that end by themselves within `seconds`."""
        processes = [self.processes[rank] for rank in ranks]
        _wait_until(lambda: all(p.poll() is not None for p in processes), seconds)
        return [p.returncode for p in processes]

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def _plain_environment() -> dict[str, str]:
    """This process's environment without what a launcher may have left in it."""
    plain = {name: v for name, v in os.environ.items() if not name.startswith(LAUNCHERS)}
    return plain | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": THREADS}


def _wait_until(done: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, f"not within {seconds:.0f} s"
        time.sleep(0.02)


def _options(name: str, overrides: Iterable[str]) -> list[str]:
    return ["--config", "critic.yaml", "--override", f"run.name={name}", *overrides]


@contextmanager
def _job(
    folder: Path,
    name: str,
    *overrides: str,
    world: int = 3,
    absent: Sequence[int] = (),
    command: Sequence[str] = TRAIN,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Job]:
    """Start a training on `world` ranks without the absent ones; kill what is left at the end."""
    job = Job(folder, name)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        **(environment or {}),
    }
    try:
        for rank in range(world):
            if rank not in absent:
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                job.start(rank, [*command, *_options(name, overrides)], shared | own)
        yield job
    finally:
        job.kill()


# A rank that is killed


@pytest.fixture(scope="module", params=[0, 1, 2])
def killed(folder: Path, request: pytest.FixtureRequest) -> tuple[Job, int]:
    """A job of three whose others have ended after a kill in mid-training, and who was killed."""
    victim: int = request.param
    with _job(folder, f"killed-{victim}") as job:
        job.wait_for_steps(5)
        job.processes[victim].kill()
        with contextlib.suppress(AssertionError):  # for the first test to report
            job.codes(job.others(victim))
    return job, victim


def test_the_others_end_and_one_names_a_rank_that_was_killed(killed: tuple[Job, int]) -> None:
    job, victim = killed
    others = job.others(victim)
    assert [job.processes[rank].returncode for rank in others] == [Exit.CRASHED] * 2
    said = [f"rank {victim} failed first: it died without a word"]
    assert [job.blamed(rank) for rank in others] == [said, []]


def test_who_was_killed_is_in_the_logs_and_status_of_the_run(killed: tuple[Job, int]) -> None:
    job, victim = killed
    verdict = f"rank {victim} failed first: it died without a word"
    assert [rank for rank in job.others(victim) if verdict not in job.kept_log(rank)] == []
    if victim != 0:
        assert (job.status["state"], job.status["error"]) == ("failed", verdict)


def test_each_rank_has_a_log_of_its_own_in_the_run(killed: tuple[Job, int]) -> None:
    job, _ = killed
    for rank in job.processes:
        assert re.search(r"attempt 1 of \S+, 3 process\(es\)", job.kept_log(rank))
    assert len(list((job.run / "attempts/0001").glob("rank-*.log"))) == 2  # rank 0's is train.log


def test_ranks_log_how_they_met_and_how_fast_they_answer(killed: tuple[Job, int]) -> None:
    job, _ = killed
    here = re.escape(socket.gethostname())
    places = re.compile(rf"3 ranks have met\n(  rank \d: {here} 127\.0\.0\.1 \[.*\blo\b.*\n){{3}}")
    assert places.search(job.errors(0))
    answers = r"all ranks answer: 4\.2 MB all-reduced in [\d.]+ s, [\d.]+ GB/s"
    assert len(re.findall(answers, job.errors(0))) == 1
    assert not re.search(answers, job.errors(1) + job.errors(2))


# A rank that raises


@pytest.fixture(scope="module")
def failed(folder: Path) -> Job:
    """A job of three that has ended after an error on rank 1."""
    error = {"ERROR": "RuntimeError('a bad day')"}
    with _job(folder, "failed", command=["raising.py"], environment=error) as job:
        job.codes(job.processes, START_SECONDS)
    return job


def test_an_error_of_one_rank_is_in_all_logs_and_once_on_the_terminal(failed: Job) -> None:
    assert failed.codes(failed.processes) == [Exit.CRASHED] * 3
    named = "rank 1 failed first: RuntimeError: a bad day"
    assert [rank for rank in (0, 2) if f" ERROR {named}\n" in failed.kept_log(rank)] == [0, 2]
    assert [failed.errors(rank).count("a bad day") for rank in (0, 1, 2)] == [0, 1, 0]
    assert (failed.status["state"], failed.status["error"]) == ("failed", named)


def test_a_failing_rank_shows_its_own_traceback_and_blames_nobody(failed: Job) -> None:
    shown = failed.errors(1)
    assert "Traceback (most recent call last)" in shown
    assert re.search(r'File ".*loop\.py", line \d+, in _step', shown)
    assert re.search(r"RuntimeError: a bad day$", shown.strip())
    assert failed.blamed(1) == []


def test_a_failing_rank_leaves_its_error_in_its_own_log(failed: Job) -> None:
    assert "RuntimeError: a bad day" in failed.kept_log(1)


def test_wrong_input_on_one_rank_ends_all_as_wrong_input(folder: Path) -> None:
    error = {"ERROR": "InputError('rows.jsonl: nothing in it')"}
    with _job(folder, "input", world=2, command=["raising.py"], environment=error) as job:
        assert job.codes(job.processes, START_SECONDS) == [Exit.BAD_INPUT] * 2
    assert "rank 1 failed first: InputError: rows.jsonl: nothing in it" in job.kept_log(0)
    assert job.errors(1).splitlines()[-1] == "error: rows.jsonl: nothing in it"
    assert (job.errors(0) + job.errors(1)).count("nothing in it") == 1


def test_what_all_ranks_end_with_is_said_by_the_first(folder: Path) -> None:
    data = ("data.train=nowhere.jsonl", "data.validation=nowhere.jsonl")
    with _job(folder, "all", *data, world=2) as job:
        assert job.codes(job.processes, START_SECONDS) == [Exit.BAD_INPUT] * 2
    said = "error: nowhere.jsonl: cannot read the data: No such file or directory"
    assert [job.errors(rank).count("nowhere.jsonl") for rank in (0, 1)] == [1, 0]
    assert job.errors(0).splitlines()[-1] == said
    assert ["nowhere.jsonl" in job.kept_log(rank) for rank in (0, 1)] == [True, True]


# A rank that hangs


@pytest.fixture(scope="module")
def stuck(folder: Path) -> Job:
    """A job of three of which rank 1 was stopped, and continued when the others had ended."""
    with _job(folder, "stuck", f"distributed.timeout_seconds={STEP_SECONDS}") as job:
        job.wait_for_steps(5)
        job.processes[1].send_signal(signal.SIGSTOP)
        job.codes(job.others(1))
        assert job.processes[1].poll() is None
        job.processes[1].send_signal(signal.SIGCONT)
        job.codes([1])
    return job


@pytest.mark.all  # more than a minute of waiting
def test_a_job_suspended_in_a_collective_goes_on_after_longer_than_its_timeout(
    folder: Path,
) -> None:
    with _job(folder, "suspended", f"distributed.timeout_seconds={STEP_SECONDS}") as job:
        job.wait_for_steps(5)
        for rank in (1, 0, 2):  # the others wait in a collective by then
            job.processes[rank].send_signal(signal.SIGSTOP)
            time.sleep(1)
        steps = job.n_steps
        time.sleep(STEP_SECONDS + 65)
        for rank in (0, 2, 1):
            job.processes[rank].send_signal(signal.SIGCONT)
            time.sleep(0.2)
        job.wait_for_steps(steps + 5)
        assert all(process.poll() is None for process in job.processes.values())


def test_a_stuck_collective_ends_all_and_leaves_stacks(stuck: Job) -> None:
    assert stuck.codes(stuck.processes) == [Exit.CRASHED] * 3
    stacks = {
        rank: file.read_text()
        for rank in (0, 2)
        if (file := stuck.run / f"attempts/0001/stacks.rank-{rank:05}.txt").exists()
    }
    assert stacks  # of both, unless one heard of the other's end first
    for rank, text in stacks.items():
        assert f"no progress for {STEP_SECONDS} s" in stuck.errors(rank)
        assert f"stacks.rank-{rank:05}.txt" in stuck.errors(rank)
        threads = re.split(r"^(?:Current thread|Thread) 0x", text, flags=re.MULTILINE)[1:]
        assert len(threads) >= 3  # main, watchdog and lifeline at least
        (main,) = (t for t in threads if re.search(r"loop\.py\", line \d+ in _step", t))
        assert re.search(r"distributed_c10d\.py\", line \d+ in all_\w+", main)  # where it is stuck


def test_the_status_says_that_a_run_has_hung(stuck: Job) -> None:
    assert stuck.status["state"] == "failed"
    assert f"no progress for {STEP_SECONDS} s" in stuck.status["error"]


def test_ranks_that_ended_since_another_hung_are_not_blamed(stuck: Job) -> None:
    blamed = [text for rank in stuck.processes for text in stuck.blamed(rank)]
    assert [text for text in blamed if "died without a word" in text] == []


# Ranks that do not come


def test_ranks_that_do_not_come_are_named_by_the_others(folder: Path) -> None:
    patience = f"distributed.start_timeout_seconds={MEET_SECONDS}"
    with _job(folder, "absent", patience, absent=[2]) as job:
        assert job.codes(job.processes) == [Exit.CRASHED] * 2
    for rank in (0, 1):
        assert f"rank(s) 2 of 3 did not come within {MEET_SECONDS} s" in job.errors(rank)
        assert "Traceback" not in job.errors(rank)


def test_a_rank_that_reaches_nobody_says_who_and_where_it_is(folder: Path) -> None:
    environment = {"MASTER_PORT": str(free_port())}
    patience = f"distributed.start_timeout_seconds={MEET_SECONDS}"
    with _job(folder, "alone", patience, world=2, absent=[0], environment=environment) as job:
        assert job.codes([1]) == [Exit.CRASHED]
    message = job.errors(1).splitlines()[-1]
    interfaces = ",".join(name for _, name in socket.if_nameindex())
    assert message.startswith(
        f"rank 1 ({socket.gethostname()} 127.0.0.1 [{interfaces}] GLOO_SOCKET_IFNAME=lo) cannot "
        f"meet the others at 127.0.0.1:{environment['MASTER_PORT']} within {MEET_SECONDS} s"
    )


@pytest.mark.parametrize(
    ("place", "victim"),
    [
        ("torch.distributed.monitored_barrier", 2),  # before the first all-reduce
        ("torch.distributed.monitored_barrier", 0),
        ("job.distributed.rendezvous.Caller", 2),  # before it can be told of others' failures
    ],
)
def test_a_rank_that_comes_and_hangs_is_named_by_the_others(
    folder: Path, place: str, victim: int
) -> None:
    name = f"hanging-{victim}-{place.rpartition('.')[2]}"
    patience = f"distributed.start_timeout_seconds={MEET_SECONDS}"
    environment = {"PLACE": place, "VICTIM": str(victim)}
    with _job(folder, name, patience, command=["hanging.py"], environment=environment) as job:
        codes = job.codes(job.others(victim), END_SECONDS / 2)
    assert codes == [Exit.CRASHED] * 2
    for rank in job.others(victim):
        said = re.sub(r"^  rank \d+: .*", "", job.errors(rank), flags=re.MULTILINE)  # all places
        assert "Traceback" not in said
        assert re.search(rf"\branks?(\(s\))? {victim}\b", said, re.IGNORECASE)
        assert "died without a word" not in said


# Ways to start ranks


@pytest.fixture(scope="module")
def metrics(folder: Path) -> bytes:
    """What four steps on two ranks record, started as the other tests start ranks."""
    run_ranks([*TRAIN, *_options("plain", ["training.max_steps=4"])], 2, folder)
    return (folder / "runs/plain/metrics.jsonl").read_bytes()


def _torchrun(folder: Path, name: str, *command: str) -> Job:
    """A job of two by torchrun that has ended well."""
    job = Job(folder, name)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    options = _options(name, ["training.max_steps=4"])
    environment = {"ERROR": "RuntimeError('a bad day')"}
    try:
        job.start(0, [*launcher, *command, *options], environment, forked=False)
        assert job.codes([0], START_SECONDS) == [0], job.errors(0)[-3000:]
    finally:
        job.processes[0].send_signal(signal.SIGTERM)  # it ends its ranks itself
        job.processes[0].wait()
    return job


@pytest.mark.all
def test_torchrun_starts_the_same_training(folder: Path, metrics: bytes) -> None:
    job = _torchrun(folder, "torchrun", *TRAIN)
    assert (job.run / "metrics.jsonl").read_bytes() == metrics


def test_torchrun_starts_it_again_after_a_failure(folder: Path, metrics: bytes) -> None:
    job = _torchrun(folder, "restarted", "--max_restarts", "1", "raising.py")
    assert "a bad day" in job.errors(0)
    assert "failed to bind" not in job.errors(0)  # the store is torchrun's own
    assert (job.run / "metrics.jsonl").read_bytes() == metrics
    assert {path.name for path in (job.run / "attempts").iterdir()} == {"0001", "0002"}


def test_srun_starts_the_same_training(folder: Path, metrics: bytes) -> None:
    job = Job(folder, "srun")
    shared = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_JOB_ID": _job_of_a_free_port(),
        "SLURM_STEP_NODELIST": "localhost",
    }
    options = _options("srun", ["training.max_steps=4"])
    try:
        for rank in range(2):
            own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
            job.start(rank, [*TRAIN, *options], shared | own, forked=False)
        assert job.codes([0, 1], START_SECONDS) == [0, 0], job.errors(0)[-3000:]
    finally:
        job.kill()
    assert (job.run / "metrics.jsonl").read_bytes() == metrics
    attempt = json.loads((job.run / "attempts/0001/attempt.json").read_text())
    assert (attempt["world_size"], attempt["slurm_job"]) == (2, shared["SLURM_JOB_ID"])


def _job_of_a_free_port() -> str:
    """A Slurm job number whose port, which all its ranks derive from it, nobody uses."""
    for job in range(os.getpid() % 10000, 12000):  # below the ports that systems give out
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 20000 + job))
            return str(job)
    raise AssertionError("no port is free")
