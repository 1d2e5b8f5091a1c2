"""The copy of a training's state in host memory, which checkpoints are written from."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from job.model.shards import local_shard, sharded_like

_log = logging.getLogger(__name__)


class HostCopy:
    """Host memory that tensors are copied into again and again: allocated once, pinned for a GPU.

    torch.distributed.checkpoint has a stager too, but those of torch 2.11 and 2.12 work once.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._pins = True

    def update(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors, or this rank's shards of them; the copies of the last call become these.

        Raises:
            RuntimeError: the host's memory is not enough, or the device has failed.
        """
        locals_ = {name: local_shard(tensor) for name, tensor in tensors.items()}
        for name, local in locals_.items():
            self._buffer(name, local).copy_(local, non_blocking=True)
        for device in {local.device for local in locals_.values() if local.is_cuda}:
            torch.cuda.synchronize(device)
        return {name: sharded_like(tensor, self._buffers[name]) for name, tensor in tensors.items()}

    def _buffer(self, name: str, local: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
            buffer = torch.empty_like(local, device="cpu")
            if local.is_cuda and local.nbytes and self._pins:
                self._pin(buffer)
            self._buffers[name] = buffer
        return buffer

    def _pin(self, buffer: Tensor) -> None:
        """Let the GPU copy into it directly, which is several times as fast.

        What torch allocates as pinned is rounded up to a power of two: gigabytes, here.
        """
        runtime = torch.cuda.cudart()
        failed = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
        if failed:
            self._pins = False
            _log.warning("saving will be slower: host memory cannot be pinned (CUDA %d)", failed)
            return
        unpin = weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
        unpin.atexit = False  # CUDA may be gone by then
