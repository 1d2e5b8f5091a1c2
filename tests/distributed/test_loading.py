"""Every number of ranks loads the same trunk, from files of either layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bases import language_model, write_hugging_face, write_meta, write_parts, write_shards
from launch import run_ranks
from safetensors.torch import save_file

from job.model.architecture import TransformerConfig

pytestmark = pytest.mark.slow
WORKER = str(Path(__file__).with_name("loading_worker.py"))
# Rows that do not divide by the number of ranks, and slices that end inside a head.
ARCHITECTURES = {
    "grouped heads": TransformerConfig(
        dim=18, n_layers=4, n_heads=6, n_kv_heads=2, head_dim=6, vocab_size=38, n_future_tokens=2
    ),
    "biases": TransformerConfig(dim=20, n_layers=2, n_heads=2, vocab_size=22, qkv_bias=True),
    "norms of heads": TransformerConfig(dim=24, n_layers=2, n_heads=4, vocab_size=26, qk_norm=True),
}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_every_number_of_ranks_loads_the_same(case: str, world: int, tmp_path: Path) -> None:
    model = language_model(ARCHITECTURES[case], torch.float16)
    left = ("output.", "extra_heads.")
    trunk = {k: v for k, v in model.state_dict().items() if not k.startswith(left)}
    save_file(trunk, tmp_path / "expected.safetensors")
    folders = [
        write_meta(tmp_path / "meta", model),
        write_parts(tmp_path / "parts-by-columns", model, 2, embedding_dim=1),
        write_parts(tmp_path / "parts-by-rows", model, 2, embedding_dim=0),
        write_hugging_face(tmp_path / "hf", model),
        write_shards(tmp_path / "shards", model, 3),
    ]
    run_ranks([WORKER, "expected.safetensors", *(f.name for f in folders)], world, tmp_path)
