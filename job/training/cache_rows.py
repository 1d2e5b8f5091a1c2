"""Rows of a micro-batch's stream as rows of its sequences, which are what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from job.data.packing import Batch
from job.data.state_shards import Piece, Stored, Writer
from job.model.packed_layout import Reads


@dataclass(frozen=True)
class Rows:
    """Where a micro-batch's rows are among those of its sequences, which may share some.

    Attributes:
        places: of each row of the stream among those of all sequences, end to end; None if they
            are the same.
        sources: of each row of the sequences, in the stream.
    """

    places: Tensor | None
    sources: Tensor | None

    @classmethod
    def of(cls, batch: Batch, reads: Reads, *, of_read_rows: bool) -> Rows:
        """Those of all tokens, or of what is read."""
        keys = batch.layout.keys
        if not of_read_rows:
            return cls(None, None) if keys is None else cls(keys.places, keys.rows)
        if reads.at is None:
            return cls(None, None)
        places = torch.empty_like(reads.rows)
        places[reads.at] = torch.arange(len(reads.at), device=places.device)
        return cls(places, reads.at)

    def in_stream(self, rows: Tensor) -> Tensor:
        return rows if self.places is None else rows[self.places]

    def of_sequences(self, rows: Tensor) -> Tensor:
        return rows if self.sources is None else rows[self.sources]


def put_states(
    writer: Writer, stored: Stored, states: Tensor, step: int, found: NDArray[np.int64]
) -> None:
    """Write the states [rows, d] of those sequences that were not found."""
    ends = np.cumsum(stored.rows)
    spans = zip(stored.keys, ends - stored.rows, ends, found, strict=True)
    pieces = [Piece(key, int(a), int(b)) for key, a, b, entry in spans if entry < 0]
    host, ready = _to_host(states)
    writer.put(pieces, host.view(torch.uint8).numpy(), step, ready)


def _to_host(states: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """A copy in host memory, and what to wait for until it is there."""
    if not states.is_cuda:
        return states.detach().contiguous(), lambda: None
    host = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
    host.copy_(states.detach(), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event.synchronize
