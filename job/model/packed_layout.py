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

SPAN_TOKENS = 128  # short sequences share a call of attention up to so many tokens
CALL_QUERIES = 128  # of a sequence in a call on a CPU, twice as many if it is long
LONG = 1024  # tokens


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
        """How attention goes over the stream where there is no kernel for packed sequences.

        Its queries are the stream's tokens, on a GPU all keys'; masks have that type.
        """
        if dtype not in self._spans:
            tokens = (self.keys or self) if self.varlen else self
            self._spans[dtype] = list(_spans(self, tokens.lengths, dtype))
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
        """As the layout's on a CPU, with queries of these rows alone."""
        if dtype not in self._spans:
            self._spans[dtype] = list(_spans(self._layout, self._counts, dtype))
        return self._spans[dtype]


class Call(NamedTuple):
    """One call of attention.

    Attributes:
        queries: how many.
        mask: [queries, keys], added to the scores, for as many of the span's first keys as it has;
            None: causal, of as many queries as keys.
    """

    queries: int
    mask: Tensor | None


class Span(NamedTuple):
    """A sequence or short ones in a row: how many keys, and the calls of their queries in order."""

    keys: int
    calls: list[Call]


def _spans(layout: PackedLayout, queries: Sequence[int], dtype: torch.dtype) -> Iterator[Span]:
    """Those of all sequences; of each the last so many tokens are queries."""
    runs, first = _group_sequences((layout.keys or layout).lengths, SPAN_TOKENS), 0
    strip = _strip(layout, max((run[0] for run in runs if len(run) == 1), default=0), dtype)
    for run in runs:
        wanted, first = queries[first : first + len(run)], first + len(run)
        if len(run) > 1:
            calls = _joint_call(layout, run, wanted, dtype)
        else:
            calls = _calls(run[0], wanted[0], strip)
        yield Span(sum(run), list(calls))


def _joint_call(
    layout: PackedLayout, lengths: list[int], queries: Sequence[int], dtype: torch.dtype
) -> Iterator[Call]:
    """One for several sequences, if they have any queries."""
    counts, ends = torch.tensor(queries), torch.tensor(lengths).cumsum(0)
    starts = (ends - torch.tensor(lengths)).repeat_interleave(counts)[:, None]
    shift = (ends - counts.cumsum(0)).repeat_interleave(counts)
    places = (torch.arange(sum(queries)) + shift)[:, None]  # of the queries among the keys
    keys = torch.arange(sum(lengths))
    if len(places):
        hidden = (keys < starts) | (places < keys)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
        yield Call(len(mask), to_device(mask, layout.device))


def _calls(keys: int, queries: int, strip: Tensor | None) -> Iterator[Call]:
    """Those of one sequence, under views of a strip; without one it is a single causal one.

    A kernel that is causal by itself computes part of what it hides, calls of few queries less.
    Over thousands of keys it is as good, and short sequences are one call anyway.
    """
    if strip is None or (queries == keys and not CALL_QUERIES < keys <= LONG):
        yield Call(queries, None)
        return
    before = keys - queries
    while before < keys:
        count = min(_call_queries(keys), keys - before)
        shift = strip.shape[1] - strip.shape[0] - before
        yield Call(count, strip[:count, shift : shift + before + count])
        before += count


def _call_queries(keys: int) -> int:
    return CALL_QUERIES * (2 if keys > LONG else 1)


def _strip(layout: PackedLayout, keys: int, dtype: torch.dtype) -> Tensor | None:
    """Masks of all calls of sequences of at most so many keys; a GPU has no use for them.

    [m, keys + m]: columns from `keys` - x on are the mask of queries that follow x keys.
    """
    if layout.varlen:  # where a call costs more than what it spares
        return None
    rows = _call_queries(keys)
    hidden = torch.full((rows, rows), -torch.inf, dtype=dtype).triu(1)
    return torch.cat((hidden.new_zeros(rows, keys), hidden), 1)


def _group_sequences(lengths: list[int], budget: int) -> list[list[int]]:
    """Consecutive sequences in runs of at most `budget` tokens (a longer one stands alone)."""
    runs = [[lengths[0]]]
    for length in lengths[1:]:
        if sum(runs[-1]) + length > budget:
            runs.append([])
        runs[-1].append(length)
    return runs
