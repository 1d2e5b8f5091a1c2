"""Tokenizers of every kind, trained on a few words, and texts to give them."""

from __future__ import annotations

import base64
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from pieces import train_pieces
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from job.data.tiktoken import N_RANKS, _letters
from job.data.tokenizer import Encoded, Tokenizer, load_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "seven", "plus", "three", "equals", "ten", "and"]
BLANKS_AND_SIGNS = [" ", "  ", "\n", "\t", ".", "=", "12", "345", "\x00"]
FRAGMENTS = [*WORDS, *BLANKS_AND_SIGNS, "é", "ß", "漢字", "😀", "\U0001d538"]


def sentences(count: int = 400) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 8)) + "." for _ in range(count)]


def random_pairs(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Texts of any characters, cut anywhere; prompt or response may be empty."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        text = "".join(FRAGMENTS[i] for i in rng.integers(0, len(FRAGMENTS), rng.integers(1, 12)))
        cut = int(rng.integers(0, len(text) + 1))
        yield text[:cut], text[cut:]


def check_frame(tokenizer: Tokenizer, encoded: Encoded) -> tuple[list[int], list[int], int]:
    """What stands between begin and end token; both must be there once."""
    assert len(encoded.ids) == len(encoded.ends)
    assert encoded.ids[0] == tokenizer.bos_id
    assert encoded.ids[-1] == tokenizer.eos_id
    assert encoded.ends[0] == 0
    assert encoded.ends[-1] == (encoded.ends[-2] if len(encoded.ends) > 2 else 0)
    assert encoded.ends == sorted(encoded.ends)
    return encoded.ids[1:-1], encoded.ends[1:-1], encoded.response_start - 1


def encode(tokenizer: Tokenizer, prompt: str, response: str) -> Encoded:
    (encoded,) = tokenizer.encode([(prompt, response)])
    return encoded


def saved(folder: Path, tokenizer: tokenizers.Tokenizer, **settings: Any) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


@functools.cache
def train_sentencepiece(**options: Any) -> bytes:
    return train_pieces(sentences(), **options)


CHARACTERS = sorted(set("".join(FRAGMENTS)) - {"\x00"})
LLAMA_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
BLANK_IN_FRONT = decoders.Strip(" ", 1, 0)


def train_json(folder: Path, raw: tokenizers.Tokenizer, **settings: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<|sep|>"],
        initial_alphabet=[*CHARACTERS, "▁", *pre_tokenizers.ByteLevel.alphabet()],
        show_progress=False,
    )
    raw.train_from_iterator(sentences(), trainer)
    return saved(folder, raw, bos_token="<s>", eos_token="</s>", **settings)


def byte_level(folder: Path, *, prefix: bool) -> Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(prefix)
    raw.decoder = decoders.ByteLevel()
    return train_json(folder, raw)


def metaspace(folder: Path, scheme: str) -> Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return train_json(folder, raw)


def composing(folder: Path) -> Tokenizer:
    """A normalizer joins a letter and an accent that follows it."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    raw.decoder = decoders.ByteLevel()
    return train_json(folder, raw)


def llama_json(folder: Path) -> Tokenizer:
    """As the first conversions of Llama: the blank in front is a normalizer's."""
    model = sentencepiece.SentencePieceProcessor(model_proto=llama_model("bpe"))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces[3 + 256 :]
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]
    raw = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([*LLAMA_DECODER, BLANK_IN_FRONT])
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return saved(folder, raw, bos_token="<s>", eos_token="</s>")


def llama_model(model_type: str) -> bytes:
    return train_sentencepiece(
        vocab_size=350,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


def sentencepiece_model(folder: Path, model_type: str, **settings: Any) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(llama_model(model_type))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "byte-level BPE": lambda f: byte_level(f, prefix=False),
    "byte-level BPE with a blank in front": lambda f: byte_level(f, prefix=True),
    "byte-level BPE behind NFC": composing,
    "Metaspace before the first word": lambda f: metaspace(f, "first"),
    "Metaspace before every part": lambda f: metaspace(f, "always"),
    "Llama's first tokenizer.json": llama_json,
    "sentencepiece BPE": lambda f: sentencepiece_model(f, "bpe"),
    "sentencepiece unigram": lambda f: sentencepiece_model(f, "unigram"),
}


class Plain:
    """The library's own tokenizer of a folder: what it makes of one text, and of ids."""

    def __init__(self, folder: Path) -> None:
        if (folder / "tokenizer.json").exists():
            library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.encode = lambda text: library.encode(text, add_special_tokens=False).ids
            self.decode = lambda ids: library.decode(ids, skip_special_tokens=False)
        else:
            model = folder / "tokenizer.model"
            processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
            self.encode, self.decode = processor.encode, processor.decode


def with_settings(folder: Path, source: Path, settings: object) -> Tokenizer:
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def write_llama_3(folder: Path, trained: tokenizers.Tokenizer) -> None:
    """Llama 3's own tokenizer.model: a trained vocabulary, filled up with what is in no text."""
    ids = range(trained.get_vocab_size())
    letters = {letter: bytes([byte]) for byte, letter in _letters().items()}
    tokens = [b"".join(letters[x] for x in str(trained.id_to_token(i))) for i in ids]
    tokens += [b"\xff" + n.to_bytes(3, "big") for n in range(N_RANKS - len(tokens))]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
