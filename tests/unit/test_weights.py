"""Trunks in Meta's layout: what is written is what is read, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from job.common.errors import InputError
from job.common.schema import DistributedConfig, FsdpConfig
from job.distributed.fsdp import shard
from job.distributed.world import World, joined_world
from job.model.architecture import RopeScaling, TransformerConfig
from job.model.architecture_file import read_architecture
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.packed_layout import PackedLayout
from job.model.shards import full_tensor
from job.model.transformer import Transformer, Trunk, rope_frequencies
from job.model.weights import load_trunk, save_transformer

TINY = TransformerConfig(dim=16, n_layers=4, n_heads=4, vocab_size=11, multiple_of=8)
ARCHITECTURES = {
    "plain": TINY,
    "extra heads": replace(TINY, n_future_tokens=3),
    "grouped heads": replace(TINY, n_kv_heads=2),
    "own sizes": replace(TINY, head_dim=6, ffn_hidden=20, norm_eps=1e-6, rope_theta=5e5),
    "multiplier": replace(TINY, ffn_dim_multiplier=1.3, multiple_of=4),
    "bias and norms": replace(TINY, qkv_bias=True, qk_norm=True),
    "scaled RoPE": replace(TINY, rope_scaling=RopeScaling(factor=32.0)),
}


@pytest.fixture
def world() -> Iterator[World]:
    with joined_world(DistributedConfig()) as world:
        yield world


def _saved(
    config: TransformerConfig, folder: Path, dtype: torch.dtype | None = None
) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).to(dtype)
    save_transformer(model, folder)
    return model


def _loaded(folder: Path) -> Trunk:
    trunk = Trunk(read_architecture(folder))
    load_trunk(trunk, folder)
    return trunk


def _change_params(folder: Path, changes: dict[str, Any]) -> None:
    """Change some values of params.json; `...` takes one out."""
    params = json.loads((folder / "params.json").read_text()) | changes
    kept = {name: value for name, value in params.items() if value is not ...}
    (folder / "params.json").write_text(json.dumps(kept))


def _stored(folder: Path) -> dict[str, Tensor]:
    weights = torch.load(folder / "consolidated.pth")
    assert isinstance(weights, dict)
    return weights


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_round_trip_to_the_bit(case: str, tmp_path: Path) -> None:
    model = _saved(ARCHITECTURES[case], tmp_path)
    assert read_architecture(tmp_path) == ARCHITECTURES[case]
    trunk = _loaded(tmp_path)
    stored = model.state_dict()
    kept = {name for name in stored if not name.startswith(("output.", "extra_heads."))}
    assert {name for name, _ in trunk.named_parameters()} == kept
    for name, parameter in trunk.named_parameters():
        assert torch.equal(parameter, stored[name])
    tokens, layout = torch.arange(9), PackedLayout([4, 5])
    assert torch.equal(trunk(tokens, layout), Trunk.forward(model, tokens, layout))


@pytest.mark.parametrize("frozen", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_frozen_weights_as_asked_and_trainable_ones_in_full(
    n: int, frozen: torch.dtype, tmp_path: Path, world: World
) -> None:
    model = _saved(TINY, tmp_path)
    with torch.device("meta"):
        critic = Critic(TINY)
    unfreeze_last_blocks(critic, n)
    trainable = {name for name, p in critic.trunk.named_parameters() if p.requires_grad}
    shard(critic, FsdpConfig(mixed_precision=frozen is torch.bfloat16), world)
    load_trunk(critic.trunk, tmp_path)
    for name, parameter in critic.trunk.named_parameters():
        dtype = torch.float32 if name in trainable else frozen
        assert parameter.requires_grad == (name in trainable)
        assert parameter.dtype == dtype
        assert torch.equal(full_tensor(parameter), model.state_dict()[name].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_files_of_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    model = _saved(TINY, tmp_path, dtype)
    for name, parameter in _loaded(tmp_path).named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, model.state_dict()[name].float())


def test_every_float16_becomes_the_bfloat16_next_to_it(tmp_path: Path) -> None:
    """All 65536 bit patterns in the embedding."""
    config = replace(TINY, vocab_size=4096)
    model = _saved(config, tmp_path, torch.float16)
    weights = _stored(tmp_path)
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    weights["tok_embeddings.weight"] = halves.view(4096, 16)
    torch.save(weights, tmp_path / "consolidated.pth")
    trunk = Trunk(model.config).to(torch.bfloat16)
    load_trunk(trunk, tmp_path)
    found, expected = trunk.tok_embeddings.weight.flatten(), halves.to(torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_heads_and_a_stored_rope_table_are_not_loaded(tmp_path: Path) -> None:
    _saved(replace(TINY, n_future_tokens=2), tmp_path)
    weights = _stored(tmp_path)
    left = {n for n in weights if n.startswith(("output.", "extra_heads."))}
    assert left
    unfit = {name: torch.zeros(3, dtype=torch.int8) for name in (*left, "rope.freqs")}
    torch.save(weights | unfit, tmp_path / "consolidated.pth")
    trunk = _loaded(tmp_path)
    assert len(trunk.layers) == 3
    assert {n for n, _ in trunk.named_parameters()} == weights.keys() - left


@pytest.mark.parametrize("stored", [-1, ...])
def test_a_vocabulary_left_open_is_the_embedding(stored: object, tmp_path: Path) -> None:
    _saved(TINY, tmp_path)
    _change_params(tmp_path, {"vocab_size": stored})
    assert read_architecture(tmp_path) == TINY


LLAMA_3 = RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("params", "scaling"),
    [
        ({}, None),
        ({"use_scaled_rope": False}, None),
        ({"rope_scaling": None}, None),
        ({"rope_scaling": {}}, LLAMA_3),
        ({"rope_scaling": {"factor": 32}}, replace(LLAMA_3, factor=32)),
        ({"use_scaled_rope": True, "rope_scaling": {"factor": 4.0}}, replace(LLAMA_3, factor=4.0)),
        ({"use_scaled_rope": True, "rope_scaling": None}, None),
    ],
)
def test_rope_scaling(params: dict[str, Any], scaling: RopeScaling | None, tmp_path: Path) -> None:
    _saved(TINY, tmp_path)
    _change_params(tmp_path, params)
    found = read_architecture(tmp_path)
    assert found == replace(TINY, rope_scaling=scaling)
    assert rope_frequencies(found).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "factor"),
    [((4096, 32), 8), ((8192, 80), 8), ((2048, 16), 32), ((3072, 28), 32), ((2048, 32), None)],
)
def test_a_factor_that_is_not_written_is_that_of_the_published_model(
    shape: tuple[int, int], factor: float | None, tmp_path: Path
) -> None:
    _saved(TINY, tmp_path)
    dim, n_layers = shape
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": 8, "n_kv_heads": 8, "head_dim": 64}
    sizes |= {"ffn_hidden": 64, "n_future_tokens": 1}
    _change_params(tmp_path, sizes | {"use_scaled_rope": True})
    if factor is None:
        with pytest.raises(InputError, match=r'add "rope_scaling": \{"factor": 8\.0\}'):
            read_architecture(tmp_path)
    else:
        scaling = read_architecture(tmp_path).rope_scaling
        assert scaling == replace(LLAMA_3, factor=factor)


def test_params_that_say_nothing_about_the_model(tmp_path: Path) -> None:
    _saved(TINY, tmp_path)
    _change_params(tmp_path, {"max_seq_len": 4096, "max_batch_size": 32})
    assert read_architecture(tmp_path) == TINY


def test_a_trunk_is_a_copy_of_its_file(tmp_path: Path) -> None:
    _saved(TINY, tmp_path)
    before = (tmp_path / "consolidated.pth").read_bytes()
    trunk = _loaded(tmp_path)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.zero_()
    assert (tmp_path / "consolidated.pth").read_bytes() == before
    assert _loaded(tmp_path).tok_embeddings.weight.any()


def test_ten_of_many_misfits_are_shown(tmp_path: Path) -> None:
    _saved(TINY, tmp_path)
    _change_params(tmp_path, {"dim": 32})
    with pytest.raises(InputError) as caught:
        _loaded(tmp_path)
    head, *lines = str(caught.value).splitlines()
    assert head.endswith("38 tensor(s) do not fit the model")
    assert len(lines) == 11
    assert lines[-1] == "  ... and 28 more"
    assert "has shape (16, 16), params.json says (32, 32)" in lines[0]
