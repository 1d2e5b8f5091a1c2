"""Meta's layout of a trunk and Hugging Face's: tensor names, and the rows that RoPE rotates.

A position turns pairs of a head's e channels. Meta pairs neighbours, (0, 1), (2, 3), ...; Hugging
Face's Llama family pairs each channel of the first half with one of the second, (0, e / 2), ...
Both compute the same once the rows of the query and key projections, their biases and their norms
are reordered within each head. Everything else is the same under other names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TO_META = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
_ROTATED = ("attention.wq", "attention.wk", "attention.q_norm", "attention.k_norm")
_BLOCK = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
# In the files, and no part of a trunk: LM head, multi-token heads, a classifier's or TRL's value
# head, a stored RoPE table.
_NOT_LOADED = ("output.", "extra_heads.", "rope.", "lm_head.", "score.", "v_head.")
_ROPE_TABLES = (".rope.freqs", ".rotary_emb.inv_freq")


def is_loaded(stored_name: str) -> bool:
    """Whether a critic uses a tensor of a file of either layout."""
    return not stored_name.startswith(_NOT_LOADED) and not stored_name.endswith(_ROPE_TABLES)


def hugging_face_name(name: str) -> str:
    """What Hugging Face calls a tensor of Meta's layout.

    Raises:
        KeyError: it has no such tensor; multi-token heads are an example.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    block = _BLOCK.fullmatch(name)
    if block is None or block[2] not in _IN_BLOCK:
        raise KeyError(name)
    return f"model.layers.{block[1]}.{_IN_BLOCK[block[2]]}.{block[3]}"


def meta_name(name: str) -> str:
    """What Meta calls a tensor of Hugging Face's layout.

    A model that was saved without any head names its tensors without `model.`.

    Raises:
        KeyError: it has no such tensor.
    """
    within = name.removeprefix("model.")
    for ours, theirs in _OUTSIDE.items():
        if theirs in (name, f"model.{within}"):
            return ours
    block = _BLOCK.fullmatch(within)
    if block is None or block[2] not in _TO_META:
        raise KeyError(name)
    return f"layers.{block[1]}.{_TO_META[block[2]]}.{block[3]}"


def is_rotated(name: str) -> bool:
    """Whether the rows of a tensor, by Meta's name, lie otherwise in Hugging Face's layout."""
    block = _BLOCK.fullmatch(name)
    return block is not None and block[2] in _ROTATED


def halves(rows: Tensor, head_width: int) -> Tensor:
    """Rows of whole heads [h e, ...], from Meta's order to Hugging Face's."""
    return rows.unflatten(0, (-1, head_width // 2, 2)).transpose(1, 2).flatten(0, 2)


def neighbours(rows: Tensor, head_width: int) -> Tensor:
    """Rows of whole heads [h e, ...], from Hugging Face's order to Meta's."""
    return rows.unflatten(0, (-1, 2, head_width // 2)).transpose(1, 2).flatten(0, 2)


def to_hugging_face(named: Mapping[str, Tensor], head_width: int) -> dict[str, Tensor]:
    """Tensors of Meta's layout in Hugging Face's, whole and contiguous.

    Raises:
        KeyError: a name that Hugging Face's layout does not have.
    """
    return {
        hugging_face_name(name): halves(t, head_width) if is_rotated(name) else t.contiguous()
        for name, t in named.items()
    }


def to_meta(named: Mapping[str, Tensor], head_width: int) -> dict[str, Tensor]:
    """Tensors of Hugging Face's layout in Meta's, whole and contiguous.

    Raises:
        KeyError: a name that Meta's layout does not have.
    """
    renamed = {meta_name(name): tensor for name, tensor in named.items()}
    return {
        name: neighbours(t, head_width) if is_rotated(name) else t.contiguous()
        for name, t in renamed.items()
    }
