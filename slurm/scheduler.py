"""Slurm's client commands, and what they say of a job. Works without accounting."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from job.common.errors import Ending, Exit, first_line
from slurm.cluster import time_limit_seconds

_PATIENCE_SECONDS = 120  # a client gives up by itself within a minute
AWAY = re.compile(
    "Unable to contact slurm controller|Connection refused|Socket timed out|Zero Bytes|"
    "Communication connection failure|Transport endpoint|backup controller in standby|"
    "configuration (source|file)|establish_config_source|fetch config|resolve_ctls",
    re.IGNORECASE,
)
_UNKNOWN = re.compile("Invalid job id", re.IGNORECASE)
_MISSING = ("", "None", "(null)", "N/A", "Unknown")
# What Slurm tells of the job that a command runs in; a new job must not inherit it.
_OF_A_JOB = re.compile("(SLURM|SLURMD|SRUN|SBATCH|SALLOC|PMI)_")
_FORMS = {"SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}  # seconds; whole lists of elements
# Of a shell outside of any job: what sbatch and srun would follow rather than what the script says.
_RIVALS = re.compile(
    r"""SBATCH_(ACCOUNT|ARRAY_INX|CONSTRAINT|CONTAINER|CPUS_PER_\w+|ERROR|GPUS\w*|GRES|INPUT|JOB_NAME
    |MEM_PER_\w+|(NO_)?REQUEUE|OPEN_MODE|OUTPUT|OVERCOMMIT|PARTITION|QOS|SIGNAL|TIMELIMIT
    |TRES_PER_TASK|WAIT)$
    |SRUN_\w+$
    |SLURM_(CPU_BIND\w*|CPUS_PER_\w+|EXPORT_ENV|GPUS\w*|GRES|JOB_NAME|JOB_NUM_NODES|KILL_BAD_EXIT
    |MEM_PER_\w+|NNODES|NPROCS|NTASKS\w*|OPEN_MODE|OVERCOMMIT|STD\w+MODE|TIMELIMIT|TRES_PER_TASK
    |WAIT)$""",
    re.VERBOSE,
)
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
            encoding="utf-8",
            errors="replace",  # names and comments of other jobs
            timeout=_PATIENCE_SECONDS,
            env=outside_environment(os.environ) | _FORMS,
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
    """An environment in which a job is only what its script says.

    It lacks what Slurm has set for the job that this process may be part of, or what is set aside.
    """
    left_out = set_aside(environment)
    if "SLURM_JOB_ID" in environment:
        left_out = [k for k in environment if k not in _KEPT and _OF_A_JOB.match(k)]
    return {k: v for k, v in environment.items() if k not in left_out}


def set_aside(environment: Mapping[str, str]) -> list[str]:
    """The variables of a user or site that would change what profile and options say."""
    if "SLURM_JOB_ID" in environment:
        return []
    return [name for name, value in environment.items() if value and _RIVALS.match(name)]


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
    return parse_job(job_id, _show(job_id))


def _show(job_id: str) -> str:
    """What Slurm says of a job, or of all elements of an array; nothing if it knows none."""
    try:
        return client("scontrol", "show", "job", "-o", job_id)
    except Refused as refused:
        if _UNKNOWN.search(str(refused)):
            return ""
        raise ControllerAway(f"scontrol show job {job_id}: {refused}") from None


def show_jobs(job_ids: Sequence[str]) -> dict[str, Job]:
    """The jobs among these that the controller knows; it is asked once for an array's elements.

    Raises:
        ControllerAway: it cannot be asked.
    """
    jobs: dict[str, Job | None] = {}
    for array, elements in groupby(sorted(set(job_ids)), lambda job_id: job_id.partition("_")[0]):
        several = list(elements)
        if len(several) == 1:
            jobs[several[0]] = show_job(several[0])
        else:
            jobs |= _of_array(_show(array), several)
    return {job_id: job for job_id, job in jobs.items() if job is not None}


def _of_array(text: str, job_ids: Sequence[str]) -> dict[str, Job | None]:
    """The elements of an array: one line for each that runs, and one for all that wait."""
    tasks = {line: _tasks(_fields(line).get("ArrayTaskId", "")) for line in text.splitlines()}
    found: dict[str, Job | None] = {}
    for job_id in job_ids:
        number = int(job_id.partition("_")[2])
        line = next((line for line, numbers in tasks.items() if number in numbers), "")
        found[job_id] = parse_job(job_id, line)
    return found


def _tasks(expression: str) -> set[int]:
    """The numbers in 0,2-4%1 as Slurm writes an array's elements."""
    numbers: set[int] = set()
    for part in expression.partition("%")[0].split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            first, last, step = (int(n) if n else None for n in match.groups())
            numbers |= set(range(first or 0, (last or first or 0) + 1, step or 1))
    return numbers


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
