"""Settings of torch's CUDA memory and of cuBLAS's, which both read from the environment."""

from __future__ import annotations

import ctypes
import os
import re

from job.common.errors import InputError

_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # new name, and old, which prevails
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_SAME_BITS = (":4096:8", ":16:8")  # the workspaces with which torch calls cuBLAS deterministic


def set_up_allocator() -> None:
    """Make settings where none are made; before CUDA is used.

    Segments that grow leave fewer gaps. torch 2.13 dies making them where NVML is missing, as in a
    container without the driver's utilities. The workspace is one with which cuBLAS gives the same
    bits, and of one size on all GPUs.
    """
    os.environ.setdefault(_WORKSPACE, _SAME_BITS[0])
    if not any(name in os.environ for name in _SETTINGS) and _has_nvml():
        os.environ[_SETTINGS[0]] = "expandable_segments:True"


def segments_grow() -> bool:
    """Whether torch's allocator has been told to let its segments grow."""
    given = next((os.environ[name] for name in reversed(_SETTINGS) if name in os.environ), "")
    said = re.findall(r"expandable_segments\s*:\s*(\w+)", given)
    return said[-1:] == ["True"]


def check_workspace() -> None:
    """See that cuBLAS has been given a workspace with which it gives the same bits.

    Raises:
        InputError: it has not, and torch would end the first matrix product.
    """
    if (given := os.environ.get(_WORKSPACE)) not in _SAME_BITS:
        raise InputError(
            f"{_WORKSPACE}={given} in the environment: cuBLAS gives the same bits only with "
            f"{' or '.join(_SAME_BITS)}; unset it, or set training.deterministic to false"
        )


def _has_nvml() -> bool:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")  # by the name that torch opens it by
    except OSError:
        return False
    return True
