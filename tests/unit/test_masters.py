"""Trainable weights are float32 masters: small steps are not lost in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from micro_critic import MicroCritics
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def test_nearly_all_masters_change_in_twenty_small_steps_of_bf16_compute(
    critics: MicroCritics, tmp_path: Path
) -> None:
    base = _in_bfloat16(critics.trunk, tmp_path / "bf16")
    run = critics.run(
        "masters",
        f"model.path={base}",
        "model.recipe=null",
        "distributed.fsdp.mixed_precision=true",
        "training.num_unfrozen_layers=2",
        "training.learning_rate=1e-5",
        "training.warmup_steps=0",
        "training.max_steps=20",
    )
    before = torch.load(base / "consolidated.pth", weights_only=True)
    after = load_file(run.path / "critic.safetensors")
    pairs = [(after[n], before[n.removeprefix("trunk.")]) for n in after if n.startswith("trunk.")]
    assert {a.dtype for a, _ in pairs} == {torch.float32}
    changed = sum(int((a != b.float()).sum()) for a, b in pairs)
    in_bf16 = sum(int((a.bfloat16() != b).sum()) for a, b in pairs)
    total = sum(a.numel() for a, _ in pairs)
    assert total > 20_000
    assert changed / total >= 0.99
    assert in_bf16 / total < 0.5  # the test could not fail where bfloat16 shows the steps too


def _in_bfloat16(trunk: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("params.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((trunk / name).read_bytes())
    weights = torch.load(trunk / "consolidated.pth", weights_only=True)
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    torch.save(half, folder / "consolidated.pth")
    return folder
