"""GPUs that cannot do what a configuration asks for, and heads that take another path on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from micro_job import write_job

from job.common.config import load_config
from job.common.errors import Exit, UnfitNode
from job.common.schema import CriticConfig, FsdpConfig
from job.memory.footprint import Setting, _Step
from job.model.architecture import TransformerConfig
from job.model.packed_layout import PackedLayout
from job.model.transformer import attend
from job.training import fitness
from job.training.gpu import check_gpu

GPU = torch.device("cuda", 0)
SHAPE = TransformerConfig(dim=64, n_layers=2, n_heads=2, vocab_size=100)
OLD = (
    "Tesla V100 has compute capability 7.0, and bf16 needs 8.0: take a newer GPU, or set "
    "distributed.fsdp.mixed_precision=false"
)
EXACT = FsdpConfig(mixed_precision=False)


def _gpus(patch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Pretends GPUs, as the driver describes them."""
    patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    patch.setattr(torch.cuda, "get_device_capability", lambda one: capabilities[one.index])
    patch.setattr(torch.cuda, "get_device_name", lambda one: "Tesla V100")


def test_bf16_needs_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, (7, 0))
    with pytest.raises(UnfitNode) as ended:
        check_gpu(FsdpConfig(), SHAPE, GPU)
    assert str(ended.value) == OLD
    check_gpu(EXACT, SHAPE, GPU)
    for newer in ((8, 0), (9, 0), (12, 0)):
        _gpus(monkeypatch, newer)
        check_gpu(FsdpConfig(), SHAPE, GPU)
    check_gpu(FsdpConfig(), SHAPE, torch.device("cpu"))


def test_preflight_names_each_gpu_that_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path, ["distributed.fsdp.mixed_precision=true"])
    _gpus(monkeypatch, (8, 0), (7, 0))
    config = load_config(CriticConfig, "critic.yaml")
    found = {one.name: one for one in fitness.of_this_node(config, 2, None)}
    assert "GPU 0" not in found
    assert (found["GPU 1"].fault, found["GPU 1"].seen) == (Exit.UNFIT_NODE, OLD)
    config.distributed.fsdp.mixed_precision = False
    assert "GPU 1" not in {one.name for one in fitness.of_this_node(config, 2, None)}


def test_a_gpu_that_does_not_answer_is_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\n more")

    monkeypatch.chdir(tmp_path)
    write_job(tmp_path)
    _gpus(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    config = load_config(CriticConfig, "critic.yaml")
    found = {one.name: one for one in fitness.of_this_node(config, 1, None)}
    assert found["GPU 0"].fault is Exit.UNFIT_NODE
    assert "busy or unavailable); see nvidia-smi" in found["GPU 0"].seen


@pytest.mark.parametrize(("width", "takes"), [(64, True), (20, False), (256, True), (264, False)])
def test_heads_that_flash_attention_does_not_take_are_told(
    width: int, takes: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _gpus(monkeypatch, (8, 0))
    check_gpu(FsdpConfig(), replace(SHAPE, head_dim=width), GPU)
    assert (
        f"heads of {width} channels are none that flash attention takes" in caplog.text
    ) != takes
    caplog.clear()
    check_gpu(EXACT, replace(SHAPE, head_dim=width), GPU)
    assert not caplog.text


def _of_a_gpu(lengths: list[int]) -> PackedLayout:
    """A layout whose kernels are chosen as on a GPU; it lies on the host."""
    layout = PackedLayout(lengths)
    layout.varlen = True
    return layout


@pytest.mark.parametrize("width", [20, 264])
def test_such_heads_are_attended_to_with_masks(width: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(90, 2, width, dtype=torch.bfloat16) for _ in range(3))
    found = attend(q, k, v, _of_a_gpu([50, 40]))  # flash attention has no form for a CPU
    expected = attend(*(x.float() for x in (q, k, v)), PackedLayout([50, 40]))
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)


def test_float32_has_keys_and_values_repeated_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups, CUDA has no one kernel for it."""
    heads: list[tuple[int, int, bool]] = []
    kernel = F.scaled_dot_product_attention

    def look(q: torch.Tensor, k: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        heads.append((q.shape[1], k.shape[1], bool(more["enable_gqa"])))
        return kernel(q, k, *rest, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    torch.manual_seed(0)
    q, k, v = (torch.randn(90, n, 16) for n in (4, 2, 2))
    found = attend(q, k, v, _of_a_gpu([50, 40]))
    assert heads == [(4, 4, False)]
    torch.testing.assert_close(found, attend(q, k, v, PackedLayout([50, 40])))
    assert heads[-1] == (4, 2, True)


@pytest.mark.parametrize(
    ("width", "config", "repeats", "copies"),
    [
        (24, FsdpConfig(), False, 3),  # queries and the result; half as many keys and values
        (24, FsdpConfig(), True, 4),  # as many, before torch 2.12
        (20, FsdpConfig(), False, 5),  # and the spans' results put together
        (24, EXACT, False, 5),
    ],
)
def test_the_closed_form_knows_which_path_is_taken(
    width: int, config: FsdpConfig, repeats: bool, copies: int
) -> None:
    shape = replace(SHAPE, n_heads=4, n_kv_heads=2, head_dim=width)
    step = _Step(Setting(shape, 2, config, 4096, repeats_keys=repeats))
    size = 2 if config.mixed_precision else 4
    assert step.saved_attention(4096) == 4096 * (copies * 4 * width * size + 4 * 4)
