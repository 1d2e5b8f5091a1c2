"""One model in both layouts: the same bits and outputs, with multi-token heads too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from bases import language_model, loaded, write_hugging_face, write_meta
from micro_job import write_recipe
from safetensors.torch import load_file

from job.common.config import load_config
from job.common.schema import PretrainConfig
from job.model.architecture import LinearScaling, RopeScaling, TransformerConfig
from job.model.architecture_file import read_architecture
from job.model.layout import to_hugging_face, to_meta
from job.model.packed_layout import PackedLayout
from job.model.transformer import Transformer, Trunk
from job.model.weights import check_trunk
from job.training.pretraining import make_trunk

pytestmark = pytest.mark.slow

SMALL = TransformerConfig(
    dim=48, n_layers=4, n_heads=6, n_kv_heads=2, vocab_size=61, multiple_of=16, n_future_tokens=2
)
CASES = {
    "Llama": SMALL,
    "Llama 3": replace(SMALL, rope_scaling=RopeScaling(original_max_position_embeddings=16)),
    "linear": replace(SMALL, rope_scaling=LinearScaling(4.0), rope_theta=1e5),
    "Qwen2": replace(SMALL, qkv_bias=True),
    "Qwen3": replace(SMALL, qk_norm=True, head_dim=16),
}


@torch.no_grad()
def _logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Of the token ahead."""
    return model.head_logits(tokens, PackedLayout([len(tokens)]))[0]


@torch.no_grad()
def _transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model(input_ids=tokens[None]).logits[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_meta_to_hugging_face_and_back_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = language_model(CASES[case], dtype)
    write_meta(tmp_path / "meta", model)
    write_hugging_face(tmp_path / "hf", model)
    stored = {k: v for k, v in model.state_dict().items() if not k.startswith("extra_heads.")}
    written = load_file(tmp_path / "hf/model.safetensors")
    back = to_meta(written, model.config.head_width)
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name
    again = to_hugging_face(back, model.config.head_width)
    assert all(torch.equal(again[name], tensor) for name, tensor in written.items())
    for (name, one), other in zip(
        loaded(tmp_path / "meta").named_parameters(),
        loaded(tmp_path / "hf").parameters(),
        strict=True,
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("case", CASES)
def test_neighbouring_pairs_and_halves_give_the_same_logits(case: str, tmp_path: Path) -> None:
    model = language_model(CASES[case])
    write_hugging_face(tmp_path, model)
    tokens = torch.arange(40)
    ours, theirs = _logits(model, tokens), _transformers_logits(tmp_path, tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert theirs.std() > 0.1


def test_of_32_layers_with_four_heads_29_are_the_next_token_model(tmp_path: Path) -> None:
    model = language_model(replace(SMALL, n_layers=32, n_future_tokens=4))
    write_meta(tmp_path / "meta", model)
    write_hugging_face(tmp_path / "hf", model)
    assert [len(loaded(tmp_path / name).layers) for name in ("meta", "hf")] == [29, 29]
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert len(theirs.layers) == 29
    tokens = torch.arange(30)
    with torch.no_grad():
        ours = loaded(tmp_path / "meta")(tokens, PackedLayout([30]))
        expected = theirs(input_ids=tokens[None])[0][0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_pre_training_leaves_the_same_model_in_both_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(Path("pretrain.yaml"))
    make_trunk(load_config(PretrainConfig, "pretrain.yaml", []))
    meta, hugging_face = Path("trunk"), Path("trunk/hf")
    check_trunk(meta, 64)
    check_trunk(hugging_face, 64)
    for (name, one), other in zip(
        loaded(meta).named_parameters(), loaded(hugging_face).parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(hugging_face)
    tokens = torch.tensor(tokenizer("3+4=7;7*2=14")["input_ids"])
    with torch.device("meta"):
        model = Transformer(read_architecture(meta))
    model.load_state_dict(torch.load(meta / "consolidated.pth"), assign=True)
    ours, theirs = _logits(model, tokens), _transformers_logits(hugging_face, tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_trunk_of_either_layout_is_an_ordinary_module(tmp_path: Path) -> None:
    model = language_model(SMALL)
    trunk = Trunk(read_architecture(write_hugging_face(tmp_path, model)))
    named = load_file(tmp_path / "model.safetensors")
    del named["lm_head.weight"]
    trunk.load_state_dict(to_meta(named, trunk.config.head_width))
    tokens, layout = torch.arange(9), PackedLayout([4, 5])
    torch.testing.assert_close(trunk(tokens, layout), Trunk.forward(model, tokens, layout))
