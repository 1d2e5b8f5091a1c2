"""A trunk is the same whichever head stands on it; a head of one label can be the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bases import change_safetensors, loaded, randomise
from micro_critic import MicroCritics
from safetensors.torch import load_file

from job.common.config import load_config
from job.common.errors import InputError
from job.common.schema import CriticConfig
from job.export.formats import export
from job.model.architecture_file import read_architecture
from job.model.critic import Critic
from job.model.fingerprint import fingerprint
from job.model.packed_layout import PackedLayout
from job.model.stored_head import head_names, read_head
from job.model.weights import check_trunk, load_trunk
from job.run.trained import TrainedCritic
from job.training.preparation import prepare_inputs

pytestmark = pytest.mark.slow

LENGTHS = [5, 9]
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
HEADS = ("ForCausalLM", "Model", "ForSequenceClassification", "ForTokenClassification")


def _saved(folder: Path, head: str, *, family: str = "Llama", labels: int = 1) -> Any:
    config = getattr(transformers, f"{family}Config")(**SIZES, num_labels=labels)
    model = getattr(transformers, family + head)(config)
    randomise(model)
    body = getattr(model, "model", model)
    randomise(body, seed=1)  # the same one below each head
    model.save_pretrained(folder)
    return model.eval()


def _tokens() -> torch.Tensor:
    return torch.randint(1, 40, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_trunk_below_each_head_is_the_same(family: str, tmp_path: Path) -> None:
    hidden = []
    for head in HEADS:
        _saved(tmp_path / head, head, family=family)
        check_trunk(tmp_path / head, 9)
        with torch.no_grad():
            hidden.append(loaded(tmp_path / head)(_tokens(), PackedLayout(LENGTHS)))
    for other in hidden[1:]:
        assert torch.equal(other, hidden[0])


def test_a_value_head_beside_a_language_model_is_not_read(tmp_path: Path) -> None:
    _saved(tmp_path, "ForCausalLM")
    before = loaded(tmp_path).state_dict()
    identity = fingerprint(tmp_path, tmp_path / "cache")
    head = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
    change_safetensors(tmp_path / "model.safetensors", lambda tensors: tensors.update(head))
    after = loaded(tmp_path).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert fingerprint(tmp_path, tmp_path / "cache") == identity
    assert head_names(tmp_path) == ["v_head.summary.bias", "v_head.summary.weight"]


def test_a_tensor_that_is_there_with_and_without_its_prefix_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path, "ForCausalLM")
    twice = {"norm.weight": torch.ones(32)}
    change_safetensors(tmp_path / "model.safetensors", lambda tensors: tensors.update(twice))
    with pytest.raises(InputError, match=r"norm\.weight in model\.safetensors is not part"):
        check_trunk(tmp_path, 9)


@pytest.mark.parametrize("head", HEADS[2:])
def test_a_kept_head_values_as_the_classifier_did(head: str, tmp_path: Path) -> None:
    model = _saved(tmp_path, head)
    critic = Critic(read_architecture(tmp_path))
    load_trunk(critic.trunk, tmp_path)
    found = read_head(tmp_path, 32)
    critic.set_head(found.weight, torch.zeros(1) if found.bias is None else found.bias)
    assert (found.bias is None) == (head == "ForSequenceClassification")
    first = _tokens()[: LENGTHS[0]]
    with torch.no_grad():
        values = critic(first, PackedLayout(LENGTHS[:1]), torch.arange(LENGTHS[0]))
        theirs = model(input_ids=first[None]).logits[0].flatten()
    ours = values[-1:] if head == "ForSequenceClassification" else values
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_heads_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    _saved(tmp_path / "plain", "ForCausalLM")
    with pytest.raises(InputError, match=r"model\.keep_head, but no head lies there"):
        read_head(tmp_path / "plain", 32)
    _saved(tmp_path / "many", "ForSequenceClassification", labels=3)
    with pytest.raises(InputError, match=r"score\.weight has shape \(3, 32\)"):
        read_head(tmp_path / "many", 32)


@pytest.mark.parametrize("form", ["token-classification", "sequence-classification", "meta"])
def test_an_exported_critic_is_a_trunk_whose_head_can_be_kept(
    critics: MicroCritics, form: str, tmp_path: Path
) -> None:
    run = critics.run("n1-no-bias", "training.value_head.bias=false").path
    export(TrainedCritic.find(run), form, tmp_path / "base")
    trained = load_file(run / "critic.safetensors")
    kept = read_head(tmp_path / "base", 32)
    assert torch.equal(kept.weight, trained["value_head.weight"])
    assert kept.bias is None or not kept.bias.any()
    trunk = loaded(tmp_path / "base").state_dict()
    torch.testing.assert_close(trunk["norm.weight"], trained["trunk.norm.weight"])
    settings = (f"model.path={tmp_path}/base", "model.recipe=null", "model.keep_head=true")
    named = f"run.dir={tmp_path}/again"
    config = load_config(CriticConfig, critics.folder / "critic.yaml", (*settings, named))
    prepare_inputs(config)
