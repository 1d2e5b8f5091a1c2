"""A Llama-family decoder under Meta's parameter names, on packed sequences.

Notation: b sequences, t tokens of the packed stream, d model width, h query heads,
k key/value heads, e channels per head.

There is no padding: a batch is one stream of t tokens in which b sequences lie end to end.
`PackedLayout` says where each one starts, and attention never crosses a boundary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

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

SPAN_TOKENS = 128  # on CPU, sequences share one masked attention call up to this many tokens


class PackedLayout:
    """Where the sequences of a packed stream lie.

    Args:
        lengths: tokens per sequence, in stream order; their sum is t.
        device: where the stream lies.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError("a packed stream needs at least one sequence, and none may be empty")
        self.lengths = list(lengths)
        self.device = torch.device(device)
        self.varlen = self.device.type == "cuda"  # which kernel attends; see `attend`
        # on the host, where the lengths are: a GPU would be waited for to know n_tokens
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        self.n_tokens = int(ends[-1])
        starts = torch.repeat_interleave(ends[:-1], torch.tensor(self.lengths))
        self.positions = (torch.arange(self.n_tokens) - starts).to(self.device)  # [t]
        self.boundaries = ends.to(self.device, torch.int32)  # [b + 1], as varlen kernels take them
        self.max_length = max(self.lengths)

    @functools.cached_property
    def spans(self) -> tuple[list[int], list[Tensor | None]]:
        """Token counts and masks of runs of whole sequences; a lone sequence needs no mask."""
        runs = _group_sequences(self.lengths, SPAN_TOKENS)
        masks = [None if len(run) == 1 else self._span_mask(run) for run in runs]
        return [sum(run) for run in runs], masks

    def _span_mask(self, run: list[int]) -> Tensor:
        """Block-diagonal and causal, bool [span, span]."""
        ids = torch.repeat_interleave(torch.arange(len(run)), torch.tensor(run))
        return (ids[:, None] == ids[None, :]).tril().to(self.device)


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


def rope_table(config: TransformerConfig, positions: Tensor) -> Tensor:
    """Rotation at each position as unit complex numbers, complex64 [t, 1, e / 2]."""
    frequencies = rope_frequencies(config).to(positions.device)
    # float32: bf16 has no exact numbers for odd positions beyond 256
    angles = positions[:, None, None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs (Meta's layout) of x [t, heads, e]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).type_as(x)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistic in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


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

    def forward(self, x: Tensor, rope: Tensor, layout: PackedLayout) -> Tensor:
        q = self.wq(x).unflatten(-1, (-1, self.width))  # [t, h, e]
        k = self.wk(x).unflatten(-1, (-1, self.width))  # [t, k, e]
        v = self.wv(x).unflatten(-1, (-1, self.width))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = attend(rotate(q, rope), rotate(k, rope), v, layout)
        return self.wo(mixed.flatten(-2))


def attend(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Block-diagonal causal attention: q [t, h, e], k and v [t, k, e] -> [t, h, e]."""
    if layout.varlen and _fits_flash_attention(q):
        return _attend_varlen(q, k, v, layout)
    return _attend_spans(q, k, v, layout)


def _fits_flash_attention(q: Tensor) -> bool:
    return q.dtype in (torch.bfloat16, torch.float16) and flash_attention_takes(q.shape[-1])


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    ends, longest = layout.boundaries, layout.max_length
    mixed = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0))
    assert isinstance(mixed, Tensor)  # a pair only where the log-sum-exp is asked for
    return mixed


def _attend_spans(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    # one call for each run of short sequences: a mask over the whole stream would be t x t, and a
    # call for each sequence would cost more than what it computes
    if layout.varlen:  # CUDA's kernels for masks and float32 know no groups: it would be many small
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    sizes, masks = layout.spans
    # split, not slices: the gradient of a split is one concatenation
    qs, ks, vs = (x.transpose(0, 1)[None].split(sizes, 2) for x in (q, k, v))  # [1, heads, span, e]
    outputs = [
        F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, enable_gqa=grouped
        )
        for query, key, value, mask in zip(qs, ks, vs, masks, strict=True)
    ]
    return torch.cat(outputs, 2)[0].transpose(0, 1)


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
    keeping them.
    """

    recompute = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, layout: PackedLayout) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # the reentrant form drops all gradients where x needs none
            return checkpoint(self._transform, x, rope, layout, use_reentrant=False)
        return self._transform(x, rope, layout)

    def _transform(self, x: Tensor, rope: Tensor, layout: PackedLayout) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, layout)
        return x + self.feed_forward(self.ffn_norm(x))


class Trunk(nn.Module):
    """Embedding, blocks and final norm: what a critic uses of a language model."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_trunk_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        # the block at which gradients end for now, though those before it are trainable too
        self.gradients_from: int | None = None

    def first_trainable_block(self) -> int:
        """Index of the first block that gradients must reach; len(layers) if there is none."""
        if self.tok_embeddings.weight.requires_grad:
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

    @torch.no_grad()
    def prefix(self, tokens: Tensor, layout: PackedLayout) -> Tensor:
        """Hidden states [t, d] before the first block with gradients, without any."""
        return self._run(self.tok_embeddings(tokens), 0, self._first_with_gradients(), layout)

    def suffix(self, hidden: Tensor, layout: PackedLayout) -> Tensor:
        """Output of the last block [t, d], from the prefix's result on."""
        return self._run(hidden, self._first_with_gradients(), len(self.layers), layout)

    def _first_with_gradients(self) -> int:
        if self.gradients_from is not None:
            return self.gradients_from
        return self.first_trainable_block()

    def hidden(self, tokens: Tensor, layout: PackedLayout) -> Tensor:
        """Output of the last block [t, d], before the final norm; tokens int [t]."""
        if self.tok_embeddings.weight.requires_grad and self.gradients_from is None:
            return self._run(self.tok_embeddings(tokens), 0, len(self.layers), layout)
        return self.suffix(self.prefix(tokens, layout), layout)

    def forward(self, tokens: Tensor, layout: PackedLayout) -> Tensor:
        """Normed hidden states [t, d]."""
        return self.norm(self.hidden(tokens, layout))

    def _run(self, x: Tensor, start: int, stop: int, layout: PackedLayout) -> Tensor:
        rope = rope_table(self.config, layout.positions)
        for block in self.layers[start:stop]:
            x = block(x, rope, layout)
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
        rope = rope_table(self.config, layout.positions)
        # the trunk without its last block, which is the head of the next token
        shared = self._run(self.tok_embeddings(tokens), 0, len(self.layers) - 1, layout)
        heads = [self.layers[-1], *self.extra_heads]
        return [self.output(self.norm(head(shared, rope, layout))) for head in heads]
