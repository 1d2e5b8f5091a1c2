"""The copy of a training's state in host memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from job.common.schema import DistributedConfig
from job.distributed.world import joined_world
from job.training.host_copy import HostCopy


def test_a_copy_keeps_what_was_there_and_the_next_one_reuses_its_memory() -> None:
    copy, source = HostCopy(), {"a": torch.arange(6.0).view(2, 3), "b": torch.empty(0, 3)}
    first = copy.update(source)
    source["a"].add_(1)
    assert first["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    second = copy.update(source)
    assert second["a"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert second["b"].shape == (0, 3)


def test_a_copy_of_a_sharded_tensor_is_sharded_as_it_is() -> None:
    with joined_world(DistributedConfig()):
        mesh = init_device_mesh("cpu", (1,))
        tensor = distribute_tensor(torch.arange(8.0).view(4, 2), mesh, [Shard(0)])
        copied = HostCopy().update({"a": tensor})["a"]
        assert isinstance(copied, DTensor)
        assert (copied.placements, copied.shape) == (tensor.placements, tensor.shape)
        assert torch.equal(copied.to_local(), tensor.to_local())
        assert copied.to_local().data_ptr() != tensor.to_local().data_ptr()


def test_memory_that_cannot_be_pinned_is_used_as_it_is_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def refuse(pointer: int, size: int, flags: int) -> int:
        calls.append((pointer, size))
        return 2

    monkeypatch.setattr(
        torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=refuse, cudaHostUnregister=0)
    )
    copy, buffer = HostCopy(), torch.empty(4)
    copy._pin(buffer)
    assert calls == [(buffer.data_ptr(), 16)]
    assert not copy._pins
    assert caplog.text.count("cannot be pinned") == 1
