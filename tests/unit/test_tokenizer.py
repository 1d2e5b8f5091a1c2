"""Tokenisation: the joined text stays as it is, and the response begins where it should.

The references count bytes: in byte-level and byte-fallback vocabularies each token stands for
known bytes, so that its place in the text follows without any offsets of the libraries.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from pieces import train_pieces
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from job.common.errors import InputError
from job.data.arithmetic import ALPHABET, chains
from job.data.tiktoken import N_RANKS, _letters
from job.data.tokenizer import (
    Encoded,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    write_bpe_tokenizer,
    write_character_tokenizer,
)

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


def reference(sizes: list[int], prompt: str, response: str) -> tuple[list[int], int]:
    """`ends` and `response_start` of tokens that stand for so many bytes each."""
    text = prompt + response
    assert sum(sizes) == len(text.encode())
    char_of_byte = [i for i, char in enumerate(text) for _ in char.encode()]
    ends = [char_of_byte[last - 1] + 1 if last else 0 for last in itertools.accumulate(sizes)]
    n_prompt = len(prompt.encode())
    return ends, sum(1 for last in itertools.accumulate(sizes) if last <= n_prompt)


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


# --- byte-level BPE --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    write_bpe_tokenizer(folder, sentences(), 400)
    return folder


@pytest.fixture(scope="module")
def bpe(bpe_folder: Path) -> Tokenizer:
    return load_tokenizer(bpe_folder)


@pytest.fixture(scope="module")
def library(bpe_folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))


def test_bpe_ids_decode_to_the_joined_text(bpe: Tokenizer, library: tokenizers.Tokenizer) -> None:
    pairs = list(random_pairs(2000, seed=1))
    for (prompt, response), encoded in zip(pairs, bpe.encode(pairs), strict=True):
        ids, _, _ = check_frame(bpe, encoded)
        assert library.decode(ids, skip_special_tokens=False) == prompt + response


def test_bpe_prompt_has_its_own_tokens_and_the_response_all_that_hold_a_byte_of_it(
    bpe: Tokenizer, library: tokenizers.Tokenizer
) -> None:
    would_straddle = 0
    pairs = list(random_pairs(2000, seed=2))
    for (prompt, response), encoded in zip(pairs, bpe.encode(pairs), strict=True):
        ids, ends, start = check_frame(bpe, encoded)
        # Byte-level pieces have one character for each byte.
        sizes = [len(str(library.id_to_token(i))) for i in ids]
        assert (ends, start) == reference(sizes, prompt, response)
        assert ids[:start] == library.encode(prompt).ids
        assert sum(sizes[:start]) == len(prompt.encode())
        joined = library.encode(prompt + response).ids
        if joined[:start] == ids[:start]:
            assert ids == joined
        else:
            assert ids[start:] == library.encode(response).ids
            would_straddle += 1
    assert would_straddle > 50


def test_where_prompt_and_response_meet_between_tokens_changes_none(
    bpe: Tokenizer, library: tokenizers.Tokenizer
) -> None:
    text = "the cat sat 漢字 on 12 mats."
    whole = encode(bpe, "", text)
    cuts = {end for _, end in library.encode(text).offsets}
    for i in cuts:
        found = encode(bpe, text[:i], text[i:])
        assert (found.ids, found.ends) == (whole.ids, whole.ends)


def test_a_token_that_would_hold_the_end_of_the_prompt_is_not_taken(
    bpe: Tokenizer, library: tokenizers.Tokenizer
) -> None:
    encoded = encode(bpe, "the c", "at sat")
    pieces = [library.id_to_token(i) for i in encoded.ids]
    assert library.encode("the cat sat").tokens == ["the", "Ġcat", "Ġsat"]
    n = encoded.response_start
    assert pieces[:n] == ["<s>", *library.encode("the c").tokens]
    assert pieces[n:] == [*library.encode("at sat").tokens, "</s>"]
    assert encoded.ends[n - 1] == 5
    assert encoded.ends[-1] == 11


def test_all_bytes_of_a_character_are_on_its_side_of_the_boundary(bpe: Tokenizer) -> None:
    assert encode(bpe, "😀", "a").response_start == 1 + 4
    assert encode(bpe, "a", "😀").response_start == 1 + 1
    assert encode(bpe, "漢", "字").response_start == 1 + 3


def test_an_empty_prompt_leaves_everything_but_the_begin_token_to_the_response(
    bpe: Tokenizer,
) -> None:
    for response in ("cat", " cat", "漢", "\n"):
        assert encode(bpe, "", response).response_start == 1


def test_an_empty_response_leaves_the_end_token(bpe: Tokenizer) -> None:
    encoded = encode(bpe, "the cat", "")
    assert encoded.ids[encoded.response_start :] == [bpe.eos_id]


def test_pairs_encoded_together_are_encoded_alike(bpe: Tokenizer) -> None:
    pairs = list(random_pairs(300, seed=3))
    assert bpe.encode(pairs) == [encode(bpe, *pair) for pair in pairs]
    assert bpe.encode([]) == []


def test_bpe_takes_digits_one_by_one(bpe: Tokenizer) -> None:
    assert len(encode(bpe, "", "1234567").ids) == 1 + 7 + 1


def test_bpe_training_gives_the_same_tokenizer_again(bpe: Tokenizer, tmp_path: Path) -> None:
    write_bpe_tokenizer(tmp_path, iter(sentences()), 400)
    assert load_tokenizer(tmp_path).fingerprint == bpe.fingerprint


def test_the_vocabulary_is_no_larger_than_asked_and_holds_every_id(bpe: Tokenizer) -> None:
    assert 258 <= bpe.vocab_size <= 400
    pairs = list(random_pairs(200, seed=4))
    assert max(i for encoded in bpe.encode(pairs) for i in encoded.ids) < bpe.vocab_size


# --- other tokenizer.json --------------------------------------------------------------------


def saved(folder: Path, tokenizer: tokenizers.Tokenizer, **settings: Any) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def test_a_blank_at_the_end_of_a_token_counts_although_the_file_asks_to_trim_it(
    tmp_path: Path,
) -> None:
    words = ["<s>", "</s>", "a", "b", "Ġ", "aĠ", ".", "ĠĠ"]
    model = models.BPE({w: i for i, w in enumerate(words)}, [("a", "Ġ"), ("Ġ", "Ġ")])
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = saved(tmp_path, raw, bos_token="<s>", eos_token="</s>")
    within = encode(tokenizer, "a ", ".")
    assert (within.ids, within.ends) == ([0, 5, 6, 1], [0, 2, 3, 3])
    assert within.response_start == 2
    would_straddle = encode(tokenizer, "a", " .")
    assert (would_straddle.ids, would_straddle.ends) == ([0, 2, 4, 6, 1], [0, 1, 2, 3, 3])
    assert would_straddle.response_start == 2
    assert encode(tokenizer, "a  ", "b").response_start == 1 + 2


def test_a_template_of_the_file_adds_no_second_begin_token(
    tmp_path: Path, bpe_folder: Path, bpe: Tokenizer
) -> None:
    raw = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = saved(tmp_path, raw, bos_token="<s>", eos_token="</s>")
    assert encode(tokenizer, "the cat", " sat") == encode(bpe, "the cat", " sat")


def test_truncation_and_padding_of_the_file_are_left_out(
    tmp_path: Path, bpe_folder: Path, bpe: Tokenizer
) -> None:
    raw = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    tokenizer = saved(tmp_path, raw, bos_token="<s>", eos_token="</s>")
    pairs = list(random_pairs(50, seed=5))
    assert tokenizer.encode(pairs) == bpe.encode(pairs)


def test_byte_fallback_in_tokenizer_json_keeps_characters_whole_at_the_boundary(
    tmp_path: Path,
) -> None:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁thecatsmon."]
    words = [*dict.fromkeys(words), "▁t", "ca"]
    model = models.BPE(
        {w: i for i, w in enumerate(words)},
        [("▁", "t"), ("c", "a")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    raw = tokenizers.Tokenizer(model)
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = saved(tmp_path, raw, bos_token="<s>", eos_token="</s>")
    for prompt, response, n_prompt in (("the", "é漢", 3), ("té", "cat", 3), ("t漢", "字", 4)):
        encoded = encode(tokenizer, prompt, response)
        assert encoded.response_start == 1 + n_prompt
        check_frame(tokenizer, encoded)


# --- the embedded tokenizer ------------------------------------------------------------------


def test_the_character_tokenizer_has_one_token_per_character(tmp_path: Path) -> None:
    write_character_tokenizer(tmp_path, ALPHABET)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == len(ALPHABET) + 3
    drawn = chains(200, min_steps=1, max_steps=4, error_probability=0.3, attempts=2, seed=3)
    pairs = [(chain.prompt, chain.response) for chain in drawn]
    for (prompt, response), encoded in zip(pairs, tokenizer.encode(pairs), strict=True):
        ids, ends, start = check_frame(tokenizer, encoded)
        assert "".join(ALPHABET[i - 3] for i in ids) == prompt + response
        assert ends == list(range(1, len(prompt + response) + 1))
        assert start == len(prompt)


def test_characters_outside_the_alphabet_are_one_unknown_token_each(tmp_path: Path) -> None:
    write_character_tokenizer(tmp_path, ALPHABET)
    encoded = encode(load_tokenizer(tmp_path), "1\n", "😀 \x00A")
    assert encoded.ids == [1, 4, 0, 0, 0, 0, 3 + ALPHABET.index("A"), 2]
    assert encoded.ends == [0, 1, 2, 3, 4, 5, 6, 6]
    assert encoded.response_start == 3


# --- sentencepiece ---------------------------------------------------------------------------


@functools.cache
def train_sentencepiece(**options: Any) -> bytes:
    return train_pieces(sentences(), **options)


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Llama's: BPE, byte fallback, no normalisation."""
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    file.write_bytes(llama_model("bpe"))
    return file


def piece_sizes(processor: sentencepiece.SentencePieceProcessor, ids: list[int]) -> list[int]:
    """Bytes of the text behind each piece; the blank before the text is not part of it."""
    pieces = [processor.id_to_piece(i).replace("▁", " ") for i in ids]
    sizes = [
        1 if processor.is_byte(i) else len(p.encode()) for i, p in zip(ids, pieces, strict=True)
    ]
    assert pieces[0].startswith(" ")
    return [sizes[0] - 1, *sizes[1:]]


def test_sentencepiece_ids_stand_for_the_joined_text_and_the_response_starts_in_place(
    sentencepiece_file: Path,
) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    pairs = list(random_pairs(2000, seed=6))
    would_straddle = 0
    for (prompt, response), encoded in zip(pairs, tokenizer.encode(pairs), strict=True):
        ids, ends, start = check_frame(tokenizer, encoded)
        assert processor.decode(ids) == prompt + response
        sizes = piece_sizes(processor, ids)
        wanted_ends, wanted_start = reference(sizes, prompt, response)
        if sizes[0] == 0 and prompt == "":
            wanted_start = 0  # the blank before the text belongs to what follows it
        assert start == wanted_start
        assert all(a <= b for a, b in zip(ends, wanted_ends, strict=True))
        assert sum(sizes[:start]) == len(prompt.encode())
        if prompt:
            assert ids[:start] == processor.encode(prompt)
        would_straddle += ids != processor.encode(prompt + response)
    assert would_straddle > 50


def test_sentencepiece_bytes_of_a_character_are_on_its_side_of_the_boundary(
    sentencepiece_file: Path,
) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)
    for prompt, response, n_prompt in (
        ("the", "é漢", 1),
        ("the 漢", "é", 5),
        ("漢", "the", 4),
        ("", "漢", 0),
        ("", "the", 0),
    ):
        assert encode(tokenizer, prompt, response).response_start == 1 + n_prompt


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_takes_unknown_characters_as_one_token(
    tmp_path: Path, model_type: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(
        train_sentencepiece(vocab_size=40, model_type=model_type)
    )
    tokenizer = load_tokenizer(tmp_path)
    for prompt, response in (("the ", "漢字 a"), ("the ", "漢字")):
        ids, ends, start = check_frame(tokenizer, encode(tokenizer, prompt, response))
        assert ids.count(0) == 1
        assert ids[start] == 0
        assert ends[start - 1 : start + 1] == [4, 6]
    ids, ends, start = check_frame(tokenizer, encode(tokenizer, "the 漢", "字 a"))
    assert ids[start - 1 : start + 1] == [0, 0]  # one on each side
    assert ends[start - 1 : start + 1] == [5, 6]


def test_sentencepiece_without_begin_and_end_token_has_none(tmp_path: Path) -> None:
    model = train_sentencepiece(vocab_size=40, model_type="bpe", bos_id=-1, eos_id=-1)
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    encoded = encode(tokenizer, "the cat", " sat")
    assert encoded.ends[-1] == 11
    assert encoded.ids[: encoded.response_start] == encode(tokenizer, "the cat", "").ids


# --- the boundary, for every kind of tokenizer -----------------------------------------------

CHARACTERS = sorted(set("".join(FRAGMENTS)) - {"\x00"})
BYTES = [f"<0x{b:02X}>" for b in range(256)]
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
EDGES = [
    ("", "the cat"),
    ("", " the cat"),
    ("", "😀"),
    ("the", " cat"),
    ("the ", "cat"),
    ("the ", " cat"),
    ("the\n", "\ncat"),
    ("the\n\n", "cat"),
    ("se", "ven"),
    ("the  ", "  cat  "),
    ("漢", "字"),
    ("a😀", "😀"),
    ("\n", "\n"),
    ("caf", "é ß"),
    ("the", "."),
]


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


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_response_have_their_own_tokens_and_the_joined_text_is_unchanged(
    tmp_path: Path, kind: str
) -> None:
    tokenizer, plain = KINDS[kind](tmp_path), Plain(tmp_path)
    # These cannot tell a text's own first blank from the one that they put in front.
    first = " " if "Metaspace" in kind or "blank in front" in kind else ""
    unknown = "\x00" if "Metaspace" in kind else "\x01"
    pairs = [*EDGES, *random_pairs(400, seed=8)]
    pairs = [pair for pair in pairs if unknown not in "".join(pair)]
    would_straddle = 0
    for (prompt, response), encoded in zip(pairs, tokenizer.encode(pairs), strict=True):
        ids, _, start = check_frame(tokenizer, encoded)
        for found, text in ((ids, prompt + response), (ids[:start], prompt)):
            decoded = plain.decode(found)
            assert text in (decoded, first + decoded) or decoded == first + text
        assert ids[:start] == (plain.encode(prompt) if prompt else [])
        joined = plain.encode(prompt + response)
        would_straddle += ids != joined
        if joined[:start] == ids[:start]:
            assert ids == joined
    assert 20 < would_straddle < len(pairs) / 2


def test_a_normalizer_joins_nothing_over_the_boundary(tmp_path: Path) -> None:
    tokenizer, plain = composing(tmp_path), Plain(tmp_path)
    encoded = encode(tokenizer, "cafe", "\u0301 on")
    start = encoded.response_start
    assert plain.decode(encoded.ids[1:start]) == "cafe"
    assert plain.decode(encoded.ids[start:-1]) == "\u0301 on"
    assert plain.decode(encode(tokenizer, "cafe\u0301", " on").ids[1:-1]) == "café on"


def test_blanks_that_sentencepiece_drops_leave_one_between_prompt_and_response(
    tmp_path: Path,
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(
        train_sentencepiece(vocab_size=60, model_type="unigram")
    )
    tokenizer, plain = load_tokenizer(tmp_path), Plain(tmp_path)
    for prompt, response in (("the", " cat"), ("the ", "cat"), ("the  ", "\n cat ")):
        ids, _, start = check_frame(tokenizer, encode(tokenizer, prompt, response))
        assert plain.decode(ids) == "the cat"
        assert plain.decode(ids[start:]) == "cat"
    assert plain.decode(encode(tokenizer, "se", "ven").ids[1:-1]) == "seven"


def test_blanks_as_ends_of_words_are_refused(tmp_path: Path) -> None:
    model = train_sentencepiece(vocab_size=60, model_type="bpe", treat_whitespace_as_suffix=True)
    (tmp_path / "tokenizer.model").write_bytes(model)
    with pytest.raises(InputError, match="blanks as the ends of words are not supported"):
        load_tokenizer(tmp_path)


# --- Llama 3's tiktoken vocabulary -----------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    raw.train_from_iterator(
        [word for text in sentences() for word in re.findall(" ?[a-z]+", text)], trainer
    )
    raw.decoder = decoders.ByteLevel()
    return raw


def write_llama_3(folder: Path, trained: tokenizers.Tokenizer) -> None:
    """A vocabulary of Llama 3's size: the trained one, filled up with what is in no text."""
    ids = range(trained.get_vocab_size())
    letters = {letter: bytes([byte]) for byte, letter in _letters().items()}
    tokens = [b"".join(letters[x] for x in str(trained.id_to_token(i))) for i in ids]
    tokens += [b"\xff" + n.to_bytes(3, "big") for n in range(N_RANKS - len(tokens))]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


@pytest.mark.slow
def test_llama_3_s_tiktoken_vocabulary_is_read_as_the_bpe_that_it_is(
    tmp_path: Path, trained: tokenizers.Tokenizer
) -> None:
    write_llama_3(tmp_path, trained)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (N_RANKS, N_RANKS + 1)
    assert tokenizer.vocab_size == N_RANKS + 256
    for words in (["the", " cat", " sat"], ["seventhree", " mats", " zebra"], [" plus", "漢字"]):
        expected = [i for word in words for i in trained.encode(word).ids]
        ids, _, start = check_frame(tokenizer, encode(tokenizer, words[0], "".join(words[1:])))
        assert ids == expected
        assert start == len(trained.encode(words[0]).ids)
    chat = encode(tokenizer, "<|start_header_id|>user<|end_header_id|>", "\n\nten<|eot_id|>")
    assert [i - N_RANKS for i in chat.ids if i >= N_RANKS] == [0, 6, 7, 9, 1]
    pairs = list(random_pairs(200, seed=9))
    for (prompt, response), encoded in zip(pairs, tokenizer.encode(pairs), strict=True):
        assert trained.decode(encoded.ids[1:-1]) == prompt + response


# --- special tokens in a text ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_begin_and_end_token_in_a_text_are_tokens_and_not_doubled(
    tmp_path: Path, kind: str
) -> None:
    tokenizer = KINDS[kind](tmp_path)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    for prompt, response in (("<s>the", " cat"), ("the", " cat</s>"), ("<s>the", " cat</s>")):
        ids = encode(tokenizer, prompt, response).ids
        assert (ids.count(bos), ids.count(eos)) == (1, 1)
        assert (ids[0], ids[-1]) == (bos, eos)
    within = encode(tokenizer, "the</s>", "</s><s> cat")
    n = within.response_start
    assert within.ids[n - 1 : n + 2] == [eos, eos, bos]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_frame_nothing_is_added(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind](tmp_path)
    (bare,) = tokenizer.encode([("the", " cat")], framed=False)
    framed = encode(tokenizer, "the", " cat")
    assert framed.ids == [tokenizer.bos_id, *bare.ids, tokenizer.eos_id]
    assert bare.response_start == framed.response_start - 1
    (own,) = tokenizer.encode([("<s>the", " cat</s>")], framed=False)
    assert (own.ids[0], own.ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert (own.ends[0], own.ends[-2:]) == (3, [10, 14])


def test_sentencepiece_begins_anew_after_a_begin_token(tmp_path: Path) -> None:
    tokenizer = sentencepiece_model(tmp_path, "bpe")
    written, added = encode(tokenizer, "<s>the", " cat"), encode(tokenizer, "the", " cat")
    assert (written.ids, written.response_start) == (added.ids, added.response_start)
    assert encode(tokenizer, "<s>", "the cat").ids == encode(tokenizer, "", "the cat").ids


ADDED = {"32": {"content": "<|im_start|>"}, "400": {"content": "<|im_end|>", "special": True}}


def test_sentencepiece_knows_the_tokens_added_beside_it(tmp_path: Path) -> None:
    tokenizer = sentencepiece_model(
        tmp_path / "a", "bpe", added_tokens_decoder=ADDED, eos_token="<|im_end|>"
    )
    assert tokenizer.eos_id == 400
    assert tokenizer.vocab_size == 401
    encoded = encode(tokenizer, "<|im_start|>the", " cat<|im_end|>")
    plain = Plain(tmp_path / "a")
    assert encoded.ids[:2] == [1, 32]
    assert plain.decode(encoded.ids[2:-1]) == "the cat"
    assert plain.encode("the")[0] not in encoded.ids  # no blank in the middle
    (tmp_path / "b").mkdir()
    (tmp_path / "b/added_tokens.json").write_text('{"<|im_start|>": 32, "<|im_end|>": 400}')
    other = sentencepiece_model(tmp_path / "b", "bpe", eos_token="<|im_end|>")
    assert encode(other, "<|im_start|>the", " cat<|im_end|>") == encoded
    assert other.fingerprint == tokenizer.fingerprint
    assert sentencepiece_model(tmp_path / "c", "bpe").fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "added", [{"x": {"content": "<a>"}}, {"3": "<a>"}, {"3": {}}, ["<a>"], None]
)
def test_an_added_token_without_text_or_number_is_an_input_error(
    tmp_path: Path, added: object
) -> None:
    with pytest.raises(InputError, match="a token without text or number"):
        sentencepiece_model(tmp_path, "bpe", added_tokens_decoder=added)


@pytest.mark.parametrize("pad", [None, "</s>", "<unk>", "<s>"])
@pytest.mark.parametrize("kind", ["byte-level BPE", "sentencepiece BPE"])
def test_the_end_token_is_a_response_token_whatever_the_padding_token_is(
    tmp_path: Path, kind: str, pad: str | None
) -> None:
    KINDS[kind](tmp_path)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": pad}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    for response in (" cat", " cat</s>"):
        encoded = encode(tokenizer, "the", response)
        of_response = encoded.ids[encoded.response_start :]
        assert of_response[-1] == tokenizer.eos_id
        assert of_response.count(tokenizer.eos_id) == 1
        assert len(of_response) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_has_one_end_token_and_it_is_the_last_one(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind](tmp_path)
    plain = encode(tokenizer, "the", " cat")
    for brought in ("</s>", "</s>\n", "</s> \n\t", "</s></s>", "</s>\n</s>\n"):
        assert encode(tokenizer, "the", " cat" + brought) == plain
    alone = encode(tokenizer, "the</s>", "</s>\n")
    assert alone.ids[alone.response_start :] == [tokenizer.eos_id]
    assert encode(tokenizer, "the", " cat\n").ids != plain.ids, "blanks alone stay"


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_that_was_cut_off_has_no_end_token(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind](tmp_path)
    whole = encode(tokenizer, "the", " cat")
    for response in (" cat", " cat</s>\n"):
        pairs = [("the", response), ("the", " cat")]
        cut, other = tokenizer.encode(pairs, ended=[False, True])
        assert (cut.ids, cut.ends) == (whole.ids[:-1], whole.ends[:-1])
        assert other == whole


def test_an_end_token_that_swallows_blanks_does_so_where_it_is_added(
    tmp_path: Path, bpe_folder: Path
) -> None:
    parts = json.loads((bpe_folder / "tokenizer.json").read_text())
    parts["added_tokens"][1]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    tokenizer = load_tokenizer(tmp_path)
    raw = tokenizers.Tokenizer.from_str(json.dumps(parts))
    assert encode(tokenizer, "the", " cat  ").ids == [0, *raw.encode("the cat  </s>").ids]


# --- tokens that are declared beside tokenizer.json ---------------------------------------------

STEP = {"content": "<step>", "special": True, "normalized": False}
DECLARED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "decoder": ({"added_tokens_decoder": {"900": STEP}}, {}),
    "ordinary": ({"added_tokens_decoder": {"900": STEP | {"special": False}}}, {}),
    "added_tokens.json": ({}, {"added_tokens.json": {"<step>": 900}}),
    "map": ({}, {"special_tokens_map.json": {"additional_special_tokens": ["<step>"]}}),
    "additional": ({"additional_special_tokens": ["<step>"]}, {}),
    "extra": ({"extra_special_tokens": {"step_token": "<step>"}}, {}),
    "extra list": ({"extra_special_tokens": ["<step>"]}, {}),
    "padding": ({"pad_token": "<step>"}, {}),
    "padding in the map": ({}, {"special_tokens_map.json": {"pad_token": STEP}}),
}


def beside(folder: Path, source: Path, name: str) -> Tokenizer:
    settings, files = DECLARED[name]
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    return with_settings(folder, source, {"bos_token": "<s>", "eos_token": "</s>"} | settings)


@pytest.mark.parametrize("name", DECLARED)
def test_a_declared_token_is_one_token_with_the_next_id(
    tmp_path: Path, bpe_folder: Path, bpe: Tokenizer, name: str
) -> None:
    tokenizer = beside(tmp_path, bpe_folder, name)
    step = bpe.vocab_size
    assert encode(tokenizer, "the<step>", " cat<step>").ids == [
        *encode(bpe, "the", "").ids[:-1],
        step,
        *encode(bpe, "", " cat").ids[1:-1],
        step,
        1,
    ]
    assert tokenizer.vocab_size == step + 1
    assert (tokenizer.fingerprint == bpe.fingerprint) == name.startswith("padding")


def test_a_declared_flag_counts_and_what_changes_nothing_keeps_the_fingerprint(
    tmp_path: Path, bpe_folder: Path, bpe: Tokenizer
) -> None:
    def told(name: str, **flags: bool) -> Tokenizer:
        (tmp_path / name).mkdir()
        decoder = {"1": {"content": "</s>", "special": True, "normalized": False, **flags}}
        named = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": decoder}
        return with_settings(tmp_path / name, bpe_folder, named)

    same, strips = told("same"), told("strips", rstrip=True)
    assert same.fingerprint == bpe.fingerprint != strips.fingerprint
    text = "the</s> cat"
    assert encode(same, text, "").ids != encode(strips, text, "").ids


def test_names_in_the_older_map_count_where_no_newer_list_is_there(
    tmp_path: Path, bpe_folder: Path
) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "."}')
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    older = with_settings(tmp_path, bpe_folder, named)
    assert older.eos_id == older.token_id(".")
    newer = with_settings(tmp_path, bpe_folder, named | {"added_tokens_decoder": {}})
    assert newer.eos_id == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_token": "<step>"}, "image_token '<step>'"),
        (
            {"extra_special_tokens": ["<step>"], "additional_special_tokens": ["</s>"]},
            "'<step>' among additional_special_tokens and extra_special_tokens",
        ),
    ],
)
def test_what_versions_of_transformers_read_each_in_its_way_is_refused_by_name(
    tmp_path: Path, bpe_folder: Path, bpe: Tokenizer, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=f"{said} is not the same token.*added_tokens_decoder"):
        with_settings(tmp_path, bpe_folder, settings)
    known = settings | {"added_tokens_decoder": {"900": STEP}}
    assert with_settings(tmp_path, bpe_folder, known).token_id("<step>") == bpe.vocab_size


def test_an_older_special_token_before_which_the_text_is_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text('{"<step>": 900}')
    listed = {"additional_special_tokens": ["<step>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(listed))
    raw = tokenizers.Tokenizer(models.BPE({"a": 0, "<s>": 1, "</s>": 2}, []))
    saved(tmp_path, raw, bos_token="<s>", eos_token="</s>")
    raw.normalizer = normalizers.Prepend("▁")
    with pytest.raises(
        InputError, match=r"added_tokens\.json and special_tokens_map\.json: '<step>'"
    ):
        saved(tmp_path, raw, bos_token="<s>", eos_token="</s>")


# --- begin and end token ---------------------------------------------------------------------


def with_settings(folder: Path, source: Path, settings: object) -> Tokenizer:
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, (0, 1)),
        ({"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>", "lstrip": 0}}, (0, 1)),
        ({"bos_token": "</s>", "eos_token": "."}, (1, ".")),
        ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}, (None, 1)),
        ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}, (0, 1)),
        ({"bos_token": None, "eos_token": "</s>"}, (None, 1)),
        ({"bos_token": None, "eos_token": None}, (None, None)),
        ({}, (0, 1)),
        (None, (0, 1)),
    ],
)
def test_begin_and_end_token_are_those_of_the_settings_or_the_usual_ones(
    tmp_path: Path,
    bpe_folder: Path,
    library: tokenizers.Tokenizer,
    settings: dict[str, Any] | None,
    expected: tuple[int | str | None, int | str | None],
) -> None:
    tokenizer = with_settings(tmp_path, bpe_folder, settings)
    bos, eos = (library.token_to_id(e) if isinstance(e, str) else e for e in expected)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)
    encoded = encode(tokenizer, "the", " cat")
    first, last = [bos] * (bos is not None), [eos] * (eos is not None)
    assert encoded.ids == [*first, *library.encode("the cat").ids, *last]
    assert encoded.response_start == len(first) + 1
    assert len(encoded.ends) == len(encoded.ids)


BEGIN = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
BOTH = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
BYTES = processors.ByteLevel(trim_offsets=False)
LLAMA, PLAIN = {"tokenizer_class": "LlamaTokenizerFast"}, {"tokenizer_class": "GPT2Tokenizer"}


# As transformers 4.57 has it with the classes of Llama's kind, and all its versions with others.
@pytest.mark.parametrize(
    ("settings", "processor", "begins"),
    [
        (PLAIN, None, False),
        (PLAIN, BYTES, False),
        (PLAIN, BEGIN, True),
        (PLAIN, BOTH, True),
        (PLAIN, processors.Sequence([BYTES, BEGIN]), True),
        (PLAIN | {"add_bos_token": False}, BEGIN, True),
        (PLAIN | {"add_bos_token": True}, BYTES, True),
        (LLAMA, None, True),
        (LLAMA, BYTES, True),
        (LLAMA | {"add_bos_token": False}, None, False),
        (LLAMA | {"add_bos_token": False}, BEGIN, False),
        ({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}, BYTES, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, None, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, BEGIN, True),
        ({}, None, True),
        ({}, BEGIN, True),
    ],
)
def test_a_begin_token_is_put_where_the_tokenizer_puts_one(
    tmp_path: Path, bpe_folder: Path, settings: dict[str, Any], processor: Any, begins: bool
) -> None:
    raw = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    if processor is not None:
        raw.post_processor = processor
    tokenizer = saved(tmp_path, raw, bos_token="<s>", eos_token="</s>", **settings)
    plain = raw.encode("the cat", add_special_tokens=False).ids
    assert encode(tokenizer, "the", " cat").ids == [0] * begins + plain + [1]
    assert tokenizer.named["bos_token"] == "<s>", "templates know its name all the same"


@pytest.mark.parametrize(("model", "begins"), [("llama", True), ("qwen2", False), ("gpt2", False)])
def test_without_a_class_the_model_beside_the_tokenizer_decides(
    tmp_path: Path, bpe_folder: Path, model: str, begins: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    tokenizer = with_settings(tmp_path, bpe_folder, {"bos_token": "<s>", "eos_token": "</s>"})
    assert (tokenizer.bos_id is not None) == begins


def test_two_tokens_before_a_text_are_refused(tmp_path: Path, bpe_folder: Path) -> None:
    raw = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single="<s> </s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    with pytest.raises(InputError, match="puts 2 tokens before a text; one is supported"):
        saved(tmp_path, raw, bos_token="<s>", eos_token="</s>")


def test_a_vocabulary_without_the_usual_names_has_neither(tmp_path: Path) -> None:
    model = models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


# --- fingerprints ----------------------------------------------------------------------------


def test_the_fingerprint_depends_on_content_and_on_begin_and_end_token(
    tmp_path: Path, bpe_folder: Path, bpe: Tokenizer, sentencepiece_file: Path
) -> None:
    variants: dict[str, Callable[[Path], Tokenizer]] = {
        "no begin": lambda f: with_settings(f, bpe_folder, {"bos_token": None}),
        "no end": lambda f: with_settings(f, bpe_folder, {"eos_token": None}),
        "swapped": lambda f: with_settings(
            f, bpe_folder, {"bos_token": "</s>", "eos_token": "<s>"}
        ),
        "sentencepiece": lambda f: load_tokenizer(sentencepiece_file),
    }
    found = {bpe.fingerprint}
    for name, make in variants.items():
        (tmp_path / name).mkdir()
        found.add(make(tmp_path / name).fingerprint)
    write_bpe_tokenizer(tmp_path / "smaller", sentences(), 270)
    found.add(load_tokenizer(tmp_path / "smaller").fingerprint)
    assert len(found) == 2 + len(variants)


def test_the_fingerprint_is_of_the_file_and_of_what_stands_around_a_text(
    tmp_path: Path, bpe_folder: Path
) -> None:
    content = (bpe_folder / "tokenizer.json").read_text()

    def expected(around: str) -> str:
        return hashlib.blake2b(f"{content}|{around}".encode(), digest_size=16).hexdigest()

    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}
    assert with_settings(tmp_path, bpe_folder, named).fingerprint == expected("None|1")
    # and so a run whose prompts had a merely named begin token can go on
    told = named | {"add_bos_token": True}
    assert with_settings(tmp_path, bpe_folder, told).fingerprint == expected("0|1")


def test_the_fingerprint_does_not_depend_on_the_place(
    tmp_path: Path, bpe_folder: Path, bpe: Tokenizer
) -> None:
    shutil.copytree(bpe_folder, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == bpe.fingerprint
    assert load_tokenizer(tmp_path / "copy/tokenizer.json").fingerprint == bpe.fingerprint


# --- finding and refusing files --------------------------------------------------------------


def test_tokenizer_json_comes_before_tokenizer_model(
    tmp_path: Path, bpe_folder: Path, bpe: Tokenizer, sentencepiece_file: Path
) -> None:
    shutil.copyfile(sentencepiece_file, tmp_path / "tokenizer.model")
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    shutil.copyfile(bpe_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).fingerprint == bpe.fingerprint


@pytest.mark.parametrize("name", ["", "missing", "missing/tokenizer.json"])
def test_a_missing_tokenizer_is_an_input_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json or tokenizer\.model here"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "other.txt"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b'{"model": {"type": "BPE"}}',
        b"IQ== 0\nIg== 1\n",  # the beginning of Llama 3's tokenizer.model
        b"IQ== 0\r\nIg== 1\r\n",
        b"\xff\xfe\x00\x01" * 100,
    ],
)
def test_a_wrong_tokenizer_file_is_an_input_error(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: cannot read the tokenizer"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "a tokenizer configuration is a JSON object"),
        (b'{"bos_token": "<other>"}', "bos_token '<other>' is not in the vocabulary"),
        (b'{"eos_token": {"content": "<other>"}}', "eos_token '<other>' is not in the vocabulary"),
        (b'{"bos_token": 3}', "bos_token 3 is not in the vocabulary"),
    ],
)
def test_a_wrong_tokenizer_configuration_is_an_input_error(
    tmp_path: Path, bpe_folder: Path, content: bytes, said: str
) -> None:
    shutil.copyfile(bpe_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(InputError, match=said):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"IQ== 0\nIg== 1\n", b"IQ== 0\n= 1\n", b"IQ== 0\nIg==\n"])
def test_another_or_damaged_tiktoken_vocabulary_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.model: cannot read the tokenizer: "):
        load_tokenizer(tmp_path)


def test_a_tiktoken_vocabulary_that_is_not_llama_3_s_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(InputError, match=r"tiktoken vocabulary of 2 tokens.* a tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "tekken.json", "qwen.tiktoken", "spiece.model"])
def test_a_folder_with_another_kind_of_tokenizer_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=f"{name} alone is not supported.*save_pretrained"):
        load_tokenizer(tmp_path)


def test_wordpiece_is_refused(tmp_path: Path) -> None:
    model = models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="WordPiece is not supported"):
        load_tokenizer(tmp_path)
