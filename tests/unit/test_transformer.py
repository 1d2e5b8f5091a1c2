"""The decoder: packing, attention, RoPE, sizes, and where gradients stop."""

from __future__ import annotations

import math

import pytest
import torch

from job.model import packed_layout, transformer
from job.model.architecture import RopeScaling, TransformerConfig
from job.model.packed_layout import PackedLayout
from job.model.transformer import Transformer, Trunk, rope_frequencies, rope_table, rotate

PLAIN = TransformerConfig(dim=32, n_layers=3, n_heads=4, vocab_size=40, multiple_of=8)
GROUPED = TransformerConfig(
    dim=48,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    vocab_size=40,
    multiple_of=8,
    qkv_bias=True,
    qk_norm=True,
    head_dim=10,
    rope_scaling=RopeScaling(),
)


def _trunk(config: TransformerConfig) -> Trunk:
    torch.manual_seed(0)
    return Trunk(config)


@pytest.mark.parametrize("config", [PLAIN, GROUPED], ids=["plain", "grouped"])
@pytest.mark.parametrize("lengths", [[5], [3, 9, 1, 4], [150, 2, 130, 7]])
def test_packed_sequences_equal_the_same_sequences_alone(
    config: TransformerConfig, lengths: list[int]
) -> None:
    trunk = _trunk(config)
    tokens = torch.randint(0, 40, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    packed = trunk(tokens, PackedLayout(lengths))
    alone = [trunk(part, PackedLayout([len(part)])) for part in tokens.split(lengths)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("span", [1, 4, 1000])
def test_how_sequences_share_attention_calls_changes_nothing(
    span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, lengths = _trunk(PLAIN), [3, 2, 6, 1]
    tokens = torch.arange(12)
    expected = trunk(tokens, PackedLayout(lengths))
    monkeypatch.setattr(packed_layout, "SPAN_TOKENS", span)
    monkeypatch.setattr(packed_layout, "CALL_QUERIES", span)
    torch.testing.assert_close(trunk(tokens, PackedLayout(lengths)), expected)


def test_a_token_depends_on_no_later_one_and_on_no_other_sequence() -> None:
    trunk, layout = _trunk(PLAIN), PackedLayout([4, 4])
    tokens = torch.arange(8)
    changed = tokens.clone()
    changed[2] = 30
    same = (trunk(tokens, layout) == trunk(changed, layout)).all(-1)
    assert same.tolist() == [True, True, False, False, True, True, True, True]


def test_attention_equals_the_textbook_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, n, 4, generator=generator) for n in (4, 2, 2))
    mixed = transformer.attend(q, k, v, PackedLayout([5]))
    for head in range(4):
        scores = q[:, head] @ k[:, head // 2].T / math.sqrt(4)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(mixed[:, head], scores.softmax(-1) @ v[:, head // 2])


def test_positions_restart_with_each_sequence() -> None:
    layout = PackedLayout([3, 1, 2])
    assert layout.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert layout.boundaries.tolist() == [0, 3, 4, 6]


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_a_stream_without_tokens_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        PackedLayout(lengths)


def test_rope_rotates_neighbouring_channels_by_position_times_frequency() -> None:
    config = TransformerConfig(dim=4, n_layers=1, n_heads=1, vocab_size=2)
    x = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])
    turned = rotate(x, rope_table(rope_frequencies(config), torch.tensor([3])))[0, 0]
    slow = 3 * 10000**-0.5
    expected = [math.cos(3), math.sin(3), -math.sin(slow), math.cos(slow)]
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_llama_3_scaling_keeps_fast_channels_and_stretches_slow_ones() -> None:
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    config = TransformerConfig(
        dim=128, n_layers=1, n_heads=1, vocab_size=2, rope_theta=5e5, rope_scaling=scaling
    )
    plain = 5e5 ** -(torch.arange(0, 128, 2) / 128)
    ratio = rope_frequencies(config) / plain
    wavelength = 2 * math.pi / plain
    fast, slow = wavelength < 8192 / 4, wavelength > 8192
    torch.testing.assert_close(ratio[fast], torch.ones(int(fast.sum())))
    torch.testing.assert_close(ratio[slow], torch.full((int(slow.sum()),), 0.125))
    middle = ~fast & ~slow
    smooth = (8192 / wavelength[middle] - 1) / 3
    torch.testing.assert_close(ratio[middle], (1 - smooth) / 8 + smooth)


@pytest.mark.parametrize(
    ("dim", "multiple", "multiplier", "width"),
    [
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 4096, 1.3, 28672),
        (4096, 1024, 1.3, 14336),
    ],
)
def test_hidden_size_follows_metas_rounding(
    dim: int, multiple: int, multiplier: float | None, width: int
) -> None:
    config = TransformerConfig(
        dim=dim,
        n_layers=1,
        n_heads=32,
        vocab_size=2,
        multiple_of=multiple,
        ffn_dim_multiplier=multiplier,
    )
    assert config.ffn_width == width


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    norm = transformer.RMSNorm(2, 0.0)
    expected = torch.tensor([3.0, 4.0]) / math.sqrt(12.5)
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), expected)


def test_parameter_names_are_metas() -> None:
    config = TransformerConfig(dim=8, n_layers=3, n_heads=2, vocab_size=9, n_future_tokens=2)
    with torch.device("meta"):
        names = set(Transformer(config).state_dict())
    assert {
        "tok_embeddings.weight",
        "layers.1.attention.wq.weight",
        "layers.0.feed_forward.w2.weight",
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
        "extra_heads.0.attention.wo.weight",
        "norm.weight",
        "output.weight",
    } <= names
    assert "layers.2.attention.wq.weight" not in names
    assert "extra_heads.1.attention.wq.weight" not in names


def test_the_first_head_is_the_ordinary_next_token_path() -> None:
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(dim=16, n_layers=4, n_heads=2, vocab_size=9, n_future_tokens=3)
    )
    tokens, layout = torch.arange(9), PackedLayout([4, 5])
    logits = model.head_logits(tokens, layout)
    assert len(logits) == 3
    torch.testing.assert_close(logits[0], model.output(model(tokens, layout)))


def test_the_prefix_runs_without_gradients_and_joins_the_suffix() -> None:
    trunk = _trunk(PLAIN).requires_grad_(False)
    trunk.layers[2].requires_grad_(True)
    tokens, layout = torch.arange(6), PackedLayout([6])
    rope = trunk.rope(layout)
    prefix = trunk.prefix(tokens, layout, rope)
    assert trunk.first_trainable_block() == 2
    assert not prefix.requires_grad
    hidden = trunk.suffix(prefix, layout, rope)
    assert hidden.requires_grad
    torch.testing.assert_close(hidden, trunk.hidden(tokens, layout))


def _one_trainable(n_frozen: int, *, recompute: bool) -> Trunk:
    config = TransformerConfig(dim=32, n_layers=n_frozen + 1, n_heads=4, vocab_size=40)
    trunk = _trunk(config).requires_grad_(False)
    trunk.layers[-1].requires_grad_(True)
    if recompute:
        trunk.recompute_trainable_blocks()
    return trunk


def _saved_bytes(trunk: Trunk) -> int:
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trunk.hidden(torch.arange(20), PackedLayout([20]))
    return total


def test_saved_activations_do_not_depend_on_the_number_of_frozen_blocks() -> None:
    few, many = (_saved_bytes(_one_trainable(n, recompute=False)) for n in (1, 7))
    assert few == many > 0


def test_recomputed_blocks_save_less_and_give_the_same_gradients() -> None:
    gradients, saved = [], []
    for recompute in (False, True):
        trunk = _one_trainable(2, recompute=recompute)
        saved.append(_saved_bytes(trunk))
        trunk(torch.arange(20), PackedLayout([12, 8])).square().sum().backward()
        gradients.append([p.grad for p in trunk.layers[-1].parameters()])
    assert saved[1] < saved[0] / 2
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 30}, "not divisible"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"dim": 12}, "must be even"),
        ({"n_future_tokens": 9}, "n_future_tokens"),
    ],
)
def test_impossible_architectures_are_refused(change: dict[str, int], message: str) -> None:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 9} | change
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**sizes)  # type: ignore[arg-type]
