"""Tensors as they lie in the files of a base, memory-mapped: read where their rows are used."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from job.model.layout import neighbours

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a base, whole in a file or cut into the files of Meta's model-parallel ranks.

    Attributes:
        name: in the files.
        files: one a part.
        parts: views of memory-mapped files.
        dim: the parts are slices along this; None: each is the whole.
        head_width: of heads whose rows lie in Hugging Face's order; None: rows lie in Meta's.
    """

    name: str
    files: tuple[Path, ...]
    parts: tuple[Tensor, ...]
    dim: int | None = None
    head_width: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        if self.dim is not None:
            shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    def rows(self, rows: slice) -> Tensor:
        """Some rows in Meta's order: a view of the file where they lie there in this order."""
        if self.head_width is None or rows.start == rows.stop:
            return self.stored_rows(rows)
        first = rows.start // self.head_width * self.head_width
        last = -(-rows.stop // self.head_width) * self.head_width
        heads = neighbours(self.stored_rows(slice(first, last)), self.head_width)
        return heads[rows.start - first : rows.stop - first]

    def stored_rows(self, rows: slice) -> Tensor:
        """Some rows in the order of the file; a scalar counts as one."""
        parts = self._overlapping(rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim or 0)

    def read_ahead(self, rows: slice) -> None:
        """Begin to read some rows from the disk, without waiting for them."""
        for part in self._overlapping(rows):
            _advise(part, mmap.MADV_WILLNEED)

    def release(self, rows: slice) -> None:
        """Take pages that were read out of this process; the system may keep them."""
        for part in self._overlapping(rows):
            _advise(part, mmap.MADV_DONTNEED)

    def _overlapping(self, rows: slice) -> list[Tensor]:
        """Views of the parts that make up some rows; empty ones only for no rows at all."""
        parts = [torch.atleast_1d(part) for part in self.parts]
        if self.dim != 0:
            return [part[rows] for part in (parts if self.dim == 1 else parts[:1])]
        views, start = [], 0
        for part in parts:
            view = part[max(0, rows.start - start) : max(0, rows.stop - start)]
            start += len(part)
            if len(view):
                views.append(view)
        return views or [parts[0][:0]]


def _advise(tensor: Tensor, advice: int) -> None:
    """Tell the system about the pages between a tensor's first and last element."""
    if tensor.numel() == 0 or tensor.device.type != "cpu":
        return
    elements = 1 + sum(
        (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + elements * tensor.element_size() - first
    _libc.madvise(first, length, advice)  # advice: if it is not taken, nothing is wrong


def shapes(parts: Sequence[Tensor]) -> str:
    """The parts' shapes for a message."""
    different = sorted({tuple(part.shape) for part in parts})
    return " and ".join(map(str, different))
