"""Layouts in which the field keeps solutions and their labels, as rows of one kind.

A layout is a generator: from one raw row the rows that it holds, a RowError in place of each that
cannot be used. `data.fields` names a preset, or the fields of the plain layout, or both: names
given beside a preset replace its own.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from job.common.errors import quoted
from job.common.schema import RIGHT, preset_of
from job.data import fields as read
from job.data.raw_rows import RawRow, RowError
from job.data.rows import Message, Range, Rewards, Row
from job.data.targets import (
    END,
    Target,
    TargetError,
    last_of,
    looks_like_targets,
    read_targets,
)

ALPACA_FIELDS = {"prompt": "instruction", "response": "output", "reward": "is_correct"}
_UNIT = (0.0, 1.0)
_PROMPTS = ("prompt", "problem", "question", "instruction")
_RESPONSES = ("responses", "answers", "generations", "completions", "solutions")
_LABELS = ("labels", "correctness", "correct", "is_correct", "rewards", "scores")
_MARK = "\N{CYRILLIC SMALL LETTER KA}\N{CYRILLIC SMALL LETTER I}"  # Math-Shepherd's end of a step
_FIRST_STEP = re.compile(r"Step 1\s*:")
Parser = Callable[[RawRow], Iterator[Row | RowError]]


@dataclass(frozen=True)
class _Options:
    """How rows of a layout are read."""

    names: Mapping[str, str] = field(default_factory=dict)
    rewards: Rewards = True
    span: Range = _UNIT

    def name(self, key: str, *usual: str) -> str | None:
        return self.names.get(key, usual[0] if usual else None)

    def of(self, row: RawRow, key: str, usual: Sequence[str]) -> str:
        """The name of a field: as given, else the first usual one that the row has."""
        return self.names.get(key) or read.first_there(row, usual)

    def label(self, value: Any, name: str) -> tuple[float, str | None]:
        """A reward, and why a label that is there is none."""
        if not self.rewards:
            return 0.0, None
        if self.rewards == "optional":
            return read.optional_label(value, name, self.span)
        return read.as_label(value, name, self.span), None


def layout_parser(
    fields: Any, rewards: Rewards, reward_range: Sequence[float] | None = None
) -> Parser:
    """What makes rows of a raw row, by `data.fields` and `data.reward_range`."""
    preset = preset_of(fields)
    given = {k: v for k, v in fields.items() if k != "preset"} if isinstance(fields, dict) else {}
    layout = PRESETS[preset] if preset else Layout(_rows if fields else _plain)
    low, high = reward_range or layout.span
    options = _Options({**layout.names, **given}, rewards, (low, high))
    return functools.partial(layout.parse, options)


def _plain(options: _Options, row: RawRow) -> Iterator[Row | RowError]:
    """A row where no layout is named; an error names those that would read it."""
    try:
        yield from _rows(options, row)
    except RowError as error:
        if {"prompt", "response", "reward"} <= row.keys():  # it is a plain one
            raise
        if readers := [name for name in PRESETS if _reads(name, options.rewards, row)]:
            raise RowError(f"{error} (data.fields={' or '.join(readers)} reads it)") from None
        raise


def _reads(preset: str, rewards: Rewards, row: RawRow) -> bool:
    try:
        return not any(isinstance(made, RowError) for made in layout_parser(preset, rewards)(row))
    except RowError:
        return False


def _about(options: _Options, row: RawRow, made: Row) -> Row:
    """A row with what any layout may also say of it."""
    part = read.optional_name(row, options.name("part"))
    changes: dict[str, Any] = {"part": made.part if part is None else part}
    if answer := options.name("answer"):
        changes["answer"] = read.optional_name(row, answer)
    return replace(made, **changes)


def _response(value: Any, name: str) -> str:
    response = read.as_text(value, name)
    if not response.strip():
        raise RowError(f"field {name!r} is empty{' but for blanks' * bool(response)}")
    return response


def _optional(row: RawRow, name: str) -> Any:
    try:
        return read.field(row, name)
    except RowError:
        return None


# --- a solution a row --------------------------------------------------------------------------


def _rows(options: _Options, row: RawRow, *, alpaca: bool = False) -> Iterator[Row]:
    """Prompt, response and reward, each a field."""
    prompt = read.text(row, options.names.get("prompt", "prompt"))
    if alpaca:
        prompt = alpaca_prompt(prompt, row)
    name = options.names.get("response", "response")
    response = _response(read.field(row, name), name)
    yield _about(options, row, _labelled(options, row, prompt, response))


def _labelled(
    options: _Options,
    row: RawRow,
    prompt: str,
    response: str,
    messages: tuple[Message, ...] = (),
    usual: Sequence[str] = ("reward",),
) -> Row:
    targets = _targets(options, row, response)
    reward, odd = _reward(options, row, options.of(row, "reward", usual), bool(targets))
    if targets and odd is None:
        reward, targets = _at_the_end(reward, targets)
    problem = read.problem(row, options.name("problem_id"), prompt)
    cut = read.truncated(row, options.name("truncated"))
    return Row(
        prompt, response, reward, problem,
        truncated=cut, odd_label=odd, messages=messages, targets=targets,
    )  # fmt: skip


def _reward(
    options: _Options, row: RawRow, name: str, has_targets: bool
) -> tuple[float, str | None]:
    """The reward, which is that of the end beside targets, where it may be none; why it is odd."""
    if options.rewards is True and not has_targets:
        return options.label(read.field(row, name), name)
    value = _optional(row, name)
    if has_targets and read.is_none(value, options.span):
        return math.nan, None
    return options.label(value, name)


def _at_the_end(reward: float, targets: tuple[Target, ...]) -> tuple[float, tuple[Target, ...]]:
    """A reward beside targets is one more, at the end; without one the last target's is it."""
    if math.isnan(reward):
        return last_of(targets).value, targets
    return reward, (*targets, Target(0, reward, 1.0, END))


def _targets(options: _Options, row: RawRow, response: str) -> tuple[Target, ...]:
    """A row's targets at positions; none where the field is null or missing.

    A field that is not named may be somebody else's, unless it has what targets have.
    """
    name = options.names.get("targets", "targets")
    given = _optional(row, name)
    meant = "targets" in options.names or looks_like_targets(given)
    if given is None or not meant or not options.rewards:
        return ()
    label = functools.partial(read.as_label, span=options.span)
    try:
        return read_targets(given, name, response, label)
    except TargetError as error:
        raise RowError(str(error)) from None


def alpaca_prompt(instruction: str, row: dict[str, Any]) -> str:
    """The instruction template of Stanford Alpaca (Taori et al. 2023), with or without input."""
    context = read.text(row, "input") if row.get("input") else ""
    lead = "Below is an instruction that describes a task"
    if context:
        lead += ", paired with an input that provides further context"
    lead += ". Write a response that appropriately completes the request."
    middle = f"\n\n### Input:\n{context}" if context else ""
    return f"{lead}\n\n### Instruction:\n{instruction}{middle}\n\n### Response:"


# --- conversations -----------------------------------------------------------------------------


def _turns(value: Any, name: str) -> tuple[Message, ...]:
    """Messages, each an object with role and content."""
    if not isinstance(value, list) or not value:
        raise RowError(f"field {name!r} must be a list of messages, not {quoted(value)}")
    return tuple(_message(turn, f"{name}[{k}]") for k, turn in enumerate(value))


def _message(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{name} must be a message with role and content, not {quoted(turn)}")
    role, content = (read.as_text(turn.get(key), f"{name}.{key}") for key in Message._fields)
    return Message(role, content)


def _prompt(turns: Sequence[Message]) -> tuple[str, tuple[Message, ...]]:
    """The text of a prompt, and its turns if they are more than one question."""
    single = len(turns) == 1 and turns[0].role == "user"
    text = turns[0].content if single else "\n".join(turn.content for turn in turns)
    return text, () if single else tuple(turns)


def _asked(value: Any, name: str) -> tuple[str, tuple[Message, ...]]:
    """A prompt that is a text or messages."""
    if isinstance(value, str):
        return read.as_text(value, name), ()
    return _prompt(_turns(value, name))


def _answered(turns: Sequence[Message], name: str) -> str:
    """What the last turn says, which must be the assistant's."""
    if turns[-1].role != "assistant":
        raise RowError(f"{name} must end with the assistant's turn, not {turns[-1].role!r}")
    return _response(turns[-1].content, name)


def _messages(options: _Options, row: RawRow) -> Iterator[Row]:
    """A conversation whose last turn is the response."""
    name = options.of(row, "messages", ("messages", "conversation"))
    turns = _turns(read.field(row, name), name)
    response = _answered(turns, name)
    if len(turns) == 1:
        raise RowError(f"field {name!r} has no turn before the response")
    prompt, before = _prompt(turns[:-1])
    made = _labelled(options, row, prompt, response, before, ("reward", "label", "score"))
    yield _about(options, row, made)


def _trl_conversational(options: _Options, row: RawRow) -> Iterator[Row]:
    """Prompt and completion as messages."""
    name, said = options.names.get("prompt", "prompt"), options.names.get("response", "completion")
    prompt, before = _asked(read.field(row, name), name)
    response = _answered(_turns(read.field(row, said), said), said)
    made = _labelled(options, row, prompt, response, before, ("label", "reward"))
    yield _about(options, row, made)


# --- several solutions a row -------------------------------------------------------------------


def _attempts(options: _Options, row: RawRow) -> Iterator[Row | RowError]:
    """A problem with lists of responses and labels, and of answers where they are named."""
    name = options.of(row, "prompt", _PROMPTS)
    prompt, before = _asked(read.field(row, name), name)
    problem = read.problem(row, options.name("problem_id"), prompt)
    said = options.of(row, "response", _RESPONSES)
    responses = read.as_list(row, said)
    judged = options.of(row, "reward", _LABELS)
    labels = _beside(options, row, judged, len(responses))
    answers = _answers(options, row, len(responses))
    part = read.optional_name(row, options.name("part")) or ""
    for k, (response, label) in enumerate(zip(responses, labels, strict=True)):
        try:
            text = _response(response, f"{said}[{k}]")
            reward, odd = options.label(label, f"{judged}[{k}]")
        except RowError as error:
            yield error
            continue
        yield Row(
            prompt, text, reward, problem,
            odd_label=odd, messages=before, answer=answers[k], part=part,
        )  # fmt: skip


def _beside(options: _Options, row: RawRow, name: str, count: int) -> list[Any]:
    """A list as long as that of the responses; where it is not needed, it may be missing."""
    if options.rewards is not True and _optional(row, name) is None:
        return [None] * count
    return _as_long(read.as_list(row, name), name, count)


def _as_long(values: list[Any], name: str, count: int) -> list[Any]:
    if len(values) != count:
        raise RowError(f"field {name!r} has {len(values)} entries, for {count} responses")
    return values


def _answers(options: _Options, row: RawRow, count: int) -> list[str | None]:
    name = options.name("answer")
    if name is None:
        return [None] * count
    given = _as_long(read.as_list(row, name), name, count)
    return [read.optional_name({name: value}, name) for value in given]


def _preference(options: _Options, row: RawRow) -> Iterator[Row | RowError]:
    """Better and worse answers to one prompt: texts, lists of texts, or conversations.

    Rewards are 1 and 0, or where a row has a `margin` 0.5 and half of that on either side.
    """
    margin = _margin(options, row)
    sides = (("chosen", 0.5 + margin / 2), ("rejected", 0.5 - margin / 2))
    name = options.names.get("part", "subset")
    part = read.optional_name(row, name) if _optional(row, name) is not None else None
    for side, reward in sides:
        for k, given in enumerate(_candidates(read.field(row, side))):
            try:
                prompt, before, response = _conversation(options, row, given, f"{side}[{k}]")
                problem = read.problem(row, options.name("problem_id"), prompt)
            except RowError as error:
                yield error
                continue
            yield Row(prompt, response, reward, problem, messages=before, part=part or "")


def _margin(options: _Options, row: RawRow) -> float:
    name = options.names.get("reward", "margin")
    value = _optional(row, name)
    none = read.is_none(value, options.span)
    return 1.0 if none else read.as_label(value, name, options.span)


def _candidates(value: Any) -> list[Any]:
    """Several answers: RewardBench 2 has lists of texts; a list of messages is one answer."""
    several = isinstance(value, list) and bool(value) and not isinstance(value[0], dict)
    return value if several else [value]


def _conversation(
    options: _Options, row: RawRow, given: Any, name: str
) -> tuple[str, tuple[Message, ...], str]:
    """Prompt, turns and response of an answer, which may have the prompt within itself."""
    asked = options.of(row, "prompt", _PROMPTS)
    if isinstance(given, str):
        prompt, before = _asked(read.field(row, asked), asked)
        return prompt, before, _response(given, name)
    turns = _turns(given, name)
    response = _answered(turns, name)
    prompt, before = _prompt(turns[:-1]) if len(turns) > 1 else _asked(row.get(asked), asked)
    return prompt, before, response


# --- steps -------------------------------------------------------------------------------------


def _stepped(
    options: _Options,
    row: RawRow,
    prompt: str,
    response: str,
    ends: Sequence[int],
    labels: Sequence[float | None],
) -> Row:
    """A solution whose steps end there, with a label for each, None for those without.

    Its reward is the label of the last step that has one, and the target of the end token too, at
    which whole solutions are ranked. No step is wrong whose label is 0.5 or more.
    """
    targets = [Target(at, x) for at, x in zip(ends, labels, strict=True) if x is not None]
    if not targets and options.rewards is True:
        raise RowError("no step has a label")
    reward = targets[-1].value if targets else math.nan
    end = [Target(0, reward, 1.0, END)] if targets else []
    return Row(
        prompt,
        _response(response, "steps"),
        reward if options.rewards else 0.0,
        read.problem(row, options.name("problem_id"), prompt),
        truncated=read.truncated(row, options.name("truncated")),
        targets=(*targets, *end) if options.rewards else (),
        step_ends=tuple(ends),
        first_error=_first_error(labels),
    )


def _joined(steps: Sequence[str], between: str) -> tuple[str, list[int]]:
    """The response of some steps, and where each of them ends."""
    ends: list[int] = []
    for step in steps:
        ends.append((ends[-1] + len(between) if ends else 0) + len(step))
    return between.join(steps), ends


def _first_error(labels: Sequence[float | None]) -> int | None:
    wrong = [k for k, x in enumerate(labels) if x is not None and x < RIGHT]
    if wrong:
        return wrong[0]
    return None if any(x is None for x in labels) or not labels else -1


def _step_label(value: Any, name: str, span: Range = _UNIT) -> float | None:
    return None if read.is_none(value, span) else read.as_label(value, name, span)


def _stepwise(options: _Options, row: RawRow) -> Iterator[Row]:
    """TRL's: a prompt, its steps and a label for each, which a line end lies between."""
    name = options.of(row, "prompt", _PROMPTS)
    said = options.of(row, "response", ("completions", "steps"))
    steps = [read.as_text(s, f"{said}[{k}]") for k, s in enumerate(read.as_list(row, said))]
    judged = options.of(row, "reward", ("labels", "ratings"))
    given = _as_long(_beside(options, row, judged, len(steps)), judged, len(steps))
    labels = [_step_label(x, f"{judged}[{k}]", options.span) for k, x in enumerate(given)]
    made = _stepped(options, row, read.text(row, name), *_joined(steps, "\n"), labels)
    yield _about(options, row, made)


def _math_shepherd(options: _Options, row: RawRow) -> Iterator[Row]:
    """A text with a mark behind each step, and the same text with + or - in its place.

    What stands behind the last mark is one more step, of which nothing is known.
    """
    name, judged_in = options.names.get("response", "input"), options.names.get("reward", "label")
    marked, judged = read.text(row, name), read.text(row, judged_in)
    pieces = marked.split(_MARK)
    first = _FIRST_STEP.search(marked)
    if len(pieces) < 2 or first is None or first.start() > len(pieces[0]):
        raise RowError(f"field {name!r} has no 'Step 1:' with a {_MARK!r} behind it")
    labels: list[float | None] = [_SIGNS[sign] for sign in _signs(pieces, judged)]
    prompt, begun = marked[: first.start()], pieces[0][first.start() :]
    response, ends = _unmarked([begun, *pieces[1:]])
    labels += [None] * (len(ends) - len(labels))
    yield _about(options, row, _stepped(options, row, prompt, response, ends, labels))


def _unmarked(pieces: Sequence[str]) -> tuple[str, list[int]]:
    """The text between marks as it lies, and where each step ends.

    Blanks before a mark are the mark's own, unless nothing else would part two steps.
    """
    text, ends = "", []
    for piece, behind in itertools.pairwise(pieces):
        text += piece
        bare = text.rstrip()
        ends.append(len(bare))
        if not behind or behind[0].isspace():
            text = bare
        elif text == bare:
            text += "\n"
    rest = pieces[-1].rstrip()
    return text + rest, [*ends, len(text + rest)] if rest else ends


_SIGNS = {"+": 1.0, "-": 0.0}


def _signs(pieces: Sequence[str], judged: str) -> Iterator[str]:
    at = 0
    for k, piece in enumerate(pieces[:-1], 1):
        at += len(piece)
        sign = judged[at : at + 1]
        if sign not in _SIGNS or not judged.startswith(piece, at - len(piece)):
            raise RowError(f"field 'label' differs from 'input' before the mark of step {k}")
        yield sign
        at += 1


def _prm800k(options: _Options, row: RawRow) -> Iterator[Row]:
    """OpenAI's: of each step the completion that was chosen, or else the wrong one that ended it.

    Ratings are 1, 0 (neutral, which counts as right, as with Lightman et al. 2023) and -1.
    """
    prompt = read.text(row, options.names.get("prompt", "question.problem"))
    steps, labels = [], []
    name = options.names.get("response", "label.steps")
    for k, step in enumerate(read.as_list(row, name)):
        taken = _taken(step, f"{name}[{k}]")
        if taken is None:
            break
        steps.append(taken[0])
        labels.append(taken[1])
    if not steps:
        raise RowError(f"field {name!r} has no step that was chosen or rated wrong")
    yield _about(options, row, _stepped(options, row, prompt, *_joined(steps, "\n"), labels))


def _taken(step: Any, name: str) -> tuple[str, float | None] | None:
    """Text and label of the completion with which the solution goes on, or ends wrong."""
    if not isinstance(step, dict):
        raise RowError(f"{name} must be a step with completions, not {quoted(step)}")
    completions, chosen = step.get("completions") or [], step.get("chosen_completion")
    if chosen is None and isinstance(human := step.get("human_completion"), dict):
        return read.as_text(human.get("text"), f"{name}.human_completion.text"), 1.0
    wrong = [k for k, one in enumerate(completions) if one.get("rating") == -1]
    at = chosen if chosen is not None else next(iter(wrong), None)
    if at is None:
        return None
    if not isinstance(at, int) or not 0 <= at < len(completions):
        raise RowError(f"{name}.chosen_completion: {quoted(at)}, of {len(completions)}")
    return _rated(completions[at], f"{name}.completions[{at}]")


def _rated(completion: dict[str, Any], name: str) -> tuple[str, float | None]:
    text, rating = read.as_text(completion.get("text"), f"{name}.text"), completion.get("rating")
    if rating not in (None, -1, 0, 1):
        raise RowError(f"{name}.rating must be -1, 0 or 1, not {quoted(rating)}")
    return text, None if rating is None else float(rating >= 0)


def _processbench(options: _Options, row: RawRow) -> Iterator[Row]:
    """A problem, the steps of a solution, and the first wrong one or -1; parts by the row's id."""
    prompt = read.text(row, options.of(row, "prompt", ("problem", *_PROMPTS)))
    said, name = options.names.get("response", "steps"), options.names.get("reward", "label")
    steps = [read.as_text(s, f"{said}[{k}]") for k, s in enumerate(read.as_list(row, said))]
    first = read.field(row, name)
    if isinstance(first, bool) or not isinstance(first, int) or not -1 <= first < len(steps):
        raise RowError(
            f"field {name!r} must be the first wrong of {len(steps)} steps or -1, "
            f"not {quoted(first)}"
        )
    labels = [None if -1 < first < k else float(k != first) for k in range(len(steps))]
    made = _stepped(options, row, prompt, *_joined(steps, "\n\n"), labels)
    part = str(row.get("id", "")).rpartition("-")[0]
    yield _about(options, row, replace(made, first_error=first, part=part))


@dataclass(frozen=True)
class Layout:
    """A layout: how it is parsed, its usual names, and the span of its rewards."""

    parse: Callable[[_Options, RawRow], Iterator[Row | RowError]]
    names: Mapping[str, str] = field(default_factory=dict)
    span: Range = _UNIT


PRESETS: dict[str, Layout] = {
    "alpaca": Layout(functools.partial(_rows, alpaca=True), ALPACA_FIELDS),
    "attempts": Layout(_attempts),
    "stepwise": Layout(_stepwise),
    "math_shepherd": Layout(_math_shepherd),
    "prm800k": Layout(_prm800k),
    "processbench": Layout(_processbench),
    "preference": Layout(_preference),
    "trl_conversational": Layout(_trl_conversational),
    "helpsteer2": Layout(_rows, {"reward": "correctness"}, (0.0, 4.0)),
    "messages": Layout(_messages),
}
