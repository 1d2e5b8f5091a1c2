"""Slurm's clients as scripts that say what a test wants, and a job to be planned without Slurm."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from slurm.record import Attempt, Record
from slurm.submission import Submission, store

# A trunk of seven billion parameters that predicts four tokens, as Meta's params.json has it.
SEVEN_B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "vocab_size": 32000,
    "multiple_of": 256,
    "n_future_tokens": 4,
}
SMALL = {"dim": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 96, "multiple_of": 32}
# `scontrol show partition -o` of Slurm 22.05
PARTITION = (
    "PartitionName={name} AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL "
    "Default={default} QoS=N/A DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO "
    "GraceTime={grace} Hidden=NO MaxNodes=2 MaxTime={limit} MinNodes=0 LLN=NO "
    "MaxCPUsPerNode=UNLIMITED Nodes=critic[5-6] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO "
    "ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode={mode} State=UP TotalCPUs=32 "
    "TotalNodes=2 SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED "
    "MaxMemPerNode=UNLIMITED TRES=cpu=32,mem=125G,node=2,billing=32,gres/gpu=8"
)
ROW = '{"prompt": "1+1=", "response": "2", "reward": 1}\n'  # of a data file
STARTS = (
    "sbatch: Job 55399031 to start at 1795398481 using 1 processors on nodes critic5 in "
    "partition main"
)


def partition(
    name: str, *, default: bool = False, grace: int = 0, mode: str = "OFF", limit: str = "UNLIMITED"
) -> str:
    """What Slurm says of a partition."""
    yes_or_no = "YES" if default else "NO"
    return PARTITION.format(name=name, default=yes_or_no, grace=grace, mode=mode, limit=limit)


@dataclass(frozen=True)
class FakeSlurm:
    """A folder to be a test's whole PATH: what is not put into it is not installed."""

    folder: Path

    def says(self, command: str, stdout: str = "", *, stderr: str = "", code: int = 0) -> None:
        """Let a client print this and end with this code, whatever it is asked."""
        said = f"printf '%s' {shlex.quote(stdout)}; printf '%s' {shlex.quote(stderr)} >&2"
        self.runs(command, f"{said}\nexit {code}")

    def runs(self, command: str, shell: str) -> None:
        """Let a client run these lines, after it has noted how it was called."""
        file, calls = self.folder / command, shlex.quote(str(self._calls))
        file.write_text(f'#!/bin/sh\necho "{command} $*" >> {calls}\n{shell}\n')
        file.chmod(0o755)

    @property
    def _calls(self) -> Path:
        return self.folder / "calls"

    @property
    def calls(self) -> list[str]:
        """The commands so far, with their arguments."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []


def write_inputs(folder: Path, architecture: dict[str, Any] | None = None) -> list[str]:
    """A trunk's architecture and data files; the overrides that name them."""
    trunk = folder / "trunk"
    trunk.mkdir()
    (trunk / "params.json").write_text(json.dumps(architecture or SMALL))
    for name in ("train", "val"):
        (folder / f"{name}.jsonl").write_text(ROW)
    files = {"data.train": "train.jsonl", "data.validation": "val.jsonl"}
    return [f"model.path={trunk}", *(f"{key}={folder / name}" for key, name in files.items())]


def options(**given: Any) -> Namespace:
    """What submit.py's command line gives, all of it left out but this."""
    names = ("gpus", "nodes", "unfreeze", "config", "cluster", "name", "time", "image", "resume")
    left_out = dict.fromkeys((*names, "site", "after")) | {"override": [], "verify": False}
    assert given.keys() <= left_out.keys()
    return Namespace(**left_out | given)


def profile(**changes: Any) -> dict[str, Any]:
    """A cluster profile, resolved, with some entries changed."""
    gpu = {"memory_gb": 85.0, "per_node": 4, "type": "a100"}
    settings: dict[str, Any] = dict.fromkeys(
        ("partition", "account", "qos", "constraint", "image", "scratch")
    )
    settings |= {"gpu": gpu, "time": "24:00:00", "cpus_per_gpu": 8, "memory_per_gpu_gb": 100}
    settings |= {"binds": [], "setup": [], "environment": {}}
    return settings | {"signal_delay_seconds": 120, "max_attempts": 10} | changes


def submission(run: Path, **changes: Any) -> Submission:
    """A submission of one GPU, with some fields changed."""
    fields: dict[str, Any] = {
        "cluster": "a100-80gb",
        "profile": profile(),
        "gpus": 1,
        "nodes": 1,
        "name": run.name,
        "folder": str(run / "slurm"),
        "cwd": str(run.parent),
        "python": "python",
    }
    return Submission(**fields | changes)


def submitted(run: Path, inputs: list[str], job_id: str | None = "7", **status: Any) -> Record:
    """A run as submit.py leaves it, with this of its own status."""
    record = Record(run)
    record.folder.mkdir(parents=True)
    settings = [*inputs, f"run.dir={run}", "run.name=critic", "checkpoint.every_steps=100"]
    OmegaConf.save(OmegaConf.from_dotlist(settings), record.config)
    store(submission(run), record)
    record.start_status(**{"state": "pending"} | status)
    if job_id is not None:
        record.add_job(job_id)
    return record


def begun(record: Record) -> Attempt:
    """The next attempt at a run, begun."""
    attempt = Attempt.next(record)
    attempt.begin()
    return attempt
