"""Runs submitted to the lab by `slurm/submit.py`, as its user would, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import Lab
from launch import MicroJob
from micro_job import MicroRun
from omegaconf import OmegaConf

SUBMIT = Path(__file__).parents[2] / "slurm" / "submit.py"
LOCALHOST = SUBMIT.parents[1] / "configs" / "cluster" / "localhost.yaml"
# The site file of who runs the tests is none of theirs.
NO_SITE = {"CRITIC_SITE": "", "XDG_CONFIG_HOME": "/nowhere"}
_POLL_SECONDS = 0.1


def submit(
    lab: Lab, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Call submit.py in the environment of a login node, or in another one."""
    ours = os.environ | lab.environment | NO_SITE
    env = ours if environment is None else dict(environment)
    command = [sys.executable, str(SUBMIT), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@dataclass(frozen=True)
class Submitted:
    """A run in the lab."""

    lab: Lab
    path: Path

    @property
    def results(self) -> MicroRun:
        return MicroRun(self.path)

    @property
    def status(self) -> dict[str, Any]:
        """What `submit.py status --json` says."""
        done = submit(self.lab, "status", str(self.path), "--json", cwd=self.path.parent)
        assert done.returncode in (0, 1), done.stderr
        return dict(json.loads(done.stdout)[0])

    @property
    def job_id(self) -> str:
        return (self.path / "slurm" / "jobs").read_text().split()[-1]

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = (self.path / "slurm" / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def command(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        """A subcommand of submit.py on this run; `--resume` is one too."""
        return submit(self.lab, name, str(self.path), *options, cwd=self.path.parents[1])

    @property
    def attempts(self) -> list[Path]:
        """The folders of its starts on nodes, the oldest first."""
        folders = (self.path / "slurm" / "attempts").glob("*")
        return sorted(folders)

    @property
    def queue(self) -> str:
        """Its job's state and reason as squeue shows them; empty if it is not there."""
        return self.lab.run("squeue", "-h", "-j", self.job_id, "-o", "%T %r", check=False).strip()

    def trainers(self) -> dict[int, dict[str, str]]:
        """The environments of its trainers that run now, by process id."""
        config = str(self.path / "slurm" / "config.yaml").encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().split(b"\0")
                if config in command and b"job.train" in command:
                    pairs = (folder / "environ").read_text(errors="replace").split("\0")
                    found[int(folder.name)] = dict(p.split("=", 1) for p in pairs if "=" in p)
        return found

    def send(self, number: signal.Signals) -> None:
        """Send a signal to its trainers alone, as Slurm would not."""
        for pid in self.trainers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def freeze_when(self, condition: Callable[[], object], what: str, seconds: float = 90) -> None:
        """Halt its trainers (until SIGCONT, which Slurm sends too) while `condition` holds."""
        limit = time.monotonic() + seconds
        while True:
            left = limit - time.monotonic()
            self.wait_until(condition, what, left, poll=0.002)
            self.send(signal.SIGSTOP)
            time.sleep(0.05)  # what a thread has begun in the kernel ends first
            if condition():
                return
            self.send(signal.SIGCONT)

    def freeze_at(self, step: int) -> None:
        self.freeze_when(lambda: self.results.step >= step, f"step {step}")

    def count(self, event: str) -> int:
        return sum(one["event"] == event for one in self.events)

    def wait_until(
        self,
        condition: Callable[[], object],
        what: str,
        seconds: float = 90,
        poll: float = _POLL_SECONDS,
    ) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, f"{seconds:.0f} s without: {what}\n{self.describe()}"
            time.sleep(poll)

    def wait_for_step(self, step: int, seconds: float = 90) -> None:
        self.wait_until(lambda: self.results.step >= step, f"step {step}", seconds)

    def wait_for(self, state: str, seconds: float = 120) -> dict[str, Any]:
        """Its status, once the run has come to this end and Slurm has cleaned up."""
        file = self.path / "slurm" / "status.json"

        def ended() -> bool:
            return json.loads(file.read_text()).get("state") == state

        self.wait_until(ended, f"the state {state}", seconds)
        self.wait_until(
            lambda: not self.lab.run("squeue", "-h", "-j", self.job_id, check=False),
            "its job's end",
            30,
        )
        return self.status

    def describe(self) -> str:
        """Everything that helps to see why a test fails."""
        folder = self.path / "slurm"
        files = [folder / "status.json", folder / "events.jsonl"]
        files += sorted(folder.glob("*_log.out")) + sorted(folder.glob("attempts/*/rank-*.log"))
        parts = [
            f"--- {file.relative_to(self.path)}\n{file.read_text(errors='replace')[-2500:]}"
            for file in files
            if file.exists()
        ]
        return "\n".join([self.lab.run("squeue", check=False), *parts])


@dataclass(frozen=True)
class ClusterJob:
    """A small critic's configuration in a folder, to be trained in the lab or right here."""

    lab: Lab
    micro: MicroJob

    @classmethod
    def prepare(cls, lab: Lab, folder: Path, *settings: str) -> ClusterJob:
        return cls(lab, MicroJob.prepare(folder, *settings))

    @property
    def folder(self) -> Path:
        return self.micro.folder

    def profile(self, **changes: Any) -> str:
        """The test cluster's profile with some entries changed, as a file; partition="low"."""
        content = OmegaConf.merge(OmegaConf.load(LOCALHOST), changes)
        file = self.folder / f"profile-{time.time_ns()}.yaml"
        OmegaConf.save(content, file)
        return str(file)

    def arguments(
        self, *options: str, settings: tuple[str, ...] = (), **profile: Any
    ) -> tuple[str, ...]:
        """What submit.py is told."""
        options = (*options, "--config", "critic.yaml", "--cluster", self.profile(**profile))
        return (*options, "--json", "--override", *self.micro.settings, *settings)

    def submit(
        self,
        *options: str,
        settings: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        **profile: Any,
    ) -> Submitted:
        """Submit a run (or a sweep: then the path is its folder)."""
        arguments = self.arguments(*options, settings=settings, **profile)
        done = submit(self.lab, *arguments, cwd=self.folder, environment=environment)
        assert done.returncode == 0, done.stderr + done.stdout
        return Submitted(self.lab, Path(json.loads(done.stdout)["run"]))

    def preempt(self, seconds: float = 1, nodes: int = 2) -> None:
        """Have a job of higher priority take all of the nodes for a while."""
        wrap = f"--wrap=sleep {seconds}"
        command = ("sbatch", "--parsable", "-p", "high", "--exclusive", "-o", "/dev/null")
        self.lab.run(*command, f"-N{nodes}", wrap)
