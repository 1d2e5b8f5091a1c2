"""A tokenizer's files beside an exported critic, so that others read texts as it was trained."""

from __future__ import annotations

import json
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


def write_settings(tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    """Complete a copied tokenizer for transformers, which does not find out everything itself.

    Returns:
        bos_token_id, eos_token_id and pad_token_id, as far as there are such tokens.
    """
    model = folder / "tokenizer.model"
    if model.exists() and is_tiktoken(model):
        text = as_tokenizer_json(model)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    pad = padding(tokenizer)
    known = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    known["pad_token_id"] = None if pad is None else tokenizer.token_id(pad)
    ids = {name: i for name, i in known.items() if i is not None}
    texts: dict[str, Any] = {n.removesuffix("_id"): tokenizer.token_text(i) for n, i in ids.items()}
    kind = "PreTrainedTokenizerFast" if (folder / "tokenizer.json").exists() else "LlamaTokenizer"
    settings = {"tokenizer_class": kind} | texts | tokenizer.settings
    settings |= {"pad_token": pad} if pad is not None else {}
    written = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / _SETTINGS).write_text(written, encoding="utf-8")
    return ids


def padding(tokenizer: Tokenizer) -> str | None:
    """A token to pad with that no text ends with; above all not the end token.

    transformers takes the value of a sequence at the last token that is no padding.
    """
    for text in _candidates(tokenizer):
        found = tokenizer.token_id(text)
        if found is not None and found != tokenizer.eos_id:
            return text
    return None


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
