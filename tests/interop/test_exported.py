"""Exported critics give other packages the values that the run gives."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import transformers
from launch import PYTHONPATH
from micro_critic import MicroCritics, write_rows
from safetensors.torch import load_file
from torch import Tensor, nn

from job.data.arithmetic import ALPHABET
from job.data.tokenizer import load_tokenizer, write_character_tokenizer
from job.export import whole_critic
from job.export.formats import export
from job.model.architecture_file import read_architecture
from job.model.critic import Critic
from job.model.packed_layout import PackedLayout
from job.run.trained import TrainedCritic
from job.training.scoring import score

pytestmark = pytest.mark.slow

README = Path(__file__).parents[2] / "README.md"

ROWS = [
    {"prompt": f"{a}+{b}?", "response": f"{a}+{b}={a + b};" * (1 + a % 3) + f"A{a + b}"}
    for a in range(6)
    for b in range(2)
]
_SIZES = {
    "vocab_size": len(ALPHABET) + 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama 3": ("Llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


@dataclass(frozen=True)
class Case:
    """A finished run, and its values of ROWS."""

    run: Path
    values: list[dict[str, Any]]

    def export(self, form: str, out: Path) -> Path:
        export(TrainedCritic.find(self.run), form, out)
        return out


def _make_base(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """A language model of transformers' own making, in which no two tensors are alike."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_SIZES, **settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    write_character_tokenizer(folder, ALPHABET)
    return folder


@pytest.fixture(scope="module", params=["meta", *BASES])
def case(
    request: pytest.FixtureRequest, critics: MicroCritics, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    settings: tuple[str, ...] = ()
    if request.param != "meta":
        base = _make_base(folder / "base", *BASES[request.param])
        settings = (f"model.path={base}", "model.recipe=null")
    run = critics.run(f"interop-{request.param}", *settings)
    return Case(run.path, _score(run.path, folder / "values.parquet"))


def _score(critic: Path, out: Path, *overrides: str) -> list[dict[str, Any]]:
    data = write_rows(out.with_suffix(".jsonl"), ROWS)
    score(lambda: TrainedCritic.find(critic, None, overrides), str(data), out)
    return pyarrow.parquet.read_table(out).to_pylist()


def _batch(folder: Path, *, left: bool = False) -> tuple[Tensor, Tensor, list[list[int]]]:
    """ROWS as token ids and attention mask [b, t], padded; and where the responses' tokens are."""
    config = transformers.AutoConfig.from_pretrained(folder)
    rows = [(str(row["prompt"]), str(row["response"])) for row in ROWS]
    encoded = load_tokenizer(folder).encode(rows)
    longest = max(len(e.ids) for e in encoded)
    ids, mask, at = [], [], []
    for e in encoded:
        padding = [config.pad_token_id] * (longest - len(e.ids))
        ids.append(padding + e.ids if left else e.ids + padding)
        mask.append(
            [0] * len(padding) + [1] * len(e.ids) if left else [1] * len(e.ids) + [0] * len(padding)
        )
        shift = len(padding) if left else 0
        at.append([shift + i for i in range(e.response_start, len(e.ids))])
    return torch.tensor(ids), torch.tensor(mask), at


def _load(cls: Any, folder: Path, **settings: Any) -> Any:
    model, notes = cls.from_pretrained(folder, output_loading_info=True, **settings)
    found = {
        name: list(notes[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    assert not any(found.values()), found
    return model


def _assert_token_values(model: Any, folder: Path, values: list[dict[str, Any]]) -> None:
    ids, mask, at = _batch(folder)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    assert logits.shape == (*ids.shape, 1)
    for row, where, expected in zip(logits[..., 0], at, values, strict=True):
        assert row[where].tolist() == pytest.approx(expected["values"], abs=1e-5)


def test_token_classification_gives_the_runs_values_in_training_mode_too(
    case: Case, tmp_path: Path
) -> None:
    folder = case.export("token-classification", tmp_path / "out")
    model = _load(transformers.AutoModelForTokenClassification, folder)
    assert model.config.num_labels == 1
    assert model.dtype == torch.float32
    for mode in (False, True):  # dropout would show in the second
        _assert_token_values(model.train(mode), folder, case.values)


def test_the_readmes_snippet_values_a_text(
    critics: MicroCritics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = critics.run("interop-meta")
    export(TrainedCritic.find(run.path), "token-classification", tmp_path / "critic")
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    # the micro trunk knows the signs of sums alone
    exec(re.sub(r"^text = .*$", 'text = "2+3?2+3=5;A5"', snippet, flags=re.MULTILINE), {})
    shown = re.fullmatch(r"after the last token: (-?\d\.\d{3})\n", capsys.readouterr().out)
    assert shown is not None
    assert -1 < float(shown[1]) < 2


def test_the_comparison_would_see_a_base_without_its_tuned_blocks(
    case: Case, tmp_path: Path
) -> None:
    folder = case.export("token-classification", tmp_path / "out")
    model = _load(transformers.AutoModelForTokenClassification, folder)
    untuned = transformers.AutoModel.from_pretrained(_base_in_halves(case))
    model.model.load_state_dict(untuned.state_dict())
    with pytest.raises(AssertionError):
        _assert_token_values(model, folder, case.values)


def _base_in_halves(case: Case) -> Path:
    """The folder of the base in Hugging Face's layout; pre-training writes one beside Meta's."""
    base = Path(TrainedCritic.find(case.run).config.model.path)
    return base / "hf" if (base / "hf").exists() else base


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_sequence_classification_gives_the_last_values_less_the_bias(
    case: Case, left: bool, tmp_path: Path
) -> None:
    folder = case.export("sequence-classification", tmp_path / "out")
    bias = load_file(case.run / "critic.safetensors")["value_head.bias"].item()
    model = _load(transformers.AutoModelForSequenceClassification, folder).train()
    assert model.config.num_labels == 1
    ids, mask, _ = _batch(folder, left=left)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]
    expected = [row["final_value"] - bias for row in case.values]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_head_without_bias_gives_the_very_values_in_both_forms(
    critics: MicroCritics, tmp_path: Path
) -> None:
    run = critics.run("no-bias", "training.value_head.bias=false").path
    case = Case(run, _score(run, tmp_path / "values.parquet"))
    tokens = case.export("token-classification", tmp_path / "tokens")
    model = _load(transformers.AutoModelForTokenClassification, tokens)
    _assert_token_values(model, tokens, case.values)
    sequences = case.export("sequence-classification", tmp_path / "sequences")
    model = _load(transformers.AutoModelForSequenceClassification, sequences)
    ids, mask, _ = _batch(sequences)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    assert found.tolist() == pytest.approx([v["final_value"] for v in case.values], abs=1e-5)


def test_logits_of_a_critic_trained_with_bce_become_its_values(
    critics: MicroCritics, tmp_path: Path
) -> None:
    run = critics.run("bce", "objective.loss=bce").path
    values = _score(run, tmp_path / "values.parquet")
    folder = Case(run, values).export("token-classification", tmp_path / "out")
    model = _load(transformers.AutoModelForTokenClassification, folder)
    ids, mask, at = _batch(folder)
    with torch.no_grad():
        probabilities = model(input_ids=ids, attention_mask=mask).logits[..., 0].sigmoid()
    for row, where, expected in zip(probabilities, at, values, strict=True):
        assert row[where].tolist() == pytest.approx(expected["values"], abs=1e-5)


def test_shards_load_as_one_file_does(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_critic, "SHARD_BYTES", 20_000)
    folder = case.export("token-classification", tmp_path / "out")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model = _load(transformers.AutoModelForTokenClassification, folder)
    _assert_token_values(model, folder, case.values)


def test_a_delta_becomes_the_same_folder_as_its_run(case: Case, tmp_path: Path) -> None:
    delta = case.export("delta", tmp_path / "delta")
    of_delta, of_run = tmp_path / "of-delta", tmp_path / "of-run"
    export(TrainedCritic.find(delta), "token-classification", of_delta)
    case.export("token-classification", of_run)
    files = {file.name for file in of_run.iterdir()}
    assert files == {file.name for file in of_delta.iterdir()}
    for name in files:
        assert (of_delta / name).read_bytes() == (of_run / name).read_bytes()


def test_metas_layout_is_a_base_whose_values_are_the_runs(case: Case, tmp_path: Path) -> None:
    folder = case.export("meta", tmp_path / "meta")
    stored = torch.load(folder / "consolidated.pth", weights_only=True)
    ids, _, at = _batch(case.export("token-classification", tmp_path / "hf"))
    critic = Critic(read_architecture(folder))
    critic.trunk.load_state_dict(stored)
    critic.value_head.load_state_dict(load_file(folder / "value_head.safetensors"))
    for tokens, where, expected in zip(ids, at, case.values, strict=True):
        stream = tokens[: where[-1] + 1]
        with torch.no_grad():
            found = critic(stream, PackedLayout([len(stream)]), torch.tensor(where))
        assert found.tolist() == pytest.approx(expected["values"], abs=1e-5)


def test_the_tokenizer_of_transformers_reads_texts_as_the_run_did(
    case: Case, tmp_path: Path
) -> None:
    folder = case.export("sequence-classification", tmp_path / "out")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for row in ROWS:
        text = str(row["prompt"]) + str(row["response"])
        (encoded,) = ours.encode([(text, "")])
        assert [*theirs(text)["input_ids"], theirs.eos_token_id] == encoded.ids
    assert theirs.pad_token_id not in (None, theirs.eos_token_id)
    assert theirs.pad_token_id == transformers.AutoConfig.from_pretrained(folder).pad_token_id


# As other trainers load them


def test_verl_s_call_loads_a_token_classification_folder(case: Case, tmp_path: Path) -> None:
    """verl asks for a configuration first and hands it over; any error sends it elsewhere."""
    folder = case.export("token-classification", tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.num_labels = 1
    config.classifier_dropout = 0.0
    config.hidden_dropout = "0"
    config.summary_dropout_prob = 0.0
    model = _load(
        transformers.AutoModelForTokenClassification,
        folder,
        dtype=torch.float32,
        config=config,
        attn_implementation="sdpa",
        trust_remote_code=False,
    )
    _assert_token_values(model, folder, case.values)


def test_a_class_like_openrlhf_s_loads_a_sequence_classification_folder(
    case: Case, tmp_path: Path
) -> None:
    """OpenRLHF puts `score`, without bias, on a bare model, and takes its output at all tokens."""
    folder = case.export("sequence-classification", tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(folder)
    bare = transformers.AutoModel.from_config(config)

    class Regression(type(bare).__bases__[0]):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = transformers.AutoModel.from_config(config)
            self.score = nn.Linear(config.hidden_size, 1, bias=False)
            self.post_init()

    model = _load(Regression, folder)
    bias = load_file(case.run / "critic.safetensors")["value_head.bias"].item()
    ids, mask, at = _batch(folder)
    with torch.no_grad():
        values = model.score(model.model(input_ids=ids, attention_mask=mask).last_hidden_state)
    for row, where, expected in zip(values[..., 0], at, case.values, strict=True):
        assert (row[where] + bias).tolist() == pytest.approx(expected["values"], abs=1e-5)


def test_trl_trains_a_step_on_a_sequence_classification_folder(
    critics: MicroCritics, tmp_path: Path
) -> None:
    run = critics.run("n1").path
    case = Case(run, _score(run, tmp_path / "values.parquet"))
    folder = case.export("sequence-classification", tmp_path / "out")
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1", "CI": "true"}
    script = Path(__file__).with_name("trl_step.py")
    pairs = [(str(row["prompt"]), str(row["response"])) for row in ROWS[:2]]
    ids = [encoded.ids for encoded in load_tokenizer(folder).encode(pairs)]
    done = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(ids)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    bias = load_file(run / "critic.safetensors")["value_head.bias"].item()
    chosen, rejected = (row["final_value"] for row in case.values[:2])
    assert found["before"] == pytest.approx([chosen - bias, rejected - bias], abs=1e-5)
    assert found["loss"] == pytest.approx(
        torch.nn.functional.softplus(torch.tensor(rejected - chosen)).item(), abs=1e-5
    )
    assert found["after"][0] - found["after"][1] > found["before"][0] - found["before"][1]
    assert found["moved"] > 0


# As PPO trainers slice what they read: V_0 at the last prompt token up to V_{T-1}


@dataclass(frozen=True)
class Rollouts:
    """ROWS as a trainer has them: prompts padded on the left, responses on the right."""

    ids: Tensor
    mask: Tensor
    context: int  # columns of prompts
    lengths: list[int]  # of responses

    @classmethod
    def of(cls, folder: Path) -> Rollouts:
        pad = transformers.AutoConfig.from_pretrained(folder).pad_token_id
        rows = [(str(row["prompt"]), str(row["response"])) for row in [*ROWS, LONGER]]
        encoded = load_tokenizer(folder).encode(rows)
        parts = [(e.ids[: e.response_start], e.ids[e.response_start :]) for e in encoded]
        before, after = (max(len(part[k]) for part in parts) for k in (0, 1))
        ids = [
            [pad] * (before - len(prompt)) + prompt + answer + [pad] * (after - len(answer))
            for prompt, answer in parts[:-1]
        ]
        whole = torch.tensor(ids)
        return cls(whole, whole != pad, before, [len(answer) for _, answer in parts[:-1]])

    @property
    def positions(self) -> Tensor:
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)

    def assert_read(self, values: Tensor, expected: list[dict[str, Any]], bias: float = 0) -> None:
        """Values [b, n], of the first n places for response tokens, are the run's."""
        for row, length, known in zip(values, self.lengths, expected, strict=True):
            wanted = [known["prompt_value"], *known["values"][:-1]]
            assert (row[:length] + bias).tolist() == pytest.approx(wanted, abs=1e-5)


LONGER = {"prompt": "1+2+3?", "response": "1+2=3;3+3=6;A6"}  # so that all of ROWS is padded


def test_verl_s_slice_of_a_token_classification_folder_is_the_values_before_each_token(
    case: Case, tmp_path: Path
) -> None:
    folder = case.export("token-classification", tmp_path / "out")
    model = _load(transformers.AutoModelForTokenClassification, folder)
    rollouts = Rollouts.of(folder)
    n = rollouts.ids.shape[1] - rollouts.context
    with torch.no_grad():
        logits = model(
            input_ids=rollouts.ids, attention_mask=rollouts.mask, position_ids=rollouts.positions
        ).logits
    rollouts.assert_read(logits[:, -n - 1 : -1, 0], case.values)


def test_nemo_rl_s_shift_of_a_token_classification_folder_is_the_values_before_each_token(
    case: Case, tmp_path: Path
) -> None:
    """Sequences padded on the right, and outputs moved by one: each token has the one before."""
    folder = case.export("token-classification", tmp_path / "out")
    model = _load(transformers.AutoModelForTokenClassification, folder)
    ids, mask, at = _batch(folder)
    with torch.no_grad():
        outputs = model(input_ids=ids, attention_mask=mask).logits[..., 0]
    moved = nn.functional.pad(outputs[:, :-1], (1, 0))
    for row, where, known in zip(moved, at, case.values, strict=True):
        wanted = [known["prompt_value"], *known["values"][:-1]]
        assert row[where].tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("reader", ["OpenRLHF", "TRL"])
def test_slices_of_a_sequence_classification_folder_are_the_values_before_each_token(
    case: Case, reader: str, tmp_path: Path
) -> None:
    """Both put `score` on every token's hidden state."""
    folder = case.export("sequence-classification", tmp_path / "out")
    model = _load(transformers.AutoModelForSequenceClassification, folder)
    bias = load_file(case.run / "critic.safetensors")["value_head.bias"].item()
    rollouts = Rollouts.of(folder)
    with torch.no_grad():
        hidden = model.model(
            input_ids=rollouts.ids, attention_mask=rollouts.mask, position_ids=rollouts.positions
        ).last_hidden_state
        outputs = model.score(hidden)[..., 0]
    if reader == "OpenRLHF":  # as many of the last as there are actions, without the very last
        read = outputs[:, :-1][:, -(rollouts.ids.shape[1] - rollouts.context) :]
    else:
        read = outputs[:, rollouts.context - 1 : -1]
    rollouts.assert_read(read, case.values, bias)
