"""Tensors as they lie in the files of a trunk, memory-mapped: read where their rows are used."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from job.common.errors import InputError, listing
from job.model.layout import neighbours

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PIECE = 2**20  # bytes of a file that are in memory beside what is made of them: fits a cache
Shapes = Mapping[str, tuple[int, ...]]
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a trunk, whole in a file or cut into the files of Meta's model-parallel ranks.

    Attributes:
        name: in the files.
        files: one a part.
        parts: views of the files.
        mapped: they are memory-mapped, so that pages can be given back.
        dim: the parts are slices along this; None: each is the whole.
        head_width: of heads whose rows lie in Hugging Face's order; None: rows lie in Meta's.
    """

    name: str
    files: tuple[Path, ...]
    parts: tuple[Tensor, ...]
    mapped: bool
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

    @property
    def is_dense_floats(self) -> bool:
        return self.dtype in _DTYPES and all(
            part.layout is torch.strided and not part.is_meta for part in self.parts
        )

    @property
    def place(self) -> tuple[Path, int]:
        """Sorts the tensors of a trunk as they lie in its files."""
        return self.files[0], self.parts[0].data_ptr()

    def pieces(self, rows: slice) -> Iterator[slice]:
        """Consecutive rows, whole heads where they lie in Hugging Face's order."""
        row = max(1, self.dtype.itemsize * math.prod(self.shape[1:]))
        heads = self.head_width or 1
        step = max(1, _PIECE // (row * heads)) * heads
        first = rows.start // heads * heads
        for start in range(first, rows.stop, step):
            yield slice(max(start, rows.start), min(start + step, rows.stop))

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

    def release(self, rows: slice) -> None:
        """Take pages that were read out of this process; the system may keep them."""
        for part in self._overlapping(rows) if self.mapped else ():
            _give_back(part)  # of any other memory this would be the end

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


def _give_back(tensor: Tensor) -> None:
    """Take the pages between a tensor's first and last element out of this process."""
    if tensor.numel() == 0:
        return
    start, end = _memory(tensor)
    start -= start % mmap.PAGESIZE
    _libc.madvise(start, end - start, mmap.MADV_DONTNEED)  # if it is not done, nothing is wrong


def _memory(tensor: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first to behind its last element."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((n - 1) * step for n, step in steps)
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


class Mappings:
    """Where files are mapped into this process, as Linux says; elsewhere nothing is known."""

    def __init__(self) -> None:
        try:
            lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        self._ranges: dict[str, list[tuple[int, int]]] = {}
        for line in lines:
            addresses, *_, file = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
            self._ranges.setdefault(file, []).append((start, end))

    def hold(self, tensor: Tensor, file: Path) -> bool:
        """Whether a tensor lies in a mapping of a file."""
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            return False
        start, end = _memory(tensor)
        ranges = self._ranges.get(str(file.resolve()), ())
        return tensor.numel() == 0 or any(a <= start and end <= b for a, b in ranges)


def raise_misfits(file: Path, problems: list[str]) -> None:
    if problems:
        head = f"{file}: {len(problems)} tensor(s) do not fit the model"
        raise InputError(head + listing(sorted(problems)))
