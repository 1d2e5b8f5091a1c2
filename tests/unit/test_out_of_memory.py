"""Memory that runs out, of the GPU or for the copy that is saved, ends as it should."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from disturbed_runs import (
    assert_same,
    before_steps,
    log_of,
    logged_steps,
    run_training,
    saved_steps,
)
from torch import Tensor

from job.common.config import load_config
from job.common.errors import Exit, InputError, UnfitNode, exit_code
from job.common.schema import CriticConfig
from job.distributed.world import World
from job.run.directory import RunDirectory
from job.training.checkpoint import SaveError
from job.training.host_copy import HostCopy
from job.training.learner import Learner
from job.training.out_of_memory import out_of_memory_judged

pytestmark = pytest.mark.usefixtures("training_folder")


@pytest.mark.slow
def test_a_copy_for_a_checkpoint_that_fails_costs_only_this_one(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/uncopied")
    update, steps = HostCopy.update, [0]

    def fail_at_six(self: HostCopy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if steps[-1] == 6:
            raise RuntimeError("CUDA error: out of memory")
        return update(self, tensors)

    monkeypatch.setattr(HostCopy, "update", fail_at_six)
    before_steps(monkeypatch, lambda step, _: steps.append(step))
    run_training(run.path.name)
    assert "saving a checkpoint failed: rank 0: CUDA error: out of memory" in log_of(run)
    assert saved_steps(run) == [2, 4, 7, 8]
    assert_same(run, whole)


def test_the_memory_that_saving_needs_is_taken_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places: list[set[int]] = []
    update = HostCopy.update

    def look(self: HostCopy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = update(self, tensors)
        places.append({copy.data_ptr() for copy in copies.values()})
        return copies

    def at_step(step: int, _: Learner) -> None:
        if step == 1:
            assert len(places) == 1

    monkeypatch.setattr(HostCopy, "update", look)
    before_steps(monkeypatch, at_step)
    run_training("reserved", "training.max_steps=2")
    assert len(places) == 2
    assert places[0] == places[1]


def test_too_little_memory_for_saving_ends_a_run_before_its_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: HostCopy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(HostCopy, "update", fail)
    with pytest.raises(SaveError, match=r"no host memory for the copy .* can't allocate") as ended:
        run_training("no-memory")
    assert exit_code(ended.value) is Exit.IO_FAILED
    assert logged_steps(RunDirectory("runs/no-memory")) == []


def _out_of_memory(step: int) -> Callable[[int, Learner], None]:
    def act(current: int, _: Learner) -> None:
        if current == step:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"
            )

    return act


def test_memory_that_runs_out_before_anything_is_saved_is_wrong_input_that_says_what_to_lower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before_steps(monkeypatch, _out_of_memory(2))
    with pytest.raises(InputError) as ended:
        run_training("too-large")
    assert exit_code(ended.value) is Exit.BAD_INPUT
    assert str(ended.value) == (
        "the GPU's memory ran out (Tried to allocate 2.00 GiB): lower training.micro_batch_tokens "
        "(128), set distributed.fsdp.activation_checkpointing, unfreeze fewer blocks than 1 "
        "(training.num_unfrozen_layers), or take more GPUs"
    )


@pytest.mark.usefixtures("saved_in_background")
def test_memory_that_runs_out_after_a_checkpoint_is_a_crash_that_goes_on_from_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before_steps(monkeypatch, _out_of_memory(3))
    with pytest.raises(torch.OutOfMemoryError):
        run_training("too-large-later")
    with pytest.raises(InputError, match="memory ran out"):  # the second attempt comes no further
        run_training("too-large-later")


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "ncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nCuda failure 2 'out of memory'",
    ],
)
def test_memory_that_runs_out_beside_torchs_allocator_is_told_alike(said: str) -> None:
    config = load_config(CriticConfig, "critic.yaml", ["training.micro_batch_tokens=auto"])

    def run_out(text: str) -> None:
        with out_of_memory_judged(config, World(), lambda: False):
            raise RuntimeError(text)

    with pytest.raises(InputError) as ended:
        run_out(said)
    assert str(ended.value) == (
        "the GPU's memory ran out: set distributed.fsdp.activation_checkpointing, unfreeze fewer "
        "blocks than 1 (training.num_unfrozen_layers), or take more GPUs"
    )
    config.training.num_unfrozen_layers = 0
    with pytest.raises(InputError, match=r"the GPU's memory ran out: take more GPUs$"):
        run_out(said)
    with pytest.raises(RuntimeError, match=r"^CUDA error: unspecified launch failure$"):
        run_out("CUDA error: unspecified launch failure")


def test_a_gpu_that_other_processes_fill_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    config, world = load_config(CriticConfig, "critic.yaml"), World(device=torch.device("cuda", 0))
    sizes = {"free": 1, "reserved": 20}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (sizes["free"] * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: sizes["reserved"] * 10**9)

    def run_out() -> None:
        with out_of_memory_judged(config, world, lambda: True):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UnfitNode, match=r"other processes have 58\.4 of its 80\.0 GB"):
        run_out()
    sizes["reserved"] = 77
    with pytest.raises(torch.OutOfMemoryError):
        run_out()
