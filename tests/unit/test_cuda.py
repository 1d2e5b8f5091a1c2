"""What only a GPU can show; skipped without one."""

from __future__ import annotations

import time

import pytest
import torch

from job.memory.recorder import Recorder
from job.model.architecture import TransformerConfig
from job.model.packed_layout import PackedLayout
from job.model.transformer import Trunk, _attend_everywhere, attend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_attention_on_packed_sequences_equals_masked_attention(kv_heads: int) -> None:
    layout = PackedLayout([5, 130, 64], "cuda")
    torch.manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    flash = [torch.randn(199, h, 64, device="cuda", requires_grad=True) for h in heads]
    exact = [x.detach().clone().requires_grad_() for x in flash]
    mixed = attend(*(x.bfloat16() for x in flash), layout).float()
    expected = _attend_everywhere(*exact, layout, None)
    torch.testing.assert_close(mixed, expected, rtol=0.02, atol=0.02)
    mixed.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(flash, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        # single gradients come close to any bound: bf16 rounds each by up to 0.4 %
        assert (ours.grad - theirs.grad).norm() < 0.02 * theirs.grad.norm()


def test_a_bf16_trunk_stays_close_to_its_float32_form() -> None:
    config = TransformerConfig(dim=128, n_layers=3, n_heads=2, vocab_size=50)
    torch.manual_seed(0)
    trunk = Trunk(config).cuda().requires_grad_(False)
    tokens, layout = torch.randint(0, 50, (90,), device="cuda"), PackedLayout([60, 30], "cuda")
    exact = trunk(tokens, layout)
    torch.testing.assert_close(
        trunk.bfloat16()(tokens, layout).float(), exact, rtol=0.05, atol=0.08
    )


def test_an_allocation_shows_in_the_allocators_and_in_nvmls_figures() -> None:
    torch.zeros(1, device="cuda")  # the context, which the baseline then holds
    size = 1 << 30
    with Recorder(torch.device("cuda", 0)) as recorder:
        with recorder.phase("forward"):
            block = torch.empty(size, dtype=torch.uint8, device="cuda")
            time.sleep(0.5)
            del block
        torch.cuda.empty_cache()
        with recorder.phase("save"):
            cpu_began = time.process_time()
            time.sleep(0.5)
            cpu_seconds = time.process_time() - cpu_began
    summary = recorder.summary()
    base, peaks = summary["baseline"], summary["peaks"]
    assert summary["backend"] == "nvml", summary["notes"]
    for figure in ("allocated", "reserved", "device_used"):
        assert peaks["forward"][figure] - base[figure] == pytest.approx(size, rel=0.02), figure
        assert peaks["save"][figure] - base[figure] < size / 2
    assert summary["sampling"]["hertz"] > 20
    assert cpu_seconds < 0.01 * 0.5
