"""Runs that are asked to stop, at any moment, by signals, a deadline or a file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from launch import SAVE, MicroJob, Ranks, running
from micro_job import MicroRun

pytestmark = pytest.mark.slow

STEPS = 160
EVALUATIONS = 20  # steps from one to the next; each takes as long as many steps
SETTINGS = (
    f"training.max_steps={STEPS}",
    "data.arithmetic.validation_examples=1500",
    f"evaluation.every_steps={EVALUATIONS}",
    "checkpoint.every_steps=1000",  # what is saved is saved because of the stop
)
STEP_CPU_SECONDS = 0.2  # more than a step takes, and less than an evaluation
STOPPED = 75
ALL = (0, 1)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> MicroJob:
    return MicroJob.prepare(tmp_path_factory.mktemp("signals"), *SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(job: MicroJob) -> MicroRun:
    return job.finish("undisturbed")


@pytest.fixture(scope="module")
def run(job: MicroJob, undisturbed: MicroRun) -> MicroRun:
    """One run that all stops here share; each goes on where the one before has stopped."""
    return job.run("stopped")


def _assert_stopped(run: MicroRun, ranks: Ranks) -> None:
    """Every rank says so, and the last complete step is committed."""
    codes = ranks.wait(120)
    assert codes == [STOPPED] * len(codes), ranks.log()
    status = run.status
    assert (status["state"], status["error"]) == ("stopped", None)
    assert "stopped by" in status["reason"]
    assert not run.hidden
    saved = run.checkpoints[-1] if run.checkpoints else 0
    assert status.get("checkpoint", 0) == saved
    # a step whose evaluation was interrupted gets its line when that is done again
    assert run.step == saved or (saved % EVALUATIONS == 0 and run.step == saved - 1)


# Signals in training


@dataclass(frozen=True)
class Stop:
    """A signal to some ranks at a moment, and perhaps another one while it is obeyed."""

    number: signal.Signals
    ranks: Iterable[int] = ALL
    during: str = "a step"
    again: signal.Signals | None = None
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        to = "all" if self.ranks == ALL else f"rank {next(iter(self.ranks))}"
        again = f" and {self.again.name}" if self.again else ""
        return f"{self.number.name}{again} to {to} during {self.during}"


ALSO = pytest.mark.all  # another variant of the same behaviour
STOPS = [
    pytest.param(Stop(signal.SIGUSR2), marks=ALSO),
    pytest.param(Stop(signal.SIGUSR1, [0]), marks=ALSO),
    pytest.param(Stop(signal.SIGTERM, [1]), marks=ALSO),
    Stop(signal.SIGUSR2, [1], again=signal.SIGTERM),
    Stop(signal.SIGTERM, again=signal.SIGTERM),
    Stop(signal.SIGINT, [0]),
    Stop(signal.SIGUSR1, during="a save", settings=("checkpoint.every_steps=2",)),
    pytest.param(Stop(signal.SIGUSR2, [1], during="an evaluation"), marks=ALSO),
    Stop(signal.SIGTERM, during="an evaluation"),
]


def _is_in_evaluation(run: MicroRun, ranks: Ranks, start: int) -> Callable[[], bool]:
    """Whether no line was added for long although the next step has only to be evaluated.

    Long is what rank 0 has computed, not what has passed: the machine may have other work.
    """
    since = dict[int, float]()

    def check() -> bool:
        step, seconds = run.step, _cpu_seconds(ranks.processes[0].pid)
        began = since.setdefault(step, seconds)
        due = step > start and step % EVALUATIONS == EVALUATIONS - 1
        return due and seconds - began > STEP_CPU_SECONDS

    return check


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_a_signal_saves_the_last_complete_step_and_ends_every_rank(
    job: MicroJob, run: MicroRun, stop: Stop
) -> None:
    start = run.step
    with job.start(run.path.name, *stop.settings, dwell=SAVE) as ranks:
        moments: dict[str, Callable[[], object]] = {
            "a step": lambda: run.step >= start + 3,
            "a save": lambda: run.step >= start + 3 and run.saving(),
            "an evaluation": _is_in_evaluation(run, ranks, start),
        }
        ranks.freeze_when(moments[stop.during], stop.during)
        ranks.signal(stop.number, stop.ranks)
        ranks.signal(signal.SIGCONT)
        if stop.again is not None:
            ranks.freeze_when(run.saving, "the save that the signal asks for")
            ranks.signal(stop.again)
            ranks.signal(signal.SIGCONT)
        _assert_stopped(run, ranks)
    assert run.step > start
    if stop.during == "an evaluation":
        assert run.checkpoints[-1] == run.step + 1


@pytest.mark.parametrize("seconds", [0.02, pytest.param(0.1, marks=ALSO)])
def test_a_signal_before_there_is_a_handler_ends_ranks_or_stops_them(
    job: MicroJob, run: MicroRun, seconds: float
) -> None:
    before = run.lines
    with _new_processes(job, run) as ranks:
        time.sleep(seconds)
        ranks.freeze_when(lambda: True, "now")
        listened = [_listens(process.pid) for process in ranks.processes]
        ranks.signal(signal.SIGTERM)
        ranks.signal(signal.SIGCONT)
        if all(listened):
            _assert_stopped(run, ranks)
        else:  # those that listen wait for the others, until the launcher ends them
            time.sleep(1)
            codes = {p.poll() for p, its in zip(ranks.processes, listened, strict=True) if not its}
            assert codes <= {None, -signal.SIGTERM}
    assert run.lines[: len(before)] == before


@pytest.mark.parametrize(
    "seconds", [0, pytest.param(0.5, marks=ALSO), 1, pytest.param(3, marks=ALSO)]
)
def test_a_signal_in_the_first_seconds_stops_every_rank(
    job: MicroJob, run: MicroRun, seconds: float
) -> None:
    before = run.lines
    with _new_processes(job, run) as ranks:
        listen = lambda: all(_listens(process.pid) for process in ranks.processes)  # noqa: E731
        ranks.wait_until(listen, "handlers")
        time.sleep(seconds)
        ranks.signal(signal.SIGTERM)
        _assert_stopped(run, ranks)
    assert run.lines[: len(before)] == before


def _new_processes(job: MicroJob, run: MicroRun) -> AbstractContextManager[Ranks]:
    """An attempt of processes that have to import everything first."""
    return job.start(run.path.name, "distributed.start_timeout_seconds=20", forked=False)


def _listens(pid: int) -> bool:
    """Whether a process catches SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_a_second_ctrl_c_ends_at_once_and_loses_no_checkpoint(job: MicroJob, run: MicroRun) -> None:
    start, saved = run.step, run.checkpoints
    in_the_save = {"DWELL_SECONDS": "60"}  # so long that the second one comes before its end
    with job.start(run.path.name, dwell=SAVE, environment=in_the_save) as ranks:
        ranks.freeze_when(lambda: run.step >= start + 2, "a step")
        for _ in range(2):  # the second one comes while nothing else in the process runs
            ranks.signal(signal.SIGINT)
            ranks.signal(signal.SIGCONT)
            ranks.wait_until(lambda: True, "a moment")
            time.sleep(0.5)
        codes = ranks.wait(60)
        assert codes == [-signal.SIGINT] * len(codes), ranks.log()
    assert run.checkpoints == saved


# Other ways to ask


def test_a_deadline_stops_like_a_signal(job: MicroJob, run: MicroRun) -> None:
    start = run.step
    began = time.monotonic()
    with job.start(run.path.name) as ranks:
        ranks.wait_until(lambda: run.step > start, "a step")
        ranks.signal(signal.SIGTERM)
        _assert_stopped(run, ranks)
    seconds = time.monotonic() - began
    deadline = time.time() + seconds
    with job.start(run.path.name, environment={"CRITIC_DEADLINE": str(deadline)}) as ranks:
        _assert_stopped(run, ranks)
    assert 0 <= time.time() - deadline < 30
    assert "the deadline" in run.status["reason"]


def test_a_deadline_that_has_passed_stops_before_training(job: MicroJob, run: MicroRun) -> None:
    before = run.lines
    with job.start(run.path.name, environment={"CRITIC_DEADLINE": "1000000000"}) as ranks:
        _assert_stopped(run, ranks)
    assert run.lines == before


def test_a_stop_file_stops_once(job: MicroJob, run: MicroRun) -> None:
    start, file = run.step, run.path / "stop"
    with job.start(run.path.name) as ranks:
        ranks.wait_until(lambda: run.step >= start + 2, "a step")
        file.touch()
        _assert_stopped(run, ranks)
    assert run.step > start
    assert not file.exists()


def test_a_stop_file_made_while_loading_stops_once(job: MicroJob, run: MicroRun) -> None:
    file = run.path / "stop"
    run.path.mkdir(parents=True, exist_ok=True)
    file.touch()
    try:
        with job.start(run.path.name) as ranks:
            _assert_stopped(run, ranks)
        assert not file.exists()
    finally:
        file.unlink(missing_ok=True)


def test_after_all_stops_the_run_ends_as_if_undisturbed(
    job: MicroJob, run: MicroRun, undisturbed: MicroRun
) -> None:
    assert run.step < STEPS, "the stops came too late to be any; make the run longer"
    job.finish(run.path.name)
    run.assert_equals(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=ALSO)])
def test_a_comparison_passes_a_stop_on_to_its_training(
    job: MicroJob, number: signal.Signals
) -> None:
    command = ["-m", "job.compare", "--config", "critic.yaml", "--unfreeze", "0", "1"]
    command += ["--override", *SETTINGS, "run.name=compared-${training.num_unfrozen_layers}"]
    run = job.run("compared-0")
    start = run.step
    with running(command, 1, job.folder) as ranks:
        ranks.wait_until(lambda: run.step >= start + 2, "a step")
        ranks.signal(number)
        _assert_stopped(run, ranks)
    assert not job.run("compared-1").path.exists()


# While rank 0 makes trunk and token cache alone


def _scratch(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_dir()]


def test_a_stop_while_the_trunk_is_made_leaves_nothing_half_made(tmp_path: Path) -> None:
    job = MicroJob.prepare(tmp_path, "training.max_steps=2")
    recipe = tmp_path / "pretrain.yaml"
    short = recipe.read_text()
    recipe.write_text(short.replace("max_steps: 5", "max_steps: 100000"))
    with job.start("run") as ranks:
        ranks.wait_until(lambda: list(tmp_path.glob(".trunk.*/tokenizer.json")), "pre-training")
        time.sleep(0.5)
        ranks.signal(signal.SIGUSR2)
        _assert_stopped(job.run("run"), ranks)
    assert not _scratch(tmp_path)
    assert not (tmp_path / "trunk").exists()
    recipe.write_text(short)
    assert job.finish("run").step == 2


def test_a_stop_while_data_is_tokenised_leaves_nothing_half_made(tmp_path: Path) -> None:
    job = MicroJob.prepare(tmp_path, "training.max_steps=2")
    cache, trunk = tmp_path / "cache", tmp_path / "trunk"
    with job.start("large", "data.arithmetic.train_examples=1000000") as ranks:
        ranks.wait_until(lambda: trunk.exists() and _scratch(cache), "tokenising")
        ranks.signal(signal.SIGTERM, [0])
        _assert_stopped(job.run("large"), ranks)
    assert not _scratch(tmp_path)
    assert job.finish("small").step == 2


def test_a_stop_of_a_rank_that_waits_for_the_trunk_comes_after_it(tmp_path: Path) -> None:
    job = MicroJob.prepare(tmp_path, "training.max_steps=2")
    with job.start("run") as ranks:
        ranks.wait_until(lambda: list(tmp_path.glob(".trunk.*")), "pre-training")
        ranks.signal(signal.SIGTERM, [1])
        _assert_stopped(job.run("run"), ranks)
    assert not _scratch(tmp_path)
    assert (tmp_path / "trunk/params.json").exists()
    assert job.finish("run").step == 2
