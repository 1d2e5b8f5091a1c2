"""Parameters that may be sharded: filling them from full tensors, and putting them together."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def shard_rows(parameter: Tensor) -> slice:
    """The rows of a parameter that this rank's shard holds: all, unless it is sharded by rows."""
    if not isinstance(parameter, DTensor):
        return slice(0, len(parameter))
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    assert tuple(shape[1:]) == tuple(parameter.shape[1:]), "sharded otherwise than by rows"
    return slice(offset[0], offset[0] + shape[0])


def fill(parameter: Tensor, full: Tensor) -> None:
    """Copy a full tensor, or this rank's shard of it, into a parameter."""
    local = parameter.detach()
    if isinstance(local, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            local.shape, local.device_mesh, local.placements
        )
        full = full[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        local = local.to_local()
    local.copy_(full)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor put together from all ranks, each of which must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, without gradient."""
    local = tensor.detach()
    return local.to_local() if isinstance(local, DTensor) else local


def sharded_like(tensor: Tensor, local: Tensor) -> Tensor:
    """A tensor of which this rank's shard is `local`, perhaps on another device."""
    if not isinstance(tensor, DTensor):
        return local
    # from_local would move it to the mesh's device
    return DTensor(local, tensor._spec, requires_grad=False)
