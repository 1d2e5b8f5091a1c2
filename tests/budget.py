"""What each test costs in CPU seconds, its processes included, and what the parts may cost.

CPU seconds depend less on what else a machine does than times do. They count for a test: those of
its process, of the processes that this one has waited for, and of forks that have ended. What
daemons start for a test (Slurm's, a container engine's) counts for nobody.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest

SLACK = 1.3
_SHOWN = 10
_PROPERTY = "cpu_seconds"


def part(nodeid: str) -> str:
    """The folder below tests/ that a test is in."""
    return nodeid.split("/")[1]


def over(spent: dict[str, float], planned: dict[str, float]) -> list[str]:
    """A line for each part that took more than is planned, slack included."""
    return [
        f"tests/{name} took {seconds:.0f} CPU seconds, and {planned.get(name, 0):.0f} are planned"
        for name, seconds in sorted(spent.items())
        if seconds > SLACK * planned.get(name, 0)
    ]


class Budget:
    """A plugin: measures where tests run; adds up, reports and judges where they are reported."""

    def __init__(self, file: Path | None) -> None:
        self._planned: dict[str, float] | None = None if file is None else _read(file)
        self._file = file
        self._began = 0.0
        self._spent: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self._began = _cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        if call.when == "teardown":
            item.user_properties.append((_PROPERTY, _cpu_seconds() - self._began))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self._spent[report.nodeid] = float(dict(report.user_properties).get(_PROPERTY, 0.0))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._excess() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("CPU seconds")
        for name, seconds in sorted(self._spent.items(), key=lambda x: -x[1])[:_SHOWN]:
            terminalreporter.write_line(f"{seconds:7.1f}  {name}")
        for name, seconds in sorted(self._parts().items()):
            terminalreporter.write_line(f"{seconds:7.1f}  in all of tests/{name}")
        for line in self._excess():
            terminalreporter.write_line(f"FAILED {line} in {self._file}", red=True)

    def _parts(self) -> dict[str, float]:
        parts: dict[str, float] = defaultdict(float)
        for name, seconds in self._spent.items():
            parts[part(name)] += seconds
        return parts

    def _excess(self) -> list[str]:
        return [] if self._planned is None else over(self._parts(), self._planned)


def _read(file: Path) -> dict[str, float]:
    return {name: float(seconds) for name, seconds in json.loads(file.read_text()).items()}


def _cpu_seconds() -> float:
    return sum(os.times()[:4]) + forks.cpu_seconds()
