"""A trunk's architecture as dataclasses, in Meta's terms. Free of torch and numpy."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling: slow channels are stretched by `factor`, fast ones kept."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LinearScaling:
    """Every channel is stretched by `factor` (Chen et al. 2023, position interpolation)."""

    factor: float
    rope_type: str = "linear"  # apart from the other in params.json


@dataclass(frozen=True)
class TransformerConfig:
    """Architecture, in the terms of Meta's params.json.

    `n_layers` counts as Meta counts: with `n_future_tokens` = n, `layers` holds
    n_layers - n + 1 blocks and `extra_heads` the other n - 1.
    `ffn_hidden` and `head_dim` override the derived sizes where a model does not follow them.
    """

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    ffn_hidden: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | LinearScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    n_future_tokens: int = 1

    def __post_init__(self) -> None:
        _check_architecture(self)

    @property
    def n_trunk_layers(self) -> int:
        return self.n_layers - self.n_future_tokens + 1

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    @property
    def ffn_width(self) -> int:
        """Meta's rounding: 2/3 of 4 d, times the multiplier, up to a multiple of `multiple_of`."""
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * ((width + self.multiple_of - 1) // self.multiple_of)


def flash_attention_takes(width: int) -> bool:
    """Whether CUDA's flash attention has kernels for heads of so many channels."""
    return width % 8 == 0 and width <= 256


def _check_architecture(config: TransformerConfig) -> None:
    """Raise ValueError for sizes that no model can have."""
    for name in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "n_future_tokens"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    if config.head_dim is None and config.dim % config.n_heads:
        raise ValueError(f"dim {config.dim} is not divisible by n_heads {config.n_heads}")
    if config.n_heads % config.kv_heads:
        raise ValueError(f"n_heads {config.n_heads} is no multiple of n_kv_heads {config.kv_heads}")
    if config.head_width % 2:
        raise ValueError(f"RoPE pairs channels: head width {config.head_width} must be even")
    if config.n_trunk_layers < 1:
        raise ValueError(f"n_future_tokens {config.n_future_tokens} exceeds n_layers")


def config_field_names() -> set[str]:
    return {f.name for f in fields(TransformerConfig)}
