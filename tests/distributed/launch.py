"""Starts a training as several processes on this machine, as a launcher would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from forks import PYTHONPATH, THREADS, Process, fork
from micro_job import CHANGES, MicroRun, write_job

_POLL_SECONDS = 0.001
# Moments that tests want to see, by the names that are renamed at their ends (see `dwell`).
SAVE = r"/\.step-"
COMMIT_NOTED = r"/status\.json$"
END = r"/critic\.safetensors$"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Ranks:
    """The processes of one job, and the file that each writes its stderr to."""

    processes: list[Process]
    logs: list[Path]

    def wait(self, seconds: float = 300) -> list[int]:
        """Every rank's exit code, once all have ended by themselves."""
        limit = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            try:
                process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} is still there\n{self.log()}") from None
        return [process.returncode for process in self.processes]

    def signal(self, number: int, ranks: Iterable[int] | None = None) -> None:
        """Send a signal to some ranks, or to all; those that have ended get none."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            self.processes[rank].send_signal(number)

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Return as soon as `condition` holds; no rank may end before."""
        limit = time.monotonic() + seconds
        while not condition():
            codes = [process.poll() for process in self.processes]
            assert codes == [None] * len(codes), f"ended ({codes}) before: {what}\n{self.log()}"
            assert time.monotonic() < limit, f"{seconds:.0f} s without: {what}\n{self.log()}"
            time.sleep(_POLL_SECONDS)

    def freeze_when(self, condition: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Halt all ranks (until SIGCONT) at a moment at which `condition` holds."""
        while True:
            self.wait_until(condition, what, seconds)
            self.signal(signal.SIGSTOP)
            self.wait_until(lambda: all(_is_halted(p.pid) for p in self.processes), "a halt", 10)
            if condition():
                return
            self.signal(signal.SIGCONT)

    def log(self) -> str:
        """The end of what each rank has written to stderr."""
        ends = [log.read_text(errors="replace")[-3000:] for log in self.logs]
        return "\n".join(f"rank {rank}: {end}" for rank, end in enumerate(ends))

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def _is_halted(pid: int) -> bool:
    """Whether every thread of a process is stopped; a thread in a system call comes later."""
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.rpartition(")")[2].split()[0] in "TZ" for stat in stats)


def start_process(
    command: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    stdout: Path,
    stderr: Path,
    *,
    forked: bool = True,
) -> Process:
    """Start a Python command: in a fork that has made the imports, or as a shell would."""
    if forked:
        return fork(command, cwd, environment, stdout, stderr)
    with stdout.open("ab") as out, stderr.open("ab") as err:
        words = [sys.executable, *command]
        return subprocess.Popen(words, cwd=cwd, env=environment, stdout=out, stderr=err)


def start_ranks(
    command: Sequence[str],
    world: int,
    cwd: Path,
    *,
    per_node: int | None = None,
    environment: Mapping[str, str] | None = None,
    forked: bool = True,
) -> Ranks:
    """Start a Python command on `world` ranks over gloo on loopback."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(per_node or world),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": THREADS,
        "PYTHONPATH": PYTHONPATH,
    }
    folder = cwd / "logs"
    folder.mkdir(exist_ok=True)
    started = Ranks([], [])
    for rank in range(world):
        log = folder / f"{time.time_ns()}.rank-{rank}.log"
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        env = os.environ | shared | own | dict(environment or {})
        process = start_process(command, cwd, env, log, log, forked=forked)
        started.processes.append(process)
        started.logs.append(log)
    return started


@contextmanager
def running(
    command: Sequence[str],
    world: int,
    cwd: Path,
    *,
    per_node: int | None = None,
    environment: Mapping[str, str] | None = None,
    forked: bool = True,
) -> Iterator[Ranks]:
    """Ranks for the length of the body; what is left of them then is killed."""
    ranks = start_ranks(
        command, world, cwd, per_node=per_node, environment=environment, forked=forked
    )
    try:
        yield ranks
    finally:
        ranks.end()


def run_ranks(
    command: Sequence[str], world: int, cwd: Path, *, per_node: int | None = None
) -> None:
    """Run a Python command on `world` ranks over gloo on loopback; all must end well."""
    with running(command, world, cwd, per_node=per_node) as ranks:
        codes = ranks.wait()
        assert codes == [0] * world, ranks.log()


def ended(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python command in a fork, once it has ended, and what it has said."""
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        environment = os.environ | {"OMP_NUM_THREADS": THREADS, "PYTHONPATH": PYTHONPATH}
        code = start_process(command, cwd, environment, out, err).wait(300)
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


# A training of seconds, to be interrupted


@dataclass(frozen=True)
class MicroJob:
    """A small critic's configuration in a folder; its runs share trunk and token cache."""

    folder: Path
    settings: tuple[str, ...]

    @classmethod
    def prepare(cls, folder: Path, *settings: str) -> MicroJob:
        write_job(folder, CHANGES, ["architecture.n_layers=3"])
        return cls(folder, settings)

    def run(self, name: str) -> MicroRun:
        return MicroRun(self.folder / "runs" / name)

    @contextmanager
    def start(
        self,
        name: str,
        *settings: str,
        world: int = 2,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        forked: bool = True,
        dwell: str = "",
    ) -> Iterator[Ranks]:
        """An attempt at run `name`; it waits a little before it renames what matches `dwell`."""
        if dwell:
            environment = {**(environment or {}), "DWELL_AT_RENAME": dwell}
        command = ["-m", "job.train", "--config", "critic.yaml", *options, "--override"]
        command += [f"run.name={name}", *self.settings, *settings]
        started = running(command, world, self.folder, environment=environment, forked=forked)
        with started as ranks:
            yield ranks

    def finish(self, name: str, *settings: str, world: int = 2) -> MicroRun:
        """Run to the end, or from where it stands to the end."""
        with self.start(name, *settings, world=world) as ranks:
            codes = ranks.wait()
            assert codes == [0] * world, ranks.log()
        return self.run(name)
