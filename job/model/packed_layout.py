"""A packed stream: where its sequences lie, what they share, and what of it is computed.

Notation: b sequences, t tokens of the stream, n outputs that are read, r rows of the stream that
the last block computes for them.

There is no padding: a batch is one stream of t tokens in which b sequences lie end to end.
Attention never crosses a boundary. Where there is no kernel for packed sequences it goes over
spans, in calls of some queries each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SPAN_TOKENS = 128  # on CPU a call of attention has so many queries, of one sequence or of several
_CALLS = 8  # of one sequence at most; then they have more queries


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; from the host without waiting for a GPU, which takes pinned memory."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Shared(NamedTuple):
    """First tokens of sequences that are first tokens of another one too: they are computed there.

    Attributes:
        leaders: int64 [b] on the host, which sequence of the stream that is; it shares none itself.
        counts: int64 [b] on the host, how many tokens; of some sequences none.
    """

    leaders: Tensor
    counts: Tensor


class PackedLayout:
    """Where the sequences of a packed stream lie.

    A sequence that shares its first tokens has only the others in the stream, but attends to all.

    Args:
        lengths: tokens of each sequence in the stream, in its order; their sum is t.
        device: where the stream lies.
        shared: tokens that are not in the stream once more.

    Attributes:
        keys: what sequences attend to; None where they share nothing: the stream as it is.
        n_keys: tokens of all sequences, shared ones as often as they are some sequence's.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        shared: Shared | None = None,
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError("a packed stream needs at least one sequence, and none may be empty")
        self.lengths = list(lengths)
        self.device = torch.device(device)
        self.varlen = self.device.type == "cuda"  # which kernel attends; see `attend`
        # on the host, where the lengths are: a GPU would be waited for to know n_tokens
        self.ends = torch.tensor([0, *self.lengths]).cumsum(0)  # [b + 1] on the host, from 0 on
        self.n_tokens = self.n_keys = int(self.ends[-1])
        shift = -self.ends[:-1]
        self.keys: Keys | None = None
        if shared is not None and shared.counts.any():
            self.keys = Keys(self, shared)
            self.n_keys += int(shared.counts.sum())
            shift = shift + shared.counts
        shifts = shift.repeat_interleave(torch.tensor(self.lengths))
        self.positions = to_device(torch.arange(self.n_tokens) + shifts, self.device)  # [t]
        # as varlen kernels take them
        self.boundaries = to_device(self.ends.to(torch.int32), self.device)  # [b + 1]
        self.max_length = max(self.lengths)
        self._spans: dict[torch.dtype, list[Span]] = {}

    def reads(self, at: Tensor) -> Reads:
        """What the last block must compute for outputs at positions `at` (int64 [n], host)."""
        return Reads(self, at)

    def spans(self, dtype: torch.dtype) -> list[Span]:
        """How attention goes over the stream where there is no kernel for packed sequences."""
        if dtype not in self._spans:
            self._spans[dtype] = list(_spans(self, self.lengths, dtype))
        return self._spans[dtype]


class Keys:
    """The tokens that the sequences of a stream attend to, end to end: all of each sequence.

    Attributes:
        lengths: of the sequences, those that they share included.
        rows: where the tokens are in the stream, int64 [n_keys].
        places: where the stream's tokens are among these, int64 [t].
        boundaries: int32 [b + 1], where the sequences begin and end among them.
        max_length: of the longest sequence.
    """

    def __init__(self, layout: PackedLayout, shared: Shared) -> None:
        own, counts, starts = torch.tensor(layout.lengths), shared.counts, layout.ends[:-1]
        lengths = own + counts
        ends = torch.cat((layout.ends[:1], lengths.cumsum(0)))
        first, n_keys = ends[:-1], int(ends[-1])
        within = torch.arange(n_keys) - first.repeat_interleave(lengths)
        there, here = (
            x.repeat_interleave(lengths) for x in (starts[shared.leaders], starts - counts)
        )
        rows = within + torch.where(within < counts.repeat_interleave(lengths), there, here)
        shift = (first + counts - starts).repeat_interleave(own)
        self.lengths: list[int] = lengths.tolist()
        self.rows = to_device(rows, layout.device)
        self.places = to_device(torch.arange(layout.n_tokens) + shift, layout.device)
        self.boundaries = to_device(ends.to(torch.int32), layout.device)
        self.max_length = max(self.lengths)


class Reads:
    """The r tokens of a packed stream that the last block computes, for those that are read.

    Of each sequence they begin with the first that is read and go to its end, as attention's
    kernels take queries; responses do so anyway. Where nothing is read it is the last token.

    Args:
        at: positions that are read, int64 [n]; on the host, or a GPU is waited for.

    Attributes:
        rows: positions in the stream, int64 [r].
        at: places of the n among the r, int64 [n]; None if they are all of them in order.
        boundaries: int32 [b + 1], where the sequences' rows begin and end.
        max_length: rows of the sequence that has most.
    """

    def __init__(self, layout: PackedLayout, at: Tensor) -> None:
        self._layout, at = layout, at.cpu()
        ends = layout.ends[1:]
        sequence = torch.searchsorted(ends, at, right=True)
        first = ends.scatter_reduce(0, sequence, at, "amin")
        if not len(at):
            first[-1] -= 1
        counts = ends - first
        before = counts.cumsum(0) - counts
        n_rows = int(counts.sum())
        shift = torch.repeat_interleave(first - before, counts, output_size=n_rows)
        rows = torch.arange(n_rows) + shift
        place = at - (first - before)[sequence]
        everything = len(at) == n_rows and bool((place == torch.arange(n_rows)).all())
        self.rows = to_device(rows, layout.device)
        self.at = None if everything else to_device(place, layout.device)
        boundaries = torch.cat((before, torch.tensor([n_rows]))).to(torch.int32)
        self.boundaries = to_device(boundaries, layout.device)
        self.max_length = int(counts.max())
        self._counts: list[int] = counts.tolist()
        self._spans: dict[torch.dtype, list[Span]] = {}

    def spans(self, dtype: torch.dtype) -> list[Span]:
        """As of the layout, with queries of these rows alone."""
        if dtype not in self._spans:
            self._spans[dtype] = list(_spans(self._layout, self._counts, dtype))
        return self._spans[dtype]


class Span(NamedTuple):
    """Whole sequences, one after the other, and the calls of attention for their queries.

    Attributes:
        keys: tokens of the sequences.
        queries: of each call; the last ones of each sequence.
        masks: of each call, [queries, keys], added to the scores, where keys may end with the last
            that any query sees; None: as many queries as keys, causal.
    """

    keys: int
    queries: list[int]
    masks: Sequence[Tensor | None]


def _spans(layout: PackedLayout, queries: Sequence[int], dtype: torch.dtype) -> Iterator[Span]:
    """Those of a layout whose sequences have so many queries."""
    lengths, first = (layout.keys or layout).lengths, 0
    for run in _group_sequences(lengths, SPAN_TOKENS):
        last = first + len(run)
        yield _span(run, queries[first:last], layout, dtype)
        first = last


def _span(
    lengths: list[int], queries: Sequence[int], layout: PackedLayout, dtype: torch.dtype
) -> Span:
    """A causal kernel computes much of what a mask hides: calls of few queries spare more of it.

    Not where one has keys by the thousand, nor on a GPU, where a call costs more than that.
    """
    keys, wanted = sum(lengths), sum(queries)
    rows = wanted if layout.varlen else max(SPAN_TOKENS, keys // _CALLS)
    if len(lengths) == 1 and wanted == keys and (layout.varlen or rows != SPAN_TOKENS):
        return Span(keys, [keys], [None])
    counts, ends = torch.tensor(queries), torch.tensor(lengths).cumsum(0)
    starts = (ends - torch.tensor(lengths)).repeat_interleave(counts)
    shift = (ends - counts.cumsum(0)).repeat_interleave(counts)
    places = torch.arange(wanted) + shift  # of the queries among the keys
    calls = list(zip(starts.split(rows), places.split(rows), strict=True)) if wanted else []
    masks = [to_device(_mask(start, place).to(dtype), layout.device) for start, place in calls]
    return Span(keys, [len(mask) for mask in masks], masks)


def _mask(starts: Tensor, places: Tensor) -> Tensor:
    """Of queries at those places, of sequences that start there."""
    key = torch.arange(int(places[-1]) + 1)
    seen = (starts[:, None] <= key) & (key <= places[:, None])
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def _group_sequences(lengths: list[int], budget: int) -> list[list[int]]:
    """Consecutive sequences in runs of at most `budget` tokens (a longer one stands alone)."""
    runs = [[lengths[0]]]
    for length in lengths[1:]:
        if sum(runs[-1]) + length > budget:
            runs.append([])
        runs[-1].append(length)
    return runs
