"""The last block computes only what is read: values and gradients are those of all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.packed_layout import PackedLayout

CONFIG = TransformerConfig(
    dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=40, qk_norm=True, norm_eps=1e-6
)
LENGTHS = [140, 5, 1, 30]  # one beyond a span of attention, three that share one
RESPONSES = [*range(90, 140), *range(142, 145), 145, *range(150, 176)]


@pytest.mark.parametrize(
    ("at", "rows", "counts"),
    [
        (RESPONSES, RESPONSES, [50, 3, 1, 26]),
        ([138, 139, 175], [138, 139, 175], [2, 0, 0, 1]),
        # from the first that is read to the end
        ([139, 141, 143], [139, 141, 142, 143, 144], [1, 4, 0, 0]),
        ([143, 141], [141, 142, 143, 144], [0, 4, 0, 0]),
        ([], [175], [0, 0, 0, 1]),  # kernels want one
        (list(range(176)), list(range(176)), LENGTHS),
    ],
)
def test_rows_of_each_sequence_go_from_the_first_read_to_its_end(
    at: list[int], rows: list[int], counts: list[int]
) -> None:
    positions = torch.tensor(at, dtype=torch.int64)
    reads = PackedLayout(LENGTHS).reads(positions)
    assert reads.rows.tolist() == rows
    assert reads.boundaries.diff().tolist() == counts
    assert reads.max_length == max(counts)
    found = reads.rows if reads.at is None else reads.rows[reads.at]
    assert torch.equal(found, positions)
    assert (reads.at is None) == (at == rows)


def _critic(n: int, *, recompute: bool = False) -> Critic:
    torch.manual_seed(0)
    critic = Critic(CONFIG)
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    unfreeze_last_blocks(critic, n)
    if recompute:
        critic.trunk.recompute_trainable_blocks()
    return critic


def _learned(critic: Critic, outputs: Tensor) -> dict[str, Tensor]:
    (outputs * torch.linspace(-1, 1, len(outputs))).sum().backward()
    learned = {n: p.grad for n, p in critic.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in learned.values())
    return learned  # type: ignore[return-value]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2, 4])
@pytest.mark.parametrize("at", [RESPONSES, [141, 143, 20]], ids=["responses", "some"])
def test_values_and_gradients_are_those_of_the_whole_last_block(
    at: list[int], n: int, recompute: bool
) -> None:
    tokens = torch.arange(sum(LENGTHS)) % CONFIG.vocab_size
    layout, positions = PackedLayout(LENGTHS), torch.tensor(at)
    critic, whole = _critic(n, recompute=recompute), _critic(n)
    outputs = critic(tokens, layout, positions)
    hidden = whole.trunk.hidden(tokens, layout)[positions]
    expected = whole.value_head(whole.trunk.norm(hidden)).sum(-1)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    gradients, theirs = _learned(critic, outputs), _learned(whole, expected)
    for name, gradient in theirs.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=1e-5 * float(scale), msg=name
        )


def test_without_a_read_position_every_trained_parameter_has_a_gradient_of_zeros() -> None:
    """A rank without sequences takes part in all reductions."""
    critic = _critic(2)
    outputs = critic(torch.zeros(2, dtype=torch.int64), PackedLayout([2]), torch.arange(0))
    assert outputs.shape == (0,)
    assert not any(gradient.any() for gradient in _learned(critic, outputs).values())


def test_the_last_block_multiplies_only_rows_that_are_read() -> None:
    rows: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda module, given, output: rows.__setitem__(name, len(given[0]))

    critic = _critic(1)
    for name, module in critic.trunk.layers[-1].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(note(name))
    n, t = len(RESPONSES), sum(LENGTHS)
    critic(torch.zeros(t, dtype=torch.int64), PackedLayout(LENGTHS), torch.tensor(RESPONSES))
    of_keys = {name: rows.pop(f"attention.{name}") for name in ("wk", "wv")}
    assert of_keys == {"wk": t, "wv": t}
    assert set(rows.values()) == {n}
    assert len(rows) == 5
