"""The text that a run read, as a chat template: for `apply_chat_template`, and for a person.

A chat of a user's message and the assistant's answer becomes the very text, begin and end token
included. It is tried: what the exported tokenizer makes of it are the tokens of the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from job.common.errors import InputError
from job.common.schema import preset_of
from job.data.layouts import alpaca_prompt
from job.data.template import (
    DAY,
    ChatTemplate,
    PlainTemplate,
    TemplateError,
    load_template,
)
from job.data.tokenizer import Tokenizer

Reader = Callable[[str], list[int]]  # of a text, without tokens that it does not have
_TRIALS = (("1 + 1?", "2."), ("the\ncat", "Sat, 漢\n\non"), ("a 'b' \"c\"", "{{ d }}\\n"))
_PROMPT, _INPUT, _RESPONSE = "{prompt}", "{input}", "{response}"
_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_REFUSAL = """\
{%- if messages[0].role != "user" or messages|length > 2 -%}
{{- raise_exception("one message of a user and its answer are all that it reads") -}}
{%- endif -%}
"""
Form = PlainTemplate | ChatTemplate


class ReadText:
    """How prompt and response become the text that a critic reads.

    Args:
        template: `data.template` of the run.
        fields: `data.fields`, of which the preset `alpaca` puts prompts into a text.
    """

    def __init__(self, template: str | None, fields: object, tokenizer: Tokenizer) -> None:
        self._form: Form = load_template(template, tokenizer)
        self._alpaca = preset_of(fields) == "alpaca"
        self._tokenizer = tokenizer

    def shown(self) -> Iterator[tuple[str, str]]:
        """Texts for a person, each with what it is."""
        if isinstance(self._form, ChatTemplate):
            yield "the chat template, for one message of a user and the answer", self._form.text
            for name, prompt in self._prompts():
                yield f"the user's message{name}", prompt
            return
        for name, prompt in self._prompts() or [("", _PROMPT)]:
            text = self._tokenizer.without_end("".join(self._form.render(prompt, _RESPONSE)))
            begin = self._tokenizer.begin_text
            begin = "" if text.startswith(begin) else begin
            yield f"the text{name}", begin + text + self._tokenizer.end_text

    def jinja(self, reads: Reader) -> str | None:
        """The chat template that makes the run's tokens of a chat; None where none does."""
        forms = self._of_chat(self._form) if isinstance(self._form, ChatTemplate) else None
        for text in forms or self._of_text(self._form):
            if self._is_alike(text, reads):
                return text
        return None

    def _prompts(self) -> list[tuple[str, str]]:
        if not self._alpaca:
            return []
        return [
            (" of a row without input", alpaca_prompt(_PROMPT, {})),
            (" of a row with input", alpaca_prompt(_PROMPT, {"input": _INPUT})),
        ]

    def _content(self) -> str:
        """The prompt as an expression of Jinja."""
        if not self._alpaca:
            return "messages[0].content"
        without, with_input = (_expression(text) for _, text in self._prompts())
        return f"({with_input} if messages[0].input else {without})"

    def _of_text(self, form: Form) -> Iterator[str]:
        assert isinstance(form, PlainTemplate)
        begin = self._tokenizer.begin_text
        prompt = f"{_quoted(form.before)} + {self._content()} + {_quoted(form.between)}"
        answer = _answer(self._tokenizer.without_end(form.after), self._tokenizer.end_text)
        for added, written in (("", ""), (" ", ""), (" ", " ")):
            lines = [f"set prompt = {prompt}"]
            if begin:
                lines.append(
                    f"set prompt = {_quoted(begin + written)} + prompt[{len(begin)}:] "
                    f"if prompt.startswith({_quoted(begin)}) else {_quoted(begin + added)} + prompt"
                )
            yield _REFUSAL + _blocks(lines) + "{{- prompt -}}\n" + answer

    def _of_chat(self, form: ChatTemplate) -> Iterator[str]:
        prefix = self._prefix(form.text)
        if not prefix and not form.blanks:
            yield form.text
        begin = self._tokenizer.named.get("bos_token", "")
        for blank in ("", " ") if begin else ("",):
            yield prefix + _wrapped(form, begin, blank)

    def _prefix(self, text: str) -> str:
        """What a template is given otherwise than here: the date, and the prompt's own text."""
        formats = sorted({found[1] for found in _NOW.findall(text)})
        lines = ""
        if formats:
            dates = json.dumps({name: DAY.strftime(name) for name in formats}, ensure_ascii=False)
            lines += "{%- macro strftime_now(format) -%}{{- " + dates
            lines += "[format] -}}{%- endmacro -%}\n"
        if self._alpaca:
            message = f'{{"role": "user", "content": {self._content()}}}'
            lines += f"{{%- set messages = [{message}] + messages[1:] -%}}\n"
        return lines

    def _is_alike(self, text: str, reads: Reader) -> bool:
        """Whether texts and tokens of chats are those of the run."""
        try:
            found = ChatTemplate("chat_template.jinja", text, self._tokenizer)
            return all(self._same(found, reads, *pair) for pair in _TRIALS)
        except (TemplateError, InputError):
            return False

    def _same(self, found: ChatTemplate, reads: Reader, prompt: str, response: str) -> bool:
        given = alpaca_prompt(prompt, {}) if self._alpaca else prompt
        pair = self._form.render(given, response)
        (read,) = self._tokenizer.encode([("", "".join(pair))], framed=self._form.framed)
        return reads(found.whole(prompt, response)) == read.ids


def _blocks(lines: list[str]) -> str:
    return "".join(f"{{%- {line} -%}}\n" for line in lines)


def _answer(after: str, end: str) -> str:
    lines = ["if messages|length > 1", "set answer = messages[1].content"]
    if end:
        bare = f"answer.rstrip()[:-{len(end)}]"
        lines.append(f"set answer = {bare} if answer.rstrip().endswith({_quoted(end)}) else answer")
    return _blocks(lines) + "{{- answer + " + _quoted(after + end) + " -}}\n{%- endif -%}\n"


def _wrapped(form: ChatTemplate, begin: str, blank: str) -> str:
    """A template without blanks behind its end token, and with one behind a begin token."""
    body = "\n" * form.text.startswith("\n") + form.text.removesuffix("\n")
    lines = "{% set text %}" + body + "{%+ endset %}\n"
    if blank:
        starts = f"text.startswith({_quoted(begin)})"
        rest = f"{_quoted(begin + blank)} + text[{len(begin)}:]"
        lines += f"{{%- set text = {rest} if {starts} else text -%}}\n"
    if form.blanks:
        ends = f"text.rstrip().endswith({_quoted(form.end)})"
        answered = 'messages[-1].role == "assistant"'
        lines += f"{{%- set text = text.rstrip() if {answered} and {ends} else text -%}}\n"
    return lines + "{{- text -}}\n"


def _expression(text: str) -> str:
    """A text with {prompt} and {input} as an expression of Jinja."""
    names = {_PROMPT: "messages[0].content", _INPUT: "messages[0].input"}
    parts = filter(None, re.split(r"(\{prompt\}|\{input\})", text))
    return "(" + " + ".join(names.get(part) or _quoted(part) for part in parts) + ")"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
