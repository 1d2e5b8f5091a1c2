"""Each supported architecture gives the hidden states and values that transformers gives."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bases import change_json, loaded, randomise
from torch import Tensor

from job.common.errors import InputError
from job.model.architecture_file import read_architecture
from job.model.critic import Critic
from job.model.fingerprint import fingerprint
from job.model.layout import meta_name, to_meta
from job.model.packed_layout import PackedLayout
from job.model.parameters import count_parameters
from job.model.transformer import Trunk
from job.model.weights import check_trunk, load_trunk

pytestmark = pytest.mark.slow

LENGTHS = [7, 40, 1, 23]
VOCABULARY, LONGEST = 61, 64
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.2,
}


def _theta(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


# The configuration class, and what is particular to the family.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("LlamaConfig", {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "Llama 3": ("LlamaConfig", {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA_3}),
    "CodeLlama": ("LlamaConfig", {"num_key_value_heads": 6, **_theta(1e6)}),
    "Sheared-LLaMA": ("LlamaConfig", {"num_key_value_heads": 6, "intermediate_size": 56}),
    "TinyLlama": ("LlamaConfig", {"num_key_value_heads": 3}),
    "SmolLM": ("LlamaConfig", {"tie_word_embeddings": True}),
    "DeepSeek-Coder": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}},
    ),
    "Mistral": ("MistralConfig", {"sliding_window": None, **_theta(1e6)}),
    "Mistral, wide window": ("MistralConfig", {"sliding_window": LONGEST}),
    "Qwen2": ("Qwen2Config", {"tie_word_embeddings": True, **_theta(1e6)}),
    "Qwen2.5": ("Qwen2Config", {"num_key_value_heads": 3, **_theta(1e6)}),
    "Qwen3": ("Qwen3Config", {"head_dim": 16, **_theta(1e6)}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> functools.partial[Path]:
    return functools.partial(_base, tmp_path_factory.mktemp("bases"))


def _base(place: Path, case: str, **changes: Any) -> Path:
    """A model of random weights, written by transformers itself."""
    folder = place / "-".join([case, *map(str, changes.values())])
    if not folder.exists():
        kind, particular = CASES[case]
        config = getattr(transformers, kind)(**SIZES | particular | changes)
        model = transformers.AutoModelForCausalLM.from_config(config)
        randomise(model)
        model.save_pretrained(folder)
    return folder


def _tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in LENGTHS]


def _padded(model: Any, sequences: list[Tensor]) -> Tensor:
    """What transformers makes of a padded batch, at the real tokens in stream order."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(s)] for s in sequences])
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask.long())
    return output[0][mask]


def _same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert theirs.std() > 0.1


@torch.no_grad()
def _hidden(trunk: Trunk) -> Tensor:
    return trunk(torch.cat(_tokens()), PackedLayout(LENGTHS))


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_of_a_packed_stream_are_those_of_a_padded_batch(
    case: str, bases: functools.partial[Path]
) -> None:
    folder = bases(case)
    check_trunk(folder, LONGEST)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    _same(_hidden(loaded(folder)), _padded(model, _tokens()))


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_a_token_classifier(case: str, bases: functools.partial[Path]) -> None:
    folder = bases(case)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder, num_labels=1)
    torch.nn.init.normal_(model.score.bias)
    critic = Critic(read_architecture(folder))
    load_trunk(critic.trunk, folder)
    critic.value_head.load_state_dict(model.score.state_dict())
    with torch.no_grad():
        values = critic(torch.cat(_tokens()), PackedLayout(LENGTHS), torch.arange(sum(LENGTHS)))
    _same(values, _padded(model.eval(), _tokens())[:, 0])


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_counted_as_transformers_has_them(
    case: str, bases: functools.partial[Path]
) -> None:
    folder = bases(case)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder, num_labels=1)
    counts = count_parameters(read_architecture(folder), num_unfrozen_layers=1)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.trunk_blocks.trainable == sum(
        p.numel() for p in model.model.layers[-1].parameters()
    )


@pytest.mark.parametrize("case", ["Llama 3", "Qwen2", "Qwen3"])
def test_the_order_of_rows_matters_to_what_is_computed(
    case: str, bases: functools.partial[Path]
) -> None:
    """Read with its rows left as they lie, the same file gives other hidden states."""
    folder = bases(case)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    named = {k: v for k, v in model.state_dict().items() if not k.startswith("lm_head")}
    right, wrong = (Trunk(read_architecture(folder)) for _ in range(2))
    right.load_state_dict(to_meta(named, right.config.head_width))
    wrong.load_state_dict({meta_name(name): tensor for name, tensor in named.items()})
    expected = _padded(model.model.eval(), _tokens())
    _same(_hidden(right), expected)
    assert (_hidden(wrong) - expected).abs().max() > 0.1


@pytest.mark.parametrize("case", ["Mistral", "Qwen2", "Qwen3"])
def test_a_window_shorter_than_sequences_is_refused_and_would_be_wrong(
    case: str, bases: functools.partial[Path]
) -> None:
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
    folder = bases(case, **window)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with pytest.raises(InputError, match=r"sliding_window 8 is less than data\.max_length 9"):
        check_trunk(folder, 9)
    check_trunk(folder, 8)
    trunk = loaded(folder)
    for length, right in ((8, True), (9, False)):
        tokens = torch.arange(length)
        theirs = _padded(model, [tokens])
        ours = trunk(tokens, PackedLayout([length])).detach()
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5) == right


@pytest.mark.parametrize("case", CASES)
def test_shards_are_one_model(case: str, bases: functools.partial[Path], tmp_path: Path) -> None:
    folder = bases(case)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_trunk(tmp_path, LONGEST)
    for (name, one), other in zip(
        loaded(folder).named_parameters(), loaded(tmp_path).parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert fingerprint(folder, tmp_path / "a") == fingerprint(tmp_path, tmp_path / "b")


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("Llama 2", {"rope_theta": ..., "num_key_value_heads": ..., "head_dim": ...}),
        ("Llama 2", {"rope_theta": 10000.0, "rope_scaling": None, "head_dim": None}),
        ("CodeLlama", {"rope_theta": 1000000}),
        ("Llama 3", {"rope_theta": 5e5, "rope_scaling": {**LLAMA_3, "rope_theta": ...}}),
        ("DeepSeek-Coder", {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4}}),
    ],
)
def test_files_of_older_versions_say_the_same(
    case: str, changes: dict[str, Any], bases: functools.partial[Path], tmp_path: Path
) -> None:
    config, file = bases(case) / "config.json", tmp_path / "config.json"
    file.write_text(config.read_text())
    scaling = changes.get("rope_scaling")
    if scaling:
        changes = changes | {"rope_scaling": {k: v for k, v in scaling.items() if v is not ...}}
    change_json(file, rope_parameters=..., **changes)
    assert read_architecture(tmp_path) == read_architecture(bases(case))
