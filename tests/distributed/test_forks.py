"""Forks that stand for new processes look like them, from inside and from outside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import PYTHONPATH, THREADS, Forked, fork

pytestmark = pytest.mark.slow

# What a command can see of how it was started.
LOOKS = """
import json, os, signal, sys, threading
from pathlib import Path
print(json.dumps({
    "name": __name__,
    "main": sys.modules["__main__"].__dict__ is globals(),
    "argv": sys.argv,
    "path": sys.path[0],
    "cwd": os.getcwd(),
    "environment": dict(os.environ),
    "threads": len(list(Path("/proc/self/task").iterdir())),
    "leads": os.getpid() == os.getsid(0) == os.getpgid(0),
    "stdin": sys.stdin.read(),
    "open": sorted(x for x in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{x}")),
    "ignored": [n.name for n in signal.Signals if signal.getsignal(n) is signal.SIG_IGN],
    "handled": [n.name for n in signal.Signals if callable(signal.getsignal(n))],
}))
"""
OWN = {"PATH", "LC_CTYPE"}  # what may be there that was not given


def _start(folder: Path, *command: str, **environment: str) -> Forked:
    given = {"OMP_NUM_THREADS": THREADS, "PYTHONPATH": PYTHONPATH, **environment}
    return fork(command, folder, given, folder / "out", folder / "err")


def _script(folder: Path, text: str) -> str:
    (folder / "script.py").write_text(text)
    return "script.py"


@pytest.mark.parametrize("how", ["script", "-m", "-c"])
def test_a_fork_sees_what_a_new_process_sees(tmp_path: Path, how: str) -> None:
    script = _script(tmp_path, LOOKS)
    command = {"script": [script], "-m": ["-m", "script"], "-c": ["-c", LOOKS]}[how]
    command = [*command, "--option", "value"]
    environment = {"OMP_NUM_THREADS": THREADS, "PYTHONPATH": PYTHONPATH, "MINE": "1"}
    assert _start(tmp_path, *command, MINE="1").wait(60) == 0
    ours = json.loads((tmp_path / "out").read_text())
    said = subprocess.check_output(
        [sys.executable, *command],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    theirs = json.loads(said)
    for seen in (ours, theirs):
        seen["environment"] = {k: v for k, v in seen["environment"].items() if k not in OWN}
    assert ours == theirs


def test_a_module_runs_as_the_main_one(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import sys; print(__name__, sys.argv[1:])")
    assert _start(tmp_path, "-m", "own", "x").wait(60) == 0
    assert (tmp_path / "out").read_text() == "__main__ ['x']\n"
    assert not (tmp_path / "err").read_text()


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("import sys; sys.exit(75)", 75, ""),
        ("import os; os._exit(3)", 3, ""),
        ("raise ValueError('bad')", 1, "ValueError: bad"),
        ("import sys; sys.exit('in words')", 1, "in words"),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM, ""),
        ("import os; os.kill(os.getpid(), 2)", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os; os.kill(os.getpid(), 11)", -signal.SIGSEGV, ""),
    ],
)
def test_exit_codes_are_those_of_a_process(tmp_path: Path, text: str, code: int, said: str) -> None:
    process = _start(tmp_path, _script(tmp_path, text))
    assert process.wait(60) == process.returncode == process.poll() == code
    assert (tmp_path / "err").read_text().strip().endswith(said)


def test_what_is_left_to_the_end_of_a_process_is_done(tmp_path: Path) -> None:
    text = "import atexit; atexit.register(print, 'last'); print('first', end=' ')"
    assert _start(tmp_path, _script(tmp_path, text)).wait(60) == 0
    assert (tmp_path / "out").read_text() == "first last\n"


def test_a_fork_that_runs_can_be_waited_for_and_killed(tmp_path: Path) -> None:
    process = _start(tmp_path, _script(tmp_path, "import time; time.sleep(600)"))
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    process.send_signal(signal.SIGTERM)  # to nobody
    assert not Path(f"/proc/{process.pid}").exists()


def test_another_number_of_threads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="OMP_NUM_THREADS"):
        _start(tmp_path, "x.py", OMP_NUM_THREADS="2")


def test_forks_do_not_outlive_the_tests(tmp_path: Path) -> None:
    """A second server, whose starter is killed."""
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(600)")
    text = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from forks import fork
here = Path({str(tmp_path)!r})
environment = os.environ | {{"OMP_NUM_THREADS": "1"}}
print(fork(["sleeps.py"], here, environment, here / "out", here / "err").pid, flush=True)
os.kill(os.getpid(), 9)
"""
    starter = subprocess.run([sys.executable, "-c", text], stdout=subprocess.PIPE, check=False)
    commands = Path(f"/proc/{int(starter.stdout)}/cmdline")
    limit = time.monotonic() + 30
    while commands.exists() and commands.read_bytes():  # empty: a zombie
        assert time.monotonic() < limit, "the fork is still there"
        time.sleep(0.05)
