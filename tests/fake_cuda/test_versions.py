"""The older torch that are allowed, without a GPU: the fast tests, and a training that saves twice.

Their CUDA wheels are those that any index has; without GPUs they are used as builds for the CPU.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from micro_job import MicroRun, write_job

from fake_cuda.runtime import VERSIONS, FakeCuda, Gpu

pytestmark = pytest.mark.all

ROOT = Path(__file__).parents[2]
SECONDS = 3600
Run = Callable[[Sequence[str], Path], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module", params=VERSIONS[1:])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python with that torch, on a machine that has neither a GPU nor NVML."""
    cuda = FakeCuda.of(request.param)
    libraries = tmp_path_factory.mktemp("libraries")
    for library in cuda.libraries.glob("lib*"):
        if not library.name.startswith("libnvidia-ml"):
            (libraries / library.name).symlink_to(library.resolve())
    environment = {"LD_LIBRARY_PATH": str(libraries)}

    def started(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        return cuda.run(command, Gpu(count=0), env=environment, cwd=cwd, timeout=SECONDS)

    ask = "import torch; print(torch.__version__, torch.cuda.is_available())"
    found = started(["-c", ask], ROOT)
    assert found.stdout.startswith(request.param), found.stderr
    assert found.stdout.split()[1] == "False"
    return started


def test_a_training_saves_more_than_once_and_goes_on(run: Run, tmp_path: Path) -> None:
    write_job(tmp_path, ["training.max_steps=6", "checkpoint.every_steps=2"])
    train = ["-m", "job.train", "--config", "critic.yaml", "--override"]
    for steps in (4, 6):
        done = run([*train, f"training.max_steps={steps}"], tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        trained = MicroRun(tmp_path / "runs/critic")
        assert (trained.status["state"], trained.step) == ("finished", steps)
        assert trained.checkpoints == [steps - 2, steps]


def test_the_fast_tests_pass(run: Run) -> None:
    fast = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not all", "tests"]
    done = run(fast, ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
