"""Llama 3's original tokenizer.model as a tokenizer.json.

It is a tiktoken vocabulary: a line for each token, in base64, and its rank. How a text is split
first, and the special tokens behind the ranks, stand in Meta's code; so this is for Llama 3 alone.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from job.common.errors import InputError, file_error

N_RANKS = 128_000
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Those whose names are the same in all versions, counted from the last rank.
_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_N_SPECIAL = 256
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def is_tiktoken(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return _LINE.match(stream.readline(1 << 10)) is not None
    except OSError:
        return False  # the reader says it better


def as_tokenizer_json(file: Path) -> str:
    """The text of an equal tokenizer.json.

    Raises:
        InputError: damaged, or not Llama 3's.
    """
    try:
        pairs = [line.split() for line in file.read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    except (OSError, ValueError) as error:
        raise file_error(error, f"{file}: cannot read the tokenizer: {error}") from None
    if sorted(ranks.values()) != list(range(N_RANKS)):
        raise InputError(
            f"{file}: cannot read the tokenizer: a tiktoken vocabulary of {len(ranks)} tokens, not "
            f"Llama 3's {N_RANKS}, lacks its rules; set tokenizer.path to a tokenizer.json"
        )
    return json.dumps(_description(ranks))


def _description(ranks: dict[bytes, int]) -> dict[str, object]:
    letters = _letters()
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    model = {
        "type": "BPE",
        "vocab": {words[token]: rank for token, rank in ranks.items()},
        "merges": [(words[a], words[b]) for a, b in _merges(ranks)],
        "ignore_merges": True,
    }
    split = {"pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    bytes_only = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [{"type": "Split", **split}, {"type": "ByteLevel", **bytes_only}]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [
        {
            "id": N_RANKS + i,
            "content": _SPECIAL.get(i, f"<|special_{i}|>"),
            "special": True,
            **flags,
        }
        for i in range(_N_SPECIAL)
    ]
    return {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", **bytes_only},
        "model": model,
    }


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Each way to make a token of two; the lower its rank, the earlier."""
    found = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        ways = [(a, b) for a, b in halves if a in ranks and b in ranks]
        found += sorted(ways, key=lambda way: (ranks[way[0]], ranks[way[1]]))
    return found


def _letters() -> dict[int, str]:
    """A visible letter for each byte, as in every byte-level vocabulary (Radford et al. 2019)."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(others)}
