"""Parameters that may be sharded: filling them, and putting them together."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def own_rows(parameter: Tensor) -> slice:
    """The rows of a parameter, whole or sharded by rows, that this rank holds."""
    if not isinstance(parameter, DTensor):
        return slice(0, len(parameter))
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    assert tuple(shape[1:]) == tuple(parameter.shape[1:]), "sharded otherwise than by rows"
    return slice(offset[0], offset[0] + shape[0])


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, or this rank's slice of it, into a parameter."""
    local = parameter.detach()
    if isinstance(local, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            local.shape, local.device_mesh, local.placements
        )
        whole = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        local = local.to_local()
    local.copy_(whole)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all ranks, each of which must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without gradient."""
    local = tensor.detach()
    return local.to_local() if isinstance(local, DTensor) else local
