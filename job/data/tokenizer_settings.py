"""What the files beside a tokenizer say: its settings, tokens by name, tokens that are added to it.

They count as in transformers, of which 4.57, 5.3 and 5.23 were asked. Where tokenizer_config.json
has `added_tokens_decoder`, the older added_tokens.json and special_tokens_map.json are not read;
where it has not, names in the latter go before those in tokenizer_config.json. An added token that
is no word of the vocabulary gets the next free id, whatever id stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.common.errors import InputError, file_error

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Their tokenizers put a begin token before a text unless add_bos_token is false.
_LLAMA_LIKE = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_LLAMA_MODELS = ("llama", "mistral", "gemma")


@dataclass(frozen=True)
class Added:
    """A token that is declared: its text, flags as `tokenizers.AddedToken` takes them, its id."""

    text: str
    flags: dict[str, bool]
    id: int = -1


@dataclass(frozen=True)
class TokenizerSettings:
    """The files beside a tokenizer.

    Attributes:
        values: of tokenizer_config.json.
        named: `bos_token` and the like, each as it is written there: text, flags or None.
        listed: special tokens without a name, as they are written.
        added: tokens that were given to the vocabulary later, in the order of their numbers.
    """

    folder: Path
    values: dict[str, Any]
    named: dict[str, Any]
    listed: tuple[Any, ...]
    added: tuple[Added, ...]
    _map: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> TokenizerSettings:
        """
        Raises:
            InputError: a file is damaged, or a token has no text or no number.
        """
        values = read_settings(folder / CONFIG)
        alone = "added_tokens_decoder" in values
        older = {} if alone else read_settings(folder / MAP)
        there = {**values, **older}
        named = {name: there[name] for name in NAMES if name in there}
        listed = _listed(there)
        special = {*map(_text, named.values()), *map(_text, listed)}
        try:
            if alone:
                decoder = values["added_tokens_decoder"].items()
                added = [Added(*_parts({**entry}), int(number)) for number, entry in decoder]
            else:
                numbers = read_settings(folder / ADDED).items()
                added = [Added(text, _plain(text in special), int(i)) for text, i in numbers]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(
                f"{folder}: {ADDED} or {CONFIG}: added_tokens_decoder has a token without text or "
                "number"
            ) from None
        in_order = sorted(filter(lambda token: token.text, added), key=lambda token: token.id)
        return cls(folder, values, named, tuple(listed), tuple(in_order), older)

    def special(self) -> Iterator[Added]:
        """Tokens that have a name or stand in a list, in the order in which they get ids."""
        for entry in (*self.named.values(), *self.listed):
            if _text(entry):
                text, flags = _parts(entry)
                yield Added(text, {"normalized": False, **flags, "special": True})

    @property
    def listed_texts(self) -> set[str]:
        return set(filter(None, map(_text, self.listed)))

    def text(self, name: str) -> str | None:
        """The text of the token of a name, such as `eos_token`."""
        return _text(self.named.get(name))

    @property
    def is_like_llama(self) -> bool:
        """Whether the tokenizer's class, or that of the model beside it, is one of Llama's kind."""
        kind = self.values.get("tokenizer_class")
        if kind is not None:
            return str(kind).removesuffix("Fast") in _LLAMA_LIKE
        model = read_settings(self.folder / "config.json").get("model_type")
        return model is None or model in _LLAMA_MODELS

    @property
    def puts_begin_token(self) -> bool | None:
        """Whether a begin token stands before a text; None where tokenizer.json decides."""
        told = self.values.get("add_bos_token")
        if self.is_like_llama:
            return told is not False
        return True if told is True else None

    def disputed(self, known: Collection[str], *, normalizes: bool) -> str:
        """A token that versions of transformers read each in its own way; empty if there is none.

        Args:
            known: the tokens that tokenizer.json itself has added.
            normalizes: whether it changes texts before it looks for tokens.
        """
        older = "added_tokens_decoder" not in self.values
        known = {*known, *(token.text for token in self.added if not older)}
        for key, entry in self.values.items():
            text = _text(entry)
            if key.endswith("_token") and key not in NAMES and text and text not in known:
                return f"{CONFIG}: {key} {text!r}"
        listed = self.listed_texts - known
        if listed and all(self.values.get(key) for key in _LISTS):
            return f"{CONFIG}: {min(listed)!r} among {' and '.join(_LISTS)}"
        if normalizes and self._map.get(_LISTS[0]):
            both = {token.text for token in self.added} & listed
            return f"{ADDED} and {MAP}: {min(both)!r}" if both else ""
        return ""


def _listed(values: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    for key in _LISTS:
        entries = values.get(key) or []
        found += entries.values() if isinstance(entries, dict) else entries
    return found


def _text(entry: Any) -> str | None:
    """The text of a token, which may be written with its flags."""
    entry = entry.get("content") if isinstance(entry, dict) else entry
    return entry if isinstance(entry, str) else None


def _parts(entry: Any) -> tuple[str, dict[str, bool]]:
    if isinstance(entry, str):
        return entry, {}
    flags = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
    return str(entry["content"]), flags


def _plain(special: bool) -> dict[str, bool]:
    return {"special": special, "normalized": not special}


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise file_error(error, f"{file}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{file}: a tokenizer configuration is a JSON object")
    return settings
