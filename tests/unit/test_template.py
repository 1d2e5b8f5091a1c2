"""Templates: what the model sees, where the response begins in it, and what is refused."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from job.common.config import load_config
from job.common.errors import InputError
from job.common.schema import CHAT, CriticConfig
from job.data.rows import BadRow, Place, Row
from job.data.template import Template, TemplateError, load_template, render_rows
from job.data.tokenizer import Tokenizer, load_tokenizer, write_bpe_tokenizer

CHAT_ML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA_2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}[INST] {{ message.content.strip() }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content.strip() }} {{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles.') }}{% endif %}{% endfor %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bpe_tokenizer(tmp_path, ["the cat sat on a mat"] * 50, 300)
    return tmp_path


def tokenizer_of(folder: Path, **settings: Any) -> Tokenizer:
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings))
    return load_tokenizer(folder)


def chat(folder: Path, text: str, **settings: Any) -> Template:
    return load_template(CHAT, tokenizer_of(folder, chat_template=text, **settings))


# --- no template, and a plain one ------------------------------------------------------------


def test_without_a_template_prompt_and_response_stay_as_they_are(folder: Path) -> None:
    template = load_template(None, tokenizer_of(folder, chat_template=CHAT_ML))
    assert template.render("a {response}", "b\n") == ("a {response}", "b\n")
    assert template.framed


def test_a_plain_template_takes_braces_in_the_texts_for_text(folder: Path) -> None:
    template = load_template("Q: {prompt}\nA: {response} {x}", tokenizer_of(folder))
    assert template.render("{response} {}", "f{prompt}") == (
        "Q: {response} {}\nA: ",
        "f{prompt} {x}",
    )
    assert template.framed


@pytest.mark.parametrize(
    "text",
    [
        "Q: {prompt}",
        "{response}",
        "{response} {prompt}",
        "{prompt} {prompt} {response}",
        "{prompt} {response} {response}",
        "{question} {answer}",
        "alpaca",
    ],
)
def test_a_plain_template_without_both_texts_in_order_is_an_input_error(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(InputError, match=r"data\.template: .* once each"):
        configured(tmp_path, text)


def configured(folder: Path, template: str, train: str = "t.jsonl") -> CriticConfig:
    file = folder / "critic.yaml"
    data = {"train": train, "validation": train, "template": template}
    run = {"run": {"name": "n", "dir": "d"}, "model": {"path": "m"}, "data": data}
    file.write_text(json.dumps(run))
    return load_config(CriticConfig, file)


@pytest.mark.parametrize("text", ["chat", CHAT_ML, "{{ messages }}", "Q: {prompt}\nA: {response}"])
def test_template_in_the_configuration(tmp_path: Path, text: str) -> None:
    assert configured(tmp_path, text).data.template == text


def test_a_quoted_template_on_the_command_line_keeps_its_line_breaks(tmp_path: Path) -> None:
    configured(tmp_path, "chat")
    given = r'data.template="Q: {prompt}\nA: {response}"'
    found = load_config(CriticConfig, tmp_path / "critic.yaml", [given])
    assert found.data.template == "Q: {prompt}\nA: {response}"


def test_embedded_data_takes_no_template(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.template: the embedded data"):
        configured(tmp_path, "chat", "embedded")


# --- chat templates --------------------------------------------------------------------------


def test_the_response_is_what_follows_the_generation_prompt(folder: Path) -> None:
    template = chat(folder, LLAMA_2)
    assert template.render(" 1 + 1? ", "2. ") == ("<s>[INST] 1 + 1? [/INST]", " 2. </s>")
    assert not template.framed


def test_blanks_behind_an_end_token_are_left_out(folder: Path) -> None:
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    as_text = chat(folder, CHAT_ML)
    assert as_text.render("q", "r\n") == (prompt, "r\n<|im_end|>\n")
    raw = json.loads((folder / "tokenizer.json").read_text())
    token = raw["added_tokens"][-1] | {"id": 1000, "content": "<|im_end|>"}
    raw["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert chat(folder, CHAT_ML).render("q", "r\n") == (prompt, "r\n<|im_end|>")


def thinking(opens: bool) -> str:
    """A template that takes what stands before </think> for a thought, and always writes one."""
    thought = (
        "{% set thought = '' %}{% set said = m.content %}{% if '</think>' in said %}"
        "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
        "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    )
    return (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'U: ' + m.content + '\\n' }}{% else %}"
        + thought
        + "{{ 'A: <think>\\n' + thought + '\\n</think>\\n\\n' + said + eos_token + '\\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}A: "
        + ("{{ '<think>\\n' }}" if opens else "")
        + "{% endif %}"
    )


@pytest.mark.parametrize(
    ("opens", "response", "stands"),
    [
        (False, "<think>\nlong\n</think>\n\nshort", "<think>\nlong\n</think>\n\nshort"),
        (False, "<think>\nlong", "<think>\nlong"),
        (False, "short", "<think>\n\n</think>\n\nshort"),  # as in the mode without thoughts
        (True, "long\n</think>\n\nshort", "long\n</think>\n\nshort"),
        (True, "long", "long"),
        (True, "long <b> long", "long <b> long"),
    ],
)
def test_a_thought_that_was_cut_off_is_not_closed_before_it_begins(
    folder: Path, opens: bool, response: str, stands: str
) -> None:
    template = chat(folder, thinking(opens))
    asked = "U: q\nA: " + "<think>\n" * opens
    assert template.render("q", response) == (asked, stands + "</s>")
    assert template.render("q", response, truncated=True) == (asked, stands)


@pytest.mark.parametrize("text", [CHAT_ML.replace("<|im_end|>", "</s>"), LLAMA_2])
def test_a_chat_has_one_end_token_whatever_the_response_brings(folder: Path, text: str) -> None:
    template = chat(folder, text)
    asked, plain = template.render("q", "2.")
    for brought in ("</s>", "</s>\n", "</s></s> "):
        assert template.render("q", "2." + brought) == (asked, plain)
    assert plain.count("</s>") == 1
    assert plain.endswith("</s>")
    for response in ("2.", "2.</s>\n"):
        cut = template.render("q", response, truncated=True)
        assert cut == (asked, plain.removesuffix("</s>").rstrip())


def test_an_end_token_that_the_template_does_not_write_stays_the_last(folder: Path) -> None:
    template = chat(folder, "{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}")
    for brought in ("</s>", "</s>\n", "</s></s>"):
        assert template.render("q", "r" + brought) == ("q\n", "r</s>")
    assert template.render("q", "r") == ("q\n", "r\n")


def test_a_short_answer_is_not_sought_in_what_stands_before_it(folder: Path) -> None:
    text = "{% for m in messages %}{{ m.role + ': ' + m.content }}</s>{% endfor %}"
    template = chat(folder, text)
    assert template.render("q", "a", truncated=True)[1] == "assistant: a"


def test_a_plain_template_puts_nothing_behind_an_answer_that_was_cut_off(folder: Path) -> None:
    template = load_template("Q: {prompt}\nA: {response}\nEND", tokenizer_of(folder))
    assert template.render("q", "r</s>\n") == ("Q: q\nA: ", "r\nEND")
    assert template.render("q", "r", truncated=True) == ("Q: q\nA: ", "r")


def test_a_chat_template_is_found_where_hugging_face_keeps_it(folder: Path) -> None:
    def found(**settings: Any) -> str:
        return load_template(CHAT, tokenizer_of(folder, **settings)).render("q", "r")[0]

    text = "{{ messages[0].content }} %s{{ messages[1].content if messages[1] }}"
    assert found(chat_template=text % "a") == "q a"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text % "b"}]
    assert found(chat_template=named) == "q b"
    (folder / "chat_template.jinja").write_text(text % "c")
    assert found(chat_template=text % "a") == "q c"
    in_key = load_template(text % "d", tokenizer_of(folder, chat_template=text % "a"))
    assert in_key.render("q", "r") == ("q d", "r")


@pytest.mark.parametrize("settings", [{}, {"chat_template": 3}, {"chat_template": [{"name": "x"}]}])
def test_a_missing_chat_template_is_an_input_error(folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"data\.template: chat, but .* has neither"):
        load_template(CHAT, tokenizer_of(folder, **settings))


def test_tokens_are_known_by_name_and_empty_where_there_is_none(folder: Path) -> None:
    names = "{{ bos_token }},{{ eos_token }},{{ pad_token }},{{ unk_token }}"
    text = names + "{% for m in messages %} {{ m.content }}{% endfor %}"
    pad = {"content": "</s>", "lstrip": False}
    assert chat(folder, text, pad_token=pad).render("q", "r") == ("<s>,</s>,</s>, q", " r")
    assert chat(folder, text, bos_token=None).render("q", "r")[0] == ",</s>,, q"


def test_generation_blocks_and_loop_controls_change_no_text(folder: Path) -> None:
    text = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% continue %}{% endif %}"
        "{{ m.content | tojson }}{% endfor %}"
    )
    assert chat(folder, text).render("q<é", "r") == ('"q<é"', "r")


def test_the_date_is_always_the_same(folder: Path) -> None:
    text = "{{ strftime_now('%d %b %Y') }}{% for m in messages %} {{ m.content }}{% endfor %}"
    assert chat(folder, text).render("q", "r")[0] == "26 Jul 2024 q"


BOTH = "{% for m in messages %}{{ m.content }}{% endfor %}"
BROKEN = {
    "{% for m in messages %}": "line 1: .*end of template",
    "a\n{{ messages[0].content ": "line 2: ",
    "{{ lost }}" + BOTH: "'lost' is undefined",
    "{{ messages[0].contents }}" + BOTH: "no attribute 'contents'",
    "{{ lost.more }}" + BOTH: "'lost' is undefined",
    "{{ raise_exception('no system role') }}": "no system role",
    "{{ 1 // 0 }}": "division",
    "{{ messages | random }}": "line 1: No filter named 'random'",
    "{{ lipsum() }}": "'lipsum' is undefined",
    "{{ ''.__class__.__mro__ }}" + BOTH: "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}": "loops over",
    "{{ range(10 ** 30) | list }}": "",
    "{{ 'a' * 1000000000 }}": "more than 10000000 characters",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% set n = namespace(s='ab') %}{% for i in range(40) %}{% set n.s = n.s * 2 %}"
    "{% endfor %}{{ n.s }}": "more than",
    "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}": "more than 10000000 characters",
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}": (
        "changes the response or leaves it out"
    ),
    "{{ messages[-1].content }}": "where the response begins is unknown",
    "{% if messages[1] %}{{ messages[1].content }}{% endif %}": "changes the prompt or leaves it",
    BOTH + "{{ '<think>' if add_generation_prompt }}": "where the response begins is unknown",
}


@pytest.mark.parametrize("text", BROKEN, ids=str)
def test_a_template_that_does_not_work_is_an_input_error_that_names_it(
    folder: Path, text: str
) -> None:
    started = time.monotonic()
    said = re.compile(rf"tokenizer_config\.json: chat_template: .*{BROKEN[text]}")
    with pytest.raises(InputError, match=said):
        chat(folder, text)
    (folder / "chat_template.jinja").write_text(text)
    with pytest.raises(InputError, match=r"chat_template\.jinja: "):
        load_template(CHAT, tokenizer_of(folder))
    with pytest.raises(InputError, match=r"^data\.template: "):
        load_template(text, tokenizer_of(folder))
    assert time.monotonic() - started < 10


def test_a_chat_template_that_is_not_utf_8_is_an_input_error(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"chat_template\.jinja: cannot read"):
        load_template(CHAT, tokenizer_of(folder))


def test_a_row_that_the_template_refuses_is_a_bad_row(folder: Path) -> None:
    text = (
        "{% if '#' in messages[0].content %}{{ raise_exception('no numbers') }}{% endif %}"
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}|{% endfor %}"
    )
    template = chat(folder, text)
    earlier = BadRow("a", 1, "broken")
    texts = [("q", "r"), ("#", "r"), ("q", "why</think>r")]
    examples = [(Place("a", n), Row(*pair, 1.0, "p")) for n, pair in enumerate(texts, 2)]
    given = [(Place("a", 1), earlier), *examples]
    rows = {place.line: row for place, row in render_rows(given, template)}
    assert rows[1] == earlier
    assert rows[2] == Row("q|", "r|", 1.0, "p", given="r")
    refused, cut = rows[3], rows[4]
    assert isinstance(refused, BadRow)
    assert isinstance(cut, BadRow)
    assert (refused.file, refused.line) == ("a", 3)
    assert refused.reason.endswith("chat_template: no numbers")
    assert cut.reason.endswith("it changes the response or leaves it out")
    with pytest.raises(TemplateError, match="no numbers"):
        template.render("#", "r")


def test_a_limit_counts_for_one_text_alone(folder: Path) -> None:
    template = chat(folder, "{% for i in range(60000) %}{% endfor %}" + BOTH)
    for _ in range(3):
        assert template.render("q", "r") == ("q", "r")


def test_what_a_text_depends_on_is_the_identity(folder: Path) -> None:
    def identity(template: str | None, **settings: Any) -> str:
        return json.dumps(load_template(template, tokenizer_of(folder, **settings)).identity)

    chat_ml = {"chat_template": CHAT_ML}
    others = [
        identity(None),
        identity("{prompt}\n{response}"),
        identity(CHAT, **chat_ml),
        identity(CHAT, chat_template=LLAMA_2),
        identity(CHAT, **chat_ml, pad_token="</s>"),
        identity(CHAT, **chat_ml, bos_token=None),
    ]
    assert len(set(others)) == len(others)
    assert identity(None, **chat_ml) == identity("{prompt}{response}") == others[0]
    assert identity(CHAT_ML) == others[2]
