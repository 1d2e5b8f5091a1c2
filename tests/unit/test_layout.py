"""Names and row order of both layouts are inverse to each other."""

from __future__ import annotations

import pytest
import torch

from job.model.layout import (
    halves,
    hugging_face_name,
    is_loaded,
    is_rotated,
    meta_name,
    neighbours,
    to_hugging_face,
    to_meta,
)

NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.0.attention.wq.weight": "model.layers.0.self_attn.q_proj.weight",
    "layers.0.attention.wk.bias": "model.layers.0.self_attn.k_proj.bias",
    "layers.0.attention.wv.weight": "model.layers.0.self_attn.v_proj.weight",
    "layers.10.attention.wo.weight": "model.layers.10.self_attn.o_proj.weight",
    "layers.0.attention.q_norm.weight": "model.layers.0.self_attn.q_norm.weight",
    "layers.0.attention.k_norm.weight": "model.layers.0.self_attn.k_norm.weight",
    "layers.0.feed_forward.w1.weight": "model.layers.0.mlp.gate_proj.weight",
    "layers.0.feed_forward.w2.weight": "model.layers.0.mlp.down_proj.weight",
    "layers.0.feed_forward.w3.weight": "model.layers.0.mlp.up_proj.weight",
    "layers.0.attention_norm.weight": "model.layers.0.input_layernorm.weight",
    "layers.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@pytest.mark.parametrize("ours", NAMES)
def test_names(ours: str) -> None:
    assert hugging_face_name(ours) == NAMES[ours]
    assert meta_name(NAMES[ours]) == ours
    assert is_rotated(ours) == any(part in ours for part in ("wq", "wk", "q_norm", "k_norm"))
    assert meta_name(NAMES[ours].removeprefix("model.")) == ours  # as saved without any head
    assert is_loaded(ours) == is_loaded(NAMES[ours]) == (ours != "output.weight")


@pytest.mark.parametrize("name", ["extra_heads.0.attention.wq.weight", "norm", "layers.0.x.weight"])
def test_a_name_without_counterpart_is_an_error(name: str) -> None:
    with pytest.raises(KeyError):
        hugging_face_name(name)
    with pytest.raises(KeyError):
        meta_name(f"model.{name}")


@pytest.mark.parametrize(
    "name",
    [
        "extra_heads.0.attention.wq.weight",
        "rope.freqs",
        "score.weight",
        "score.bias",
        "v_head.summary.weight",
        "layers.0.attention.inner_attention.rope.freqs",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ],
)
def test_heads_and_stored_tables_are_not_loaded(name: str) -> None:
    assert not is_loaded(name)


def test_each_pair_of_neighbours_becomes_a_pair_of_the_halves() -> None:
    rows = torch.arange(12)  # two heads of six channels
    assert halves(rows, 6).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert neighbours(halves(rows, 6), 6).tolist() == rows.tolist()
    matrix = torch.randn(12, 3)
    assert torch.equal(halves(neighbours(matrix, 4), 4), matrix)
    assert torch.equal(halves(matrix, 2), matrix)


def test_only_what_is_rotated_is_reordered() -> None:
    named = {
        name: torch.arange(8.0) if "norm" in name else torch.randn(8, 4) for name in sorted(NAMES)
    }
    theirs = to_hugging_face(named, 4)
    changed = {n for n, t in named.items() if not torch.equal(theirs[NAMES[n]], t)}
    assert changed == {name for name in named if is_rotated(name)}
    back = to_meta(theirs, 4)
    assert all(torch.equal(back[name], tensor) for name, tensor in named.items())
