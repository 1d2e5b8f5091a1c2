"""A tokenizer's files beside an exported critic, so that others read texts as it was trained."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from job.data.tokenizer import Tokenizer, frame_of
from job.data.tokenizer_settings import ADDED, CONFIG, MAP

_JSON, _MODEL = "tokenizer.json", "tokenizer.model"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_BESIDE = (CONFIG, MAP, ADDED, *_TEMPLATES)
_CLASS = "PreTrainedTokenizerFast"
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
# Of tokenizer_config.json: what is said of tokens elsewhere, or would be read by some versions.
_NOT_COPIED = (
    *("additional_special_tokens", "extra_special_tokens", "chat_template"),
    *("split_special_tokens", "legacy", "from_slow", "auto_map"),
)
_log = logging.getLogger("job.export")


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy a tokenizer as it is, with what its class is where that stands in the model's config."""
    name = _MODEL if ".model" in tokenizer.file.name else _JSON
    for file in map(tokenizer.folder.joinpath, _BESIDE):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    shutil.copyfile(tokenizer.file, folder / name)
    if "tokenizer_class" not in tokenizer.settings and not tokenizer.is_like_llama:
        _write(folder / CONFIG, {"tokenizer_class": _CLASS} | tokenizer.settings)


def reader_of(tokenizer: Tokenizer, folder: Path) -> Callable[[str], list[int]]:
    """How what has been written to a folder reads a text, without tokens that it does not have."""
    import tokenizers

    file = folder / _JSON
    if not file.exists():
        return lambda text: tokenizer.encode([("", text)], framed=False)[0].ids
    library = tokenizers.Tokenizer.from_file(str(file))
    return lambda text: library.encode(text, add_special_tokens=False).ids


def write_tokenizer(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> dict[str, int | None]:
    """Write a tokenizer for transformers, all of whose versions read texts then as the run did.

    tokenizer.json has all tokens, and puts before a text what the run put there; the class named in
    tokenizer_config.json takes it as it is. Others are rebuilt from the vocabulary by some version.

    Args:
        vocab_size: rows of the embedding, which may have fewer than the tokenizer has tokens.

    Returns:
        bos_token_id, eos_token_id and pad_token_id, each that there is below `vocab_size`.
    """
    pad = padding(tokenizer, vocab_size)
    _tell_padding(tokenizer, pad, vocab_size)
    named = {k: v for k, v in tokenizer.named.items() if k != "pad_token"}
    named |= {} if pad is None else {"pad_token": pad}
    settings = {k: v for k, v in tokenizer.settings.items() if k not in _NOT_COPIED} | named
    if ".model" in tokenizer.file.name:
        shutil.copyfile(tokenizer.file, folder / _MODEL)
    text = tokenizer.tokenizer_json
    if text is None:
        settings = {"tokenizer_class": "LlamaTokenizer"} | settings
        _log.warning(
            "no tokenizer.json reads texts just as this tokenizer.model, and transformers may "
            "read some otherwise: give it the ids of job.score's tokens"
        )
    else:
        description = _description(json.loads(text), tokenizer)
        _write(folder / _JSON, description)
        settings |= _settings(description, tokenizer)
    _write(folder / CONFIG, settings)
    known = {f"{name}_id": tokenizer.token_id(text) for name, text in named.items()}
    wanted = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: known.get(name) for name in wanted}
    return {name: None if i is None or i >= vocab_size else i for name, i in ids.items()}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _description(there: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json with the tokens and the begin token of the run; the rest stays."""
    import tokenizers

    there["added_tokens"] = tokenizer.added_tokens
    wanted = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if frame_of(tokenizers.Tokenizer.from_str(json.dumps(there))) != (wanted, []):
        there["post_processor"] = _processor(there.get("post_processor"), tokenizer)
    return there


def _processor(there: Any, tokenizer: Tokenizer) -> Any:
    """A post-processor that puts the begin token before a text, and nothing behind it."""
    parts = there.get("processors", [there]) if isinstance(there, dict) else []
    kept = [part for part in parts if part.get("type") == "ByteLevel"]
    if tokenizer.bos_id is not None:
        kept.append(_template(tokenizer.token_text(tokenizer.bos_id), tokenizer.bos_id))
    if len(kept) < 2:
        return kept[0] if kept else None
    return {"type": "Sequence", "processors": kept}


def _template(text: str, token: int) -> dict[str, Any]:
    begin = {"SpecialToken": {"id": text, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }


def _settings(description: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Of tokenizer_config.json, what versions and other readers would guess each in its own way."""
    tokens = description["added_tokens"]
    first = description.get("pre_tokenizer") or {}
    return {
        "tokenizer_class": _CLASS,
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
        # transformers 4 changes the file's to this
        "add_prefix_space": bool(first.get("add_prefix_space", False)),
        "added_tokens_decoder": {str(t["id"]): {flag: t[flag] for flag in _FLAGS} for t in tokens},
    }


def padding(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """A token of the model to pad with that no text ends with; above all not the end token.

    transformers takes the value of a sequence at the last token that is no padding, and does not
    load a model whose embedding has no row for padding.
    """
    for text in _candidates(tokenizer):
        found = tokenizer.token_id(text)
        if found is not None and found != tokenizer.eos_id and found < vocab_size:
            return text
    return None


def _tell_padding(tokenizer: Tokenizer, pad: str | None, vocab_size: int) -> None:
    named = tokenizer.named.get("pad_token")
    if named is not None and named != pad:
        found = tokenizer.token_id(named)
        why = (
            "its end token"
            if found == tokenizer.eos_id
            else f"not among the model's {vocab_size} tokens"
        )
        _log.warning("padding is %r: the tokenizer's own, %r, is %s", pad, named, why)


def _candidates(tokenizer: Tokenizer) -> Iterator[str]:
    if "pad_token" in tokenizer.named:
        yield tokenizer.named["pad_token"]
    for part in ("pad", "reserved", "unused", "unk"):
        yield from (text for text in sorted(tokenizer.special) if part in text.lower())
    yield "<unk>"
    if "bos_token" in tokenizer.named:
        yield tokenizer.named["bos_token"]
    yield from sorted(tokenizer.special)
