"""The watchdog of a real process: silence ends it, time for which it was suspended does not."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from python_process import python_process

BEATS = """
import sys, time
from pathlib import Path
from job.distributed.watchdog import Watchdog
dog = Watchdog(float(sys.argv[1]), Path("stacks"))
with dog.watching():
    print("ready", flush=True)
    for line in sys.stdin:
        dog.beat()
        print("beaten", flush=True)
"""


@pytest.mark.slow
def test_a_process_that_was_suspended_for_longer_than_its_timeout_goes_on(tmp_path: Path) -> None:
    with python_process(BEATS, "8", folder=tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.send_signal(signal.SIGSTOP)
        time.sleep(11)
        process.send_signal(signal.SIGCONT)
        time.sleep(2)  # with no beat, which a collective that goes on would not give at once
        print("x", file=process.stdin, flush=True)
        assert process.stdout.readline() == "beaten\n"
        process.stdin.close()
        assert process.wait(60) == 0
    assert not (tmp_path / "stacks").exists()


def test_silence_ends_a_process_with_its_stacks(tmp_path: Path) -> None:
    with python_process(BEATS, "1", folder=tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 1
        assert process.stderr is not None
        assert "no progress for 1 s" in process.stderr.read()
    assert "_watch" in (tmp_path / "stacks").read_text()
