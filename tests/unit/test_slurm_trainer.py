"""A task's trainer, as a real process: what it writes, what reaches it, and how its end reads."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from job.run.reader import last_lines
from slurm import trainer as trainer_module
from slurm.record import Outcome
from slurm.submission import PROJECT
from slurm.trainer import Trainer, describe, rank_environment, threads

STOPS_WHEN_ASKED = """
import sys, time
from job.common import signals as preemption
preemption.install_handlers()
while preemption.reason() is None:
    time.sleep(0.01)
print("stopped by", preemption.reason())
sys.exit(75)
"""


def _start(tmp_path: Path, command: Sequence[str], **environment: str) -> Trainer:
    return Trainer(command, os.environ | environment, tmp_path, tmp_path / "rank.log")


def _end(trainer: Trainer) -> Outcome:
    assert trainer.wait(20)
    return trainer.outcome(2, "node1")


def _shell(tmp_path: Path, script: str, **environment: str) -> Outcome:
    return _end(_start(tmp_path, ["/bin/sh", "-c", script], **environment))


# Output and surroundings


def test_its_terminal_is_the_log(tmp_path: Path) -> None:
    outcome = _shell(tmp_path, "echo out; echo err >&2; exit 3")
    assert (tmp_path / "rank.log").read_text() == "out\nerr\n"
    assert (outcome.rank, outcome.node, outcome.code) == (2, "node1", 3)
    assert outcome.last_lines == ["out", "err"]


def test_a_log_goes_on_where_it_was(tmp_path: Path) -> None:
    _shell(tmp_path, "echo first")
    assert _shell(tmp_path, "echo second").last_lines == ["first", "second"]


def test_it_runs_in_its_folder_with_its_environment_and_without_input(tmp_path: Path) -> None:
    (tmp_path / "input").write_text("of the supervisor\n")
    own = os.dup(0)
    with (tmp_path / "input").open() as stream:
        os.dup2(stream.fileno(), 0)
    try:
        outcome = _shell(tmp_path, 'pwd; echo "$RANK"; read line || echo "no input"', RANK="2")
    finally:
        os.dup2(own, 0)
        os.close(own)
    assert outcome.last_lines == [str(tmp_path), "2", "no input"]


def test_it_is_waited_for_in_small_portions(tmp_path: Path) -> None:
    trainer = _start(tmp_path, ["/bin/sh", "-c", "until [ -e go ]; do sleep 0.01; done; exit 75"])
    assert not trainer.wait(0.05)
    (tmp_path / "go").touch()
    assert _end(trainer).code == 75


# Signals


@pytest.mark.parametrize("number", trainer_module.STOP_SIGNALS)
def test_a_stop_signal_waits_until_the_trainer_can_hear_it(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-c", STOPS_WHEN_ASKED]
    trainer = _start(tmp_path, command, PYTHONPATH=str(PROJECT))
    trainer.send(number)  # long before the handlers are there
    outcome = _end(trainer)
    assert outcome.code == 75
    assert outcome.last_lines == [f"stopped by {signal.Signals(number).name}"]


def test_stop_signals_do_not_end_what_has_no_handlers_yet(tmp_path: Path) -> None:
    outcome = _shell(tmp_path, "kill -USR2 $$; kill -USR1 $$; kill -TERM $$; echo alive")
    assert (outcome.code, outcome.last_lines) == (0, ["alive"])


def test_other_signals_are_not_held_back(tmp_path: Path) -> None:
    outcome = _shell(tmp_path, "kill -INT $$; echo alive")
    assert (outcome.code, outcome.reason) == (-signal.SIGINT, "killed by SIGINT")


def test_the_supervisor_itself_keeps_hearing_signals(tmp_path: Path) -> None:
    _shell(tmp_path, "true")
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(trainer_module.STOP_SIGNALS)


# How it ended


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (0, "finished"),
        (1, "a crash (exit code 1): ValueError: no"),
        (69, "a crash (exit code 69): ValueError: no"),
        (71, "the node is unfit (exit code 71): ValueError: no"),
        (73, "a newer attempt has taken over (exit code 73): ValueError: no"),
        (75, "stopped on request, with its state saved (exit code 75): ValueError: no"),
        (78, "wrong input or configuration (exit code 78): ValueError: no"),
        (200, "a crash (exit code 200): ValueError: no"),
        (-signal.SIGKILL, "killed by SIGKILL"),
        (-signal.SIGSEGV, "killed by SIGSEGV"),
        (-(signal.SIGRTMIN + 3), f"killed by signal {signal.SIGRTMIN + 3}"),
    ],
)
def test_an_end_in_words(code: int, reason: str) -> None:
    assert describe(code, ["Traceback", "ValueError: no", " "]) == reason


def test_who_said_nothing_is_said_to_have_said_nothing() -> None:
    assert describe(1, []) == "a crash (exit code 1): it said nothing"


def test_where_the_disk_was_full_the_last_error_counts_and_not_half_a_line() -> None:
    lines = ["12:00 ERROR cannot write /run/status.json: No space left on device", "12:01 INFO ste"]
    reason = "input or output failed (exit code 74): " + lines[0]
    assert describe(74, lines) == reason
    assert describe(74, [*lines[1:]]).endswith(lines[1])


@pytest.mark.parametrize(
    "line",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "RuntimeError: CUDA out of memory.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
    ],
)
def test_when_the_gpus_memory_ran_out_the_way_out_is_named(tmp_path: Path, line: str) -> None:
    outcome = _shell(tmp_path, f"echo '{line}'; echo 'rank 2 ends'; exit 1")
    assert outcome.reason.startswith("the GPU's memory ran out: lower training.micro_batch_tokens")
    assert outcome.reason.endswith("rank 2 ends")


def test_memory_that_only_a_checkpoints_copy_lacked_is_no_end() -> None:
    warned = "12:00 WARNING saving a checkpoint failed: rank 0: CUDA error: out of memory"
    assert describe(1, [warned, "ValueError: no"]) == "a crash (exit code 1): ValueError: no"


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("oom_kill 3\n", "oom_kill 4\n", "the host's memory ran out"),
        ("oom_kill 3\n", "oom_kill 3\n", "killed by SIGKILL"),
        ("nothing\n", "nothing\n", "killed by SIGKILL"),
    ],
)
def test_a_kill_for_memory_is_known_by_the_kernels_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, reason: str
) -> None:
    count = tmp_path / "memory.events"
    monkeypatch.setattr(trainer_module, "_memory_events", lambda: [tmp_path / "none", count])
    count.write_text(f"oom 9\n{before}")
    trainer = _start(tmp_path, ["/bin/sh", "-c", f"printf 'oom 9\n{after}' > {count}; kill -9 $$"])
    outcome = _end(trainer)
    assert outcome.code == -signal.SIGKILL
    assert outcome.reason.startswith(reason)


def test_a_failure_beside_a_kill_for_memory_is_described_as_itself() -> None:
    assert describe(1, ["no"], killed_for_memory=True) == "a crash (exit code 1): no"


# The end of a log


def test_of_a_large_log_the_end_is_read(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"\n".join(b"line %d" % k for k in range(200_000)) + b"\n")
    assert last_lines(file) == [f"line {k}" for k in range(199_980, 200_000)]


def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"x" * 1_000_000)
    assert [len(line) for line in last_lines(file)] == [20_000]


def test_bytes_that_are_no_text_are_shown_as_such(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"\xff\xfe\x00caf\xc3\xa9\nlast")
    assert last_lines(file) == ["\ufffd\ufffd\x00caf\u00e9", "last"]


def test_without_a_log_there_are_no_lines(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "none") == []
    assert last_lines(tmp_path) == []


# What it is told


def test_a_rank_is_told_its_place_as_torchrun_does() -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert rank_environment(5, 8, 1, 4) == dict(zip(names, "5814", strict=True))


def test_threads_are_the_tasks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    assert threads() == "7"
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    assert threads() == str(len(os.sched_getaffinity(0)))
