"""GPUs of several generations: what they can compute, and a sentence where they cannot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from micro_job import MicroRun, write_job

from fake_cuda.runtime import FakeCuda, Gpu
from job.training.pretraining import ensure_trunk

pytestmark = pytest.mark.all

SETTINGS = ("training.max_steps=2", "training.micro_batch_tokens=256")
UNFIT_NODE = 71
BF16, FLOAT32 = (f"distributed.fsdp.mixed_precision={mixed}" for mixed in ("true", "false"))
TRAIN = ("-m", "job.train", "--config", "critic.yaml", "--override")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generations")
    write_job(folder, SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ensure_trunk(folder / "trunk", "pretrain.yaml")
    return folder


@pytest.mark.parametrize(
    ("capability", "precision"), [(80, BF16), (80, FLOAT32), (90, BF16), (75, FLOAT32)]
)
def test_it_trains(cuda: FakeCuda, folder: Path, capability: int, precision: str) -> None:
    name = f"run.name=on-{capability}-{precision[-5:]}"
    done = cuda.run([*TRAIN, name, precision], Gpu(capability), cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert MicroRun(folder / "runs" / name.partition("=")[2]).step == 2


@pytest.mark.parametrize(
    "command",
    [
        TRAIN,
        ("-m", "job.cache", "build", "--config", "critic.yaml", "--override"),
        ("-m", "job.memory", "measure", "--out", "m", "--config", "critic.yaml", "--override"),
    ],
    ids=["train", "cache", "memory"],
)
def test_bf16_is_refused_before_capability_8(
    cuda: FakeCuda, folder: Path, command: Sequence[str]
) -> None:
    command = [*command, "run.name=too-old", BF16, "training.prefix_cache=all"]
    done = cuda.run(command, Gpu(75), cwd=folder, timeout=300)
    assert done.returncode == UNFIT_NODE, done.stderr[-4000:]
    assert "compute capability 7.5" in done.stderr
    assert "distributed.fsdp.mixed_precision" in done.stderr
