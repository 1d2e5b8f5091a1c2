"""Runs submitted to the lab by `slurm/submit.py`, as its user would, and what they leave."""

from __future__ import annotations

import json
import os
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
_POLL_SECONDS = 0.1


def submit(
    lab: Lab, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Call submit.py in the environment of a login node, or in another one."""
    env = os.environ | lab.environment if environment is None else dict(environment)
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

    def count(self, event: str) -> int:
        return sum(one["event"] == event for one in self.events)

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 90) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, f"{seconds:.0f} s without: {what}\n{self.describe()}"
            time.sleep(_POLL_SECONDS)

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

    def submit(self, *options: str, settings: tuple[str, ...] = (), **profile: Any) -> Submitted:
        """Submit a run (or a sweep: then the path is its folder)."""
        options = (*options, "--config", "critic.yaml", "--cluster", self.profile(**profile))
        overrides = ("--override", *self.micro.settings, *settings)
        done = submit(self.lab, *options, "--json", *overrides, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return Submitted(self.lab, Path(json.loads(done.stdout)["run"]))

    def preempt(self, seconds: float = 1, nodes: int = 2) -> None:
        """Have a job of higher priority take all of the nodes for a while."""
        wrap = f"--wrap=sleep {seconds}"
        command = ("sbatch", "--parsable", "-p", "high", "--exclusive", "-o", "/dev/null")
        self.lab.run(*command, f"-N{nodes}", wrap)
