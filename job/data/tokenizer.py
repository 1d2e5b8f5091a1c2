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
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.common.errors import InputError, file_error
from job.data.sentencepiece_json import as_added_tokens, equal_json
from job.data.tiktoken import as_tokenizer_json, is_tiktoken
from job.data.tokenizer_settings import NAMES, Added, TokenizerSettings

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
        file: its tokenizer.json or tokenizer.model.
        folder: where it lies, with what else describes it.
        settings: of the tokenizer_config.json there.
        named: the texts of `bos_token`, `eos_token` and others, as far as there are such tokens.
        bos_id: the begin token, where one is put before a text; one that is merely named is not.
        special: the texts of its special tokens.
    """

    file: Path
    folder: Path
    settings: dict[str, Any]
    named: dict[str, str]
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special: frozenset[str]
    _end_takes_blanks = False  # whether the end token swallows the blanks before it

    def __init__(self, file: Path) -> None:
        self.file, self.folder = file, file.parent
        self._declared = TokenizerSettings.read(file.parent)
        self.settings = self._declared.values

    @property
    def is_like_llama(self) -> bool:
        """Whether its class puts a begin token before a text, whatever tokenizer.json says."""
        return self._declared.is_like_llama

    @property
    @abstractmethod
    def tokenizer_json(self) -> str | None:
        """The text of a tokenizer.json that reads texts alike; None where there is none."""

    @property
    @abstractmethod
    def added_tokens(self) -> list[dict[str, Any]]:
        """The tokens that are found in a text before all others, as tokenizer.json has them."""

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

    def encode(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        framed: bool = True,
        ended: Sequence[bool] | None = None,
    ) -> list[Encoded]:
        """Tokenise (prompt, response) pairs.

        Args:
            framed: whether begin and end token, where the tokenizer has them, stand around a pair;
                those that its text has already are not doubled.
            ended: which responses have an end token, if framed; by default all.
        """
        ended = [True] * len(pairs) if ended is None else ended
        if framed:
            pairs = [(p, self._body(r, end)) for (p, r), end in zip(pairs, ended, strict=True)]
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
        found = [
            _encoded(len(prompt), *whole) for (prompt, _), whole in zip(pairs, joined, strict=True)
        ]
        return list(map(self._frame, found, ended)) if framed else found

    @property
    def begin_text(self) -> str:
        """The begin token that is put before a text; empty where none is."""
        return "" if self.bos_id is None else self.token_text(self.bos_id)

    @property
    def end_text(self) -> str:
        return "" if self.eos_id is None else self.token_text(self.eos_id)

    def without_end(self, response: str) -> str:
        """A response without the end token that it brings, and without blanks behind that."""
        end = self.end_text
        while end and (bare := response.rstrip()).endswith(end):
            response = bare.removesuffix(end)
        return response

    def _body(self, response: str, ended: bool) -> str:
        body = self.without_end(response)
        return body.rstrip() if ended and self._end_takes_blanks else body

    def _frame(self, bare: Encoded, ended: bool) -> Encoded:
        ids, ends, start = bare.ids, bare.ends, bare.response_start
        if ended and self.eos_id is not None and ids[start:][-1:] != [self.eos_id]:
            ids, ends = [*ids, self.eos_id], [*ends, ends[-1] if ends else 0]
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids, ends, start = [self.bos_id, *ids], [0, *ends], start + 1
        return Encoded(ids, ends, start)

    def _find_named(self, bos: int | None, eos: int | None) -> tuple[int | None, int | None]:
        """Begin and end token: the settings', or else those given; `named` has them all."""
        texts = {name: self._declared.text(name) for name in NAMES}
        self.named = {name: text for name, text in texts.items() if text}
        found = self._setting("bos_token", bos), self._setting("eos_token", eos)
        for name, token in zip(("bos_token", "eos_token"), found, strict=True):
            if token is not None:
                self.named[name] = self.token_text(token)
        return found

    def _setting(self, key: str, default: int | None) -> int | None:
        if key not in self._declared.named:
            return default
        named = self._declared.named[key]
        if named is None:
            return None
        text = self._declared.text(key)
        found = None if text is None else self.token_id(text)
        if found is None:
            raise InputError(
                f"{self.folder}/tokenizer_config.json: {key} {text or named!r} is not in the "
                "vocabulary"
            )
        return found


def _encoded(n_prompt: int, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
    # The first bytes of a character in sentencepiece's byte pieces are empty spans before it.
    start = sum(1 for begin, end in offsets if begin < n_prompt and end <= n_prompt)
    return Encoded(ids, [end for _, end in offsets], start)


def _goes_on(whole: _Offsets, prompt: _Offsets, n_prompt: int) -> bool:
    """Whether the whole text's tokens begin with the prompt's, and these hold nothing else."""
    n = len(prompt[0])
    return whole[0][:n] == prompt[0] and (n == 0 or whole[1][n - 1][1] <= n_prompt)


def _append(prompt: _Offsets, response: _Offsets, n_prompt: int) -> _Offsets:
    moved = [(begin + n_prompt, end + n_prompt) for begin, end in response[1]]
    return prompt[0] + response[0], prompt[1] + moved


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library, or the text of one for another file."""

    def __init__(self, file: Path, text: str | None = None) -> None:
        super().__init__(file)
        made, text = text is not None, _read(file) if text is None else text
        self._text = text
        self._tokenizer = _library_tokenizer(file, text)
        before = _before_a_text(file, self._tokenizer)
        self._tokenizer.post_processor = None  # some cut blanks off the offsets
        there = self._readings()
        self._add_declared(there)
        bos, self.eos_id = self._find_named(
            self._first_known(_BOS_NAMES), self._first_known(_EOS_NAMES)
        )
        self._add(self._declared.special())
        self.bos_id = self._begin_token(bos, before, made)
        self._tell_special_tokens(bos)
        self._following = _without_prefix(self._tokenizer)
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.fingerprint = _fingerprint(text + self._changed(there), self.bos_id, self.eos_id)

    def _readings(self) -> dict[str, list[Any]]:
        """How the added tokens are found in a text, by their texts."""
        added = self._tokenizer.get_added_tokens_decoder()
        normalizes = self._tokenizer.normalizer is not None
        return {
            t.content: [i, t.lstrip, t.rstrip, t.single_word, t.normalized and normalizes]
            for i, t in added.items()
        }

    def _add_declared(self, there: Mapping[str, object]) -> None:
        """
        Raises:
            InputError: versions of transformers do not agree on what a token is.
        """
        normalizes = self._tokenizer.normalizer is not None
        if disputed := self._declared.disputed(there.keys(), normalizes=normalizes):
            raise InputError(
                f"{self.folder}/{disputed} is not the same token for all versions of transformers; "
                "write it into added_tokens_decoder of tokenizer_config.json"
            )
        older = "added_tokens_decoder" not in self.settings
        self._add((t for t in self._declared.added if not (older and t.text in there)), anew=True)

    def _add(self, tokens: Iterable[Added], *, anew: bool = False) -> None:
        """Add tokens, those of the vocabulary with their ids; `anew`: with other flags too."""
        import tokenizers

        known = set() if anew else self._readings().keys()
        new = [token for token in tokens if token.text not in known]
        for special, group in itertools.groupby(
            new, lambda token: token.flags.get("special", False)
        ):
            library = [tokenizers.AddedToken(token.text, **token.flags) for token in group]
            add = self._tokenizer.add_special_tokens if special else self._tokenizer.add_tokens
            add(library)

    def _changed(self, there: Mapping[str, object]) -> str:
        """What declared tokens change in the reading; empty if nothing.

        Tokens of a name alone, such as padding, stand in no text.
        """
        declared = {token.text for token in self._declared.added} | self._declared.listed_texts
        now = self._readings()
        changed = {t: now[t] for t in sorted(declared & now.keys()) if there.get(t) != now[t]}
        return json.dumps(changed) if changed else ""

    def _begin_token(self, named: int | None, before: int | None, made: bool) -> int | None:
        """The token before a text: what the post-processor puts there, or the tokenizer's class."""
        puts = self._declared.puts_begin_token
        if made:  # of a tokenizer.model, for which no post-processor is written down
            puts = self.settings.get("add_bos_token") is not False
        if puts is False or before is not None:
            return None if puts is False else before
        return named if puts else None

    def _first_known(self, names: Iterable[str]) -> int | None:
        return next((i for i in map(self.token_id, names) if i is not None), None)

    def _tell_special_tokens(self, bos: int | None) -> None:
        """Begin and end token may be ordinary words of the vocabulary; in a text they are not."""
        added = self._tokenizer.get_added_tokens_decoder()
        ends = [i for i in (bos, self.eos_id) if i is not None and i not in added]
        self._tokenizer.add_special_tokens([self.token_text(i) for i in ends])
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token.content for token in added.values() if token.special)
        self._end_takes_blanks = self.eos_id is not None and added[self.eos_id].lstrip

    def token_id(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text)

    def token_text(self, token: int) -> str:
        return str(self._tokenizer.id_to_token(token))

    @property
    def tokenizer_json(self) -> str:
        return self._text

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        return json.loads(self._tokenizer.to_str())["added_tokens"]

    def _encode_texts(self, texts: Sequence[str], *, follows: bool = False) -> list[_Offsets]:
        tokenizer = self._following if follows else self._tokenizer
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(e.ids, e.offsets) for e in encodings]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot read the tokenizer: {error}") from None


def _library_tokenizer(file: Path, text: str) -> Any:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{file}: cannot read the tokenizer: {error}") from None
    if isinstance(tokenizer.model, tokenizers.models.WordPiece):
        raise InputError(
            f"{file}: WordPiece is not supported, it loses blanks; BPE and Unigram are"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _before_a_text(file: Path, tokenizer: Any) -> int | None:
    """The token that the post-processor puts before a text."""
    before, _ = frame_of(tokenizer)
    if len(before) > 1:
        raise InputError(f"{file}: puts {len(before)} tokens before a text; one is supported")
    return before[0] if before else None


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the post-processor of a tokenizer of the library puts before and behind a text."""
    words = itertools.chain("a0 ", tokenizer.get_vocab())
    encoded = (tokenizer.encode(word, add_special_tokens=False) for word in words)
    bare = next((found for found in encoded if found.ids), None)
    if tokenizer.post_processor is None or bare is None:
        return [], []
    whole = tokenizer.post_process(bare)
    start = (*whole.special_tokens_mask, 0).index(0)
    return whole.ids[:start], whole.ids[start + len(bare.ids) :]


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
        of_text = json.dumps(sorted(self._added.items()))
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        begin, self.eos_id = self._find_named(bos if bos >= 0 else None, eos if eos >= 0 else None)
        self.bos_id = None if self.settings.get("add_bos_token") is False else begin
        for token in self._declared.special():
            self._added.setdefault(token.text, self._id_of(token.text))
        longest_first = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.special = frozenset(self._added)
        self.vocab_size = self._next_id()
        self.fingerprint = _fingerprint(content.hex() + of_text, self.bos_id, self.eos_id)

    @property
    def tokenizer_json(self) -> str | None:
        return equal_json(self._processor, self._added)

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        return as_added_tokens(self._added)

    def _control_tokens(self) -> dict[str, int]:
        ids = list(range(self._processor.vocab_size()))
        control = self._processor.is_control(ids)
        return {
            self._processor.id_to_piece(i): i for i, yes in zip(ids, control, strict=True) if yes
        }

    def _added_tokens(self) -> dict[str, int]:
        """Tokens that the vocabulary was given later."""
        declared = {token.text: token.id for token in self._declared.added}
        listed = sorted(self._declared.listed_texts - declared.keys())
        return declared | {t: i for t in listed if (i := self._piece(t)) is not None}

    def _next_id(self) -> int:
        return max(self._processor.vocab_size(), *(i + 1 for i in self._added.values()), 0)

    def _id_of(self, text: str) -> int:
        found = self.token_id(text)
        return self._next_id() if found is None else found

    def _piece(self, text: str) -> int | None:
        found = self._processor.piece_to_id(text)
        return found if self._processor.id_to_piece(found) == text else None

    def token_id(self, text: str) -> int | None:
        return self._added[text] if text in self._added else self._piece(text)

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


def _fingerprint(content: str, bos: int | None, eos: int | None) -> str:
    return hashlib.blake2b(f"{content}|{bos}|{eos}".encode(), digest_size=16).hexdigest()
