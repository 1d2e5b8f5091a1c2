"""A Llama-family decoder under Meta's parameter names, on packed sequences.

Notation: b sequences, t tokens of the packed stream, d model width, h query heads,
k key/value heads, e channels per head.

There is no padding: a batch is one stream of t tokens in which b sequences lie end to end.
`PackedLayout` says where each one starts, and attention never crosses a boundary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from job.model.architecture import (
    LinearScaling,
    RopeScaling,
    TransformerConfig,
    flash_attention_takes,
)
from job.model.prefix import Prefix

SPAN_TOKENS = 128  # on CPU a call of attention has so many queries, of one sequence or of several
_CALLS = 8  # of one sequence at most; then they have more queries
GROUPS_HEADS = torch.__version__ >= "2.12"  # whether varlen_attn takes fewer heads of keys
BACKEND = "inductor"  # of torch.compile
_MOST_GRAPHS = 32  # of one function; there are about ten, by what needs gradients

Parts = tuple[Callable[..., Any], Callable[..., Any]]  # of a block: before attention, after it
Rows = tuple[Tensor, Tensor]  # hidden states [t, d] and their rotations [t, 1, e / 2, 2]


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


def rope_frequencies(config: TransformerConfig) -> Tensor:
    """Angular frequency per channel pair, float32 [e / 2] (Su et al. 2021, section 3.2.2)."""
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    if isinstance(config.rope_scaling, LinearScaling):
        return frequencies / config.rope_scaling.factor
    return _scale_frequencies(frequencies, config.rope_scaling)


def _scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama-3.1's scaling: interpolates between stretched and kept frequencies by wavelength."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope_table(frequencies: Tensor, positions: Tensor) -> Tensor:
    """Cosine and sine of the rotation at each position, float32 [t, 1, e / 2, 2]."""
    # float32: bf16 has no exact numbers for odd positions beyond 256
    angles = positions[:, None, None].float() * frequencies
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs (Meta's layout) of x [t, heads, e]."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # Inductor makes no kernels of complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:  # in one kernel
        product = torch.view_as_complex(pairs) * torch.view_as_complex(rope)
        turned = torch.view_as_real(product)
    return turned.flatten(-2).type_as(x)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 inside the kernel (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads within each sequence of the stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, bias = config.head_width, config.qkv_bias
        self.width = width
        self.wq = nn.Linear(config.dim, config.n_heads * width, bias=bias)
        self.wk = nn.Linear(config.dim, config.kv_heads * width, bias=bias)
        self.wv = nn.Linear(config.dim, config.kv_heads * width, bias=bias)
        self.wo = nn.Linear(config.n_heads * width, config.dim, bias=False)
        self.q_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else None

    def project(self, all_rows: Rows, read: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [r, h, e] of the rows that are read, keys and values [t, k, e] of all."""
        q = self.wq(read[0]).unflatten(-1, (-1, self.width))
        k = self.wk(all_rows[0]).unflatten(-1, (-1, self.width))
        v = self.wv(all_rows[0]).unflatten(-1, (-1, self.width))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, read[1])  # before k, and what was q is given up
        return q, rotate(k, all_rows[1]), v


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, reads: Reads | None = None
) -> Tensor:
    """Causal attention within each sequence: q [r, h, e], k and v [t, k, e] -> [r, h, e].

    Queries are those of `reads`, or of all tokens.
    """
    if layout.keys is not None:  # little beside the products of a block's linear layers
        k, v = k.index_select(0, layout.keys.rows), v.index_select(0, layout.keys.rows)
    if layout.varlen and _fits_flash_attention(q):
        return _attend_varlen(q, k, v, layout, reads)
    return _attend_spans(q, k, v, layout, reads)


def _fits_flash_attention(q: Tensor) -> bool:
    return q.dtype in (torch.bfloat16, torch.float16) and flash_attention_takes(q.shape[-1])


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, reads: Reads | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[1] // k.shape[1]
    grouped: dict[str, Any] = {}
    if group > 1 and GROUPS_HEADS:
        grouped = {"enable_gqa": True}
    elif group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    queries, keys = reads or layout, layout.keys or layout
    mixed = varlen_attn(
        q,
        k,
        v,
        queries.boundaries,
        keys.boundaries,
        queries.max_length,
        keys.max_length,
        window_size=(-1, 0),  # the last query sees the last key
        **grouped,
    )
    assert isinstance(mixed, Tensor)  # a pair only where the log-sum-exp is asked for
    return mixed


def _attend_spans(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, reads: Reads | None = None
) -> Tensor:
    # one call for each run of short sequences: a mask over the whole stream would be t x t, and a
    # call for each sequence would cost more than what it computes
    if layout.varlen:  # CUDA's kernels for masks and float32 know no groups: it would be many small
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    spans = (reads or layout).spans(q.dtype)
    queries, keys = [sum(span.queries) for span in spans], [span.keys for span in spans]
    # split, not slices: the gradient of a split is one concatenation
    parts = (
        x.transpose(0, 1)[None].split(sizes, 2)  # [1, heads, span, e]
        for x, sizes in ((q, queries), (k, keys), (v, keys))
    )
    calls = (_attend_span(*each) for each in zip(spans, *parts, strict=True))
    return torch.cat([outputs for call in calls for outputs in call], 2)[0].transpose(0, 1)


def _attend_span(span: Span, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
    """Attention's results of each call, [1, h, queries, e]."""
    grouped = q.shape[1] != k.shape[1]
    parts = q.split(span.queries, 2) if span.queries else ()
    for query, mask in zip(parts, span.masks, strict=True):
        seen = span.keys if mask is None else mask.shape[1]
        key, value = k[:, :, :seen], v[:, :, :seen]
        yield F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, enable_gqa=grouped
        )


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer 2020)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm transformer block on a packed stream [t, d].

    With `recompute` set, the backward pass computes the block's activations again instead of
    keeping them. With `compiled` set, what comes before attention and what comes after it are two
    functions that torch.compile has made; attention is a kernel of its own anyway.
    """

    recompute = False
    compiled = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, rope: Tensor, layout: PackedLayout, reads: Reads | None = None
    ) -> Tensor:
        """The block's output [t, d], or [r, d] where only `reads` are wanted."""
        if self.recompute and torch.is_grad_enabled():
            # the reentrant form drops all gradients where x needs none
            return checkpoint(self._transform, x, rope, layout, reads, use_reentrant=False)
        return self._transform(x, rope, layout, reads)

    def _transform(
        self, x: Tensor, rope: Tensor, layout: PackedLayout, reads: Reads | None
    ) -> Tensor:
        parts: Parts = _compiled(BACKEND) if self.compiled else (Block.prepare, Block.finish)
        prepare, finish = parts
        read = None
        if reads is not None:
            read = x.index_select(0, reads.rows), rope.index_select(0, reads.rows)

        def mixed() -> Tensor:  # whose names keep nothing while the feed forward layer works
            q, k, v = prepare(self, (x, rope), read)
            return attend(q, k, v, layout, reads).flatten(-2)

        return finish(self, x if read is None else read[0], mixed())

    def prepare(self, rows: Rows, read: Rows | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; see `Attention.project`."""
        normed = self.attention_norm(rows[0]), rows[1]
        if read is None:
            return self.attention.project(normed, normed)
        return self.attention.project(normed, (self.attention_norm(read[0]), read[1]))

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block's output from its input and attention's result [r, h * e]."""
        x = x + self.attention.wo(mixed)
        del mixed  # nor is it kept here
        return x + self.feed_forward(self.ffn_norm(x))


@functools.cache
def _compiled(backend: str) -> Parts:
    """Both parts of a block compiled, once for all blocks and any number of tokens."""
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": True, "backend": backend}
    prepare, finish = (torch.compile(p, **settings) for p in (Block.prepare, Block.finish))
    return prepare, finish


class LeftOut(nn.Module):
    """Stands for a part of a trunk that is not loaded, since its results are known."""

    def forward(self, *_: Any) -> Tensor:
        raise AssertionError("a part of the trunk is run that was left out")


class Trunk(nn.Module):
    """Embedding, blocks and final norm: what a critic uses of a language model."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self._frequencies: Tensor | None = None  # no buffer, which FSDP would cast to bf16
        self.tok_embeddings: nn.Module = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_trunk_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        # the block at which gradients end for now, though those before it are trainable too
        self.gradients_from: int | None = None

    def leave_out(self, block: int) -> None:
        """Do without embeddings and the blocks before `block`: their results are always known."""
        self.tok_embeddings = LeftOut()
        for index in range(block):
            self.layers[index] = LeftOut()

    @property
    def trains_embeddings(self) -> bool:
        return any(parameter.requires_grad for parameter in self.tok_embeddings.parameters())

    def first_trainable_block(self) -> int:
        """Index of the first block that gradients must reach; len(layers) if there is none."""
        if self.trains_embeddings:
            return 0
        for index, block in enumerate(self.layers):
            if any(parameter.requires_grad for parameter in block.parameters()):
                return index
        return len(self.layers)

    def recompute_trainable_blocks(self) -> None:
        """Trade the trainable blocks' stored activations for computing them twice."""
        for block in self.layers[self.first_trainable_block() :]:
            assert isinstance(block, Block)
            block.recompute = True

    def compile_blocks(self) -> None:
        """Let torch.compile make the blocks' kernels, when they are first run."""
        for block in self.layers:
            if isinstance(block, Block):
                block.compiled = True

    def rope(self, layout: PackedLayout) -> Tensor:
        """The stream's rotations (see `rope_table`)."""
        device = layout.positions.device
        if self._frequencies is None or self._frequencies.device != device:
            self._frequencies = to_device(rope_frequencies(self.config), device)
        return rope_table(self._frequencies, layout.positions)

    @torch.no_grad()
    def prefix(
        self, tokens: Tensor, layout: PackedLayout, rope: Tensor, reads: Reads | None = None
    ) -> Tensor:
        """Hidden states [t, d] before the first block with gradients, without any.

        Where no block has some it is the last one's output, as `suffix` has it.
        """
        stop = self._first_with_gradients()
        return self._run(self.tok_embeddings(tokens), 0, stop, layout, rope, reads)

    def suffix(
        self, hidden: Tensor, layout: PackedLayout, rope: Tensor, reads: Reads | None = None
    ) -> Tensor:
        """Output of the last block [t, d], or [r, d] of `reads`, from the prefix's result on."""
        start = self._first_with_gradients()
        return self._run(hidden, start, len(self.layers), layout, rope, reads)

    @torch.no_grad()
    def _stored(
        self, tokens: Tensor, layout: PackedLayout, rope: Tensor, reads: Reads | None, given: Prefix
    ) -> Tensor:
        """As `prefix`, from states that are known."""
        states = given.states
        if states is None:
            start, x = self._beginning(tokens, given.earlier)
            states = given.settle(self._run(x, start, given.block, layout, rope, reads))
        return self._run(states, given.block, self._first_with_gradients(), layout, rope, reads)

    def _beginning(self, tokens: Tensor, earlier: Prefix | None) -> tuple[int, Tensor]:
        """From which block on a prefix is computed, and the states [t, d] before that."""
        if earlier is None:
            return 0, self.tok_embeddings(tokens)
        assert earlier.states is not None
        return earlier.block, earlier.states

    def _first_with_gradients(self) -> int:
        if self.gradients_from is not None:
            return self.gradients_from
        return self.first_trainable_block()

    def hidden(
        self,
        tokens: Tensor,
        layout: PackedLayout,
        reads: Reads | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Output of the last block [t, d] before the final norm, or [r, d]; tokens int [t].

        With a `prefix`, blocks before it are run only for what is not known of it.
        """
        rope = self.rope(layout)  # one for both: a second would have to wait for the whole prefix
        if prefix is not None:
            stored = self._stored(tokens, layout, rope, reads, prefix)
            return self.suffix(stored, layout, rope, reads)
        if self.trains_embeddings and self.gradients_from is None:
            embedded = self.tok_embeddings(tokens)
            return self._run(embedded, 0, len(self.layers), layout, rope, reads)
        return self.suffix(self.prefix(tokens, layout, rope, reads), layout, rope, reads)

    def forward(self, tokens: Tensor, layout: PackedLayout) -> Tensor:
        """Normed hidden states [t, d]."""
        return self.norm(self.hidden(tokens, layout))

    def _run(
        self,
        x: Tensor,
        start: int,
        stop: int,
        layout: PackedLayout,
        rope: Tensor,
        reads: Reads | None = None,
    ) -> Tensor:
        for block in self.layers[start:stop]:
            x = block(x, rope, layout, reads if block is self.layers[-1] else None)
        return x


class Transformer(Trunk):
    """A trunk with its language-model heads, for pre-training.

    Meta's multi-token prediction: head 0 is the last of `layers`; each extra head is one more
    block on that block's input; norm and output are shared (Gloeckle et al. 2024).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.extra_heads = nn.ModuleList(Block(config) for _ in range(config.n_future_tokens - 1))

    def head_logits(self, tokens: Tensor, layout: PackedLayout) -> list[Tensor]:
        """Logits [t, vocab] for the tokens 1, 2, ... n_future_tokens ahead."""
        rope, last = self.rope(layout), len(self.layers) - 1
        # the trunk without its last block, which is the head of the next token
        shared = self._run(self.tok_embeddings(tokens), 0, last, layout, rope)
        heads = [self.layers[-1], *self.extra_heads]
        return [self.output(self.norm(head(shared, rope, layout))) for head in heads]
