"""Prompt and response as the text that the model sees: as they are, in a plain text, in a chat.

A chat template comes with the model, from anywhere; it runs in a sandbox, knows no clock and no
chance, and has bounds on what it loops over and writes.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from job.data.rows import BadRow, Message, Placed, Row
from job.data.targets import CHARACTER, Target
from job.data.tokenizer import Encoded, Tokenizer
from job.data.tokenizer_settings import NAMES

_MAX_LOOPS = 100_000  # over ranges, in one text
_MAX_LENGTH = 10_000_000  # characters of one text
_MARK = re.compile(r"[<\[](/?)([^\s<>\[\]/]+)[>\]]")  # <think>, [THINK] and their ends
_LAST_MARK = re.compile(_MARK.pattern + r"\s*\Z")
_PROBE = ("1 + 1?", "2.")
Turns = Sequence[Message]
DAY = datetime.date(2024, 7, 26)  # Llama 3's own date where there is no clock


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
    _tokenizer: Tokenizer

    def lead(self, response: str, rendered: str) -> int:
        """How many characters `render` puts before a response's own; negative if it takes some."""
        for core in (response, self._tokenizer.without_end(response)):
            if (bare := core.strip()) and bare in rendered:
                return rendered.find(bare) - core.find(bare)
        return 0

    @abstractmethod
    def render(
        self, prompt: str, response: str, *, truncated: bool = False, turns: Turns = ()
    ) -> tuple[str, str]:
        """What the model is given, and what it says then.

        Args:
            truncated: the response was cut off; nothing stands behind it.
            turns: those of a conversation, in place of the prompt.

        Raises:
            TemplateError: the template cannot do that, or drops something.
        """


class PlainTemplate(Template):
    """A text with `{prompt}` and `{response}`; what stands behind the response is part of it."""

    framed = True

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self.identity = text
        self._tokenizer = tokenizer
        self.before, _, rest = text.partition("{prompt}")
        self.between, _, self.after = rest.partition("{response}")

    def render(
        self, prompt: str, response: str, *, truncated: bool = False, turns: Turns = ()
    ) -> tuple[str, str]:
        if turns:
            raise TemplateError(
                f"the prompt is a conversation of {len(turns)} turn(s), not one question; "
                "data.template=chat, or another chat template, makes a text of it"
            )
        said = self._tokenizer.without_end(response)
        after = "" if truncated else self.after
        return self.before + prompt + self.between, said + after


class ChatTemplate(Template):
    """A Jinja template for a list of messages, as Hugging Face's tokenizers have it.

    The prompt is the user's message up to where the assistant is to speak, the response all that
    the assistant's message adds. Blanks behind an end token are left out: no model says them.

    A response that is a thought without an end, and so was cut off, stands right behind the prompt:
    templates take it for an answer, and put a thought before it that the model never had.

    Attributes:
        text: the template.
        end: the token that it puts behind a response, with blanks behind that; both may be empty.
    """

    framed = False

    def __init__(self, source: str, text: str, tokenizer: Tokenizer) -> None:
        self.text = text
        self._source = source
        self._tokenizer = tokenizer
        self._variables = tokenizer.named  # as templates know them
        self._ends = tuple(sorted(tokenizer.special, key=len, reverse=True))
        self.identity = {"chat": text, "variables": self._variables, "ends": sorted(self._ends)}
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{source}: line {error.lineno}: {error.message}") from None
        except Exception as error:  # what a broken template raises is anybody's guess
            raise InputError(f"{source}: {first_line(error)}") from None
        _, answer = self._parts((Message("user", _PROBE[0]),), _PROBE[1])
        self._after = answer.rpartition(_PROBE[1])[2]
        self.end = self._end_of(self._after)
        self.blanks = self._after[len(self._after.rstrip()) :] if self.end else ""

    def render(
        self, prompt: str, response: str, *, truncated: bool = False, turns: Turns = ()
    ) -> tuple[str, str]:
        said = self._without_end(response)
        if said != response and not self.end and not truncated:
            said += self._tokenizer.end_text  # which the template does not write
        asked, answer = self._parts(turns or (Message("user", prompt),), said)
        lead, core, after = self._split(answer, said)
        if _is_open_thought(asked, lead, core):
            lead = ""
        if truncated:
            return asked, lead + core
        whole = lead + core + after
        return asked, whole.rstrip() if self._end_of(whole) else whole

    def _split(self, answer: str, said: str) -> tuple[str, str, str]:
        """What the template puts before a response, the response, and what it puts behind it."""
        for core in (said, said.strip()):
            if answer.endswith(core + self._after):
                return answer[: len(answer) - len(core + self._after)], core, self._after
        found = next((core for core in (said, said.strip()) if core and core in answer), None)
        if found is None:
            self._fail("it changes the response or leaves it out")
        lead, _, after = answer.rpartition(found)
        return lead, found, after

    def _without_end(self, response: str) -> str:
        response = self._tokenizer.without_end(response)
        while self.end and (bare := response.rstrip()).endswith(self.end):
            response = self._tokenizer.without_end(bare.removesuffix(self.end))
        return response

    def _end_of(self, text: str) -> str:
        """The special token that a text ends with, but for blanks."""
        return next((end for end in self._ends if text.rstrip().endswith(end)), "")

    def _parts(self, turns: Turns, response: str) -> tuple[str, str]:
        """The text that asks for an answer, and what the answer adds to it."""
        asked = self._run(turns, add_generation_prompt=True)
        whole = self._run((*turns, Message("assistant", response)), add_generation_prompt=False)
        if not whole.startswith(asked):
            self._fail(
                "the text with an answer does not begin with the text that asks for one; "
                "where the response begins is unknown"
            )
        if turns[-1].content.strip() not in asked:
            self._fail("it changes the prompt or leaves it out")
        return asked, whole[len(asked) :]

    def whole(self, prompt: str, response: str) -> str:
        """What the template makes of a chat."""
        turns = (Message("user", prompt), Message("assistant", response))
        return self._run(turns, add_generation_prompt=False)

    def _run(self, turns: Turns, add_generation_prompt: bool) -> str:
        messages = [turn._asdict() for turn in turns]
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


def load_template(template: str | None, tokenizer: Tokenizer) -> PlainTemplate | ChatTemplate:
    """The template that `data.template` asks for, tried on an example.

    Raises:
        InputError: there is none, or it does not work.
    """
    if template is None:
        return PlainTemplate("{prompt}{response}", tokenizer)
    if template != CHAT and not is_chat_template(template):
        return PlainTemplate(template, tokenizer)
    source, text = _chat_source(tokenizer) if template == CHAT else ("data.template", template)
    try:
        found = ChatTemplate(source, text, tokenizer)
        found.render(*_PROBE)
    except TemplateError as error:
        raise InputError(str(error)) from None
    return found


def _is_open_thought(asked: str, lead: str, said: str) -> bool:
    """Whether `lead` closes a thought that goes on in what was said.

    Either the prompt ends with its beginning, or what was said begins one and does not end it.
    """
    closed = {name for slash, name in _MARK.findall(lead) if slash}
    last = _LAST_MARK.search(asked)
    return bool(closed & (_left_open(said) | _left_open(last[0] if last else "")))


def _left_open(text: str) -> set[str]:
    """The marks, such as <think>, that a text opens and does not close."""
    left: set[str] = set()
    for slash, name in _MARK.findall(text):
        (left.discard if slash else left.add)(name)
    return left


def render_rows(rows: Iterable[Placed], template: Template) -> Iterator[Placed]:
    """The rows with the template's texts for prompt and response, bad where it has none."""
    for place, row in rows:
        if isinstance(row, BadRow):
            yield place, row
            continue
        try:
            prompt, response = template.render(
                row.prompt, row.response, truncated=row.truncated, turns=row.messages
            )
        except TemplateError as error:
            yield place, BadRow(*place, str(error))
        else:
            lead = template.lead(row.response, response)
            targets = tuple(_moved(one, lead) for one in row.targets)
            made: dict[str, Any] = {"prompt": prompt, "response": response, "lead": lead}
            yield place, replace(row, **made, targets=targets, given=row.response)


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, *, framed: bool) -> list[Encoded]:
    """The tokens of rows that a template, `framed` or not, has rendered."""
    texts = [(row.prompt, row.response) for row in rows]
    ended = [not row.truncated for row in rows]
    return [*tokenizer.encode(texts, framed=framed, ended=ended)]


def _moved(target: Target, lead: int) -> Target:
    """A target where the template has put what stands before the response's own text."""
    moves = target.unit == CHARACTER and target.at > 0
    return target._replace(at=max(0, target.at + lead)) if moves else target


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


class _Undefined(jinja2.Undefined):
    """False in a test, as usual; written out it is an error, but for a token that is not there."""

    def __str__(self) -> str:
        if self._undefined_name in NAMES:
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
    environment.globals |= {"raise_exception": _refuse, "strftime_now": DAY.strftime}
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
