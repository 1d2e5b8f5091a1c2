"""What a run read of a text is what transformers reads with its export: tokens, chats, values.

In each version that docs/exports.md names, over the kinds of tokenizers that models come with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import transformers
from families import DECLARED, FAMILIES, SIZE, TIKTOKEN, Family, write_declared
from micro_critic import write_rows
from versions import ALL, OTHERS, PINNED, read_with

from job.common.config import load_config
from job.common.schema import CriticConfig
from job.data.layouts import alpaca_prompt
from job.data.template import load_template
from job.data.tokenizer import Tokenizer, load_tokenizer
from job.data.tokenizer_files import reader_of, write_tokenizer
from job.export.chat_template import ReadText
from job.export.formats import export
from job.run.trained import TrainedCritic
from job.training.scoring import score
from job.training.trainer import train

pytestmark = pytest.mark.slow

PAIRS = [
    ("we need to add 3 and 4.", " that makes 7."),
    ("Is it 12?\nOr 漢字 é?", " 12, I think.\n\nYes."),
    ("{{ x }} 'a' \"b\" \\n", " \\ {prompt}"),
    ("we  need", ' <b> "makes"'),
]


@dataclass(frozen=True)
class Written:
    """A family's tokenizer as an export has it, and the tokens that a run has of PAIRS."""

    folder: Path
    ids: list[list[int]]
    starts: list[int]
    texts: list[list[int]]


def chats(pairs: list[tuple[str, str]]) -> list[list[dict[str, str]]]:
    roles = ("user", "assistant")
    return [
        [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]
        for pair in pairs
    ]


def encoded(tokenizer: Tokenizer, family: Family, pairs: list[tuple[str, str]]) -> list[Any]:
    template = load_template(family.template, tokenizer)
    if family.fields == "alpaca":
        pairs = [(alpaca_prompt(prompt, {}), response) for prompt, response in pairs]
    texts = [template.render(*pair) for pair in pairs]
    return tokenizer.encode(texts, framed=template.framed)


def write(family: Family, folder: Path) -> Written:
    base, critic = folder / "base", folder / "critic"
    family.write(base)
    critic.mkdir()
    tokenizer = load_tokenizer(base)
    write_tokenizer(tokenizer, critic, family.sizes.get("vocab_size", SIZE))
    text = ReadText(family.template, family.fields, tokenizer)
    found = text.jinja(reader_of(tokenizer, critic))
    assert found is not None
    (critic / "chat_template.jinja").write_text(found)
    plain = ["".join(pair) for pair in PAIRS]
    cases = {"texts": plain, "chats": chats(PAIRS)}
    (folder / "cases.json").write_text(json.dumps(cases))
    ids = encoded(tokenizer, family, PAIRS)
    alone = tokenizer.encode([("", text) for text in plain], ended=[False] * len(plain))
    starts = [one.response_start for one in ids]
    return Written(folder, [e.ids for e in ids], starts, [e.ids for e in alone])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    return {name: write(f, tmp_path_factory.mktemp("tokens")) for name, f in FAMILIES.items()}


def assert_read_alike(ours: Written, theirs: dict[str, Any], name: str) -> None:
    assert theirs["texts"] == ours.texts, name
    assert theirs["chats"] == ours.ids, name
    prompts = [ids[:start] for ids, start in zip(ours.ids, ours.starts, strict=True)]
    assert theirs["prompts"] == prompts, name
    assert theirs["pad"] not in (None, ours.ids[0][-1]), name


@pytest.mark.parametrize("version", ALL)
def test_texts_and_chats_have_the_tokens_of_the_run(
    written: dict[str, Written], version: str
) -> None:
    found = read_with(version, [one.folder for one in written.values()])
    for (name, ours), theirs in zip(written.items(), found, strict=True):
        assert_read_alike(ours, theirs, name)


@pytest.mark.all
@pytest.mark.parametrize("version", [PINNED, *OTHERS])
def test_llama_3_s_own_vocabulary_is_read_alike(tmp_path: Path, version: str) -> None:
    ours = write(TIKTOKEN, tmp_path)
    (theirs,) = read_with(version, [tmp_path])
    assert_read_alike(ours, theirs, "tiktoken")


def test_only_what_puts_a_begin_token_before_prompts_does_so(written: dict[str, Written]) -> None:
    begins = {
        name: load_tokenizer(one.folder / "base").bos_id is not None
        for name, one in written.items()
    }
    without = {"qwen 2", "qwen 3", "smollm"}
    assert begins == {name: name not in without for name in FAMILIES}
    for name, one in written.items():
        again = load_tokenizer(one.folder / "critic")  # an export is a base
        ours = load_tokenizer(one.folder / "base")
        assert (again.bos_id, again.eos_id) == (ours.bos_id, ours.eos_id), name


MARKED = ["we<step>need </s> <step> to <b>add", "<c>3<b><step> and</s>", "<s>we <c> need"]


@pytest.mark.parametrize("version", ALL)
def test_declared_tokens_are_those_of_transformers(tmp_path: Path, version: str) -> None:
    folders = {
        (name, normalizes): tmp_path / f"{name} {normalizes}".replace(" ", "-")
        for name in DECLARED
        for normalizes in (False, True)
    }
    for (name, normalizes), folder in folders.items():
        write_declared(folder / "critic", name, normalizes=normalizes)
        (folder / "cases.json").write_text(json.dumps({"texts": MARKED, "chats": []}))
    for (what, folder), theirs in zip(
        folders.items(), read_with(version, list(folders.values())), strict=True
    ):
        ours = load_tokenizer(folder / "critic")
        found = [e.ids for e in ours.encode([("", text) for text in MARKED], framed=False)]
        begin = [] if ours.bos_id is None else [ours.bos_id]
        assert [begin + ids for ids in found] == theirs["texts"], what
        assert ours.token_text(ours.eos_id or 0) == theirs["end"], what


# --- values -----------------------------------------------------------------------------------

ROWS = [
    {"prompt": f"we need to add {a} and {b}.", "response": f" that makes {c}.", "reward": a % 2}
    for a, b, c in ((1, 2, 3), (2, 3, 4), (3, 4, 7), (4, 6, 1))
]


def trunk(family: Family, folder: Path) -> None:
    """Random weights, no two tensors alike."""
    sizes = {
        "vocab_size": SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.trunk}Config")(**(sizes | family.sizes))
    getattr(transformers, f"{family.trunk}ForCausalLM")(config).save_pretrained(folder)
    family.write(folder)


def trained(family: Family, folder: Path) -> Path:
    """A run of a step."""
    trunk(family, folder / "base")
    names = {"prompt": "instruction", "response": "output", "reward": "is_correct"}
    rows = [{names[k]: v for k, v in row.items()} for row in ROWS] if family.fields else ROWS
    data = {"train": str(write_rows(folder / "rows.jsonl", rows)), "fields": family.fields}
    here = {"validation": data["train"], "cache_dir": str(folder / "cache"), "max_length": 256}
    described = {
        "run": {"name": "r", "dir": str(folder / "run")},
        "model": {"path": str(folder / "base")},
        "data": data | here | {"template": family.template},
        "training": {
            "num_unfrozen_layers": 1,
            "max_steps": 1,
            "batch_size": 4,
            "threads": 1,
            "micro_batch_tokens": 512,
            "learning_rate": 0.01,
        },
        "distributed": {"fsdp": {"mixed_precision": False}},
        "mlflow": {"enabled": False},
        "report": {"enabled": False},
    }
    (folder / "critic.yaml").write_text(json.dumps(described))
    train(load_config(CriticConfig, folder / "critic.yaml"))
    return folder / "run"


CHEAP = ("llama 2", "smollm")


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize(
    "name", [n if n in CHEAP else pytest.param(n, marks=pytest.mark.all) for n in FAMILIES]
)
def test_a_text_has_the_value_that_the_run_gives_it(
    tmp_path: Path, name: str, version: str
) -> None:
    run = trained(FAMILIES[name], tmp_path)
    score(lambda: TrainedCritic.find(run), str(tmp_path / "rows.jsonl"), tmp_path / "v.parquet")
    values = pyarrow.parquet.read_table(tmp_path / "v.parquet").column("final_value").to_pylist()
    export(TrainedCritic.find(run), "token-classification", tmp_path / "critic")
    pairs = [(str(row["prompt"]), str(row["response"])) for row in ROWS]
    (tmp_path / "cases.json").write_text(json.dumps({"texts": [], "chats": chats(pairs)}))
    (found,) = read_with(version, [tmp_path])
    assert found["values"] == pytest.approx(values, abs=1e-5)
    assert len({round(value, 3) for value in values}) > 1
