"""The stored token sets: contents, keys, policies, and what several or killed builders leave."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from waiting import wait_for

from job.common import derived
from job.common.derived import SUMS
from job.common.errors import InputError
from job.common.schema import ArithmeticConfig, BadRows, DataConfig, Overlong, PretrainDataConfig
from job.data import token_cache
from job.data.arithmetic import ALPHABET, Chain, chains
from job.data.packing import Packer, single_units
from job.data.rows import in_chunks, text_key
from job.data.state_shards import sequence_keys
from job.data.token_cache import (
    TokenizedSet,
    count_shared_problems,
    load_split,
    load_to_score,
)
from job.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    write_bpe_tokenizer,
    write_character_tokenizer,
)
from job.training.cache_boundary import Boundary

pytestmark = pytest.mark.slow

DERIVED = "job.common.derived"  # whose log says what was not whole
Row = dict[str, Any]
SMALL = {"train_examples": 3000, "validation_examples": 100}


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("characters")
    write_character_tokenizer(folder, ALPHABET)
    return load_tokenizer(folder)


@pytest.fixture
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bpe")
    write_bpe_tokenizer(folder, (text(row) for row in rows(200)), 300)
    return load_tokenizer(folder)


def rows(count: int = 50) -> list[Row]:
    """Rows of many lengths, three solutions to a problem."""
    return [
        {
            "prompt": f"What is {i // 3} + {i % 7}?" * (1 + i % 2),
            "response": f"It is {i // 3 + i % 7}. 漢😀" * (1 + i % 5),
            "reward": [0, 1, 0.5][i % 3],
            "problem_id": i // 3,
        }
        for i in range(count)
    ]


def text(row: Row) -> str:
    return str(row["prompt"] + row["response"])


def write(path: Path, given: Sequence[Row | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in given]
    path.write_text("\n".join(lines) + "\n")
    return path


def embedded(tmp_path: Path, **changes: Any) -> DataConfig:
    arithmetic = ArithmeticConfig(**(SMALL | changes.pop("arithmetic", {})))
    cache = str(tmp_path / "cache")
    settings: Row = {"cache_dir": cache, "max_length": 64, "arithmetic": arithmetic}
    return DataConfig(**({"train": "embedded", "validation": "embedded"} | settings | changes))


def from_file(path: Path, **changes: Any) -> DataConfig:
    cache = {"cache_dir": str(path.parent / "cache")}
    return DataConfig(**({"train": str(path), "validation": str(path)} | cache | changes))


def entries(tmp_path: Path) -> list[str]:
    """What lies in the cache folder, scratch folders included."""
    cache = tmp_path / "cache"
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def example(found: TokenizedSet, i: int) -> list[int]:
    return found.tokens[found.offsets[i] : found.offsets[i + 1]].tolist()


def embedded_chains(config: DataConfig, split: str) -> list[Chain]:
    a = config.arithmetic
    held_out = split == "validation"
    count = a.validation_examples if held_out else a.train_examples
    drawn = chains(
        count,
        min_steps=a.min_steps,
        max_steps=a.max_steps,
        error_probability=a.error_probability,
        attempts=a.attempts,
        seed=a.seed,
        held_out=held_out,
    )
    return list(drawn)


# --- contents --------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation"])
def test_embedded_data_is_stored_as_it_is_tokenised(
    tmp_path: Path, characters: Tokenizer, split: str
) -> None:
    config = embedded(tmp_path)
    found = load_split(config, split, characters)
    drawn = embedded_chains(config, split)
    encoded = characters.encode([(c.prompt, c.response) for c in drawn])
    assert len(found) == len(drawn) == getattr(config.arithmetic, f"{split}_examples")
    assert found.tokens.tolist() == [i for e in encoded for i in e.ids]
    assert found.lengths.tolist() == [len(e.ids) for e in encoded]
    assert found.response_starts.tolist() == [e.response_start for e in encoded]
    assert found.rewards.tolist() == [c.reward for c in drawn]
    assert (found.response_lengths == found.lengths - found.response_starts).all()
    problems = found.problems.reshape(-1, config.arithmetic.attempts)
    assert (problems == problems[:, :1]).all()
    assert len(np.unique(problems)) == len({c.prompt for c in drawn})
    assert found.n_skipped == 0


def test_optimal_values_stand_at_the_tokens_from_the_last_of_the_prompt_on(
    tmp_path: Path, characters: Tokenizer
) -> None:
    config = embedded(tmp_path)
    found = load_split(config, "train", characters)
    assert found.optimal is not None
    assert len(found.optimal) == len(found.tokens)
    for i, chain in enumerate(embedded_chains(config, "train")):
        values = np.asarray(found.optimal[found.offsets[i] : found.offsets[i + 1]])
        start = found.response_starts[i]
        assert np.isnan(values[: start - 1]).all()
        # what a problem is worth before any step; the end token adds nothing to the last character
        problem = 0.85 ** chain.prompt.count("+") * 0.85 ** chain.prompt.count("-")
        expected = np.asarray([problem, *chain.optimal, chain.optimal[-1]], np.float32)
        assert np.array_equal(values[start - 1 :], expected)


def test_optimal_values_stay_with_their_tokens_where_the_prompt_is_cut(
    tmp_path: Path, characters: Tokenizer
) -> None:
    config = embedded(tmp_path, max_length=28, overlong=Overlong.truncate_prompt)
    found = load_split(config, "train", characters)
    assert found.optimal is not None
    drawn = embedded_chains(config, "train")
    assert found.lengths.max() == 28
    assert any(len(c.prompt + c.response) + 2 > 28 for c in drawn)
    for i, chain in enumerate(drawn):
        values = np.asarray(found.optimal[found.offsets[i] : found.offsets[i + 1]])
        n = len(chain.optimal) + 1
        assert np.isnan(values[: -n - 1]).all()
        uncut = len(chain.prompt) + n < 28  # else its begin token may be all that is left
        assert not uncut or values[-n - 1] == np.float32(chain.optimal[0])
        assert np.array_equal(values[-n:-1], np.asarray(chain.optimal, np.float32))


def test_rows_of_a_file_are_stored_as_they_are_tokenised(tmp_path: Path, bpe: Tokenizer) -> None:
    given = rows(2500)  # more than are tokenised together
    found = load_split(from_file(write(tmp_path / "a.jsonl", given)), "train", bpe)
    assert len(found) == 2500
    assert found.optimal is None
    for i, row in enumerate(given):
        (encoded,) = bpe.encode([(row["prompt"], row["response"])])
        assert example(found, i) == encoded.ids
        assert found.response_starts[i] == encoded.response_start
        assert found.rewards[i] == row["reward"]
    same = found.problems[:, None] == found.problems[None, :300]
    ids = np.array([row["problem_id"] for row in given])
    assert np.array_equal(same, ids[:, None] == ids[None, :300])


def test_what_is_stored_is_mapped_and_cannot_be_changed(
    tmp_path: Path, characters: Tokenizer
) -> None:
    found = load_split(embedded(tmp_path), "train", characters)
    for array in (found.tokens, found.optimal):
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    arrays = (found.tokens, found.offsets, found.rewards, found.problems)
    assert [a.dtype.name for a in arrays] == ["uint32", "int64", "float64", "uint64"]


def test_pretraining_chains_have_no_errors(tmp_path: Path, characters: Tokenizer) -> None:
    data = PretrainDataConfig("embedded", cache_dir=str(tmp_path / "cache"))
    data.arithmetic.train_examples = 500
    found = load_split(data, "train", characters)
    assert len(found) == 500
    assert (found.rewards == 1).all()


def test_pretraining_rows_need_no_reward(tmp_path: Path, bpe: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    data = PretrainDataConfig(str(path), cache_dir=str(tmp_path / "cache"))
    assert len(load_split(data, "train", bpe)) == 1
    with pytest.raises(InputError, match="field 'reward' is missing"):
        load_split(from_file(path), "train", bpe)


def test_shared_problems_are_counted_once_each(tmp_path: Path, bpe: Tokenizer) -> None:
    first = load_split(from_file(write(tmp_path / "a.jsonl", rows(30))), "train", bpe)
    later = load_split(from_file(write(tmp_path / "b.jsonl", rows(60)[24:])), "train", bpe)
    apart = load_split(from_file(write(tmp_path / "c.jsonl", rows(60)[30:])), "train", bpe)
    assert count_shared_problems(first, later) == 2
    assert count_shared_problems(first, apart) == 0
    assert count_shared_problems(first, first) == 10


def test_a_row_takes_few_bytes_in_memory_while_a_set_is_written(
    tmp_path: Path, characters: Tokenizer
) -> None:
    source = token_cache._embedded(ArithmeticConfig(train_examples=6 * 1024), "train", True)
    written = tracemalloc.Filter(True, token_cache.__file__)
    held = []
    tracemalloc.start()
    try:
        with token_cache._SetWriter(tmp_path, framed=True) as writer:
            for chunk in in_chunks(source.rows):
                writer.add(chunk, characters, token_cache._Policy(2048))
                chunk.clear()
                found = tracemalloc.take_snapshot().filter_traces([written])
                held.append(sum(trace.size for trace in found.traces))
    finally:
        tracemalloc.stop()
    assert (held[5] - held[1]) / (4 * 1024) < 60  # five numbers of 8, and room to grow


def test_all_tokens_come_a_few_at_a_time(
    tmp_path: Path, characters: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load_split(embedded(tmp_path), "validation", characters)
    monkeypatch.setattr(token_cache, "_AT_ONCE", 700)
    chunks = list(found.token_chunks())
    np.testing.assert_array_equal(np.concatenate(chunks), found.tokens)
    assert {len(chunk) for chunk in chunks[:-1]} == {700}


@pytest.mark.parametrize("at_once", [1, 700, 1 << 22])
def test_examples_come_one_by_one_from_a_few_in_memory(
    tmp_path: Path, characters: Tokenizer, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    found = load_split(embedded(tmp_path), "validation", characters)
    monkeypatch.setattr(token_cache, "_AT_ONCE", at_once)
    examples = list(found.sequences())
    assert [len(example) for example in examples] == found.lengths.tolist()
    np.testing.assert_array_equal(np.concatenate(examples), found.tokens)
    longest = int(found.lengths.max())
    assert all(len(example.base) <= max(at_once, longest) for example in examples)


def test_the_prefix_cache_s_keys_do_not_map_all_tokens(
    tmp_path: Path, characters: Tokenizer
) -> None:
    found = load_split(embedded(tmp_path), "validation", characters)
    packer = Packer(found, single_units(len(found)), dim=8, budget=4096, device=torch.device("cpu"))
    tokens, found.tokens = found.tokens, None  # type: ignore[assignment]
    keys = Boundary(2, 4, 8, torch.float32).stored(packer).keys
    examples = np.split(np.asarray(tokens), found.offsets[1:-1])
    assert (keys == sequence_keys(examples, np.zeros(len(found), np.int64))).all()


def test_embedded_training_and_validation_share_no_problem_id(
    tmp_path: Path, characters: Tokenizer
) -> None:
    config = embedded(tmp_path)
    splits = [load_split(config, split, characters) for split in ("train", "validation")]
    assert count_shared_problems(*splits) == 0
    assert splits[0].folder != splits[1].folder


# --- the key ---------------------------------------------------------------------------------


def test_a_second_load_builds_nothing(tmp_path: Path, characters: Tokenizer) -> None:
    first = load_split(embedded(tmp_path), "train", characters)
    before = {path.name: path.stat() for path in first.folder.iterdir()}
    second = load_split(embedded(tmp_path), "train", characters)
    after = {path.name: path.stat() for path in second.folder.iterdir()}
    assert second.folder == first.folder
    assert entries(tmp_path) == [first.folder.name]
    for name, stat in before.items():
        assert (stat.st_ino, stat.st_mtime_ns) == (after[name].st_ino, after[name].st_mtime_ns)
    assert np.array_equal(first.tokens, second.tokens)


def _overwritten(file: Path, content: bytes) -> None:
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "zeros": lambda file: _overwritten(file, bytes(file.stat().st_size)),
    "empty": lambda file: _overwritten(file, b""),
    "cut": lambda file: _overwritten(file, file.read_bytes()[:-2]),
    "longer": lambda file: _overwritten(file, file.read_bytes() + b"x"),
    "purged": Path.unlink,
}
FILES = ("tokens.bin", "index.npz", "optimal.bin", "bad_rows.jsonl", "sums.json")


def _files(folder: Path) -> dict[str, bytes]:
    """A set's files, without those that hold the time."""
    kept = (path for path in folder.iterdir() if path.suffix != ".npz" and path.name != SUMS)
    return {path.name: path.read_bytes() for path in kept}


# of an empty bad_rows.jsonl nothing can be lost but the whole
LOSSES = [(n, d) for n in FILES for d in DAMAGES if n != "bad_rows.jsonl" or d == "purged"]


@pytest.mark.parametrize(("name", "damage"), LOSSES)
def test_a_set_that_is_not_whole_is_built_anew_and_said_so(
    tmp_path: Path,
    characters: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: str,
) -> None:
    config = embedded(tmp_path, arithmetic={"train_examples": 200})
    first = load_split(config, "train", characters)
    whole, tokens = _files(first.folder), first.tokens.tolist()
    file = first.folder / name
    DAMAGES[damage](file)
    again = load_split(config, "train", characters)
    assert again.folder == first.folder
    assert again.tokens.tolist() == tokens
    assert again.optimal is not None
    assert _files(again.folder) == whole
    assert entries(tmp_path) == [first.folder.name]  # nothing is left of the other
    (said,) = [record.getMessage() for record in caplog.records if record.name == DERIVED]
    assert said.startswith(str(file))
    assert said.endswith("; made anew")


def test_a_set_of_before_there_were_sums_is_built_anew(
    tmp_path: Path, characters: Tokenizer
) -> None:
    first = load_split(embedded(tmp_path), "train", characters)
    before = first.folder.stat().st_ino
    (first.folder / SUMS).unlink()
    assert load_split(embedded(tmp_path), "train", characters).folder.stat().st_ino != before


@pytest.fixture
def small_samples(monkeypatch: pytest.MonkeyPatch) -> int:
    """Samples that leave most of a small file out; a place between the first two of one."""
    monkeypatch.setattr(derived, "_BLOCK", 4096)
    return 5000


def test_all_of_a_set_is_looked_at_where_that_is_asked_for(
    tmp_path: Path, characters: Tokenizer, caplog: pytest.LogCaptureFixture, small_samples: int
) -> None:
    config = embedded(tmp_path, max_length=2048, arithmetic={"train_examples": 2_000})
    first = load_split(config, "train", characters)
    file = first.folder / "tokens.bin"
    content = bytearray(file.read_bytes())
    assert len(content) > 3 << 15  # beyond what samples cover
    place = small_samples
    content[place] ^= 1
    file.write_bytes(bytes(content))
    assert load_split(config, "train", characters).tokens.tobytes() == bytes(content)
    content[place] ^= 1
    found = load_split(config, "train", characters, verify=True)
    assert found.tokens.tobytes() == bytes(content)
    assert f"{file} was changed: its checksum differs; made anew" in caplog.text


def test_an_index_that_no_sample_shows_to_be_damaged_is_built_anew(
    tmp_path: Path, characters: Tokenizer, small_samples: int
) -> None:
    config = embedded(tmp_path, arithmetic={"train_examples": 4_000})
    first = load_split(config, "train", characters)
    file, rewards = first.folder / "index.npz", first.rewards.tolist()
    content = bytearray(file.read_bytes())
    assert len(content) > 3 << 15
    content[small_samples] ^= 1
    file.write_bytes(bytes(content))
    assert load_split(config, "train", characters).rewards.tolist() == rewards


def test_a_list_of_bad_rows_that_was_damaged_says_what_to_do(
    tmp_path: Path, bpe: Tokenizer, small_samples: int
) -> None:
    lines = [*map(json.dumps, rows()), *["{" + "x" * 50] * 4_000]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    settings = {"cache_dir": str(tmp_path / "cache"), "bad_rows": BadRows.skip}
    found = load_split(from_file(path, **settings), "train", bpe)
    file, listed = found.folder / "bad_rows.jsonl", list(found.bad_rows())
    content = bytearray(file.read_bytes())
    content[small_samples : small_samples + 400] = bytes(400)
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"bad_rows\.jsonl is damaged: .* with --verify"):
        list(load_split(from_file(path, **settings), "train", bpe).bad_rows())
    found = load_split(from_file(path, **settings), "train", bpe, verify=True)
    assert list(found.bad_rows()) == listed


def test_name_and_place_of_the_file_do_not_matter(tmp_path: Path, bpe: Tokenizer) -> None:
    cache = {"cache_dir": str(tmp_path / "cache")}
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "other/a.jsonl"]
    for path in paths:
        write(path, rows())
        load_split(from_file(path, **cache), "train", bpe)
        load_split(from_file(path, **cache), "validation", bpe)
    assert len(entries(tmp_path)) == 1


def test_everything_that_the_tokens_depend_on_makes_another_set(
    tmp_path: Path, bpe: Tokenizer, characters: Tokenizer
) -> None:
    path = write(tmp_path / "a.jsonl", [row | {"other": "x"} for row in rows()])
    changes: list[dict[str, Any]] = [
        {},
        {"max_length": 1024},
        {"overlong": Overlong.skip},
        {"overlong": Overlong.truncate_prompt},
        {"bad_rows": BadRows.skip},
        {"fields": {"prompt": "other"}},
        {"fields": {"response": "other"}},
    ]
    folders = {load_split(from_file(path, **c), "train", bpe).folder for c in changes}
    folders.add(load_split(from_file(path), "train", characters).folder)
    data = PretrainDataConfig(str(path), cache_dir=str(tmp_path / "cache"))
    folders.add(load_split(data, "train", bpe).folder)
    path.write_text(path.read_text().replace("It is", "it is"))
    folders.add(load_split(from_file(path), "train", bpe).folder)
    assert len(folders) == len(changes) + 3
    assert entries(tmp_path) == sorted(folder.name for folder in folders)


CHAT_ML = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"


def test_template_and_special_tokens_make_another_set(tmp_path: Path, bpe: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", rows())

    def folder(template: str | None, **settings: Any) -> Path:
        named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_ML}
        (bpe.folder / "tokenizer_config.json").write_text(json.dumps(named | settings))
        tokenizer = load_tokenizer(bpe.folder)
        return load_split(from_file(path, template=template), "train", tokenizer).folder

    found = [
        folder(None),
        folder("{prompt}\n{response}"),
        folder("{prompt} {response}"),
        folder("chat"),
        folder("chat", chat_template=CHAT_ML + "{# #}"),
        folder("chat", eos_token=None),
        folder("chat", pad_token="</s>"),
        folder(None, bos_token=None),
    ]
    assert len(set(found)) == len(found)
    assert folder("{prompt}{response}", pad_token="</s>", chat_template="") == found[0]
    assert folder(CHAT_ML) == found[3]


@pytest.mark.parametrize("template", ["chat", "Q: {prompt}\nA: {response}", None])
@pytest.mark.parametrize("pad", [None, "</s>"])
def test_the_last_response_token_is_the_end_token_whatever_the_padding_token_is(
    tmp_path: Path, bpe: Tokenizer, template: str | None, pad: str | None
) -> None:
    settings = {"eos_token": "</s>", "pad_token": pad, "chat_template": "{{ bos_token }}" + CHAT_ML}
    (bpe.folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(bpe.folder)
    path = write(tmp_path / "a.jsonl", rows())
    found = load_split(from_file(path, template=template), "train", tokenizer)
    library = tokenizers.Tokenizer.from_file(str(bpe.folder / "tokenizer.json"))
    for i, row in enumerate(rows()):
        ids, start = example(found, i), found.response_starts[i]
        assert ids[0] == 0
        assert ids[-1] == tokenizer.eos_id
        assert found.response_lengths[i] == len(ids) - start
        said = library.decode(ids[start:-1], skip_special_tokens=False)
        lead = "assistant: " if template == "chat" else ""
        assert said == lead + row["response"]
    packer = Packer(found, single_units(50), dim=8, budget=8192, device=torch.device("cpu"))
    (batch,) = packer.step(0, 50, seed=0)
    ends = batch.layout.boundaries[1:] - 1
    assert (batch.tokens[ends] == tokenizer.eos_id).all()
    assert set(ends.tolist()) <= set(batch.positions.tolist())


@pytest.mark.parametrize("template", ["chat", "Q: {prompt}\nA: {response}", None])
def test_rows_say_that_they_were_cut_off_and_bring_their_end_tokens(
    tmp_path: Path, bpe: Tokenizer, template: str | None
) -> None:
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_ML}
    (bpe.folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(bpe.folder)
    row = {"prompt": "a", "response": "4.", "reward": 1}
    brought = [row | {"response": "4." + end} for end in ("</s>", "</s>\n", "</s>  ")]
    cut = [row | {"cut": 1}, row | {"cut": True, "response": "4.</s>"}]
    plain = [row | {"cut": value} for value in (False, 0, None)]
    given = [one | {"cut": one.get("cut")} for one in [*plain, *brought, *cut]]
    path = write(tmp_path / "a.jsonl", given)
    config = from_file(path, template=template, fields={"truncated": "cut"})
    found = load_split(config, "train", tokenizer)
    whole = example(found, 0)
    assert whole[-1] == tokenizer.eos_id
    assert whole[found.response_starts[0] :].count(tokenizer.eos_id) == 1
    for i in range(len(given)):
        assert example(found, i) == (whole if i < 6 else whole[:-1])


def test_a_template_that_does_not_work_leaves_nothing(tmp_path: Path, bpe: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    with pytest.raises(InputError, match=r"data\.template: line 1"):
        load_split(from_file(path, template="{% for %}"), "train", bpe)
    no_three = "{{ raise_exception('three') if '3' in messages[0].content }}" + CHAT_ML
    with pytest.raises(InputError, match=r"a\.jsonl:\d+: data\.template: three"):
        load_split(from_file(path, template=no_three), "train", bpe)
    assert entries(tmp_path) == []


def test_truncation_keeps_a_begin_token_that_the_template_wrote(
    tmp_path: Path, bpe: Tokenizer
) -> None:
    path = write(tmp_path / "a.jsonl", [rows()[0]])
    for template in ("<s>{prompt} {response}", "{prompt} {response}"):
        whole = load_split(from_file(path, template=template), "train", bpe)
        n = len(whole.tokens)
        cut = {"max_length": n - 2, "overlong": Overlong.truncate_prompt}
        found = load_split(from_file(path, template=template, **cut), "train", bpe)
        assert example(found, 0) == [bpe.bos_id, *example(whole, 0)[3:]]
    bare = "{% for m in messages %}{{ m.content }} {% endfor %}"  # no begin token
    whole = load_split(from_file(path, template=bare), "train", bpe)
    cut = {"max_length": len(whole.tokens) - 2, "overlong": Overlong.truncate_prompt}
    found = load_split(from_file(path, template=bare, **cut), "train", bpe)
    assert example(found, 0) == example(whole, 0)[2:]


def test_every_setting_of_the_embedded_data_makes_another_set(
    tmp_path: Path, characters: Tokenizer
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"train_examples": 90},
        {"attempts": 2},
        {"min_steps": 1},
        {"max_steps": 3},
        {"error_probability": 0.2},
        {"seed": 1},
    ]
    folders = {
        load_split(
            embedded(tmp_path, arithmetic={"train_examples": 100} | change), "train", characters
        ).folder
        for change in changes
    }
    assert len(folders) == len(changes)


def test_the_size_of_the_validation_set_does_not_touch_the_training_set(
    tmp_path: Path, characters: Tokenizer
) -> None:
    other = embedded(tmp_path, arithmetic={"validation_examples": 40})
    first = load_split(embedded(tmp_path), "train", characters)
    assert load_split(other, "train", characters).folder == first.folder


# --- bad and overlong rows -------------------------------------------------------------------

BAD = {"prompt": "p", "response": "r", "reward": 7}


def with_bad_rows(tmp_path: Path) -> tuple[Path, list[int]]:
    """2000 rows, and the lines of the bad ones among them: 40 of three kinds."""
    given: list[Row | str] = [*rows(2000)]
    bad = sorted(np.random.default_rng(0).choice(2000, 40, replace=False).tolist())
    for place, i in enumerate(bad):
        long = {"prompt": "p", "response": "long " * 1000, "reward": 1}
        given[i] = ["{", BAD, long][place % 3]
    return write(tmp_path / "a.jsonl", given), [i + 1 for i in bad]


def test_bad_rows_are_an_error_that_counts_all_and_shows_the_first_ten(
    tmp_path: Path, bpe: Tokenizer
) -> None:
    path, bad = with_bad_rows(tmp_path)
    with pytest.raises(InputError) as caught:
        load_split(from_file(path, max_length=512), "train", bpe)
    first, *shown, more = str(caught.value).splitlines()
    assert first == f"{path}: 40 bad of 2000 rows (data.bad_rows=skip leaves them out)"
    assert [line.split(": ")[0].strip() for line in shown] == [f"{path}:{i}" for i in bad[:10]]
    assert more.strip() == "... and 30 more"
    assert "broken JSON" in shown[0]
    assert "lies outside" in shown[1]
    assert "tokens, more than data.max_length 512 (data.overlong=error)" in shown[2]
    assert entries(tmp_path) == []


def test_skipped_rows_are_left_out_and_listed_in_order(tmp_path: Path, bpe: Tokenizer) -> None:
    path, bad = with_bad_rows(tmp_path)
    found = load_split(from_file(path, max_length=512, bad_rows=BadRows.skip), "train", bpe)
    listed = list(map(json.loads, (found.folder / "bad_rows.jsonl").read_text().splitlines()))
    assert [row["line"] for row in listed] == bad
    assert {row["file"] for row in listed} == {str(path)}
    assert all(row["reason"] for row in listed)
    assert (len(found), found.n_skipped) == (1960, 40)
    kept = [row for i, row in enumerate(rows(2000), 1) if i not in bad]
    assert found.rewards.tolist() == [row["reward"] for row in kept]
    encoded = bpe.encode([(row["prompt"], row["response"]) for row in kept])
    assert found.tokens.tolist() == [i for e in encoded for i in e.ids]
    assert sorted([*found.lines.tolist(), *bad]) == list(range(1, 2001))
    assert [row.line for row in found.bad_rows()] == bad


def test_a_set_to_score_needs_no_reward_and_knows_its_lines(tmp_path: Path, bpe: Tokenizer) -> None:
    given: list[Row | str] = [*rows(4)]
    given[1] = {key: value for key, value in rows(4)[1].items() if key != "reward"}
    given.insert(2, "")
    path = write(tmp_path / "data.jsonl", given)
    found = load_to_score(from_file(path), str(path), bpe)
    np.testing.assert_array_equal(found.rewards, [0, np.nan, 0.5, 0])
    assert found.lines.tolist() == [1, 2, 4, 5]
    with pytest.raises(InputError, match=r"data\.jsonl:2: field 'reward' is missing"):
        load_split(from_file(path), "train", bpe)


def test_a_set_to_score_knows_its_responses_as_the_data_has_them(
    tmp_path: Path, bpe: Tokenizer
) -> None:
    path = write(tmp_path / "data.jsonl", rows(4))
    template = "Question: {prompt}\nAnswer: {response}."
    found = load_to_score(from_file(path, template=template), str(path), bpe)
    assert found.responses is not None
    assert found.responses.tolist() == [text_key(str(row["response"])) for row in rows(4)]
    assert load_split(from_file(path), "train", bpe).responses is None


def test_a_file_without_usable_row_is_an_error(tmp_path: Path, bpe: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [BAD, BAD])
    with pytest.raises(InputError, match=r"no usable row \(2 read\)"):
        load_split(from_file(path, bad_rows=BadRows.skip), "train", bpe)
    path.write_text("\n\n")
    with pytest.raises(InputError, match=r"no usable row \(0 read\)"):
        load_split(from_file(path), "train", bpe)
    assert entries(tmp_path) == []


def test_a_file_that_is_damaged_in_the_middle_leaves_nothing(
    tmp_path: Path, bpe: Tokenizer
) -> None:
    path = write(tmp_path / "a.jsonl", rows(3000))
    damaged = tmp_path / "a.jsonl.gz"
    damaged.write_bytes(gzip.compress(path.read_bytes())[:-100])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: damaged file"):
        load_split(from_file(damaged, bad_rows=BadRows.skip), "train", bpe)
    assert entries(tmp_path) == []


# Character tokens: begin, four of the prompt, three of the response, end.
NINE_TOKENS = {"prompt": "1+1?", "response": "=2;", "reward": 1}


@pytest.mark.parametrize(
    ("max_length", "kept"),
    [
        (9, ["1", "+", "1", "?"]),
        (8, ["+", "1", "?"]),
        (6, ["?"]),
        (5, []),
    ],
)
def test_truncation_drops_the_front_of_the_prompt_and_keeps_the_begin_token(
    tmp_path: Path, characters: Tokenizer, max_length: int, kept: list[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [NINE_TOKENS])
    config = from_file(path, max_length=max_length, overlong=Overlong.truncate_prompt)
    found = load_split(config, "train", characters)
    ids = [3 + ALPHABET.index(c) for c in [*kept, "=", "2", ";"]]
    assert example(found, 0) == [characters.bos_id, *ids, characters.eos_id]
    assert found.response_starts.tolist() == [1 + len(kept)]
    assert found.n_skipped == 0


@pytest.mark.parametrize("overlong", list(Overlong))
def test_a_response_that_is_too_long_by_itself_is_never_cut(
    tmp_path: Path, characters: Tokenizer, overlong: Overlong
) -> None:
    short = {"prompt": "", "response": "1", "reward": 0}
    path = write(tmp_path / "a.jsonl", [short, NINE_TOKENS, short])
    config = from_file(path, max_length=4, overlong=overlong)
    if overlong is Overlong.skip:
        found = load_split(config, "train", characters)
        assert (len(found), found.n_skipped) == (2, 1)
    else:
        with pytest.raises(InputError, match=r"1 bad of 3 rows.*\n.*:2: 9 tokens, more than"):
            load_split(config, "train", characters)


def test_without_begin_token_truncation_may_drop_the_whole_prompt(
    tmp_path: Path, characters: Tokenizer
) -> None:
    write_character_tokenizer(tmp_path / "t", ALPHABET)
    (tmp_path / "t/tokenizer_config.json").write_text('{"bos_token": null}')
    tokenizer = load_tokenizer(tmp_path / "t")
    path = write(tmp_path / "a.jsonl", [NINE_TOKENS])
    config = from_file(path, max_length=4, overlong=Overlong.truncate_prompt)
    found = load_split(config, "train", tokenizer)
    assert example(found, 0) == [*(3 + ALPHABET.index(c) for c in "=2;"), tokenizer.eos_id]
    assert found.response_starts.tolist() == [0]


def test_skipping_overlong_rows_leaves_bad_rows_an_error(tmp_path: Path, bpe: Tokenizer) -> None:
    path, bad = with_bad_rows(tmp_path)
    config = from_file(path, max_length=512, overlong=Overlong.skip)
    with pytest.raises(InputError, match=f"{len(bad) - len(bad) // 3} bad of 2000 rows"):
        load_split(config, "train", bpe)


def test_a_response_without_any_token_is_a_bad_row(tmp_path: Path) -> None:
    model = tokenizers.models.BPE({"a": 0, "b": 1}, [])  # unknown characters are dropped
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    given = [{"prompt": "a", "response": r, "reward": 1} for r in ("b", "漢", "漢b")]
    path = write(tmp_path / "a.jsonl", given)
    with pytest.raises(InputError, match=r"1 bad of 3 rows.*\n.*:2: the response has no token"):
        load_split(from_file(path), "train", tokenizer)
    found = load_split(from_file(path, bad_rows=BadRows.skip), "train", tokenizer)
    assert found.response_lengths.tolist() == [1, 1]


# --- places that cannot be written -----------------------------------------------------------


@pytest.mark.parametrize(
    "cache_dir", ["a_file", "a_file/below", "/proc/none/cache", "x" * 300], ids=lambda c: c[:20]
)
def test_a_cache_folder_that_cannot_be_written_is_an_input_error_that_names_it(
    tmp_path: Path, characters: Tokenizer, cache_dir: str
) -> None:
    (tmp_path / "a_file").write_text("")
    config = embedded(tmp_path, cache_dir=str(tmp_path / cache_dir))
    with pytest.raises(InputError, match=r"^data\.cache_dir: cannot use .*/"):
        load_split(config, "train", characters)


# --- several builders ------------------------------------------------------------------------

BUILD = """
import sys, time
from pathlib import Path
from job.common.schema import ArithmeticConfig, DataConfig
from job.data.token_cache import load_split
from job.data.tokenizer import load_tokenizer
from job.common.errors import run_command
folder, examples = Path(sys.argv[1]), int(sys.argv[2])
tokenizer = load_tokenizer(folder / "tokenizer")
config = DataConfig("embedded", "embedded", cache_dir=str(folder / "cache"))
config.arithmetic = ArithmeticConfig(train_examples=examples)
def main():
    (folder / f"ready.{sys.argv[3]}").touch()
    while not (folder / "go").exists():
        time.sleep(0.001)
    print(load_split(config, "train", tokenizer).folder)
run_command(main)
"""


def start_builder(
    tmp_path: Path, examples: int, name: str = "a", prelude: str = ""
) -> subprocess.Popen[str]:
    write_character_tokenizer(tmp_path / "tokenizer", ALPHABET)
    command = [sys.executable, "-c", prelude + BUILD, str(tmp_path), str(examples), name]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def by_parts(cache: Path, size: int) -> list[Path]:
    """Scratch folders with tokens of at least `size` bytes."""
    return [path.parent for path in cache.glob(".*/tokens.bin") if path.stat().st_size >= size]


def test_two_builders_at_once_both_succeed_and_leave_one_folder(
    tmp_path: Path, characters: Tokenizer
) -> None:
    builders = [start_builder(tmp_path, 20_000, name) for name in "ab"]
    wait_for(lambda: len(list(tmp_path.glob("ready.*"))) == 2)
    (tmp_path / "go").touch()
    wait_for(lambda: len(by_parts(tmp_path / "cache", 1)) == 2)  # both are at work
    ended = [builder.communicate(timeout=60) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], ended
    (folder,) = {Path(printed.strip()) for printed, _ in ended}
    assert entries(tmp_path) == [folder.name]
    alone = embedded(tmp_path / "alone", max_length=2048, arithmetic={"train_examples": 20_000})
    expected = load_split(alone, "train", characters)
    assert expected.folder.name == folder.name
    for path in expected.folder.iterdir():
        if path.suffix != ".npz":  # a zip archive holds the time
            assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_killed_builder_leaves_no_set_and_the_next_one_builds_it(
    tmp_path: Path, characters: Tokenizer
) -> None:
    (tmp_path / "go").touch()
    builder = start_builder(tmp_path, 20_000)
    wait_for(lambda: by_parts(tmp_path / "cache", 100_000))
    builder.send_signal(signal.SIGKILL)
    builder.communicate(timeout=60)
    assert builder.returncode == -signal.SIGKILL
    assert all(name.startswith(".") for name in entries(tmp_path))
    config = embedded(tmp_path, max_length=2048, arithmetic={"train_examples": 20_000})
    found = load_split(config, "train", characters)
    assert len(found) == 20_000
    assert found.offsets[-1] == len(found.tokens)


def test_a_full_disk_is_no_wrong_input_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    builder = start_builder(tmp_path, 20_000, prelude=prelude)
    _, said = builder.communicate(timeout=60)
    assert builder.returncode == 74
    assert said.startswith("error: data.cache_dir: cannot use ")
    assert "File too large" in said
    assert entries(tmp_path) == []
