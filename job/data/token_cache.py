"""The tokenised form of a data set: built once, kept on disk by content, read memory-mapped.

Two jobs may build the same set at once: each writes a folder of its own, and the first rename
into place wins. A set that is not whole any more is built anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from job.common.data_file import Source as Files
from job.common.data_file import check_readable, data_files, described
from job.common.derived import find_or_make, remove
from job.common.errors import InputError, file_error, listing
from job.common.progress import progress
from job.common.schema import (
    EMBEDDED,
    ArithmeticConfig,
    BadRows,
    DataConfig,
    Overlong,
    PretrainDataConfig,
)
from job.common.signals import stop_if_asked
from job.data import arithmetic
from job.data.rows import BadRow, Place, Placed, Rewards, Row, in_chunks, read_source, text_key
from job.data.stored_targets import TargetList, Targets
from job.data.targets import TargetError, by_token
from job.data.template import Template, encode_rows, load_template, render_rows
from job.data.tokenizer import Encoded, Tokenizer

FORMAT = 5  # part of the key: raise it when the stored form changes
_READING = 3  # raise it when some rows become other tokens; runs go on all the same
_READING_EMBEDDED = 3  # the same for the embedded data
_ODD_LABELS = "odd_labels.jsonl"
_AT_ONCE = 1 << 22  # tokens of a look at all of them
_DAMAGE = (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # as numpy names it


class TokenizedSet:
    """n tokenised examples, end to end: example i is `tokens[offsets[i]:offsets[i + 1]]`.

    Attributes:
        tokens: uint32 [all tokens], memory-mapped.
        offsets: int64 [n + 1].
        response_starts: int64 [n], counted from the example's first token.
        rewards: float64 [n]; NaN where a row that is to be scored has none.
        problems: uint64 [n], equal for solutions of one problem.
        optimal: float32 [all tokens], the best value after each token from the last of the prompt
            on; None where unknown.
        targets: those at positions; None where no example has any.
        lines: int64 [n], where each example stands in its file, counted from 1.
        responses: uint64 [n] of a set that is to be scored: `text_key` of each response as the data
            has it; elsewhere None.
        ends: int32 [all tokens] of a set that is to be scored: how many characters of a response
            are read after each of its tokens; elsewhere None.
        folder: where all this is stored, with bad_rows.jsonl.
        n_skipped: rows left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = np.memmap(folder / "tokens.bin", np.uint32, "r")
        with np.load(folder / "index.npz") as index:
            self.offsets: NDArray[np.int64] = index["offsets"]
            self.response_starts: NDArray[np.int64] = index["response_starts"]
            self.rewards: NDArray[np.float64] = index["rewards"]
            self.problems: NDArray[np.uint64] = index["problems"]
            self.lines: NDArray[np.int64] = index["lines"]
            self.responses: NDArray[np.uint64] | None = index.get("responses")
        self.targets = Targets.read(folder)
        optimal = folder / "optimal.bin"
        self.optimal = np.memmap(optimal, np.float32, "r") if optimal.exists() else None
        ends = folder / "ends.bin"
        self.ends = np.memmap(ends, np.int32, "r") if ends.exists() else None
        self.n_skipped = (folder / "bad_rows.jsonl").read_bytes().count(b"\n")

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def key(self) -> str:
        """What a run knows the set by: everything that it depends on, but for `_READING`."""
        return self.folder.name.partition(".")[0]

    def bad_rows(self) -> Iterator[BadRow]:
        """The rows left out, in order.

        Raises:
            InputError: the list was damaged since it was written.
        """
        return self._listed("bad_rows.jsonl")

    def odd_labels(self) -> Iterator[BadRow]:
        """Rows that are scored, and whose label is none between 0 and 1; raises as above."""
        return self._listed(_ODD_LABELS) if (self.folder / _ODD_LABELS).exists() else iter(())

    def _listed(self, name: str) -> Iterator[BadRow]:
        file = self.folder / name
        with file.open("rb") as lines:
            for line in lines:
                try:
                    yield BadRow(**json.loads(line))
                except (ValueError, TypeError):
                    way_out = "remove the folder, or repeat the command with --verify"
                    raise InputError(f"{file} is damaged: {way_out}") from None

    def token_chunks(self) -> Iterator[NDArray[np.uint32]]:
        """All tokens, few at a time: mapped, those that were looked at would stay in memory."""
        with (self.folder / "tokens.bin").open("rb") as stream:
            while len(chunk := np.fromfile(stream, np.uint32, _AT_ONCE)):
                yield chunk

    def sequences(self) -> Iterator[NDArray[np.uint32]]:
        """The tokens of each example, in order; few are in memory, as with `token_chunks`."""
        begin = 0
        with (self.folder / "tokens.bin").open("rb") as stream:
            while begin < len(self):
                limit = self.offsets[begin] + _AT_ONCE
                end = max(begin + 1, int(np.searchsorted(self.offsets, limit, "right")) - 1)
                ends = self.offsets[begin : end + 1] - self.offsets[begin]
                chunk = np.fromfile(stream, np.uint32, int(ends[-1]))
                yield from (chunk[a:b] for a, b in itertools.pairwise(ends.tolist()))
                begin = end

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def response_lengths(self) -> NDArray[np.int64]:
        return self.lengths - self.response_starts


@dataclass(frozen=True)
class Source:
    """Where examples come from, and everything that their tokenised form depends on."""

    name: str
    origin: dict[str, Any]
    rows: Iterator[Placed]
    reading: int = _READING
    scored: bool = False  # whether where tokens end and what responses are is kept


def load_split(
    data: DataConfig | PretrainDataConfig,
    split: str,
    tokenizer: Tokenizer,
    *,
    verify: bool = False,
    seed: int = 0,
) -> TokenizedSet:
    """The tokenised `train` or `validation` set, from the cache or built now.

    Pre-training data is chains without errors, or rows that need no reward; its bad and overlong
    rows are errors.

    Args:
        verify: look at all of a cached set, not only at samples.
        seed: which problems are held out, where `validation` is a share.

    Raises:
        InputError: bad rows (counted, the first ten shown), no usable row at all, or no template
            that works.
    """
    labelled = isinstance(data, DataConfig)
    files = getattr(data, split)
    if files == EMBEDDED:
        source = _embedded(data.arithmetic, split, labelled)
    else:
        share = data.validation if isinstance(data, DataConfig) else None
        if isinstance(share, float):
            source = _part(_files(data.train, data, labelled), share, seed, split)
        else:
            source = _files(files, data, labelled)
    return _find_or_write(source, data, tokenizer, verify)


def load_to_score(
    data: DataConfig, files: Files, tokenizer: Tokenizer, *, verify: bool = False
) -> TokenizedSet:
    """The tokenised form of any data in the training format, rewards optional; or of `embedded`.

    Raises:
        InputError: bad rows, unless they are skipped; no usable row; no template that works.
    """
    if files == EMBEDDED:
        source = _embedded(data.arithmetic, "validation", labelled=True)
    else:
        source = _files(files, data, "optional")
    return _find_or_write(replace(source, scored=True), data, tokenizer, verify)


def _find_or_write(
    source: Source, data: DataConfig | PretrainDataConfig, tokenizer: Tokenizer, verify: bool
) -> TokenizedSet:
    template = load_template(data.template if isinstance(data, DataConfig) else None, tokenizer)
    policy = _Policy.of(data)
    key = {
        "format": FORMAT,
        "origin": source.origin,
        "tokenizer": tokenizer.fingerprint,
        "template": template.identity,
        "policy": {k: getattr(v, "name", v) for k, v in asdict(policy).items()},
        **({"ends": True, "responses": True} if source.scored else {}),
    }
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = Path(data.cache_dir) / f"{digest}.{source.reading}"

    def write(scratch: Path) -> None:
        _write(scratch, source, template, tokenizer, policy)

    try:
        find_or_make(folder, write, remove, verify=verify)
        try:
            return TokenizedSet(folder)
        except _DAMAGE:  # where no sample was taken
            find_or_make(folder, write, remove, verify=True)
            return TokenizedSet(folder)
    except OSError as error:
        raise file_error(error, f"data.cache_dir: cannot use {folder}: {error.strerror}") from None


def count_shared_problems(a: TokenizedSet, b: TokenizedSet) -> int:
    """How many problems occur in both sets."""
    return len(np.intersect1d(a.problems, b.problems))


@dataclass(frozen=True)
class _Policy:
    """What becomes of rows that are bad or too long."""

    max_length: int
    overlong: Overlong = Overlong.error
    bad_rows: BadRows = BadRows.error
    way_out: str = ""

    @property
    def of_overlong(self) -> str:
        """What a message on a row that is too long ends with; pre-training has no such key."""
        return f" (data.overlong={self.overlong.value})" if self.way_out else ""

    @classmethod
    def of(cls, data: DataConfig | PretrainDataConfig) -> _Policy:
        if isinstance(data, PretrainDataConfig):
            return cls(data.max_length)
        way_out = " (data.bad_rows=skip leaves them out)"
        return cls(data.max_length, data.overlong, data.bad_rows, way_out)


def _embedded(config: ArithmeticConfig, split: str, labelled: bool) -> Source:
    count = config.validation_examples if split == "validation" else config.train_examples
    settings = {
        "min_steps": config.min_steps,
        "max_steps": config.max_steps,
        "error_probability": config.error_probability if labelled else 0.0,
        "attempts": config.attempts if labelled else 1,
        "seed": config.seed,
        "held_out": split == "validation",
    }
    name = f"embedded {split} data"
    drawn = arithmetic.chains(count, **settings)  # type: ignore[arg-type]
    rows = (
        # the response's first character is the problem's own: what is best after it is so before
        (
            Place(name, line),
            Row(c.prompt, c.response, c.reward, c.prompt, (c.optimal[0], *c.optimal)),
        )
        for line, c in enumerate(drawn, 1)
    )
    return Source(name, {"embedded": settings, "count": count}, rows, _READING_EMBEDDED)


def _files(files: Files, data: DataConfig | PretrainDataConfig, labelled: Rewards) -> Source:
    """Files that are read one after the other; a single one counts as itself, however named."""
    found = data_files(files)  # once: a glob may find more by the time that rows are read
    check_readable(found)
    content = [{"content": _digest(file), "kind": file.suffix} for file in found]
    origin: dict[str, Any] = {**content[0]} if len(content) == 1 else {"files": content}
    origin |= {"fields": data.fields, "labelled": labelled}
    span = data.reward_range if isinstance(data, DataConfig) else None
    if span is not None:
        origin["reward_range"] = span
    rows = read_source(found, data.fields, rewards=labelled, reward_range=span)
    return Source(described(files), origin, rows)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _part(source: Source, share: float, seed: int, split: str) -> Source:
    """The rows of the problems that are held out, or of the others.

    Each problem's own text decides, so that rows which come later change nothing for those before.
    """
    held_out = split == "validation"

    def rows() -> Iterator[Placed]:
        others: set[str] | None = set()  # problems of the other part, until this one has any
        for place, row in source.rows:
            if isinstance(row, BadRow):
                if not held_out:
                    yield place, row
            elif _is_held_out(row, share, seed) == held_out:
                others = None
                yield place, row
            elif others is not None:
                others.add(row.problem_id)
        if others:
            count = f"{0 if held_out else len(others)} of {len(others)} problems"
            raise InputError(f"data.validation: {share:g} holds out {count} of {source.name}")

    name = f"{source.name} ({split}: {share if held_out else 1 - share:g} of its problems)"
    return Source(name, source.origin | {"share": [share, seed, split]}, rows())


def _is_held_out(row: Row, share: float, seed: int) -> bool:
    key = f"{seed}:{row.problem_id}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _write(
    scratch: Path, source: Source, template: Template, tokenizer: Tokenizer, policy: _Policy
) -> None:
    """Tokenise a source into a folder, or raise InputError."""
    writer = _SetWriter(scratch, framed=template.framed, scored=source.scored)
    rows = render_rows(source.rows, template)
    with writer, progress(f"tokenising {source.name}") as advance:
        for chunk in in_chunks(rows):
            stop_if_asked()
            writer.add(chunk, tokenizer, policy)
            advance(writer.n_seen, f"{len(writer.bad)} bad" if writer.bad else "")
    refused = writer.refused
    if refused:
        raise InputError(
            f"{source.name}: {len(refused)} bad of {writer.n_seen} rows{policy.way_out}"
            + listing([str(row) for row in refused])
        )
    if not writer.rewards:
        raise InputError(f"{source.name}: no usable row ({writer.n_seen} read)")
    writer.finish()


class _SetWriter:
    """Appends tokenised examples to the files of a set; only the index stays in memory."""

    def __init__(self, folder: Path, *, framed: bool, scored: bool = False) -> None:
        self.folder = folder
        self.framed = framed
        self.n_seen = 0
        self.bad: list[BadRow] = []
        self.refused: list[BadRow] = []  # those of `bad` that the policy does not skip
        self.odd: list[BadRow] = []  # that have a label which is not used
        # 8 bytes a row each, where objects would take 40
        self.lengths, self.starts, self.lines = array("q"), array("q"), array("q")
        self.rewards, self.problems, self.responses = array("d"), array("Q"), array("Q")
        self.targets = TargetList()
        self._tokens: BinaryIO = (folder / "tokens.bin").open("wb")
        self._optimal: BinaryIO | None = None
        self._ends: BinaryIO | None = (folder / "ends.bin").open("wb") if scored else None

    def __enter__(self) -> _SetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._tokens, self._optimal, self._ends):
            if file is not None:
                file.close()

    def add(self, chunk: list[Placed], tokenizer: Tokenizer, policy: _Policy) -> None:
        good = [row for _, row in chunk if isinstance(row, Row)]
        encoded = iter(encode_rows(good, tokenizer, framed=self.framed))
        for place, row in chunk:
            self.n_seen += 1
            if isinstance(row, BadRow):
                self._leave_out(row, skip=policy.bad_rows is BadRows.skip)
            else:
                self._add_one(place, row, next(encoded), tokenizer, policy)

    def _add_one(
        self, place: Place, row: Row, tokens: Encoded, tokenizer: Tokenizer, policy: _Policy
    ) -> None:
        if tokens.response_start == len(tokens.ids):  # all its characters unknown, and no end token
            reason = "the response has no token in this vocabulary"
            skip = policy.bad_rows is BadRows.skip
            self._leave_out(BadRow(*place, reason), skip=skip)
            return
        fitted = _fit(tokens, tokenizer, policy)
        if fitted is None:
            reason = f"{len(tokens.ids)} tokens, more than data.max_length {policy.max_length}"
            reason += policy.of_overlong
            skip = policy.overlong is Overlong.skip or policy.bad_rows is BadRows.skip
            self._leave_out(BadRow(*place, reason), skip=skip)
            return
        try:
            targets = by_token(row.targets, row.prompt, fitted.ends, fitted.response_start)
        except TargetError as error:
            skip = policy.bad_rows is BadRows.skip
            self._leave_out(BadRow(*place, str(error)), skip=skip)
            return
        self.targets.add(targets)
        self._tokens.write(np.asarray(fitted.ids, np.uint32).tobytes())
        if row.optimal is not None:
            self._write_optimal(row, fitted)
        if self._ends is not None:
            read = np.asarray(fitted.ends) - len(row.prompt) - row.lead
            self._ends.write(read.astype(np.int32).tobytes())
            self.responses.append(text_key(row.response if row.given is None else row.given))
        self.lengths.append(len(fitted.ids))
        self.starts.append(fitted.response_start)
        self.rewards.append(row.reward)
        if row.odd_label is not None:
            self.odd.append(BadRow(*place, row.odd_label))
        self.lines.append(place.line)
        self.problems.append(text_key(row.problem_id))

    def _leave_out(self, row: BadRow, *, skip: bool) -> None:
        row = replace(row, row=self.n_seen)
        self.bad.append(row)
        if not skip:
            self.refused.append(row)

    def _write_optimal(self, row: Row, tokens: Encoded) -> None:
        assert row.optimal is not None
        if self._optimal is None:
            self._optimal = (self.folder / "optimal.bin").open("wb")
        read = np.asarray(tokens.ends) - len(row.prompt)  # characters of the response
        values = np.where(read >= 0, np.asarray(row.optimal)[np.maximum(read, 0)], np.nan)
        self._optimal.write(values.astype(np.float32).tobytes())

    def finish(self) -> None:
        scored: dict[str, Any] = {}
        if self._ends is not None:
            scored["responses"] = np.asarray(self.responses, np.uint64)
        np.savez(
            self.folder / "index.npz",
            offsets=np.concatenate(([0], np.cumsum(self.lengths))).astype(np.int64),
            response_starts=np.asarray(self.starts, np.int64),
            rewards=np.asarray(self.rewards, np.float64),
            problems=np.asarray(self.problems, np.uint64),
            lines=np.asarray(self.lines, np.int64),
            **scored,
        )
        if self.targets:
            self.targets.stored().write(self.folder)
        self._list("bad_rows.jsonl", self.bad)
        if self.odd:
            self._list(_ODD_LABELS, self.odd)

    def _list(self, name: str, rows: Iterable[BadRow]) -> None:
        lines = (json.dumps(asdict(row)) + "\n" for row in rows)
        (self.folder / name).write_text("".join(lines))


def _fit(tokens: Encoded, tokenizer: Tokenizer, policy: _Policy) -> Encoded | None:
    """The example within max_length tokens, its prompt cut at the front if allowed; else None."""
    surplus = len(tokens.ids) - policy.max_length
    if surplus <= 0:
        return tokens
    head = 1 if tokens.ids[0] == tokenizer.bos_id else 0
    if policy.overlong is not Overlong.truncate_prompt or tokens.response_start - head < surplus:
        return None
    return Encoded(
        tokens.ids[:head] + tokens.ids[head + surplus :],
        tokens.ends[:head] + tokens.ends[head + surplus :],
        tokens.response_start - surplus,
    )
