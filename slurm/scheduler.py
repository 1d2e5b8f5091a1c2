"""Slurm's client commands, and what they say of a job. Works without accounting."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from job.common.errors import Ending, Exit, first_line
from slurm.cluster import time_limit_seconds

_PATIENCE_SECONDS = 120  # a client gives up by itself within a minute
AWAY = re.compile(
    "Unable to contact slurm controller|Connection refused|Socket timed out|Zero Bytes|"
    "Communication connection failure|Transport endpoint|backup controller in standby|"
    "configuration (source|file)",
    re.IGNORECASE,
)
_UNKNOWN = re.compile("Invalid job id", re.IGNORECASE)
_MISSING = ("", "None", "(null)", "N/A", "Unknown")
# What Slurm tells of the job that a command runs in; a new job must not inherit it.
_OF_A_JOB = re.compile("(SLURM|SLURMD|SRUN|SBATCH|SALLOC|PMI)_")
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")


class ControllerAway(Ending):
    """No controller answers, or this machine has no Slurm."""

    code = Exit.UNAVAILABLE


class Refused(Ending):
    """The controller's no; the text is its own."""

    code = Exit.BAD_INPUT


@dataclass(frozen=True)
class Job:
    """What the controller knows of a job; times in seconds since 1970.

    `state` is the state that Slurm gives it, or will when it has cleaned up (`completing`).
    """

    id: str
    state: str
    completing: bool
    reason: str
    restarts: int
    start: float | None
    end: float | None
    nodes: str
    comment: str = ""  # what was written to it

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    @property
    def active(self) -> bool:
        return self.waits or self.state in ("RUNNING", "SUSPENDED", "CONFIGURING", "RESIZING")


@dataclass(frozen=True)
class Partition:
    """What a partition allows, and does when it preempts."""

    name: str
    max_seconds: float
    grace_seconds: int
    preempt_mode: str


def client(*command: str, stdin: str = "") -> str:
    """What a client command prints, to stderr if to nothing else.

    Raises:
        ControllerAway: it is not installed, or no controller answers.
        Refused: it failed, with what it says.
    """
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            env=outside_environment(os.environ) | {"SLURM_TIME_FORMAT": "%s"},
            preexec_fn=_not_stopped,
        )
    except FileNotFoundError:
        raise ControllerAway(
            f"{command[0]} is not installed here: run this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise ControllerAway(f"{command[0]}: no answer in {_PATIENCE_SECONDS} s") from None
    if done.returncode == 0:
        return done.stdout or done.stderr
    if done.returncode < 0:
        raise ControllerAway(f"{command[0]}: killed by signal {-done.returncode}")
    text = (done.stderr.strip() or done.stdout.strip()).removeprefix(f"{command[0]}: error: ")
    raise ControllerAway(f"{command[0]}: {text}") if AWAY.search(text) else Refused(text)


def _not_stopped() -> None:
    # Slurm signals all processes of a step, and a request that is cut in two helps nobody
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def outside_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what Slurm has set for the job that this process may be part of."""
    if "SLURM_JOB_ID" not in environment:
        return dict(environment)
    return {k: v for k, v in environment.items() if k in _KEPT or not _OF_A_JOB.match(k)}


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Submit as if from a login node, for the length of the body."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(outside_environment(before))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def show_job(job_id: str) -> Job | None:
    """A job, or None if the controller does not know it (any more).

    Raises:
        ControllerAway: it cannot be asked.
    """
    try:
        text = client("scontrol", "show", "job", "-o", job_id)
    except Refused as refused:
        if _UNKNOWN.search(str(refused)):
            return None
        raise ControllerAway(f"scontrol show job {job_id}: {refused}") from None
    return parse_job(job_id, text)


def parse_job(job_id: str, text: str) -> Job | None:
    """`scontrol show job -o`, with times in seconds; of an array, the first line is it."""
    line = text.partition("\n")[0]
    before, comment = _commented(line)
    fields = _fields(before)
    if "JobState" not in fields:
        return None
    completing = fields["JobState"] == "COMPLETING"
    return Job(
        id=job_id,
        state=_state_of_completing(fields) if completing else fields["JobState"],
        completing=completing,
        reason=fields.get("Reason", "None"),
        restarts=int(fields.get("Restarts", 0)),
        start=_time(fields.get("StartTime", "")),
        end=_time(fields.get("EndTime", "")),
        nodes=fields.get("NodeList", ""),
        comment=comment,
    )


def _commented(line: str) -> tuple[str, str]:
    """What comes before a job's comment, and the comment, which may hold anything."""
    found = re.match(r"(.* WorkDir=.*?) Comment=(.*?)(?: [A-Za-z/:]+=|$)", line)
    return (found[1], found[2]) if found else (line, "")


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", line))


def _state_of_completing(fields: Mapping[str, str]) -> str:
    """The state behind COMPLETING, which hides it; seen in Slurm's times for each way to end."""
    start, end = _time(fields.get("StartTime", "")), _time(fields.get("EndTime", ""))
    preempted = _time(fields.get("PreemptTime", ""))
    if fields.get("Reason") == "TimeLimit":
        return "TIMEOUT"
    if end is None:  # no limit, and not ended: it will run again
        return "PENDING"
    if preempted is not None and preempted >= end:
        return "PREEMPTED"
    # a job that is requeued is given its whole time anew
    whole = time_limit_seconds(fields.get("TimeLimit", ""))
    return "PENDING" if end - (start or 0) >= whole else "CANCELLED"


def _time(text: str) -> float | None:
    return None if text in _MISSING or not text.isdigit() else float(text)


def requeue(job_id: str) -> None:
    """Let a job run again.

    Raises:
        ControllerAway: it cannot be asked.
        Refused: it will not, and does not wait to run already.
    """
    try:
        client("scontrol", "requeue", job_id)
    except Refused as refused:
        if "pending execution" not in str(refused).lower():
            raise


def exclude_node(job_id: str, node: str) -> None:
    """Keep a waiting job from a node, besides those that it avoids already.

    Where no other node would be left, Slurm would let it wait for ever: then it avoids this one
    alone, or none.
    """
    text = client("scontrol", "show", "job", "-o", job_id)
    before = _fields(text.partition("\n")[0]).get("ExcNodeList", "")
    script = client("scontrol", "write", "batch_script", job_id, "-")
    wanted = [node] if before in _MISSING else [f"{before},{node}", node]
    nodes = next((nodes for nodes in wanted if _leaves_others(script, nodes)), "")
    client("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={nodes}")


def delay(job_id: str, seconds: int, why: str) -> None:
    """Let a waiting job wait for so long at least; Slurm keeps the reason, as its comment."""
    start, comment = f"StartTime=now+{seconds}", f"Comment={first_line(why)}"
    client("scontrol", "update", f"JobId={job_id}", start, comment)


def _leaves_others(script: str, excluded: str) -> bool:
    """Whether a job could run without these nodes; they are given the benefit of the doubt."""
    try:
        client("sbatch", "--test-only", f"--exclude={excluded}", stdin=script)
    except ControllerAway:
        return True
    except Refused:
        return False
    return True


def cancel(job_id: str) -> None:
    client("scancel", job_id)


def show_partition(name: str | None) -> Partition:
    """A partition, or the site's default one.

    Raises:
        ControllerAway: it cannot be asked.
        Refused: there is none of that name.
    """
    for line in client("scontrol", "show", "partition", "-o", *([name] if name else [])).split(
        "\n"
    ):
        fields = _fields(line)
        if name or fields.get("Default") == "YES":
            return Partition(
                fields["PartitionName"],
                time_limit_seconds(fields.get("MaxTime", "")),
                int(fields.get("GraceTime", 0)),
                fields.get("PreemptMode", "OFF"),
            )
    raise Refused("the site has no default partition: name one in the cluster profile")


def expected_start(script: Path) -> str:
    """What the scheduler says of a job that is not submitted: when it would start, and where.

    Raises:
        ControllerAway: it cannot be asked.
        Refused: it would not take the job.
    """
    return client("sbatch", "--test-only", str(script)).strip().removeprefix("sbatch: ")
