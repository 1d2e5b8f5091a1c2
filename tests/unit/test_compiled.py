"""Blocks that torch.compile has made: whole graphs, for any length, with the same values."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from job.common.errors import InputError
from job.common.schema import CriticConfig
from job.distributed.world import World
from job.model import transformer
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.packed_layout import PackedLayout
from job.model.transformer import rotate
from job.training import compilation
from job.training.compilation import choose_compilation, missing

# torch hides this one of its own, unless warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

CONFIG = TransformerConfig(
    dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=40, qk_norm=True, norm_eps=1e-6
)
STREAMS = [[70, 9, 20], [150], [3, 4, 5, 6]]


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    transformer._compiled.cache_clear()
    yield
    torch._dynamo.reset()
    transformer._compiled.cache_clear()


def _critic(*, compiled: bool, recompute: bool) -> Critic:
    torch.manual_seed(0)
    critic = Critic(CONFIG)
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    unfreeze_last_blocks(critic, 2)
    if recompute:
        critic.trunk.recompute_trainable_blocks()
    if compiled:
        critic.trunk.compile_blocks()
    return critic


def _step(critic: Critic, lengths: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs at the second halves, without and with gradients, and these."""
    layout = PackedLayout(lengths)
    halves = zip(lengths, layout.ends[1:], strict=True)
    at = torch.cat([torch.arange(end - n // 2, end) for n, end in halves])
    tokens = torch.arange(sum(lengths)) % CONFIG.vocab_size
    with torch.no_grad():
        evaluated = critic(tokens, layout, at)
    critic.zero_grad()
    outputs = critic(tokens, layout, at)
    outputs.square().sum().backward()
    gradients = {n: p.grad for n, p in critic.named_parameters() if p.grad is not None}
    return torch.cat((evaluated, outputs.detach())), gradients


def _compare(*, recompute: bool, tolerance: float) -> list[int]:
    """Hold compiled blocks against the others; graphs after each stream."""
    compiled, plain = (_critic(compiled=c, recompute=recompute) for c in (True, False))
    graphs = []
    torch._dynamo.utils.counters.clear()
    for lengths in STREAMS:
        (ours, gradients), (theirs, expected) = (_step(c, lengths) for c in (compiled, plain))
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (gradients[name] - gradient).norm() / gradient.norm()
            assert error < tolerance, (name, float(error))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(compiled.state_dict()) == list(plain.state_dict())  # no wrapper in any name
    return graphs


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.all), True])
def test_the_same_values_without_graph_breaks_and_no_graph_more_for_other_lengths(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "BACKEND", "eager")
    graphs = _compare(recompute=recompute, tolerance=1e-5)
    # before attention and after it: frozen, evaluated, first trained block, last one; and before
    # it the last block once more, evaluated
    assert graphs == [9, 9, 9]


@pytest.mark.all
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's, of its own
def test_kernels_of_inductor_give_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking := missing(cuda=False):
        pytest.skip(f"there is no {' and '.join(lacking)}")
    assert transformer.BACKEND == "inductor"
    assert _compare(recompute=True, tolerance=1e-4)[-1] == 9


def test_rotation_without_complex_numbers_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, frequencies = torch.randn(9, 3, 8), torch.rand(4)
    rope = transformer.rope_table(frequencies, torch.arange(9))
    expected = rotate(x, rope)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, rope), expected, rtol=1e-6, atol=1e-6)


# What `auto` is


CPU, GPU = World(), World(device=torch.device("cuda", 0))


def _chosen(given: bool | str, world: World) -> bool | str:
    config = CriticConfig()
    config.training.compile = given
    choose_compilation(config, world)
    return config.training.compile


def test_auto_compiles_on_a_gpu_where_a_compiler_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(compilation, "missing", lambda *, cuda: [])
    assert [_chosen("auto", world) for world in (CPU, GPU)] == [False, True]
    assert [_chosen(True, world) for world in (CPU, GPU)] == [True, True]
    assert [_chosen(False, world) for world in (CPU, GPU)] == [False, False]
    monkeypatch.setattr(compilation, "missing", lambda *, cuda: ["gcc or clang"])
    caplog.clear()
    assert _chosen("auto", GPU) is False
    assert caplog.messages == ["training.compile: false: there is no gcc or clang"]
    with pytest.raises(InputError, match=r"compile: true, and there is no gcc or clang"):
        _chosen(True, GPU)


def test_what_compilation_needs_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/clang" if name == "clang" else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert missing(cuda=False) == ["g++ or clang++", "Python.h"]
    (tmp_path / "Python.h").touch()
    assert "gcc or clang" not in missing(cuda=True)
    monkeypatch.setenv("CC", "icx")
    assert "icx" in missing(cuda=True)
