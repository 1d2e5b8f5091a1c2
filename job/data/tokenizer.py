"""Text to token ids, with the place where the response begins.

Prompt and response are tokenised as one text, so that nothing is split at their boundary that
the language model would not split; a token that holds any character of the response is a
response token.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.outcome import InputError

_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")


@dataclass(frozen=True)
class Encoded:
    """A tokenised example.

    `ids[response_start:]` are the response's tokens, the end token included; `ends[i]` counts
    the characters of prompt + response that have been read after token i.
    """

    ids: list[int]
    ends: list[int]
    response_start: int


class Tokenizer(ABC):
    """What the data pipeline needs of a tokenizer."""

    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    @abstractmethod
    def _encode_texts(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and character offsets of each text, without special tokens."""

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Tokenise (prompt, response) pairs, each between begin and end token where they exist."""
        parts = self._encode_texts([prompt + response for prompt, response in pairs])
        return [
            self._frame(len(prompt), ids, offsets)
            for (prompt, _), (ids, offsets) in zip(pairs, parts, strict=True)
        ]

    def _frame(self, n_prompt: int, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
        ends = [end for _, end in offsets]
        # The first bytes of a character in sentencepiece's byte pieces are empty spans before it.
        start = sum(1 for begin, end in offsets if begin < n_prompt and end <= n_prompt)
        if self.bos_id is not None:
            ids, ends, start = [self.bos_id, *ids], [0, *ends], start + 1
        if self.eos_id is not None:
            ids, ends = [*ids, self.eos_id], [*ends, ends[-1] if ends else 0]
        return Encoded(ids, ends, start)


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, file: Path) -> None:
        import tokenizers

        try:
            text = file.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file}: cannot read the tokenizer: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.post_processor = None  # some cut blanks off the offsets
        settings = _read_settings(file.with_name("tokenizer_config.json"))
        self.bos_id = self._special(settings, "bos_token", _BOS_NAMES)
        if settings.get("add_bos_token") is False:
            self.bos_id = None
        self.eos_id = self._special(settings, "eos_token", _EOS_NAMES)
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.fingerprint = _fingerprint(text, self.bos_id, self.eos_id)

    def _special(self, settings: dict[str, Any], key: str, names: Iterable[str]) -> int | None:
        if key not in settings:
            ids = map(self._tokenizer.token_to_id, names)
            return next((i for i in ids if i is not None), None)
        named = settings[key]
        if isinstance(named, dict):  # an AddedToken, as some configurations write it
            named = named.get("content")
        if named is None:
            return None
        found = self._tokenizer.token_to_id(named) if isinstance(named, str) else None
        if found is None:
            raise InputError(f"tokenizer_config.json: {key} {named!r} is not in the vocabulary")
        return found

    def _encode_texts(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(e.ids, e.offsets) for e in encodings]


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece tokenizer.model, as Meta ships it."""

    def __init__(self, file: Path) -> None:
        import sentencepiece

        try:
            content = file.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(content)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{file}: cannot read the tokenizer: {error}") from None
        self.vocab_size = self._processor.vocab_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id = bos if bos >= 0 else None
        self.eos_id = eos if eos >= 0 else None
        self.fingerprint = _fingerprint(content.hex(), self.bos_id, self.eos_id)

    def _encode_texts(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        results = []
        for text in texts:
            mapping = self._processor.encode_as_offset_mapping(text)
            results.append((mapping["ids"], mapping["offsets"]))
        return results


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load tokenizer.json or tokenizer.model from a file or from the folder that holds it."""
    path = Path(path)
    candidates = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise InputError(f"{path}: no tokenizer.json or tokenizer.model here; set tokenizer.path")
    return SentencePieceTokenizer(file) if file.suffix == ".model" else JsonTokenizer(file)


def write_character_tokenizer(folder: Path, alphabet: str) -> None:
    """Write the embedded tokenizer: one token per character of the alphabet."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *alphabet]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("[\\s\\S]"), "isolated")
    _write_tokenizer(folder, tokenizer)


def write_bpe_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer on texts and write it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _write_tokenizer(folder, tokenizer)


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{file}: a tokenizer configuration is a JSON object")
    return settings


def _fingerprint(content: str, bos: int | None, eos: int | None) -> str:
    return hashlib.blake2b(f"{content}|{bos}|{eos}".encode(), digest_size=16).hexdigest()
