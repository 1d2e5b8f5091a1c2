"""A sentencepiece tokenizer.model as the tokenizer.json that reads texts alike.

Versions of transformers make one of it themselves, each in its own way, and some without the begin
token. What is written here is held against the original on its own words.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

_BLANK = "▁"
_TRIALS = 200
_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def equal_json(processor: Any, added: Mapping[str, int]) -> str | None:
    """The text of tokenizer.json for a `SentencePieceProcessor`; None where none is equal.

    Args:
        added: the tokens that are found in a text before anything else.
    """
    named = {i: text for text, i in added.items()}
    pieces = [named.get(i) or processor.id_to_piece(i) for i in range(processor.vocab_size())]
    scores = [processor.get_score(i) for i in range(len(pieces))]
    words = [i for i in range(len(pieces)) if i not in named and _is_word(processor, i)]
    for model in (_bpe, _unigram):
        text = json.dumps(_description(processor, model(processor, pieces, scores, words), added))
        if _reads_alike(text, processor, [pieces[i] for i in words], added):
            return text
    return None


def as_added_tokens(added: Mapping[str, int]) -> list[dict[str, Any]]:
    """Tokens by their ids, as tokenizer.json lists them."""
    return [
        {"id": i, "content": text, "special": True, **_FLAGS}
        for text, i in sorted(added.items(), key=lambda item: item[1])
    ]


def _description(
    processor: Any, model: dict[str, Any], added: Mapping[str, int]
) -> dict[str, object]:
    blanks = {"replacement": _BLANK, "prepend_scheme": "first", "split": False}
    if processor.normalize("a") == "a":  # it puts no blank before a text
        blanks["prepend_scheme"] = "never"
    first = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    steps += [first] if blanks["prepend_scheme"] == "first" else []
    return {
        "version": "1.0",
        "added_tokens": as_added_tokens(added),
        "pre_tokenizer": {"type": "Metaspace", **blanks},
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": model,
    }


def _bpe(
    processor: Any, pieces: list[str], scores: list[float], words: list[int]
) -> dict[str, Any]:
    """Each way to make a piece of two; the higher its score, the earlier."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i in sorted(words, key=lambda i: -scores[i]):
        halves = [(pieces[i][:n], pieces[i][n:]) for n in range(1, len(pieces[i]))]
        merges += [(a, b) for a, b in halves if a in ids and b in ids]
    unknown = processor.id_to_piece(processor.unk_id())
    fallback = any(map(processor.is_byte, range(len(pieces))))
    model = {"type": "BPE", "vocab": ids, "merges": merges, "unk_token": unknown}
    return {**model, "fuse_unk": True, "byte_fallback": fallback}


def _unigram(
    processor: Any, pieces: list[str], scores: list[float], words: list[int]
) -> dict[str, Any]:
    fallback = any(map(processor.is_byte, range(len(pieces))))
    vocabulary = list(zip(pieces, scores, strict=True))
    model = {"type": "Unigram", "unk_id": processor.unk_id(), "vocab": vocabulary}
    return {**model, "byte_fallback": fallback}


def _is_word(processor: Any, i: int) -> bool:
    kinds: tuple[Callable[[int], bool], ...] = (
        *(processor.is_byte, processor.is_control, processor.is_unknown, processor.is_unused),
    )
    return not any(kind(i) for kind in kinds)


def _reads_alike(text: str, processor: Any, words: list[str], added: Mapping[str, int]) -> bool:
    """Whether both give the same ids to added tokens, and to texts of these words and others."""
    import tokenizers

    found = tokenizers.Tokenizer.from_str(text)
    if any(found.token_to_id(token) != i for token, i in added.items()):
        return False
    words = [word.replace(_BLANK, " ") for word in words]
    words += ["\n", "  ", "é", "漢", "😀", "ﬁ", "½", "12", "\t"]
    drawn = random.Random(0)
    for _ in range(_TRIALS):
        sample = "a" + "".join(drawn.choices(words, k=12))
        if found.encode(sample, add_special_tokens=False).ids != processor.encode(sample):
            return False
    return True
