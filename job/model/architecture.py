"""A trunk's architecture, read from a folder in Meta's layout. Free of torch and numpy."""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import reprlib
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from job.outcome import InputError

PARAMS, WEIGHTS = "params.json", "consolidated.pth"
# Keys of params.json that say nothing about the architecture.
_IGNORED_PARAMS = {"use_scaled_rope", "rope_scaling", "max_seq_len", "max_batch_size"}
_EMBEDDING = "tok_embeddings.weight"
_LARGEST_SIZE = 10**7  # far above any model's, and nothing overflows
Stored = TypeVar("Stored")


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling: slow channels are stretched by `factor`, fast ones kept."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


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
    rope_scaling: RopeScaling | None = None
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
    """The architecture in a folder's params.json.

    Raises:
        InputError: no such file, or it lacks, misspells or contradicts something.
    """
    file = Path(folder) / PARAMS
    params = _read_params(file)
    unknown = sorted(params.keys() - config_field_names() - _IGNORED_PARAMS)
    if unknown:
        raise InputError(f"{file}: unknown parameter(s) {', '.join(unknown[:10])}")
    known = {k: v for k, v in params.items() if k in config_field_names()}
    if known.get("vocab_size", -1) == -1:  # Llama 1 and 2 leave it to the tokenizer
        known["vocab_size"] = _stored_vocabulary(Path(folder))
    known["rope_scaling"] = _rope_scaling(file, params)
    _check_values(file, known, TransformerConfig)
    required = {f.name for f in fields(TransformerConfig) if f.default is MISSING}
    if missing := sorted(required - known.keys()):
        raise InputError(f"{file}: no value for {', '.join(missing)}")
    try:
        return TransformerConfig(**known)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None


def _read_params(file: Path) -> dict[str, Any]:
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file}: cannot read the architecture: {error.strerror}; "
            "model.path must be a folder with params.json and consolidated.pth"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(params, dict):
        raise InputError(f"{file}: the architecture is a JSON object")
    return params


def _check_values(file: Path, values: Mapping[str, Any], schema: type) -> None:
    """Raise InputError unless each value has its field's type, and each number a possible size."""
    types = {f.name: str(f.type).partition(" | ") for f in fields(schema)}
    for name, value in values.items():
        kind, _, optional = types[name]
        if optional and value is None:
            continue
        found = reprlib.repr(value)
        if kind == "bool" and not isinstance(value, bool):
            raise InputError(f"{file}: {name} must be true or false, not {found}")
        if kind == "int" and not (type(value) is int and 0 < value <= _LARGEST_SIZE):
            raise InputError(
                f"{file}: {name} must be an integer from 1 to {_LARGEST_SIZE}, not {found}"
            )
        if kind == "float" and not (type(value) in (int, float) and 0 < value < math.inf):
            raise InputError(f"{file}: {name} must be a positive number, not {found}")


def _rope_scaling(file: Path, params: dict[str, Any]) -> RopeScaling | None:
    scaled, values = params.get("use_scaled_rope", False), params.get("rope_scaling")
    if not isinstance(scaled, bool):
        raise InputError(f"{file}: use_scaled_rope must be true or false, not {scaled!r}")
    if values is None:
        return RopeScaling() if scaled and "rope_scaling" not in params else None
    known = [f.name for f in fields(RopeScaling)]
    if not isinstance(values, dict) or not values.keys() <= set(known):
        found = reprlib.repr(values)
        raise InputError(f"{file}: rope_scaling must hold {', '.join(known)}; not {found}")
    _check_values(file, values, RopeScaling)
    scaling = RopeScaling(**values)
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise InputError(f"{file}: rope_scaling: high_freq_factor must exceed low_freq_factor")
    return scaling


def _stored_vocabulary(folder: Path) -> int:
    file = folder / WEIGHTS
    embedding = read_named(file, _stored_shapes, StoredShape).get(_EMBEDDING)
    if embedding is None or len(embedding.sizes) != 2:
        raise InputError(f"{file}: no matrix {_EMBEDDING} to read vocab_size from")
    return embedding.sizes[0]


def read_named(
    file: Path, load: Callable[[Path], object], kind: type[Stored]
) -> Mapping[str, Stored]:
    """What `load` reads from a weight file: a value of `kind` under each name.

    Raises:
        InputError: the file cannot be read, is damaged, or holds anything else.
    """
    _check_zip(file)
    try:
        stored = load(file)
    except pickle.UnpicklingError:
        raise InputError(
            f"{file}: damaged, or holds more than tensors; code in a weight file is never run"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{file}: not a readable weight file: {reason}") from None
    if not isinstance(stored, dict) or not all(
        isinstance(k, str) and isinstance(v, kind) for k, v in stored.items()
    ):
        raise InputError(f"{file}: expected a dictionary of named tensors")
    return stored


def _check_zip(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            zipped = zipfile.is_zipfile(stream)
    except OSError as error:
        raise InputError(
            f"{file}: cannot read the weights: {error.strerror}; "
            f"model.path must hold {PARAMS} and {WEIGHTS}"
        ) from None
    if not zipped:
        raise InputError(f"{file}: truncated, or no zip file as torch.save writes it")


@dataclass(frozen=True)
class StoredShape:
    """A tensor of a weight file, of which nothing else is read."""

    sizes: tuple[int, ...]


def _stored_shapes(file: Path) -> object:
    """The pickle of a weight file, with a StoredShape for each tensor."""
    with zipfile.ZipFile(file) as archive:
        top = archive.namelist()[0].partition("/")[0]  # as torch.load finds it
        content = archive.read(f"{top}/data.pkl")
    return _ShapeReader(io.BytesIO(content), encoding="utf-8").load()


class _ShapeReader(pickle.Unpickler):
    """Imports nothing: a name in the file finds a stand-in from here, or is refused."""

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if _TYPE.fullmatch(full):
            return None  # the shape does not depend on it
        if full not in _STAND_INS:
            raise pickle.UnpicklingError(f"{full} is no part of a state dict")
        return _STAND_INS[full]

    def persistent_load(self, pid: Any, /) -> None:
        """A storage, which is left unread."""


def _tensor(storage: None, offset: int, sizes: tuple[int, ...], *_: object) -> StoredShape:
    if not isinstance(sizes, tuple) or not all(type(size) is int for size in sizes):
        raise pickle.UnpicklingError("a tensor without a shape")
    return StoredShape(sizes)


def _parameter(data: StoredShape, *_: object) -> StoredShape:
    return data


# A type of storage, or of the numbers in it.
_TYPE = re.compile(r"torch(\.storage)?\.\w*Storage|torch\.(u?int|b?float|complex|bool)\w*")
_STAND_INS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
