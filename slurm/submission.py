"""What Slurm is asked for: the sbatch script by submitit, and its submission."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from job.common.errors import InputError, first_line
from job.common.files import write_atomic
from slurm.cluster import time_limit_seconds
from slurm.record import Record
from slurm.scheduler import AWAY, ControllerAway, Refused, outside_of_jobs

PROJECT = Path(__file__).resolve().parents[1]
# What of a task's own environment a container needs as well.
_INSIDE = re.compile("(MLFLOW|AWS|CUDA|NCCL|GLOO)_|SLURM_JOB_ID$")
# Until Python has handlers of its own a signal would end the task; the supervisor asks Slurm what
# it has missed.
_DEAF = (
    'command -v "$1" >/dev/null || { echo "error: $(hostname) has no $1, the Python that has '
    'submitted: install the project on a file system that all nodes see" >&2; exit 78; }; '
    'trap "" TERM USR1 USR2; exec "$@"'
)
# One that comes a moment before even that ends the task, which is then begun again.
_AGAIN = (
    'srun() { local code; until command srun "$@"; do code=$?; '
    "case $code in 138 | 140 | 143) ;; *) return $code ;; esac; done; }"
)


@dataclass(frozen=True)
class Submission:
    """All that is asked of Slurm for one run, or for each run of a sweep."""

    cluster: str
    profile: dict[str, Any]  # the cluster profile, resolved
    gpus: int  # per node
    nodes: int
    name: str
    folder: str  # of submitit's files
    cwd: str
    image: str | None = None
    binds: list[str] = field(default_factory=list)
    after: str | None = None  # job id that must have ended well
    python: str = sys.executable
    verify: bool = False  # derived files whole, not samples of them

    @property
    def environment(self) -> dict[str, str]:
        return {key: str(value) for key, value in self.profile["environment"].items()}

    @property
    def scratch(self) -> str | None:
        return self.profile["scratch"]

    @property
    def signal_delay_seconds(self) -> int:
        return self.profile["signal_delay_seconds"]

    @property
    def max_attempts(self) -> int:
        return self.profile["max_attempts"]

    @property
    def time_seconds(self) -> float:
        return time_limit_seconds(self.profile["time"])

    def of_one_run(self) -> Submission:
        """The same for a run that is submitted once more by itself."""
        return replace(self, after=None)

    def preflight_command(self, config: str, gpus: int) -> list[str]:
        """How a task looks at its node before it trains; `gpus` of it are the job's."""
        there = gpus if self.profile["gpu"]["memory_gb"] else 0
        scratch = ["--scratch", os.path.expandvars(self.scratch)] if self.scratch else []
        return self.command("preflight", "--config", config, "--gpus", str(there), *scratch)

    def train_command(self, config: str) -> list[str]:
        """How a task starts its trainer."""
        return self.command("train", "--config", config, *["--verify"] * self.verify)

    def command(self, name: str, *arguments: str) -> list[str]:
        """How a task starts a command of the job."""
        if self.image is None:
            return [self.python, "-m", f"job.{name}", *arguments]
        inside = ["--nv", "--containall", "--pwd", self.cwd, *self._binds()]
        return ["apptainer", "run", *inside, self.image, name, *arguments]

    def _binds(self) -> list[str]:
        """Options for the folders inside: the profile's entries as they stand, and paths."""
        given = self.profile.get("binds", ())
        scratch = [] if self.scratch is None else [self.scratch]
        options: list[str] = []
        for bind in [*self.binds, *scratch]:
            path = os.path.expandvars(bind) if bind in (*given, *scratch) else bind
            options += ["--bind", path] if bind in given else _bind_option(path)
        return options

    def task_environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """This task's environment with `given`, and what of it a container lets in."""
        everything = os.environ | dict(given)
        if self.image is None:
            return everything
        inside = {k: v for k, v in everything.items() if k in given or _INSIDE.match(k)}
        # not --env, which takes a comma for a separator
        return everything | {f"APPTAINERENV_{key}": value for key, value in inside.items()}

    def parameters(self) -> dict[str, Any]:
        """The parameters of submitit's executor."""
        profile, gpu = self.profile, self.profile["gpu"]
        wanted = {
            "job_name": self.name,
            "time": int(self.time_seconds // 60) or 1,
            "nodes": self.nodes,
            "ntasks_per_node": self.gpus,
            "gpus_per_node": f"{gpu['type']}:{self.gpus}" if gpu["type"] else self.gpus,
            "cpus_per_task": profile["cpus_per_gpu"],
            "mem": f"{profile['memory_per_gpu_gb'] * self.gpus}G",
            "signal_delay_s": profile["signal_delay_seconds"],
            "dependency": f"afterok:{self.after}" if self.after else None,
            "setup": self._setup(),
            "stderr_to_stdout": True,
            # srun of Slurm 22.05 and later does not take the CPUs of a task from sbatch
            "srun_args": [
                "--export=ALL",  # of the script's environment, where sbatch was to export none
                f"--cpus-per-task={profile['cpus_per_gpu']}",
                "--cpu-bind=cores",
                "--kill-on-bad-exit=0",  # the others report too
                "--wait=0",
            ],
            # a dependency that has failed ends the job in place of leaving it to wait for ever
            "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes"},
        }
        wanted |= {key: profile[key] for key in ("partition", "account", "qos", "constraint")}
        given = {key: value for key, value in wanted.items() if value is not None}
        return given | {"wckey": None}  # submitit's own default, which sites may refuse

    def _setup(self) -> list[str]:
        here = f'export PYTHONPATH={shlex.quote(str(PROJECT))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
        return [*self.profile["setup"], here, _AGAIN]


def _bind_option(path: str) -> list[str]:
    """Apptainer's option that binds a path, whichever signs it has.

    --bind has colons and commas of its own, which no escape brings through in all places; --mount
    (Apptainer 1.0) takes the fields of a line of CSV.
    """
    if not set(path) & set(':,\\"'):
        return ["--bind", path]
    quoted = path.replace('"', '""')
    return ["--mount", f'type=bind,"source={quoted}","destination={quoted}"']


class _Executor(submitit.SlurmExecutor):
    """submitit's, whose script can be looked at where there is no Slurm too."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _executor(submission: Submission) -> _Executor:
    deaf = f"bash -c {shlex.quote(_DEAF)} bash {shlex.quote(submission.python)}"
    executor = _Executor(submission.folder, python=deaf)
    executor.update_parameters(**submission.parameters())
    return executor


def script(submission: Submission, runs: int = 1) -> str:
    """The sbatch script of a run, or of a sweep of several."""
    executor = _executor(submission)
    if runs > 1:
        executor.parameters["map_count"] = runs
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def require_clients() -> None:
    """Raises ControllerAway where Slurm's commands are not installed."""
    if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
        raise ControllerAway(
            f"{missing[0]} is not installed here: run this on a login node of the cluster"
        )


def submit(supervisors: Sequence[Callable[[], str]], submission: Submission) -> list[str]:
    """Submit one job, or an array of several; their ids.

    Raises:
        ControllerAway: there is no Slurm here, or no controller answers.
        Refused: Slurm does not take the job.
    """
    require_clients()
    executor = _executor(submission)
    with outside_of_jobs():
        try:
            return [job.job_id for job in executor.submit_array(supervisors)]
        except FailedSubmissionError as error:  # no id in what sbatch has said
            raise Refused(first_line(error)) from None
        except FailedJobError as error:
            text = _last_line(str(error))
            raise (ControllerAway if AWAY.search(text) else Refused)(text) from None


def _last_line(text: str) -> str:
    said = [line for line in text.splitlines() if "error:" in line]
    return (said or text.splitlines() or [""])[-1].removeprefix("sbatch: error: ")


def store(submission: Submission, record: Record) -> None:
    write_atomic(record.submission, json.dumps(asdict(submission), indent=2) + "\n")


def load(record: Record) -> Submission:
    """What a run was submitted with.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return Submission(**json.loads(record.submission.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        way_out = f"submit the run anew: --config FILE --override run.dir={record.run}"
        raise InputError(f"{record.submission}: cannot be read; {way_out}") from None
