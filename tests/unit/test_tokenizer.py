"""Tokenisation: the joined text stays as it is, and the response begins where it should.

The references count bytes: in byte-level and byte-fallback vocabularies each token stands for
known bytes, so that its place in the text follows without any offsets of the libraries.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from kinds_of_tokenizers import (
    KINDS,
    Plain,
    check_frame,
    composing,
    encode,
    random_pairs,
    saved,
    sentences,
    train_sentencepiece,
    write_llama_3,
)
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from job.common.errors import InputError
from job.data.arithmetic import ALPHABET, chains
from job.data.tiktoken import N_RANKS
from job.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    write_bpe_tokenizer,
    write_character_tokenizer,
)


def reference(sizes: list[int], prompt: str, response: str) -> tuple[list[int], int]:
    """`ends` and `response_start` of tokens that stand for so many bytes each."""
    text = prompt + response
    assert sum(sizes) == len(text.encode())
    char_of_byte = [i for i, char in enumerate(text) for _ in char.encode()]
    ends = [char_of_byte[last - 1] + 1 if last else 0 for last in itertools.accumulate(sizes)]
    n_prompt = len(prompt.encode())
    return ends, sum(1 for last in itertools.accumulate(sizes) if last <= n_prompt)


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
