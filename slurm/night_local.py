"""Entries on this machine, one after the other, without Slurm."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from job.common.errors import Exit
from job.nightly.matrix import Kind
from job.run.reader import last_lines
from slurm.night_jobs import command_of, execute, tell_to_stop
from slurm.night_plan import NightRun
from slurm.record import Record
from slurm.submission import Submission
from slurm.trainer import STOP_SIGNALS, Trainer, describe, rank_environment, threads

_MOST_ATTEMPTS = 3


def run_here(run: NightRun) -> str:
    """Run one entry to its end; how it ended, for people."""
    assert run.plan is not None
    record, submission = Record(run.path), run.plan.submission
    if run.entry.kind is not Kind.train:
        execute(record, command_of(run), submission)
    else:
        _train(run, record, submission)
    return str(record.status().get("reason"))


def _train(run: NightRun, record: Record, submission: Submission) -> None:
    """Train, and where a stop was asked for, again."""
    record.set_status(state="running")
    for _ in range(_MOST_ATTEMPTS):
        record.add_event("started")
        codes, reason = _attempt(run, record, submission)
        record.add_event("ended", reason=reason)
        if set(codes) != {Exit.STOPPED}:
            break
    done = not any(codes)
    record.set_status(state="finished" if done else "failed", reason=reason)


def _attempt(run: NightRun, record: Record, submission: Submission) -> tuple[list[int], str]:
    """One attempt of all ranks: their exit codes, and why the first that failed has."""
    world = run.entry.gpus * run.entry.nodes
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    shared |= {"OMP_NUM_THREADS": str(max(1, int(threads()) // world))}
    words = submission.train_command(str(record.config))
    trainers, logs = [], [record.folder / f"rank-{rank:05}.log" for rank in range(world)]
    for rank, log in enumerate(logs):
        given = shared | submission.environment | rank_environment(rank, world, rank, world)
        environment = submission.task_environment(given)
        trainers.append(Trainer(words, environment, Path(submission.cwd), log))
    if run.entry.stop_at is not None:
        _stop_later(record, run.entry.stop_at, trainers)
    codes = [_wait(trainer, rank) for rank, trainer in enumerate(trainers)]
    return codes, _why(codes, logs)


def _stop_later(record: Record, step: int, trainers: Sequence[Trainer]) -> None:
    def send() -> None:
        for trainer in trainers:
            trainer.send(STOP_SIGNALS[0])

    arguments = (record, step, send)
    threading.Thread(target=tell_to_stop, args=arguments, daemon=True).start()


def _wait(trainer: Trainer, rank: int) -> int:
    while not trainer.wait(1):
        pass
    return trainer.outcome(rank, "").code


def _why(codes: Sequence[int], logs: Sequence[Path]) -> str:
    rank = next((rank for rank, code in enumerate(codes) if code), 0)
    return f"rank {rank}: {describe(codes[rank], last_lines(logs[rank]))}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
