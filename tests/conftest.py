"""What many tests share: small trained critics, and a running Slurm cluster, that in $SLURM_LAB or
one of their own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from budget import Budget
from lab import Lab, LabImpossible
from micro_critic import MicroCritics
from xdist.scheduler import LoadFileScheduling

SECONDS = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "fail where a part takes more CPU seconds than this file plans (tests/budget.json)"
    parser.addoption("--budget", type=Path, metavar="FILE", help=what)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budget(config.getoption("--budget")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _Places(config, log)


class _Places(LoadFileScheduling):
    """Side by side run files, but in one place what shares the image."""

    def _split_scope(self, nodeid: str) -> str:
        container = "tests/container/"
        return container if nodeid.startswith(container) else super()._split_scope(nodeid)


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    if running := os.environ.get("SLURM_LAB"):
        yield Lab.attach(Path(running))
        return
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    try:
        lab = _start(folder)
        request.config.stash[SECONDS] = lab.seconds
        yield lab
        lab.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def critics(tmp_path_factory: pytest.TempPathFactory) -> MicroCritics:
    return MicroCritics.prepare(tmp_path_factory.mktemp("critics"))


def _start(folder: Path) -> Lab:
    try:
        return Lab.start(folder)
    except LabImpossible as reason:
        # A machine of continuous integration that could hold a lab must not pass without one.
        root_on_debian = os.geteuid() == 0 and Path("/etc/debian_version").exists()
        if os.environ.get("CI") == "true" and root_on_debian:
            pytest.fail(str(reason))
        pytest.skip(str(reason))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if seconds := config.stash.get(SECONDS, None):
        terminalreporter.write_line(f"the Slurm lab was up in {seconds:.1f} s")
