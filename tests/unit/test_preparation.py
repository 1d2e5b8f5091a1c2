"""What torch is told before a training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from micro_job import write_job

from job.common.config import completed, load_config
from job.common.errors import InputError
from job.common.schema import CriticConfig
from job.training import allocator
from job.training.allocator import segments_grow
from job.training.preparation import set_up_torch

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An environment without settings, and torch's own state back afterwards."""
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in (*ALLOCATOR, "CUBLAS_WORKSPACE_CONFIG"):
        os.environ.pop(name, None)
    on, fill = torch.are_deterministic_algorithms_enabled(), _fills()
    yield
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def _fills() -> bool:
    return bool(torch.utils.deterministic.fill_uninitialized_memory)


def _set_up(*overrides: str) -> None:
    set_up_torch(load_config(CriticConfig, "critic.yaml", overrides))


def test_the_same_bits_are_asked_for_unless_the_configuration_says_otherwise() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    _set_up()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch._inductor.config.deterministic  # no kernel is chosen by how fast it was
    assert not _fills()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    _set_up("training.deterministic=false")
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch._inductor.config.deterministic


def test_a_run_of_before_the_key_goes_on_as_it_began() -> None:
    assert not completed({"training": {"seed": 1}}, CriticConfig)["training"]["deterministic"]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The libraries that the loader finds."""
    found = ["libnvidia-ml.so.1"]

    def load(name: str) -> object:
        if name not in found:
            raise OSError(f"{name}: cannot open shared object file")
        return object()

    monkeypatch.setattr(allocator.ctypes, "CDLL", load)
    return found


def test_segments_of_gpu_memory_grow(nvml: list[str]) -> None:
    _set_up()
    assert os.environ[ALLOCATOR[0]] == "expandable_segments:True"
    assert ALLOCATOR[1] not in os.environ
    assert segments_grow()


def test_segments_do_not_grow_where_torch_would_die_of_it(nvml: list[str]) -> None:
    nvml.clear()
    _set_up()
    assert not set(ALLOCATOR) & set(os.environ)
    assert not segments_grow()


@pytest.mark.parametrize("name", ALLOCATOR)
def test_settings_of_the_users_own_stay_as_they_are(nvml: list[str], name: str) -> None:
    os.environ |= {name: "max_split_size_mb:64", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    _set_up()
    assert {n: os.environ[n] for n in ALLOCATOR if n in os.environ} == {
        name: "max_split_size_mb:64"
    }
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert not segments_grow()
    os.environ[name] = "max_split_size_mb:64, expandable_segments: True"
    assert segments_grow()
    os.environ[name] += ",expandable_segments:False"
    assert not segments_grow()


def test_of_both_names_torch_reads_the_old_one() -> None:
    os.environ |= dict(zip(ALLOCATOR, ("expandable_segments:True", ""), strict=True))
    assert not segments_grow()
    os.environ |= dict(zip(ALLOCATOR, ("", "expandable_segments:True"), strict=True))
    assert segments_grow()


def test_a_workspace_with_which_a_gpu_does_not_give_the_same_bits_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":0:0"
    _set_up()  # without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError) as ended:
        _set_up()
    assert str(ended.value) == (
        "CUBLAS_WORKSPACE_CONFIG=:0:0 in the environment: cuBLAS gives the same bits only with "
        ":4096:8 or :16:8; unset it, or set training.deterministic to false"
    )
    _set_up("training.deterministic=false")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    _set_up()
