"""A tokenizer's files beside an exported critic, so that others read texts as it was trained."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.data.tiktoken import as_tokenizer_json, is_tiktoken
from job.data.tokenizer import Tokenizer, token_setting

_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_SETTINGS = "tokenizer_config.json"
_log = logging.getLogger("job.export")


def copy_tokenizer(path: str | Path, folder: Path) -> None:
    """Copy a tokenizer, from its file or folder, as it is."""
    path = Path(path)
    there = path if path.is_dir() else path.parent
    for file in map(there.joinpath, _NAMES):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    if path.is_file():
        name = "tokenizer.model" if ".model" in path.name else "tokenizer.json"
        shutil.copyfile(path, folder / name)


def write_settings(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> dict[str, int | None]:
    """Complete a copied tokenizer for transformers, which does not find out everything itself.

    Args:
        vocab_size: rows of the embedding, which may have fewer than the tokenizer has tokens.

    Returns:
        bos_token_id, eos_token_id and pad_token_id, each that there is below `vocab_size`.
    """
    model = folder / "tokenizer.model"
    if model.exists() and is_tiktoken(model):
        text = as_tokenizer_json(model)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    pad = padding(tokenizer, vocab_size)
    _tell_padding(tokenizer, pad, vocab_size)
    known = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    known["pad_token_id"] = None if pad is None else tokenizer.token_id(pad)
    ids = {n: None if i is None or i >= vocab_size else i for n, i in known.items()}
    texts: dict[str, Any] = {
        n.removesuffix("_id"): tokenizer.token_text(i) for n, i in known.items() if i is not None
    }
    kind = "PreTrainedTokenizerFast" if (folder / "tokenizer.json").exists() else "LlamaTokenizer"
    settings = {"tokenizer_class": kind} | texts | tokenizer.settings
    settings |= {"pad_token": pad} if pad is not None else {}
    written = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / _SETTINGS).write_text(written, encoding="utf-8")
    return ids


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
    named = token_setting(tokenizer.settings, "pad_token")
    if isinstance(named, str) and named != pad:
        found = tokenizer.token_id(named)
        why = (
            "its end token"
            if found == tokenizer.eos_id
            else f"not among the model's {vocab_size} tokens"
        )
        _log.warning("padding is %r: the tokenizer's own, %r, is %s", pad, named, why)


def _candidates(tokenizer: Tokenizer) -> Iterator[str]:
    named = token_setting(tokenizer.settings, "pad_token")
    if isinstance(named, str):
        yield named
    for part in ("pad", "reserved", "unused", "unk"):
        yield from (text for text in sorted(tokenizer.special) if part in text.lower())
    yield "<unk>"
    if tokenizer.bos_id is not None:
        yield tokenizer.token_text(tokenizer.bos_id)
    yield from sorted(tokenizer.special)
