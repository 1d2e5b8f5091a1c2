"""Prompt and response as the text that the model sees: as they are, in a plain text, in a chat.

A chat template comes with the model, from anywhere; it runs in a sandbox, knows no clock and no
chance, and has bounds on what it loops over and writes.
"""

from __future__ import annotations

import datetime
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from job.common.errors import InputError, file_error, first_line
from job.common.schema import CHAT, is_chat_template
from job.data.rows import BadRow, Row
from job.data.tokenizer import Tokenizer, token_setting

_MAX_LOOPS = 100_000  # over ranges, in one text
_MAX_LENGTH = 10_000_000  # characters of one text
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class TemplateError(ValueError):
    """What a template makes of a prompt and a response is of no use."""


class Template(ABC):
    """How a prompt and a response become the text that the model sees.

    Attributes:
        framed: whether the tokenizer's begin and end token stand around the text.
        identity: everything that the text depends on besides prompt and response.
    """

    framed: bool
    identity: Any

    @abstractmethod
    def render(self, prompt: str, response: str) -> tuple[str, str]:
        """What the model is given, and what it says then.

        Raises:
            TemplateError: the template cannot do that, or drops something.
        """


class PlainTemplate(Template):
    """A text with `{prompt}` and `{response}`; what stands behind the response is part of it."""

    framed = True

    def __init__(self, text: str) -> None:
        self.identity = text
        self._before, _, rest = text.partition("{prompt}")
        self._between, _, self._after = rest.partition("{response}")

    def render(self, prompt: str, response: str) -> tuple[str, str]:
        return self._before + prompt + self._between, response + self._after


class ChatTemplate(Template):
    """A Jinja template for a list of messages, as Hugging Face's tokenizers have it.

    The prompt is the user's message up to where the assistant is to speak, the response all that
    the assistant's message adds. Blanks behind an end token are left out: no model says them.
    """

    framed = False

    def __init__(self, source: str, text: str, tokenizer: Tokenizer) -> None:
        self._source = source
        self._variables = _token_variables(tokenizer)
        self._ends = tuple(sorted(tokenizer.special))
        self.identity = {"chat": text, "variables": self._variables, "ends": self._ends}
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{source}: line {error.lineno}: {error.message}") from None
        except Exception as error:  # what a broken template raises is anybody's guess
            raise InputError(f"{source}: {first_line(error)}") from None

    def render(self, prompt: str, response: str) -> tuple[str, str]:
        user = {"role": "user", "content": prompt}
        asked = self._run([user], add_generation_prompt=True)
        assistant = {"role": "assistant", "content": response}
        whole = self._run([user, assistant], add_generation_prompt=False)
        if not whole.startswith(asked):
            self._fail(
                "the text with an answer does not begin with the text that asks for one; "
                "where the response begins is unknown"
            )
        answer = whole[len(asked) :]
        if answer.rstrip().endswith(self._ends):
            answer = answer.rstrip()
        if prompt.strip() not in asked:
            self._fail("it changes the prompt or leaves it out")
        if response.strip() not in answer:
            self._fail("it changes the response or leaves it out")
        return asked, answer

    def _run(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        given = {"tools": None, "documents": None, "range": _bounded_range()} | self._variables
        parts, length = [], 0
        try:
            for part in self._template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, **given
            ):
                parts.append(part)
                length += len(part)
                if length > _MAX_LENGTH:
                    _refuse(f"more than {_MAX_LENGTH} characters of text")
        except Exception as error:  # what a foreign template raises is anybody's guess
            self._fail(first_line(error))
        return "".join(parts)

    def _fail(self, reason: str) -> NoReturn:
        raise TemplateError(f"{self._source}: {reason}") from None


def load_template(template: str | None, tokenizer: Tokenizer) -> Template:
    """The template that `data.template` asks for, tried on an example.

    Raises:
        InputError: there is none, or it does not work.
    """
    if template is None:
        return PlainTemplate("{prompt}{response}")
    if template != CHAT and not is_chat_template(template):
        return PlainTemplate(template)
    source, text = _chat_source(tokenizer) if template == CHAT else ("data.template", template)
    found = ChatTemplate(source, text, tokenizer)
    try:
        found.render("1 + 1?", "2.")
    except TemplateError as error:
        raise InputError(str(error)) from None
    return found


def render_rows(
    rows: Iterable[tuple[int, Row | BadRow]], template: Template, file: str
) -> Iterator[tuple[int, Row | BadRow]]:
    """The rows with the template's texts for prompt and response, bad where it has none."""
    for line, row in rows:
        if isinstance(row, BadRow):
            yield line, row
            continue
        try:
            prompt, response = template.render(row.prompt, row.response)
        except TemplateError as error:
            yield line, BadRow(file, line, str(error))
        else:
            yield line, replace(row, prompt=prompt, response=response)


def _chat_source(tokenizer: Tokenizer) -> tuple[str, str]:
    """Name and text of the chat template that lies beside a tokenizer."""
    file = tokenizer.folder / "chat_template.jinja"
    if file.is_file():
        try:
            return str(file), file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise file_error(error, f"{file}: cannot read the chat template: {error}") from None
    source = f"{tokenizer.folder}/tokenizer_config.json: chat_template"
    found = tokenizer.settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {entry.get("name"): entry for entry in found if isinstance(entry, dict)}
        found = named.get("default", {}).get("template")
        source += " default"
    if not isinstance(found, str):
        raise InputError(
            f"data.template: {CHAT}, but {tokenizer.folder} has neither chat_template.jinja nor a "
            "chat_template in tokenizer_config.json; write the template into data.template"
        )
    return source, found


def _token_variables(tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token` and the like, as templates know them."""
    named = {
        f"{name}_token": token_setting(tokenizer.settings, f"{name}_token") for name in _TOKENS
    }
    variables = {key: text for key, text in named.items() if isinstance(text, str)}
    for key, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if token is not None:
            variables.setdefault(key, tokenizer.token_text(token))
    return variables


class _Undefined(jinja2.Undefined):
    """False in a test, as usual; written out it is an error, but for a token that is not there."""

    def __str__(self) -> str:
        if self._undefined_name in {f"{name}_token" for name in _TOKENS}:
            return ""
        return self._fail_with_undefined_error()


class _GenerationBlock(Extension):
    """`{% generation %}` tells transformers which part is the assistant's; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for text, count in ((left, right), (right, left)):
            repeats = isinstance(text, str | list | tuple) and isinstance(count, int)
            if repeats and len(text) * count > _MAX_LENGTH:
                _refuse(f"more than {_MAX_LENGTH} characters of text")
        return super().call_binop(context, operator, left, right)


@functools.cache
def _environment() -> jinja2.Environment:
    """What Hugging Face offers its templates, without what differs from one time to another."""
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=_Undefined,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
    )
    # Llama 3's own date where there is no clock.
    day = datetime.date(2024, 7, 26)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": day.strftime}
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    del environment.globals["lipsum"], environment.filters["random"]
    return environment


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _bounded_range() -> Callable[..., range]:
    """`range` whose calls together have so many items at most."""
    left = _MAX_LOOPS

    def bounded(*bounds: int) -> range:
        nonlocal left
        found = range(*bounds)
        left -= len(found)
        if left < 0:
            _refuse(f"loops over more than {_MAX_LOOPS} numbers")
        return found

    return bounded
