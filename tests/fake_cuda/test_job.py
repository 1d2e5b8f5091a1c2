"""The whole job under torch's CUDA wheel: training, stopping, going on, scoring, exporting.

Nothing computes, so that losses are zeros and weights stay what was read; what is shown is that
every call which the job makes of CUDA, NCCL and FSDP on a GPU can be made, and that what it reads,
keeps and writes goes through device memory whole.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from launch import free_port
from micro_critic import write_rows
from micro_job import MicroRun, write_job
from safetensors.torch import load_file

from fake_cuda.runtime import VERSIONS, FakeCuda, Gpu
from job.model.architecture_file import read_architecture
from job.model.transformer import Trunk
from job.model.weights import load_trunk
from job.training.pretraining import ensure_trunk

pytestmark = pytest.mark.all

STEPS = 8
SETTINGS = (
    "distributed.fsdp.mixed_precision=true",
    f"training.max_steps={STEPS}",
    "training.micro_batch_tokens=256",
    "checkpoint.every_steps=2",
    "evaluation.every_steps=4",
    "logging.every_steps=1",
)
STOPPED = 75
SECONDS = 300
TRAIN = ("-m", "job.train", "--config", "critic.yaml", "--override")


def launched(command: Sequence[str], gpus: int) -> list[str]:
    """A command's arguments of python, as one process or as one for each GPU."""
    if gpus == 1:
        return [*command]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", str(gpus))
    return [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(free_port()), *command]


@dataclass(frozen=True)
class Job:
    """A folder with a configuration and its trunk, made on the CPU."""

    folder: Path

    def run(self, name: str) -> MicroRun:
        return MicroRun(self.folder / "runs" / name)

    def train(
        self, cuda: FakeCuda, name: str, *settings: str, gpus: int = 1
    ) -> subprocess.CompletedProcess[str]:
        command = launched([*TRAIN, f"run.name={name}", *settings], gpus)
        return cuda.run(command, Gpu(count=gpus), cwd=self.folder, timeout=SECONDS)

    def finish(self, cuda: FakeCuda, name: str, *settings: str, gpus: int = 1) -> MicroRun:
        done = self.train(cuda, name, *settings, gpus=gpus)
        assert done.returncode == 0, done.stderr[-6000:]
        run = self.run(name)
        assert run.status["state"] == "finished"
        assert [record["step"] for record in run.records] == list(range(1, STEPS + 1))
        return run


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    write_job(folder, SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ensure_trunk(folder / "trunk", "pretrain.yaml")
    return Job(folder)


@pytest.fixture(scope="module")
def finished(cuda: FakeCuda, job: Job) -> MicroRun:
    return job.finish(cuda, "finished")


def test_a_training_on_one_gpu_ends_with_the_weights_that_it_read(
    job: Job, finished: MicroRun
) -> None:
    assert finished.checkpoints[-1] == STEPS
    trunk = Trunk(read_architecture(job.folder / "trunk"))
    load_trunk(trunk, job.folder / "trunk")
    trained = load_file(finished.path / "critic.safetensors")
    blocks = {n.removeprefix("trunk."): t for n, t in trained.items() if "layers." in n}
    assert blocks
    for name, tensor in blocks.items():
        assert torch.equal(tensor, trunk.get_parameter(name)), name


def test_memory_is_predicted_and_measured_on_the_gpu(finished: MicroRun) -> None:
    memory = json.loads((finished.path / "memory.json").read_text())
    (rank,) = memory["ranks"]
    assert rank["device"] == "Fake A100"
    assert rank["peak"]["allocated"] > rank["baseline"]["allocated"]
    assert memory["predicted"]["outside_bytes"] > 0


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_run_that_was_stopped_between_two_saves_goes_on(
    cuda: FakeCuda, job: Job, gpus: int
) -> None:
    name, saves = f"stopped-{gpus}", "checkpoint.every_steps=10"
    command = launched([*TRAIN, f"run.name={name}", "training.max_steps=400", saves], gpus)
    run, log = job.run(name), job.folder / f"{name}.log"
    environment = cuda.environment(Gpu(count=gpus))
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=job.folder,
            env=environment,
            stderr=stream,
            stdout=stream,
        )
        try:
            _wait_until(run, process, 25, log)
            for rank in _ranks(process.pid, gpus):
                rank.send_signal(signal.SIGUSR2)
            ended = process.wait(SECONDS)
            assert ended == (STOPPED if gpus == 1 else 1), log.read_text()[-4000:]
        finally:
            with suppress(psutil.NoSuchProcess):
                for one in psutil.Process(process.pid).children(recursive=True):
                    one.kill()
            process.kill()
            process.wait()
    at = run.step
    assert run.status["state"] == "stopped"
    assert run.checkpoints[-1] == at >= 25
    done = job.train(cuda, name, f"training.max_steps={at + 5}", saves, gpus=gpus)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [record["step"] for record in run.records] == list(range(1, at + 6))


def _ranks(pid: int, gpus: int) -> list[psutil.Process]:
    """The processes that train: this one, or torchrun's."""
    if gpus == 1:
        return [psutil.Process(pid)]
    found = [one for one in psutil.Process(pid).children() if "job.train" in one.cmdline()]
    assert len(found) == gpus
    return found


def _wait_until(run: MicroRun, process: subprocess.Popen[bytes], step: int, log: Path) -> None:
    limit = time.monotonic() + SECONDS
    while run.step < step:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < limit, log.read_text()[-4000:]
        time.sleep(0.05)


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_critic_is_scored(cuda: FakeCuda, job: Job, finished: MicroRun, gpus: int) -> None:
    rows = [{"prompt": f"{a}+1?", "response": f"{a}+1={a + 1};A{a + 1}"} for a in range(6)]
    data = write_rows(job.folder / "rows.jsonl", rows)
    out = job.folder / f"values-{gpus}.jsonl"
    command = ["-m", "job.score", "--critic", str(finished.path), "--data", str(data)]
    command = launched([*command, "--out", str(out)], gpus)
    done = cuda.run(command, Gpu(count=gpus), cwd=job.folder, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(out.read_text().splitlines()) == len(rows)


@pytest.mark.parametrize("form", ["token-classification", "delta"])
def test_it_is_exported(cuda: FakeCuda, job: Job, finished: MicroRun, form: str) -> None:
    _export(cuda, job, finished, form)


def _export(cuda: FakeCuda, job: Job, run: MicroRun, form: str) -> None:
    out = job.folder / f"{run.path.name}-{form}"
    command = ["-m", "job.export", "--critic", str(run.path), "--format", form]
    done = cuda.run([*command, "--out", str(out)], cwd=job.folder, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert any(out.glob("*.safetensors"))


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "REPLICATE_FROZEN"])
def test_two_ranks_train_save_twice_go_on_and_are_exported(
    cuda: FakeCuda, job: Job, strategy: str
) -> None:
    """A real NCCL process group, on an NCCL that sends nothing."""
    sharding = f"distributed.fsdp.sharding_strategy={strategy}"
    name = f"two-{strategy}"
    half = job.train(cuda, name, sharding, "training.max_steps=4", gpus=2)
    assert half.returncode == 0, half.stderr[-6000:]
    assert job.run(name).step == 4
    run = job.finish(cuda, name, sharding, gpus=2)
    memory = json.loads((run.path / "memory.json").read_text())
    assert [rank["device"] for rank in memory["ranks"]] == ["Fake A100"] * 2
    assert len({rank["uuid"] for rank in memory["ranks"]}) == 2
    _export(cuda, job, run, "token-classification")


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_every_torch_that_is_allowed_trains_and_saves_twice(job: Job, version: str) -> None:
    run = job.finish(FakeCuda.of(version), f"torch-{version}")
    assert run.checkpoints[-1] == STEPS
