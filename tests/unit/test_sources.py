"""Data of several files, of folders, and validation data that is a share of the training's."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from job.common.config import load_config, load_stored_config
from job.common.data_file import check_readable, data_files, described
from job.common.errors import InputError
from job.common.nested import to_dict
from job.common.schema import BadRows, CriticConfig, DataConfig
from job.common.text_values import dump
from job.data.arithmetic import ALPHABET
from job.data.rows import Row, read_source
from job.data.token_cache import TokenizedSet, load_split, load_to_score
from job.data.tokenizer import load_tokenizer, write_character_tokenizer

ROWS = [
    {"prompt": f"{k % 10}+{k // 10}?", "response": f"{k}", "reward": k % 2, "problem_id": k // 4}
    for k in range(60)
]
Rows = list[dict[str, Any]]


def lines(rows: Rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def shards(folder: Path) -> Path:
    """The rows in three shards of three kinds, and a file that is no data."""
    folder.mkdir()
    (folder / "part-0.jsonl").write_bytes(lines(ROWS[:20]))
    (folder / "part-1.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[20:40])))
    pq.write_table(pa.Table.from_pylist(ROWS[40:]), folder / "part-2.parquet")
    (folder / "README.md").write_text("about")
    return folder


def saved(folder: Path) -> Path:
    """The rows as `datasets.save_to_disk` leaves them: Arrow streams in an order of its own."""
    folder.mkdir()
    names = ("data-00001-of-00002.arrow", "data-00000-of-00002.arrow")
    for name, rows in zip(names, (ROWS[:33], ROWS[33:]), strict=True):
        table = pa.Table.from_pylist(rows)
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as s,
        ):
            s.write_table(table, max_chunksize=7)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"})
    )
    (folder / "dataset_info.json").write_text("{}")
    return folder


def responses(source: Any) -> list[str]:
    found = [row for _, row in read_source(source)]
    return [row.response for row in found if isinstance(row, Row)]


EVERY = [row["response"] for row in ROWS]


def test_files_globs_folders_and_lists_of_them_are_read_in_order(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    assert responses(str(folder)) == EVERY
    assert responses(f"{folder}/part-*") == EVERY
    assert responses(f"{tmp_path}/**/part-?.*") == EVERY
    assert responses([f"{folder}/part-0.jsonl", f"{folder}/part-[12]*"]) == EVERY
    assert responses([f"{folder}/part-2.parquet", f"{folder}/part-0.jsonl"]) == [
        *EVERY[40:],
        *EVERY[:20],
    ]
    assert responses(str(saved(tmp_path / "saved"))) == EVERY


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    file = tmp_path / "a[1].jsonl"
    file.write_bytes(lines(ROWS[:3]))
    assert responses(str(file)) == EVERY[:3]


def test_rows_are_named_by_their_own_file(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    (folder / "part-1.jsonl").write_bytes(lines(ROWS[:2]) + b"{}\n")
    (bad,) = [row for _, row in read_source(str(folder)) if not isinstance(row, Row)]
    assert str(bad).startswith(f"{folder}/part-1.jsonl:3: field 'prompt' is missing")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: f / "train-*.parquet", "no file has such a name"),
        (lambda f: f / "missing.jsonl", "cannot read the data: No such file"),
        (lambda f: f / "empty", "a folder without data files"),
        (lambda f: f / "splits", "several splits; name the folder of one: "),
        (lambda f: f / "broken", "state.json: does not say what its Arrow files are"),
        (lambda f: [f / "good.jsonl", f / "none.jsonl"], "none.jsonl: the file is empty"),
        (lambda f: f / "some.csv", "unknown kind of data file"),
    ],
)
def test_what_is_no_source_is_refused_before_anything_is_read(
    tmp_path: Path, make: Any, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    (tmp_path / "good.jsonl").write_bytes(lines(ROWS[:1]))
    (tmp_path / "none.jsonl").write_bytes(b"")
    (tmp_path / "some.csv").write_bytes(b"a,b\n")
    named = make(tmp_path)
    source = [str(one) for one in named] if isinstance(named, list) else str(named)
    with pytest.raises(InputError) as error:
        check_readable(source)
    assert said in str(error.value)


def test_a_long_list_is_told_of_in_a_line() -> None:
    assert described(["a.jsonl", "b.jsonl", "c.jsonl"]) == "a.jsonl and 2 more"
    assert described(["a.jsonl"]) == described("a.jsonl") == "a.jsonl"


# --- tokenised ---------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_character_tokenizer(folder, ALPHABET)
    return load_tokenizer(folder)


def data(folder: Path, **keys: Any) -> DataConfig:
    return DataConfig(cache_dir=str(folder / "cache"), max_length=64, **keys)


def told_apart(found: TokenizedSet) -> list[bytes]:
    return [
        found.tokens[found.offsets[i] : found.offsets[i + 1]].tobytes() for i in range(len(found))
    ]


def test_shards_are_one_set_and_a_single_file_is_itself(tmp_path: Path, tokenizer: Any) -> None:
    folder = shards(tmp_path / "data")
    whole = tmp_path / "whole.jsonl"
    whole.write_bytes(lines(ROWS))
    sets = [
        load_split(data(tmp_path, train=source), "train", tokenizer)
        for source in (str(folder), str(whole), [str(whole)], str(folder))
    ]
    assert told_apart(sets[0]) == told_apart(sets[1])
    assert sets[1].key == sets[2].key != sets[0].key == sets[3].key
    assert sets[0].lines.tolist() == [*range(1, 21)] * 3


def test_a_share_holds_out_whole_problems_by_the_seed(tmp_path: Path, tokenizer: Any) -> None:
    whole = tmp_path / "whole.jsonl"
    whole.write_bytes(lines(ROWS))
    config = data(tmp_path, train=str(whole), validation=0.3)

    def both(seed: int) -> tuple[TokenizedSet, TokenizedSet]:
        train, validation = (
            load_split(config, split, tokenizer, seed=seed) for split in ("train", "validation")
        )
        return train, validation

    train, validation = both(0)
    assert not set(train.problems.tolist()) & set(validation.problems.tolist())
    assert sorted([*train.lines, *validation.lines]) == list(range(1, 61))
    assert 1 <= len(set(validation.problems.tolist())) <= 9, "of 15 problems"
    again = both(0)
    assert again[1].key == validation.key
    assert both(1)[1].lines.tolist() != validation.lines.tolist()
    longer = tmp_path / "longer.jsonl"
    more = [ROWS[0] | {"problem_id": f"new {k}"} for k in range(400)]
    longer.write_bytes(lines([*ROWS, *more]))
    config.train = str(longer)
    grown = both(0)[1]
    assert grown.lines[: len(validation)].tolist() == validation.lines.tolist()
    assert len(grown) - len(validation) == pytest.approx(120, abs=30)


def test_bad_rows_of_shared_data_are_told_of_once(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"{}\n" + lines(ROWS))
    config = data(tmp_path, train=str(file), validation=0.3, bad_rows=BadRows.skip)
    train, validation = (load_split(config, s, tokenizer) for s in ("train", "validation"))
    assert (train.n_skipped, validation.n_skipped) == (1, 0)


def test_a_share_without_a_problem_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(ROWS[:4]))
    config = data(tmp_path, train=str(file), validation=1e-6)
    with pytest.raises(InputError, match=r"1e-06 holds out 0 of \d problems of .*a\.jsonl"):
        load_split(config, "validation", tokenizer)


def test_rewards_of_another_range_are_another_set(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines([row | {"reward": 3} for row in ROWS]))
    config = data(tmp_path, train=str(file), reward_range=[0, 4])
    assert set(load_split(config, "train", tokenizer).rewards) == {0.75}
    config.reward_range = [0, 3]
    assert set(load_split(config, "train", tokenizer).rewards) == {1.0}


def test_scored_sets_know_where_tokens_end(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines([{"prompt": "1+2?", "response": "12;A3", "reward": 1}]))
    plain = data(tmp_path)
    found = load_to_score(plain, str(file), tokenizer)
    assert found.ends is not None
    at = found.response_starts[0]
    assert found.ends[at:].tolist() == [1, 2, 3, 4, 5, 5], "the end token reads nothing"
    plain.template = "A{prompt}={response}+"
    found = load_to_score(plain, str(file), tokenizer)
    assert found.ends is not None
    assert found.ends[found.response_starts[0] :].tolist() == [1, 2, 3, 4, 5, 6, 6]
    assert load_split(data(tmp_path, train=str(file)), "train", tokenizer).ends is None


# --- configuration -----------------------------------------------------------------------------

CONFIG = "run: {name: r, dir: runs/r}\nmodel: {path: trunk}\n"


def configured(tmp_path: Path, *overrides: str, text: str = "") -> DataConfig:
    file = tmp_path / "critic.yaml"
    file.write_text(CONFIG + text)
    config = load_config(CriticConfig, file, overrides)
    (tmp_path / "stored.yaml").write_text(dump(to_dict(config)))
    stored = load_stored_config(CriticConfig, tmp_path / "stored.yaml")
    assert stored.data == config.data, "what is stored is read back"
    return config.data


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("a.jsonl", "a.jsonl"),
        ("train-*.parquet", "train-*.parquet"),
        ("1.10", "1.10"),
        ("007", "007"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("./0.05", "./0.05"),
        ('"0.05"', "0.05"),
        ("[a.jsonl, 1.10]", ["a.jsonl", "1.10"]),
        ("['train-*.parquet', 0.5]", ["train-*.parquet", "0.5"]),
        ("embedded", "embedded"),
    ],
)
def test_a_source_is_what_was_typed(tmp_path: Path, typed: str, meant: object) -> None:
    other = "embedded" if meant == "embedded" else "v.jsonl"
    found = configured(tmp_path, f"data.train={typed}", f"data.validation={other}")
    assert found.train == meant
    if "*" not in typed or typed.startswith("["):  # YAML itself takes it for an alias
        text = f"data: {{train: {typed}, validation: {other}}}\n"
        assert configured(tmp_path, text=text).train == meant


def test_a_number_between_0_and_1_is_a_share_of_the_training_data(tmp_path: Path) -> None:
    given = ("data.train=a.jsonl", "data.validation=0.05")
    assert configured(tmp_path, *given).validation == 0.05
    text = yaml.safe_dump({"data": {"train": "a.jsonl", "validation": 0.05}})
    assert configured(tmp_path, text=text).validation == 0.05
    assert configured(tmp_path, given[0], "data.validation=./0.05").validation == "./0.05"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.train=0.05", "data.train: a file, a glob, a folder or a list of these, not 0.05"),
        ("data.train=[]", "data.train: an empty list"),
        ("data.train=[embedded, a.jsonl]", "data.train: embedded stands alone"),
        ("data.validation=[a.jsonl, '']", "data.validation: '' is no name or path"),
        ("data.reward_range=[4, 0]", "data.reward_range: [4.0, 0.0] must be two numbers"),
        ("data.reward_range=[1]", "data.reward_range: [1.0] must be two numbers"),
        ("data.fields={preset: prm}", "data.fields: unknown preset 'prm'; the presets are alpaca"),
        ("data.fields={answers: a}", "data.fields.answers: unknown field; valid: prompt"),
    ],
)
def test_what_no_source_can_be_is_refused(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        configured(tmp_path, "data.train=a.jsonl", "data.validation=v.jsonl", override)
    assert said in str(error.value)


def test_embedded_data_has_a_validation_set_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="both embedded or neither"):
        configured(tmp_path, "data.train=embedded", "data.validation=0.1")


def test_the_files_of_a_folder_are_those_of_known_kinds(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    assert [file.name for file in data_files(str(folder))] == [
        "part-0.jsonl",
        "part-1.jsonl.gz",
        "part-2.parquet",
    ]
