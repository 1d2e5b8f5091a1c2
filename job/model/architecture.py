"""A trunk's architecture, read from a folder in either layout. Free of torch and numpy."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from job.model import hf_config
from job.model.base import Base, Layout, find_base
from job.model.json_values import check_complete, check_values, read_object
from job.model.pickle_shapes import StoredShape, read_named, stored_shapes
from job.outcome import InputError

# Keys of params.json that say nothing about the architecture.
_IGNORED_PARAMS = {"use_scaled_rope", "rope_scaling", "max_seq_len", "max_batch_size"}
_EMBEDDING = "tok_embeddings.weight"


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


def read_architecture(folder: str | Path) -> TransformerConfig:
    """The architecture in a folder's params.json or config.json.

    Raises:
        InputError: no such file, or it lacks, misspells or contradicts something, or describes a
            model that is not supported.
    """
    base = find_base(folder)
    file = base.description
    values = _meta_values(base) if base.layout is Layout.META else hf_config.read(file).values
    values["rope_scaling"] = _rope_scaling(file, values["rope_scaling"])
    check_values(file, values, TransformerConfig)
    check_complete(file, values, TransformerConfig)
    try:
        return TransformerConfig(**values)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None


def check_window(folder: str | Path, max_length: int) -> None:
    """Raise InputError where a base attends to fewer tokens than sequences may have."""
    base = find_base(folder)
    if base.layout is Layout.META:
        return
    window = hf_config.read(base.description).window
    if window is not None and window < max_length:
        raise InputError(
            f"{base.description}: sliding_window {window} is less than data.max_length "
            f"{max_length}, and attention here sees the whole sequence; set data.max_length to "
            f"{window} or less (data.overlong says what becomes of longer ones)"
        )


def _meta_values(base: Base) -> dict[str, Any]:
    file = base.description
    params = read_object(file, "the architecture")
    unknown = sorted(params.keys() - config_field_names() - _IGNORED_PARAMS)
    if unknown:
        raise InputError(f"{file}: unknown parameter(s) {', '.join(unknown[:10])}")
    known = {k: v for k, v in params.items() if k in config_field_names()}
    if known.get("vocab_size", -1) == -1:  # Llama 1 and 2 leave it to the tokenizer
        known["vocab_size"] = _stored_vocabulary(base, known.get("dim"))
    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise InputError(f"{file}: use_scaled_rope must be true or false, not {scaled!r}")
    known["rope_scaling"] = params.get("rope_scaling", {} if scaled else None)
    return known


def _rope_scaling(file: Path, values: object) -> RopeScaling | LinearScaling | None:
    """Scaling as an object of params.json; one without `rope_type` is Llama-3's."""
    if values is None:
        return None
    linear = isinstance(values, dict) and values.get("rope_type") == "linear"
    schema = LinearScaling if linear else RopeScaling
    known = [f.name for f in fields(schema)]
    if not isinstance(values, dict) or not values.keys() <= set(known):
        found = reprlib.repr(values)
        raise InputError(f"{file}: rope_scaling must hold {', '.join(known)}; not {found}")
    check_values(file, values, schema)
    check_complete(file, values, schema)
    scaling = schema(**values)
    if isinstance(scaling, RopeScaling) and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise InputError(f"{file}: rope_scaling: high_freq_factor must exceed low_freq_factor")
    return scaling


def _stored_vocabulary(base: Base, dim: object) -> int:
    """Rows of the embedding; in several files it is split by columns, or since Llama 3 by rows."""
    shapes = []
    for file in base.weight_files():
        embedding = read_named(file, stored_shapes, StoredShape).get(_EMBEDDING)
        if embedding is None or len(embedding.sizes) != 2:
            raise InputError(f"{file}: no matrix {_EMBEDDING} to read vocab_size from")
        shapes.append(embedding.sizes)
    by_rows = all(columns == dim for _, columns in shapes)
    return sum(rows for rows, _ in shapes) if by_rows else shapes[0][0]
