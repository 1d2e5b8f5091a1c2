"""Chats have the tokens that transformers gives them, prompt and whole alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from pieces import train_llama_pieces
from tokenizers import decoders, models, pre_tokenizers, trainers

from job.common.schema import CHAT
from job.data.template import load_template
from job.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "seven", "plus", "ten", "user", "assistant"]
CHARACTERS = "".join(map(chr, range(32, 127))) + "\nßé漢字"

# One for each habit of the templates that models come with.
TEMPLATES = {
    "a default system message": """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "brackets, and blanks around the answer": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}"
        "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "special tokens on lines of their own": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
    "thoughts that are left empty": """\
{%- macro turn(role, text) -%}
    <|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro -%}
{%- if tools %}{{ raise_exception('no tools here') }}{% endif -%}
{%- for message in messages -%}
    {%- set ns = namespace(text=message.content) -%}
    {%- if message.role == 'assistant' and loop.last -%}
        {%- set ns.text = '<think>\\n\\n</think>\\n\\n' + ns.text.lstrip('\\n') -%}
    {%- endif -%}
    {{- turn(message.role, ns.text) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""",
    "marked generations and no special token": """\
{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}
Answer: {{ message.content }}
{% endgeneration %}
{% else %}
Question: {{ message.content }}
{% endif %}
{% endfor %}
""",
}


def sentences() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 8)) + "." for _ in range(400)]


def settings(**more: Any) -> dict[str, Any]:
    return {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **more}


def train(folder: Path, raw: tokenizers.Tokenizer) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet(), *CHARACTERS, "▁"],
        show_progress=False,
    )
    raw.train_from_iterator(sentences(), trainer)
    raw.save(str(folder / "tokenizer.json"))
    described = settings(tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def byte_level(folder: Path) -> None:
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    raw.decoder = decoders.ByteLevel()
    train(folder, raw)


def metaspace(folder: Path) -> None:
    raw = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    first = decoders.Strip(" ", 1, 0)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), first])
    train(folder, raw)


def sentencepiece_model(folder: Path) -> None:
    model = train_llama_pieces(sentences(), control_symbols=SPECIAL[3:])
    (folder / "tokenizer.model").write_bytes(model)
    described = settings(tokenizer_class="LlamaTokenizer", legacy=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


KINDS: dict[str, Callable[[Path], None]] = {
    "byte-level BPE": byte_level,
    "Metaspace": metaspace,
    "sentencepiece": sentencepiece_model,
}
TEXTS = [
    ("the cat", "sat on a mat."),
    ("three plus seven?\nIn words.", "ten\n\n"),
    ("a\n", "\n漢字 é"),
    (" the ", " cat "),
    ("", "the"),
]


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    KINDS[request.param](tmp_path)
    return tmp_path


def use(folder: Path, template: str) -> Any:
    """Write the template into the folder, and load transformers' tokenizer from there."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def messages(prompt: str, *response: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    texts = (prompt, *response)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_a_chat_is_what_transformers_makes_of_it(folder: Path, name: str) -> None:
    theirs = use(folder, TEMPLATES[name])
    tokenizer = load_tokenizer(folder)
    template = load_template(CHAT, tokenizer)
    # With a tokenizer.model a text begins after a begin token, as for those who made it;
    # transformers puts no blank there.
    begins_anew = (folder / "tokenizer.model").exists() and "{{ bos_token }}" in TEMPLATES[name]
    for prompt, response in TEXTS:
        asked = {"add_generation_prompt": True}
        rendered = template.render(prompt, response)
        assert rendered[0] == theirs.apply_chat_template(messages(prompt), tokenize=False, **asked)
        whole = theirs.apply_chat_template(messages(prompt, response), tokenize=False)
        assert whole.startswith("".join(rendered))
        assert not whole.removeprefix("".join(rendered)).strip()
        (encoded,) = tokenizer.encode([rendered], framed=template.framed)
        before = theirs.apply_chat_template(messages(prompt), return_dict=False, **asked)
        ids = theirs.apply_chat_template(messages(prompt, response), return_dict=False)
        if begins_anew:
            texts = (rendered[0], "".join(rendered))
            before, ids = (
                [1, *theirs(text[3:], add_special_tokens=False).input_ids] for text in texts
            )
        assert encoded.ids[: encoded.response_start] == before
        if ids[: len(before)] == before:
            assert encoded.ids == ids[: len(encoded.ids)]
            assert not theirs.decode(ids[len(encoded.ids) :]).strip()
        else:  # transformers' tokens of the whole are not those that follow the prompt's
            assert theirs.decode(encoded.ids) == "".join(rendered)


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_the_end_of_a_turn_is_the_last_token(folder: Path) -> None:
    use(folder, TEMPLATES["a default system message"])
    tokenizer = load_tokenizer(folder)
    template = load_template(CHAT, tokenizer)
    (encoded,) = tokenizer.encode([template.render("the cat", "sat")], framed=template.framed)
    assert tokenizer.token_text(encoded.ids[-1]) == "<|im_end|>"
    assert len(encoded.ids) - encoded.response_start > 1


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_without_a_template_a_prompt_has_the_tokens_of_transformers(folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    pairs = [*TEXTS, ("the</s>\nmat", "<|im_end|>ten")]
    if (folder / "tokenizer.model").exists():  # where sentencepiece itself puts another blank
        pairs = [pair for pair in pairs if not pair[0].startswith(" ")]
    for prompt, response in pairs:
        (encoded,) = tokenizer.encode([(prompt, response)])
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        assert encoded.ids[: len(begin)] == begin
        before = encoded.ids[len(begin) : encoded.response_start]
        assert before == theirs(prompt, add_special_tokens=False).input_ids
        found = theirs.decode(encoded.ids[len(begin) : -1])
        assert found.lstrip() == (prompt + response).lstrip()
