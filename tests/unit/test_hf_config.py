"""config.json: what it says in the terms of params.json, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.common.errors import InputError
from job.model import hf_config
from job.model.architecture import LinearScaling, RopeScaling, TransformerConfig
from job.model.architecture_file import check_window, read_architecture

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LLAMA_2 = TransformerConfig(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=32000, ffn_hidden=11008
)
LLAMA_3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 8}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 8}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 8, "head_dim": 128}


def _write(folder: Path, changes: dict[str, Any]) -> Path:
    """A config.json; `...` takes a key out."""
    values = {k: v for k, v in (CONFIG | changes).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


READ: dict[str, tuple[dict[str, Any], TransformerConfig]] = {
    "Llama 2": ({}, LLAMA_2),
    "grouped heads": ({"num_key_value_heads": 8}, replace(LLAMA_2, n_kv_heads=8)),
    "derived head width": ({"head_dim": 128}, LLAMA_2),
    "own head width": ({"head_dim": 64}, replace(LLAMA_2, head_dim=64)),
    "theta": ({"rope_theta": 1e6}, replace(LLAMA_2, rope_theta=1e6)),
    "no scaling": ({"rope_scaling": None}, LLAMA_2),
    "Llama 3.2": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA_3}},
        replace(LLAMA_2, rope_theta=5e5, rope_scaling=RopeScaling(factor=32.0)),
    ),
    "one object": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA_3}},
        replace(LLAMA_2, rope_theta=5e5, rope_scaling=RopeScaling(factor=32.0)),
    ),
    "keys of both versions": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "llama3", **LLAMA_3},
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA_3},
        },
        replace(LLAMA_2, rope_theta=5e5, rope_scaling=RopeScaling(factor=32.0)),
    ),
    "classifier of sequences": ({"architectures": ["LlamaForSequenceClassification"]}, LLAMA_2),
    "classifier of tokens": (
        QWEN3 | {"architectures": ["Qwen3ForTokenClassification"]},
        replace(LLAMA_2, n_kv_heads=8, qk_norm=True),
    ),
    "no head": (
        MISTRAL | {"architectures": ["MistralModel"], "sliding_window": None},
        replace(LLAMA_2, n_kv_heads=8),
    ),
    "linear": (
        {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        replace(LLAMA_2, rope_theta=1e5, rope_scaling=LinearScaling(4.0)),
    ),
    "tied": ({"tie_word_embeddings": True}, LLAMA_2),
    "Mistral": (MISTRAL | {"sliding_window": None}, replace(LLAMA_2, n_kv_heads=8)),
    "Qwen2": (QWEN2, replace(LLAMA_2, n_kv_heads=8, qkv_bias=True)),
    "Qwen3": (QWEN3, replace(LLAMA_2, n_kv_heads=8, qk_norm=True)),
}


@pytest.mark.parametrize("case", READ)
def test_what_a_file_says(case: str, tmp_path: Path) -> None:
    changes, expected = READ[case]
    assert read_architecture(_write(tmp_path, changes)) == expected


@pytest.mark.parametrize("case", READ)
def test_what_is_written_is_read_again(case: str, tmp_path: Path) -> None:
    config = replace(READ[case][1], n_layers=34, n_future_tokens=3)
    written = hf_config.write(config, "bfloat16", 4096)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_architecture(tmp_path) == READ[case][1]


def test_rope_is_written_as_each_version_of_transformers_reads_it() -> None:
    scaled = replace(LLAMA_2, rope_theta=5e5, rope_scaling=RopeScaling(factor=32.0))
    written = hf_config.write(scaled, "float32", 1)
    scaling = {"rope_type": "llama3", **LLAMA_3}
    assert (written["rope_theta"], written["rope_scaling"]) == (5e5, scaling)
    assert written["rope_parameters"] == scaling | {"rope_theta": 5e5}
    plain = hf_config.write(LLAMA_2, "float32", 1)
    assert (plain["rope_theta"], plain["rope_scaling"]) == (1e4, None)
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4}


def test_biases_with_norms_of_heads_have_no_architecture() -> None:
    with pytest.raises(ValueError, match="biases and norms"):
        hf_config.write(replace(LLAMA_2, qkv_bias=True, qk_norm=True), "float32", 1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mixture of experts": (
        {"architectures": ["MixtralForCausalLM"]},
        "architectures: ['MixtralForCausalLM'] is not supported; supported are LlamaForCausalLM, "
        "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
    ),
    "no architecture": ({"architectures": ...}, "architectures: None is not supported"),
    "two architectures": (
        {"architectures": ["LlamaForCausalLM", "Qwen3ForCausalLM"]},
        "is not supported",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; supported is"),
    "bias of the output": ({"attention_bias": True}, "attention_bias: True is not supported"),
    "bias of the MLP": ({"mlp_bias": True}, "mlp_bias: True is not supported"),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config: {'quant_method': 'gptq'} is not supported; supported is no such key",
    ),
    "code of its own": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map: {'AutoModel': 'x.Y'}"),
    "yarn": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "RoPE of type 'yarn'",
    ),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE of type 'dynamic'"),
    "part of the channels": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "over all channels",
    ),
    "scaling is text": ({"rope_scaling": "linear"}, "must be objects"),
    "scaling incomplete": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "no value for low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    "factor is text": ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor must be"),
    "two scalings": (
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        },
        "do not agree",
    ),
    "two thetas": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        "rope_theta is 10000.0 and 1000000.0",
    ),
    "theta is text": ({"rope_theta": "1e6"}, "rope_theta must be a positive number, not '1e6'"),
    "no width": ({"hidden_size": ...}, "no value for hidden_size"),
    "no eps": ({"rms_norm_eps": ...}, "no value for rms_norm_eps"),
    "width is text": ({"hidden_size": "4096"}, "hidden_size must be an integer"),
    "indivisible": ({"num_attention_heads": 33}, "dim 4096 is not divisible by n_heads 33"),
    "no groups": (QWEN2 | {"num_key_value_heads": ...}, "no value for num_key_value_heads"),
    "no head width": (QWEN3 | {"head_dim": ...}, "no value for head_dim"),
    "no window": (MISTRAL, "no value for sliding_window"),
    "window is text": (MISTRAL | {"sliding_window": "4096"}, "sliding_window must be a positive"),
    "layers of another kind": (
        QWEN3 | {"layer_types": ["full_attention", "linear_attention"]},
        "layer_types: ['full_attention', 'linear_attention'] is not supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(InputError) as caught:
        read_architecture(_write(tmp_path, changes))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(caught.value)


WINDOWS: dict[str, tuple[dict[str, Any], int | None]] = {
    "Llama has none": ({"sliding_window": 8}, None),
    "Mistral": (MISTRAL | {"sliding_window": 4096}, 4096),
    "Mistral without": (MISTRAL | {"sliding_window": None}, None),
    "Qwen, off": (QWEN2 | {"sliding_window": 4096, "use_sliding_window": False}, None),
    "Qwen, on": (QWEN3 | {"sliding_window": 4096, "use_sliding_window": True}, 4096),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_window_must_cover_the_longest_sequence(case: str, tmp_path: Path) -> None:
    changes, window = WINDOWS[case]
    folder = _write(tmp_path, changes)
    check_window(folder, window or 10**6)
    if window is not None:
        with pytest.raises(InputError, match=r"sliding_window 4096 .* data\.max_length 4097"):
            check_window(folder, window + 1)
