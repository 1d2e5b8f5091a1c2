"""Fingerprints of tokenizers, and files that are none."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from kinds_of_tokenizers import sentences, with_settings
from tokenizers import models

from job.common.errors import InputError
from job.data.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    write_bpe_tokenizer,
)


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
