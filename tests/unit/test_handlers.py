"""How a process ends: at the first Ctrl-C and the second, whatever it is doing, and by itself."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from python_process import python_process

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    {*ROOT.glob("job/*.py"), *ROOT.glob("job/*/__main__.py")} - {ROOT / "job/__init__.py"}
)
HEARS = """
import signal, sys, time
signal.signal(signal.SIGINT, {before})
from job.common.signals import install_handlers, reason
install_handlers()
print("ready", flush=True)
{body}
"""
# Native code that comes back to no handler: the main thread waits for a lock that it holds.
HANGS = "import threading; lock = threading.Lock(); lock.acquire(); {}; lock.acquire()"
FLAG = "while reason() is None: time.sleep(0.01)\nprint(reason(), flush=True)\ntime.sleep(60)"


def _process(
    body: str, before: str = "signal.default_int_handler"
) -> AbstractContextManager[subprocess.Popen[str]]:
    return python_process(HEARS.format(body=body, before=before))


def _next_line(stream: object) -> str:
    return next(line for line in stream if line.strip())  # type: ignore[attr-defined]


def test_the_first_ctrl_c_asks_to_stop_and_the_second_ends_at_once() -> None:
    with _process(FLAG) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"
        assert "Ctrl-C again" in _next_line(process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT


def test_the_second_ctrl_c_ends_a_process_that_hangs_in_native_code() -> None:
    blocked = "signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {9, 19})"
    with _process(HANGS.format(blocked)) as process:
        process.send_signal(signal.SIGINT)
        assert "Ctrl-C again" in _next_line(process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT


def test_a_process_that_a_shell_keeps_from_ctrl_c_does_not_hear_it() -> None:
    with _process("time.sleep(0.3); print(reason())", "signal.SIG_IGN") as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "None\n"
        assert process.returncode == 0


@pytest.mark.parametrize("run", ["run_command", "run_and_leave"])
def test_a_command_that_saves_nothing_ends_in_one_line(run: str) -> None:
    code = (
        f"import signal, time; from job.common.errors import {run} as run; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "run(lambda: (print('ready', flush=True), time.sleep(60)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "ended by Ctrl-C\n"
        assert process.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_command_leaves_without_taking_the_interpreter_down(file: Path) -> None:
    """Which a thread in torch's native code may abort (pytorch/pytorch#190489)."""
    assert file.read_text().endswith("    run_and_leave(main)\n")


@pytest.mark.slow
def test_a_thread_in_native_code_changes_no_exit_code() -> None:
    """Taking the interpreter down would end a thread that comes back from C++, by an abort."""
    code = (
        "import threading, torch; from job.common.errors import run_and_leave\n"
        "def compute():\n"
        "    while True: (torch.ones(300, 300) @ torch.ones(300, 300)).sum().item()\n"
        "threading.Thread(target=compute, daemon=True).start()\n"
        "run_and_leave(lambda: print('done'))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
