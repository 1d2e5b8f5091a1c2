"""Whether a GPU can train what a configuration asks for, and on which path."""

from __future__ import annotations

import logging

import torch

from job.common.errors import UnfitNode
from job.common.schema import FsdpConfig
from job.model.architecture import TransformerConfig, flash_attention_takes

_log = logging.getLogger(__name__)
_BF16 = (8, 0)  # compute capability from which on there is bf16, and flash attention: Ampere


def gpu_problem(config: FsdpConfig, device: torch.device) -> str | None:
    """Why a GPU cannot train this, and what to do; None if it can."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= _BF16 or not config.mixed_precision:
        return None
    found, needed = (".".join(map(str, pair)) for pair in (capability, _BF16))
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {found}, and bf16 needs "
        f"{needed}: take a newer GPU, or set distributed.fsdp.mixed_precision=false"
    )


def slower_attention(config: FsdpConfig, architecture: TransformerConfig) -> str | None:
    """Why attention on a GPU takes the path of masks; None where it is flash attention."""
    width = architecture.head_width
    if not config.mixed_precision or flash_attention_takes(width):
        return None
    return (
        f"attention is slower and takes more memory: heads of {width} channels are none that flash "
        "attention takes (a multiple of 8, at most 256)"
    )


def check_gpu(config: FsdpConfig, architecture: TransformerConfig, device: torch.device) -> None:
    """See that this process's GPU can train this, and say where it takes a slower path.

    Raises:
        UnfitNode: it cannot.
    """
    if device.type != "cuda":
        return
    if (problem := gpu_problem(config, device)) is not None:
        raise UnfitNode(problem)
    if (slower := slower_attention(config, architecture)) is not None:
        _log.warning("%s", slower)
