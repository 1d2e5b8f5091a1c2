"""Hugging Face's config.json in the terms of Meta's params.json, and back. Free of torch.

What transformers takes from its own defaults where a key is absent is taken here only where the
default is the same in all its versions; any other key must be there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.common.errors import InputError, quoted
from job.model.json_values import check_complete, check_values, read_object

if TYPE_CHECKING:
    from job.model.architecture import TransformerConfig

LLAMA, MISTRAL, QWEN2, QWEN3 = "Llama", "Mistral", "Qwen2", "Qwen3"
_MODEL_TYPES = {LLAMA: "llama", MISTRAL: "mistral", QWEN2: "qwen2", QWEN3: "qwen3"}
_LANGUAGE_MODEL = "ForCausalLM"
# What may stand on a family's blocks; the trunk is the same.
_HEADS = (_LANGUAGE_MODEL, "Model", "ForSequenceClassification", "ForTokenClassification")
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ROPE_TYPES = ("default", "linear", "llama3")
# Keys that change what a model computes, and the only value that is supported.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "auto_map": None,
}


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a config.json says of a model: values of params.json, and how far attention sees."""

    values: dict[str, Any]
    window: int | None  # tokens that one attends to, itself included; None: all before it


@dataclass(frozen=True)
class _Keys:
    """Sizes in config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    head_dim: int | None = None


def read(file: Path) -> HuggingFaceModel:
    """The model that a config.json describes.

    Raises:
        InputError: it cannot be read, lacks a key, or describes what is not supported.
    """
    config = read_object(file, "the architecture")
    family = model_family(file, config)
    _check_supported(file, config)
    sizes = _sizes(file, config, family)
    theta, scaling = _rope(file, config)
    values = {
        "dim": sizes.hidden_size,
        "n_layers": sizes.num_hidden_layers,
        "n_heads": sizes.num_attention_heads,
        "n_kv_heads": sizes.num_key_value_heads,
        "vocab_size": sizes.vocab_size,
        "head_dim": sizes.head_dim,
        "ffn_hidden": sizes.intermediate_size,
        "norm_eps": sizes.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": family == QWEN2,
        "qk_norm": family == QWEN3,
    }
    return HuggingFaceModel(values, _window(file, config, family))


def model_family(file: Path, config: Mapping[str, Any]) -> str:
    """The family that a config.json's architecture is of, whichever head stands on it.

    Raises:
        InputError: none that is supported.
    """
    named = config.get("architectures")
    if isinstance(named, list) and len(named) == 1:
        for family in _MODEL_TYPES:
            if named[0] in [family + head for head in _HEADS]:
                return family
    raise InputError(
        f"{file}: architectures: {quoted(named)} is not supported; supported are "
        f"{', '.join(family + _LANGUAGE_MODEL for family in _MODEL_TYPES)}, and these with "
        f"{', '.join(_HEADS[1:])} in place of {_LANGUAGE_MODEL}"
    )


def _check_supported(file: Path, config: Mapping[str, Any]) -> None:
    for key, supported in _ONLY.items():
        found = config.get(key, supported)
        if found != supported:
            wanted = "no such key" if supported is None else repr(supported)
            raise InputError(
                f"{file}: {key}: {quoted(found)} is not supported; supported is {wanted}"
            )


def _sizes(file: Path, config: Mapping[str, Any], family: str) -> _Keys:
    found = {name: config[name] for name in _Keys.__annotations__ if name in config}
    if family == LLAMA and found.get("num_key_value_heads") is None:
        # Llama 1 and 2, from before there were grouped heads
        found["num_key_value_heads"] = found.get("num_attention_heads")
    check_values(file, found, _Keys)
    check_complete(file, found, _Keys)
    if family == QWEN3 and found.get("head_dim") is None:
        raise InputError(f"{file}: no value for head_dim")
    sizes = _Keys(**found)
    # newer versions write what older ones derive
    derived = sizes.head_dim and sizes.head_dim * sizes.num_attention_heads == sizes.hidden_size
    return replace(sizes, head_dim=None) if derived else sizes


def _rope(file: Path, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """RoPE's theta and scaling, as in params.json.

    transformers 5 has both in `rope_parameters`, before it `rope_theta` and `rope_scaling`.
    """
    given = [config.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(values, dict) for values in given):
        raise InputError(f"{file}: rope_parameters and rope_scaling must be objects")
    scalings = [dict(values) for values in given if values]
    theta = _agreed_theta(file, config, scalings)
    for scaling in scalings:
        scaling["rope_type"] = scaling.pop("rope_type", scaling.get("type", "default"))
        scaling.pop("type", None)
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise InputError(f"{file}: rope_parameters and rope_scaling do not agree")
    scaling = scalings[0] if scalings else {}
    kind = scaling.pop("rope_type", "default")
    if kind not in _ROPE_TYPES or scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"{file}: RoPE of type {kind!r} in {quoted(given)} is not supported; supported "
            f"are {', '.join(_ROPE_TYPES)}, over all channels"
        )
    return theta, _scaling(file, kind, scaling)


def _agreed_theta(file: Path, config: Mapping[str, Any], scalings: Sequence[dict[str, Any]]) -> Any:
    """The one theta of all places that name one; it is taken out of the scalings."""
    named = [config.get("rope_theta"), *(scaling.pop("rope_theta", None) for scaling in scalings)]
    found = [theta for theta in named if theta is not None]
    if any(theta != found[0] for theta in found):
        raise InputError(f"{file}: rope_theta is {' and '.join(map(repr, found))}")
    return found[0] if found else 10000.0


def _scaling(file: Path, kind: str, values: dict[str, Any]) -> dict[str, Any] | None:
    if kind == "default":
        return None
    keys = ["factor"]
    if kind == "llama3":
        keys += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    if missing := [key for key in keys if key not in values]:
        raise InputError(f"{file}: RoPE of type {kind}: no value for {', '.join(missing)}")
    found = {key: values[key] for key in keys}
    return found | {"rope_type": kind} if kind == "linear" else found


def _window(file: Path, config: Mapping[str, Any], family: str) -> int | None:
    if not set(config.get("layer_types") or ()) <= _LAYER_TYPES:
        found = quoted(config["layer_types"])
        raise InputError(f"{file}: layer_types: {found} is not supported")
    if family == LLAMA:
        return None
    if family == MISTRAL and "sliding_window" not in config:
        raise InputError(f"{file}: no value for sliding_window")
    window = config.get("sliding_window")
    if family != MISTRAL and not config.get("use_sliding_window", False):
        return None
    if window is not None and not (type(window) is int and window > 0):
        raise InputError(f"{file}: sliding_window must be a positive integer, not {window!r}")
    return window


def write(config: TransformerConfig, dtype: str, max_positions: int) -> dict[str, Any]:
    """The config.json of a language model on a trunk; keys that all versions of transformers read.

    Args:
        dtype: of the stored weights, such as `float32`.
        max_positions: tokens of the longest sequence that it was trained on.

    Raises:
        ValueError: no supported architecture has these biases and norms.
    """
    if config.qkv_bias and config.qk_norm:
        raise ValueError("no Hugging Face architecture here has biases and norms of q and k")
    family = QWEN3 if config.qk_norm else QWEN2 if config.qkv_bias else LLAMA
    return {
        "architectures": [family + _LANGUAGE_MODEL],
        "model_type": _MODEL_TYPES[family],
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.n_trunk_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": config.norm_eps,
        **rope_keys(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def rope_keys(config: TransformerConfig) -> dict[str, Any]:
    """RoPE as transformers 4 reads it, and as 5 does; each takes no notice of the other's keys."""
    given = config.rope_scaling
    scaling = None if given is None else {"rope_type": "llama3", **vars(given)}
    parameters = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": parameters,
    }
