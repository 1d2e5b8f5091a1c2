"""What many tests share: small trained critics, and a running Slurm cluster, that in $SLURM_LAB or
one of their own.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from budget import Budget
from lab import Lab, LabImpossible
from micro_critic import MicroCritics
from thinning import mark_beyond
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

# Their asserts show what was compared, as those of tests do.
pytest.register_assert_rewrite(
    "disturbed_runs", "kinds_of_tokenizers", "mirrored_runs", "spoiled_input"
)

SECONDS = pytest.StashKey[float]()
CORES = os.cpu_count() or 1
TESTS = Path(__file__).parent
_WAITING = ("tests/cluster/", "tests/container/")


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "fail where a part takes more CPU seconds than this file plans (tests/budget.json)"
    parser.addoption("--budget", type=Path, metavar="FILE", help=what)


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(Budget(config.getoption("--budget")))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Whether this process of several leaves out a place, since it does not run its tests.

    To collect all of them takes many seconds of each process, most of it for imports.
    """
    if _computes(os.environ.get("PYTEST_XDIST_WORKER", "gw0")):
        return None
    inside = collection_path.is_relative_to(TESTS) and collection_path != TESTS
    place = f"tests/{collection_path.relative_to(TESTS)}/" if inside else ""
    return True if place and not place.startswith(_WAITING) else None


def _computes(worker: str) -> bool:
    """Whether a process ("gw0", "gw1", ...) is one of those of which each core has one."""
    return int(worker.removeprefix("gw")) < CORES


@pytest.hookimpl(tryfirst=True)  # before marks are selected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_beyond(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _Places(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str) -> None:
    """End where a process dies: the others would wait for good for what it has not run."""
    pytest.exit(f"a process of tests died while it ran {crashitem}", 1)


class _Places(LoadFileScheduling):
    """Side by side run files, but in one place what shares the image.

    Tests of the cluster and the image mostly wait, for Slurm's clocks and for the disk. Processes
    beyond one for each core run only these, so that something is there to be computed meanwhile.
    """

    def _split_scope(self, nodeid: str) -> str:
        if "SLURM_LAB" in os.environ and nodeid.startswith(_WAITING):
            return "tests/cluster/"  # its jobs are cancelled between tests
        container = "tests/container/"
        return container if nodeid.startswith(container) else super()._split_scope(nodeid)

    def _check_nodes_have_same_collection(self) -> bool:
        """Whether nobody has collected what the first, whose list is the whole one, has not."""
        collected = self.registered_collections
        first = next(node for node in collected if _computes(node.gateway.id))
        self.registered_collections = {first: collected[first], **collected}
        return all(set(own) <= set(collected[first]) for own in collected.values())

    def schedule(self) -> None:
        super().schedule()
        # else what is done is a share of what the last process to collect has collected
        session: Any = self.config.pluginmanager.get_plugin("session")
        session.testscollected = max(map(len, self.registered_collections.values()))

    def _assign_work_unit(self, node: WorkerController) -> None:
        place = next(self._takes(node), None)
        if place is None:
            node.shutdown()
            return
        self.workqueue.move_to_end(place, last=False)
        super()._assign_work_unit(node)

    def _takes(self, node: WorkerController) -> Iterator[str]:
        """The places left for a process, the best first."""
        waiting = [place for place in self.workqueue if place.startswith(_WAITING)]
        if _computes(node.gateway.id):
            yield from (place for place in self.workqueue if place not in waiting)
        yield from waiting


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
