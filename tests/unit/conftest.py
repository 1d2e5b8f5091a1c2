"""What unit tests share: trainings, tokenizers and benchmarks, and what Slurm and NVML answer."""

from __future__ import annotations

import importlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from disturbed_runs import IN_BACKGROUND, crash_before, environment, run_training, workspace
from fake_nvml import FakeNvml, compiled
from fake_slurm import FakeSlurm
from kinds_of_tokenizers import llama_model, sentences
from spoiled_input import (  # noqa: F401 - fixtures
    command,
    pretrain_refused,
    refused,
    tiny_trunk,
    workplace,
)
from tokenizers import Tokenizer as LibraryTokenizer

from job.data.tokenizer import Tokenizer, load_tokenizer, write_bpe_tokenizer
from job.run.directory import RunDirectory
from job.training import checkpoint as checkpoint_module

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="session")
def bench() -> Iterator[Callable[[str], ModuleType]]:
    """Import a benchmark by name; they import each other from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module


@pytest.fixture(scope="session", autouse=True)
def _no_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The site file of who runs the tests is none of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        patch.delenv("CRITIC_SITE", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _roomy_disk() -> Iterator[None]:
    """Checkpoints of 7B, which no test writes, fit on the disk of who runs the tests."""
    real = shutil.disk_usage

    def roomy(path: Path) -> shutil._ntuple_diskusage:
        usage = real(path)
        return usage._replace(free=1 << 50) if usage.total else usage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", roomy)
        yield


@pytest.fixture(autouse=True)
def _no_handler_stays() -> Iterator[None]:
    """What a command under test logs to is that test's stderr, which is closed after it."""
    logger = logging.getLogger("job")
    before = (logger.level, logger.handlers[:])
    yield
    logger.level, logger.handlers = before


@pytest.fixture(scope="session")
def _training_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace(tmp_path_factory.mktemp("trainings"))


@pytest.fixture(scope="session")
def whole(_training_folder: Path) -> RunDirectory:
    """A training of eight steps that nothing disturbed; tests leave it as it is."""
    with environment(_training_folder):
        run_training("whole")
    return RunDirectory(_training_folder / "runs/whole")


@pytest.fixture(scope="session")
def halted(_training_folder: Path) -> RunDirectory:
    """The same training, ended before step 7: with checkpoints at 2, 4 and 6."""
    with environment(_training_folder):
        crash_before(7, "halted")
    return RunDirectory(_training_folder / "runs/halted")


@pytest.fixture
def training_folder(_training_folder: Path, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Work where `whole` and `halted` are, and one thing after the other."""
    caplog.set_level(logging.INFO, "job")
    with environment(_training_folder):
        yield


@pytest.fixture
def saved_in_background(training_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are saved by their own thread, as in earnest."""
    monkeypatch.setattr(checkpoint_module, "_in_background", IN_BACKGROUND)


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    write_bpe_tokenizer(folder, sentences(), 400)
    return folder


@pytest.fixture(scope="session")
def bpe(bpe_folder: Path) -> Tokenizer:
    return load_tokenizer(bpe_folder)


@pytest.fixture(scope="session")
def library(bpe_folder: Path) -> LibraryTokenizer:
    """What `bpe` is in the library of tokenizers."""
    return LibraryTokenizer.from_file(str(bpe_folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Llama's: BPE, byte fallback, no normalisation."""
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    file.write_bytes(llama_model("bpe"))
    return file


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow's, one for all tests: making one takes two seconds."""
    from mlflow import MlflowClient  # takes seconds

    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    MlflowClient(uri).search_experiments()
    return uri


@pytest.fixture
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No job, and no tracking server, of who runs the tests."""
    for name in ("SLURM_PROCID", "SLURM_JOB_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A machine where no Slurm is installed, until a test lets a client speak."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return FakeSlurm(folder)


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def nvml(nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    """NVML's stand-in behind the real bindings, until the test ends."""
    yield from FakeNvml.loaded(nvml_library, tmp_path, monkeypatch)
