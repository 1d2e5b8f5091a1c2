"""Trunks with multi-token heads: N counts on the blocks of the next-token path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bases import language_model, write_meta
from torch import nn

from job.model.architecture import TransformerConfig
from job.model.architecture_file import read_architecture
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.packed_layout import PackedLayout
from job.model.parameters import count_parameters
from job.model.weights import load_trunk

SMALL = TransformerConfig(dim=16, n_layers=32, n_heads=2, vocab_size=11, multiple_of=8)
TOKENS, LAYOUT = torch.arange(9), PackedLayout([4, 5])


def _critic(folder: Path, n_future_tokens: int, n: int) -> Critic:
    write_meta(folder, language_model(replace(SMALL, n_future_tokens=n_future_tokens)))
    critic = Critic(read_architecture(folder))
    load_trunk(critic.trunk, folder)
    critic.initialise_head(0.5, seed=0)
    unfreeze_last_blocks(critic, n)
    return critic


def _values(critic: Critic) -> torch.Tensor:
    return critic(TOKENS, LAYOUT, torch.arange(9))


@pytest.mark.slow
@pytest.mark.parametrize(("n_future_tokens", "blocks"), [(1, 32), (4, 29)])
def test_n_counts_on_the_blocks_that_are_there(
    n_future_tokens: int, blocks: int, tmp_path: Path
) -> None:
    critic = _critic(tmp_path, n_future_tokens, n=4)
    assert len(critic.trunk.layers) == blocks
    _values(critic).sum().backward()
    for index, block in enumerate(critic.trunk.layers):
        reached = [p.grad is not None and bool(p.grad.any()) for p in block.parameters()]
        assert all(reached) if index >= blocks - 4 else not any(reached)
    counts = count_parameters(critic.trunk.config, 4)
    assert counts.trainable == sum(p.numel() for p in critic.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("n_future_tokens", [1, 4])
def test_the_last_block_is_part_of_the_values(n_future_tokens: int, tmp_path: Path) -> None:
    critic = _critic(tmp_path, n_future_tokens, n=4)
    with torch.no_grad():
        before = _values(critic)
        critic.trunk.layers = nn.ModuleList(critic.trunk.layers[:-1])
        after = _values(critic)
    assert ((before - after).abs() > 1e-4).all()


def test_extra_heads_are_no_part_of_the_values(tmp_path: Path) -> None:
    critic = _critic(tmp_path, 4, n=4)
    weights = torch.load(tmp_path / "consolidated.pth")
    heads = [name for name in weights if name.startswith("extra_heads.")]
    assert len({name.split(".")[1] for name in heads}) == 3
    torch.save(
        {k: torch.zeros_like(v) if k in heads else v for k, v in weights.items()},
        tmp_path / "consolidated.pth",
    )
    other = Critic(read_architecture(tmp_path))
    load_trunk(other.trunk, tmp_path)
    other.value_head.load_state_dict(critic.value_head.state_dict())
    assert torch.equal(_values(critic), _values(other))
