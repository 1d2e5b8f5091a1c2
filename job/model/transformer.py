"""A Llama-family decoder under Meta's parameter names, on packed sequences.

Notation: b sequences, t tokens of the packed stream, d model width, h query heads,
k key/value heads, e channels per head.

A batch is one stream without padding, in which a `PackedLayout` says where each sequence lies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

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
from job.model.packed_layout import PackedLayout, Reads, Span, to_device
from job.model.prefix import Prefix

GROUPS_HEADS = torch.__version__ >= "2.12"  # whether varlen_attn takes fewer heads of keys
BACKEND = "inductor"  # of torch.compile
_MOST_GRAPHS = 32  # of one function; there are about ten, by what needs gradients

Parts = tuple[Callable[..., Any], Callable[..., Any]]  # of a block: before attention, after it
Rows = tuple[Tensor, Tensor]  # hidden states [t, d] and their rotations [t, 1, e / 2, 2]


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
    if not layout.varlen:
        return _attend_spans(q, k, v, (reads or layout).spans(q.dtype))
    if _fits_flash_attention(q):
        return _attend_varlen(q, k, v, layout, reads)
    return _attend_everywhere(q, k, v, layout, reads)


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


def _attend_everywhere(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, reads: Reads | None
) -> Tensor:
    # with queries for all keys, since only then CUDA's kernels know which keys come too late; those
    # for masks and float32 know no groups: it would be many small ones
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    spans, places = layout.spans(q.dtype), _places(layout, reads)
    if places is None:
        return _attend_spans(q, k, v, spans)
    everywhere = q.new_zeros(len(k), *q.shape[1:]).index_put((places,), q)
    return _attend_spans(everywhere, k, v, spans).index_select(0, places)


def _places(layout: PackedLayout, reads: Reads | None) -> Tensor | None:
    """Where among the keys the queries are, int64 [r]; None if there is one for each, in order."""
    if reads is None:
        return None if layout.keys is None else layout.keys.places
    return reads.rows if layout.keys is None else layout.keys.places.index_select(0, reads.rows)


def _attend_spans(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span]) -> Tensor:
    # a mask over the whole stream would be t x t, and a call for each short sequence would cost
    # more than what it computes
    queries = [sum(call.queries for call in span.calls) for span in spans]
    keys = [span.keys for span in spans]
    # split, not slices: the gradient of a split is one concatenation
    parts = (
        x.transpose(0, 1)[None].split(sizes, 2)  # [1, heads, span, e]
        for x, sizes in ((q, queries), (k, keys), (v, keys))
    )
    outputs = [_attend_span(*each) for each in zip(spans, *parts, strict=True)]
    return torch.cat([one for each in outputs for one in each], 2)[0].transpose(0, 1)


def _attend_span(span: Span, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Attention's results of each call, [1, h, queries, e]."""
    grouped = q.shape[1] != k.shape[1]
    parts = q.split([call.queries for call in span.calls], 2) if span.calls else ()
    outputs = []
    for query, (_, mask) in zip(parts, span.calls, strict=True):
        seen = span.keys if mask is None else mask.shape[1]
        key, value = k[:, :, :seen], v[:, :, :seen]
        outputs.append(
            F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, enable_gqa=grouped
            )
        )
    return outputs


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
