"""Text to token ids, with the place where the response begins.

The prompt is tokenised as it is when a model is prompted with it, and the response follows. Where
the joined text has just these tokens at its beginning, the rest of its tokens are the response's.
Where it has not, because a token would hold characters of both, the response is tokenised by
itself, as the continuation that it is: a model that was given the prompt cannot take any of it
back. So no token lies on both sides, and all tokens together stand for the joined text.

Special tokens written out in a text (`</s>`, `<|im_start|>`) are these tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.common.errors import InputError, file_error
from job.data.tiktoken import as_tokenizer_json, is_tiktoken

_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")
_Offsets = tuple[list[int], list[tuple[int, int]]]  # ids, and the characters that each holds


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
    """What the data pipeline needs of a tokenizer.

    Attributes:
        folder: where it lies, with what else describes it.
        settings: of the tokenizer_config.json there.
        special: the texts of its special tokens.
    """

    folder: Path
    settings: dict[str, Any]
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special: frozenset[str]

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        self.settings = _read_settings(file.with_name("tokenizer_config.json"))

    @abstractmethod
    def token_id(self, text: str) -> int | None:
        """The id of the token of this very text."""

    @abstractmethod
    def token_text(self, token: int) -> str:
        """The text in the vocabulary."""

    @abstractmethod
    def _encode_texts(self, texts: Sequence[str], *, follows: bool = False) -> list[_Offsets]:
        """Ids and character offsets of each text, without adding special tokens.

        Args:
            follows: the text goes on after another; nothing is put before it.
        """

    def encode(self, pairs: Sequence[tuple[str, str]], *, framed: bool = True) -> list[Encoded]:
        """Tokenise (prompt, response) pairs.

        Args:
            framed: whether begin and end token, where the tokenizer has them, stand around a pair;
                those that its text has already are not doubled.
        """
        joined = self._encode_texts([prompt + response for prompt, response in pairs])
        prompts = self._encode_texts([prompt for prompt, _ in pairs])
        apart = [
            i
            for i, (whole, part) in enumerate(zip(joined, prompts, strict=True))
            if not _goes_on(whole, part, len(pairs[i][0]))
        ]
        responses = self._encode_texts([pairs[i][1] for i in apart], follows=True)
        for i, response in zip(apart, responses, strict=True):
            joined[i] = _append(prompts[i], response, len(pairs[i][0]))
        return [
            self._frame(len(prompt), *whole, framed)
            for (prompt, _), whole in zip(pairs, joined, strict=True)
        ]

    def _frame(
        self, n_prompt: int, ids: list[int], offsets: list[tuple[int, int]], framed: bool
    ) -> Encoded:
        ends = [end for _, end in offsets]
        # The first bytes of a character in sentencepiece's byte pieces are empty spans before it.
        start = sum(1 for begin, end in offsets if begin < n_prompt and end <= n_prompt)
        if framed and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids, ends, start = [self.bos_id, *ids], [0, *ends], start + 1
        if framed and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids, ends = [*ids, self.eos_id], [*ends, ends[-1] if ends else 0]
        return Encoded(ids, ends, start)

    def _frame_ids(self, bos: int | None, eos: int | None) -> None:
        """Begin and end token: the settings', or else those given."""
        self.bos_id = self._setting("bos_token", bos)
        self.eos_id = self._setting("eos_token", eos)
        if self.settings.get("add_bos_token") is False:
            self.bos_id = None

    def _setting(self, key: str, default: int | None) -> int | None:
        if key not in self.settings:
            return default
        named = token_setting(self.settings, key)
        if named is None:
            return None
        found = self.token_id(named) if isinstance(named, str) else None
        if found is None:
            raise InputError(
                f"{self.folder}/tokenizer_config.json: {key} {named!r} is not in the vocabulary"
            )
        return found


def _goes_on(whole: _Offsets, prompt: _Offsets, n_prompt: int) -> bool:
    """Whether the whole text's tokens begin with the prompt's, and these hold nothing else."""
    n = len(prompt[0])
    return whole[0][:n] == prompt[0] and (n == 0 or whole[1][n - 1][1] <= n_prompt)


def _append(prompt: _Offsets, response: _Offsets, n_prompt: int) -> _Offsets:
    moved = [(begin + n_prompt, end + n_prompt) for begin, end in response[1]]
    return prompt[0] + response[0], prompt[1] + moved


def token_setting(settings: dict[str, Any], key: str) -> Any:
    """The text of a token in tokenizer_config.json, which may be written as an AddedToken."""
    named = settings.get(key)
    return named.get("content") if isinstance(named, dict) else named


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library, or the text of one for another file."""

    def __init__(self, file: Path, text: str | None = None) -> None:
        import tokenizers

        super().__init__(file)
        try:
            text = file.read_text(encoding="utf-8") if text is None else text
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file}: cannot read the tokenizer: {error}") from None
        if isinstance(self._tokenizer.model, tokenizers.models.WordPiece):
            raise InputError(
                f"{file}: WordPiece is not supported, it loses blanks; BPE and Unigram are"
            )
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.post_processor = None  # some cut blanks off the offsets
        self._frame_ids(self._first_known(_BOS_NAMES), self._first_known(_EOS_NAMES))
        self._tell_special_tokens()
        self._following = _without_prefix(self._tokenizer)
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.fingerprint = _fingerprint(text, self.bos_id, self.eos_id)

    def _first_known(self, names: Iterable[str]) -> int | None:
        return next((i for i in map(self.token_id, names) if i is not None), None)

    def _tell_special_tokens(self) -> None:
        """Begin and end token may be ordinary words of the vocabulary; in a text they are not."""
        added = self._tokenizer.get_added_tokens_decoder()
        ends = [i for i in (self.bos_id, self.eos_id) if i is not None and i not in added]
        self._tokenizer.add_special_tokens([self.token_text(i) for i in ends])
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token.content for token in added.values() if token.special)

    def token_id(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text)

    def token_text(self, token: int) -> str:
        return str(self._tokenizer.id_to_token(token))

    def _encode_texts(self, texts: Sequence[str], *, follows: bool = False) -> list[_Offsets]:
        tokenizer = self._following if follows else self._tokenizer
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(e.ids, e.offsets) for e in encodings]


def _without_prefix(tokenizer: Any) -> Any:
    """The tokenizer that neither puts a blank before a text nor cuts one off there."""
    import tokenizers

    parts = json.loads(tokenizer.to_str())
    changed = parts | {key: _no_prefix(parts[key]) for key in ("normalizer", "pre_tokenizer")}
    return tokenizer if changed == parts else tokenizers.Tokenizer.from_str(json.dumps(changed))


def _no_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer of tokenizer.json; None where nothing is left of it."""
    if isinstance(part, list):
        return [kept for kept in map(_no_prefix, part) if kept is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    new = {"add_prefix_space": False, "prepend_scheme": "never", "strip_left": False}
    nested = {key: _no_prefix(part[key]) for key in ("normalizers", "pretokenizers") if key in part}
    return part | {key: value for key, value in new.items() if key in part} | nested


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece tokenizer.model, as Meta ships it, with the tokens added beside it.

    A blank is put before a text's beginning and before what follows a begin token, as Meta's and
    Mistral's own code does.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        try:
            content = file.read_bytes()
            self._processor = _load_sentencepiece(content)
            self._following = _load_sentencepiece(content + _NO_DUMMY_PREFIX)
        except (OSError, RuntimeError) as error:
            raise file_error(error, f"{file}: cannot read the tokenizer: {error}") from None
        if self._processor.normalize("a") == "a▁":
            raise InputError(f"{file}: blanks as the ends of words are not supported")
        self._added = self._control_tokens() | self._added_tokens()
        longest_first = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self._frame_ids(bos if bos >= 0 else None, eos if eos >= 0 else None)
        self.special = frozenset(self._added)
        sizes = (self._processor.vocab_size(), *(i + 1 for i in self._added.values()))
        self.vocab_size = max(sizes)
        added = json.dumps(sorted(self._added.items()))
        self.fingerprint = _fingerprint(content.hex() + added, self.bos_id, self.eos_id)

    def _control_tokens(self) -> dict[str, int]:
        ids = list(range(self._processor.vocab_size()))
        control = self._processor.is_control(ids)
        return {
            self._processor.id_to_piece(i): i for i, yes in zip(ids, control, strict=True) if yes
        }

    def _added_tokens(self) -> dict[str, int]:
        """Tokens that the vocabulary was given later, from where Hugging Face keeps them."""
        file = self.folder / "added_tokens.json"
        added: list[tuple[Any, Any]] = [*_read_settings(file).items()]
        try:
            for token, entry in self.settings.get("added_tokens_decoder", {}).items():
                added.append((entry["content"], token))
            return {str(text): int(token) for text, token in added if text}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(
                f"{self.folder}: added_tokens.json or tokenizer_config.json: added_tokens_decoder "
                "has a token without text or number"
            ) from None

    def token_id(self, text: str) -> int | None:
        if text in self._added:
            return self._added[text]
        found = self._processor.piece_to_id(text)
        return found if self._processor.id_to_piece(found) == text else None

    def token_text(self, token: int) -> str:
        added = {i: text for text, i in self._added.items()}
        return added.get(token) or str(self._processor.id_to_piece(token))

    def _encode_texts(self, texts: Sequence[str], *, follows: bool = False) -> list[_Offsets]:
        return [self._encode_text(text, follows) for text in texts]

    def _encode_text(self, text: str, follows: bool) -> _Offsets:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for part in filter(None, self._pattern.split(text)):
            if part in self._added:
                ids.append(self._added[part])
                offsets.append((at, at + len(part)))
                follows = ids[-1] != self._processor.bos_id()
            else:
                processor = self._following if follows else self._processor
                mapping = processor.encode_as_offset_mapping(part)
                ids += mapping["ids"]
                offsets += [(at + begin, at + end) for begin, end in mapping["offsets"]]
                follows = True
            at += len(part)
        return ids, offsets


# As protocol buffers write it. Of a field that occurs twice the last one counts, so that these
# bytes change a model to whose end they are added.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }


def _load_sentencepiece(content: bytes) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    return processor


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load tokenizer.json or tokenizer.model from a file or from the folder that holds it.

    Raises:
        InputError: nothing there, damaged, or of a kind that is not supported.
    """
    path = Path(path)
    candidates = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise InputError(f"{path}: no tokenizer.json or tokenizer.model here{_instead(path)}")
    if is_tiktoken(file):
        return JsonTokenizer(file, as_tokenizer_json(file))
    return SentencePieceTokenizer(file) if ".model" in file.name else JsonTokenizer(file)


def _instead(folder: Path) -> str:
    """What is there that is not supported, and the way out."""
    kinds = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json", "*.tiktoken", "spiece.model")
    found = sorted(file.name for kind in kinds for file in folder.glob(kind))
    if not found:
        return "; set tokenizer.path"
    return (
        f"; {', '.join(found)} alone is not supported: transformers' "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...) makes a tokenizer.json of it"
    )


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
    except (OSError, ValueError, RecursionError) as error:
        raise file_error(error, f"{file}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{file}: a tokenizer configuration is a JSON object")
    return settings


def _fingerprint(content: str, bos: int | None, eos: int | None) -> str:
    return hashlib.blake2b(f"{content}|{bos}|{eos}".encode(), digest_size=16).hexdigest()
