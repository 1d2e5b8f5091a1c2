"""The trainer of one task: a process, how it is started, and how it ended."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from job.common.errors import GPU_OUT_OF_MEMORY, Exit
from job.common.places import disk
from job.run.reader import last_lines
from slurm.policy import exit_status
from slurm.record import Outcome

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_GPU_OUT_OF_MEMORY = re.compile("|".join(map(re.escape, ("OutOfMemoryError", *GPU_OUT_OF_MEMORY))))
_WARNING = " WARNING "  # as of a checkpoint that could not be copied, after which training went on
_ERROR = re.compile(r"^error: | ERROR ")
_SMALLER = (
    "lower training.micro_batch_tokens, set distributed.fsdp.activation_checkpointing, "
    "unfreeze fewer blocks, or take more GPUs"
)
_MEANINGS: dict[int, str] = {
    Exit.UNFIT_NODE: "the node is unfit",
    Exit.SUPERSEDED: "a newer attempt has taken over",
    Exit.IO_FAILED: "input or output failed",
    Exit.STOPPED: "stopped on request, with its state saved",
    Exit.BAD_INPUT: "wrong input or configuration",
}


class Trainer:
    """A trainer that runs; its terminal is a file."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        self._log = log
        self._kills_before = _out_of_memory_kills()
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                preexec_fn=_before_it_starts,
            )

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after `seconds` at most."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def outcome(self, rank: int, node: str) -> Outcome:
        code, ended = self._process.wait(), time.time()
        lines = last_lines(self._log)
        killed_for_memory = _out_of_memory_kills() > self._kills_before
        reason = describe(code, lines, killed_for_memory=killed_for_memory)
        if code == Exit.IO_FAILED:  # which may have kept the log from saying so
            reason = f"{reason} ({self._log.parent} is on {disk(self._log)})"
        return Outcome(rank, node, code, ended, reason, lines)


def _before_it_starts() -> None:
    # signals wait until the trainer has installed its handlers, and lets them through
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # a supervisor that is killed leaves no trainer that goes on with nobody to bring it back
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def describe(code: int, lines: Sequence[str], *, killed_for_memory: bool = False) -> str:
    """Why a trainer ended, for people."""
    if exit_status(code) == 128 + signal.SIGKILL and killed_for_memory:
        return "the host's memory ran out (killed by the kernel): ask for more, memory_per_gpu_gb"
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"killed by {names.get(-code, f'signal {-code}')}"
    if code == Exit.FINISHED:
        return "finished"
    told = [line.strip() for line in lines if line.strip()]
    if code == Exit.IO_FAILED:  # what comes last may be half a line, on a full disk
        told = [line for line in told if _ERROR.search(line)] or told
    said = told[-1] if told else "it said nothing"
    if any(_GPU_OUT_OF_MEMORY.search(line) and _WARNING not in line for line in lines):
        return f"the GPU's memory ran out: {_SMALLER}. {said}"
    meaning = _MEANINGS.get(code, "a crash")
    return f"{meaning} (exit code {code}): {said}"


def _out_of_memory_kills() -> int:
    """How often the kernel has killed in this task's memory group; 0 where nobody counts."""
    for file in _memory_events():
        try:
            match = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
        except OSError:
            continue
        if match:
            return int(match[1])
    return 0


def _memory_events() -> list[Path]:
    """Where the kernel counts, in version 1 and 2 of control groups."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if "memory" in controllers.split(","):
            files.append(Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control"))
        elif not controllers:
            files.append(Path(f"/sys/fs/cgroup{path}/memory.events"))
    return files


def rank_environment(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    """The variables by which a trainer knows its place, as torchrun names them."""
    ranks = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_size,
    }
    return {name: str(value) for name, value in ranks.items()}


def threads() -> str:
    """CPU threads of one process: its share of the allocation."""
    return os.environ.get("SLURM_CPUS_PER_TASK") or str(len(os.sched_getaffinity(0)))
