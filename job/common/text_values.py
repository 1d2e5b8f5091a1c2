"""Text in YAML that stays text: `name: 1.10` is the name 1.10 and no number. Free of torch.

YAML gives a value its type by its looks; here the key's type comes first. What is written is read
back as it was, by YAML and by OmegaConf.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Callable
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from job.common.schema import SOURCES

_NULLS = ("", "null", "Null", "NULL", "~")  # as YAML writes them
_NULL = "tag:yaml.org,2002:null"
_TEXT = "tag:yaml.org,2002:str"
_INTERPOLATION = re.compile(r"(\\*)\$\{")


def is_utf8(text: str) -> bool:
    """Whether a text can be written; of bytes that are none, Python makes surrogates."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def is_text(hint: Any) -> bool:
    """Whether a key's type is str, or str | None."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return hint is str or (union and set(typing.get_args(hint)) == {str, type(None)})


def is_sources(hint: Any) -> bool:
    """Whether a key takes a text, a list of texts, or a share."""
    return SOURCES in getattr(hint, "__metadata__", ())


def sources_of(typed: str) -> str | float | None:
    """What a person means who types a single source: a share between 0 and 1, else a text."""
    return float(typed) if _is_share(typed) else text_of(typed)


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False


def hint_at(hint: Any, key: str) -> Any:
    """The type of a key with dots, below a dataclass or a mapping; Any where it is not known."""
    for part in key.split("."):
        hint = _below(hint, part)
    return hint


def text_of(typed: str) -> str | None:
    """What a person means who types the value of a text: that, unless it is quoted or null."""
    alone = typed.strip()
    if alone in _NULLS:
        return None
    try:
        node = yaml.compose(alone, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return typed
    if not isinstance(node, yaml.ScalarNode) or node.style not in ("'", '"'):
        return typed
    return node.value if node.end_mark.index == len(alone) else typed  # else a comment follows


def with_quotes(text: str, hint: Any) -> str:
    """A YAML document of a type, in which each plain value of a text is quoted."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is None:
        return text
    _quote(node, hint)
    return yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True)


def _quote(node: yaml.Node, hint: Any) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _quote(value, hint if key.value == "<<" else _below(hint, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        inside = typing.get_args(hint) if typing.get_origin(hint) is list else ()
        for value in node.value:
            # a list of mappings may also stand behind `<<`
            _quote(value, inside[0] if inside else str if is_sources(hint) else hint)
    elif isinstance(node, yaml.ScalarNode) and _is_plain(node) and _stays(node.value, hint):
        node.tag, node.style = _TEXT, '"'


def _stays(text: str, hint: Any) -> bool:
    """Whether a plain value of this type is a text, whatever it looks like."""
    return is_text(hint) or (is_sources(hint) and not _is_share(text))


def _is_plain(node: yaml.ScalarNode) -> bool:
    return node.style is None and node.tag != _NULL


def _below(hint: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _hints(cast(type, hint)).get(key, Any)
    return typing.get_args(hint)[1] if typing.get_origin(hint) is dict else Any


def element_sections(schema: type) -> dict[str, type]:
    """By key, what each entry of a list is, where that is a section."""
    inside = {name: typing.get_args(hint) for name, hint in _hints(schema).items()}
    first = {k: cast(type, args[0]) for k, args in inside.items() if args}
    return {k: one for k, one in first.items() if dataclasses.is_dataclass(one)}


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema, include_extras=True)


def dump(tree: dict[str, Any]) -> str:
    """A resolved configuration as YAML, whose values are read back as they are."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(tree)))


def load_plain(text: str) -> Any:
    """What `dump` has written, without a schema."""
    return _unescaped(yaml.safe_load(text))


def _escaped(value: Any) -> Any:
    """With `${` as OmegaConf wants to see it where it stands for itself."""
    return _each_text(value, lambda text: _INTERPOLATION.sub(r"\1\1\\${", text))


def _unescaped(value: Any) -> Any:
    return _each_text(value, lambda text: _INTERPOLATION.sub(_halved, text))


def _halved(match: re.Match[str]) -> str:
    return "\\" * (len(match[1]) // 2) + "${"


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _each_text(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(one, change) for one in value]
    return change(value) if isinstance(value, str) else value
