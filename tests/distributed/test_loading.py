"""Every number of ranks loads the same trunk, from files of either layout."""

from __future__ import annotations

from pathlib import Path

import loading_worker
import pytest
import torch
from bases import language_model, write_hugging_face, write_meta, write_parts, write_shards
from launch import run_ranks
from loading_worker import EXPECTED
from safetensors.torch import save_file

from job.model.architecture import TransformerConfig

pytestmark = pytest.mark.slow
# Rows that do not divide by the number of ranks, and slices that end inside a head.
ARCHITECTURES = {
    "grouped heads": TransformerConfig(
        dim=18, n_layers=4, n_heads=6, n_kv_heads=2, head_dim=6, vocab_size=38, n_future_tokens=2
    ),
    "biases": TransformerConfig(dim=20, n_layers=2, n_heads=2, vocab_size=22, qkv_bias=True),
    "norms of heads": TransformerConfig(dim=24, n_layers=2, n_heads=4, vocab_size=26, qk_norm=True),
}


def _write(folder: Path, config: TransformerConfig) -> None:
    """One model in all ways, and what a trunk must have of it."""
    model = language_model(config, torch.float16)
    write_meta(folder / "meta", model)
    write_parts(folder / "parts-by-columns", model, 2, embedding_dim=1)
    write_parts(folder / "parts-by-rows", model, 2, embedding_dim=0)
    write_hugging_face(folder / "hf", model)
    write_shards(folder / "shards", model, 3)
    left = ("output.", "extra_heads.")
    trunk = {k: v for k, v in model.state_dict().items() if not k.startswith(left)}
    save_file(trunk, folder / EXPECTED)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_number_of_ranks_loads_the_same(world: int, tmp_path: Path) -> None:
    for case, config in ARCHITECTURES.items():
        _write(tmp_path / case, config)
    run_ranks([loading_worker.__file__, *ARCHITECTURES], world, tmp_path)
