"""What job.data says of a file, counted by hand, and its rows as the model will see them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from job.common.errors import InputError
from job.common.schema import DataConfig
from job.data import __main__ as command
from job.data.arithmetic import ALPHABET
from job.data.survey import Survey, survey
from job.data.token_cache import load_split
from job.data.tokenizer import Tokenizer, load_tokenizer, write_character_tokenizer
from job.run.data_page import facts, write_data_page

ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1?", "response": "2", "reward": 1, "problem_id": "a"},
    {"prompt": "1+1?", "response": "3;A3", "reward": 0, "problem_id": "a"},
    {"prompt": "1+2?", "response": "A3", "reward": 0.5, "problem_id": "b", "truncated": True},
    {"prompt": "1+3?", "response": "A4", "problem_id": "c"},
    {"prompt": "1+3?", "response": " ", "reward": 1},
]
STEPS = [{"prompt": "1+2?", "completions": ["1+2=3;", "A3"], "labels": [0.75, 0]}]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def made(folder: Path) -> Tokenizer:
    (folder / "trunk").mkdir()
    write_character_tokenizer(folder / "trunk", ALPHABET)
    return load_tokenizer(folder / "trunk")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return made(tmp_path)


def looked_at(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> Survey:
    tokenizer = keys.pop("tokenizer", None)
    file = write(folder / "a.jsonl", rows)
    return survey(DataConfig(**{"train": file, "validation": None, **keys}), tokenizer)


def test_counts_are_those_of_the_file(tmp_path: Path) -> None:
    found = looked_at(tmp_path, ROWS)
    assert (found.rows, found.n_bad, found.truncated) == (4, 1, 1)
    assert found.bad[0].line == 5
    assert found.solutions == {1: 2, 2: 1}
    assert found.lengths.tolist() == [5, 8, 6, 6]
    labels = {name: (n, by_row, by_length) for name, n, by_row, by_length in found.labels()}
    assert labels == {
        "0": (1, 0.25, 4 / 9),
        "0.4 to 0.6": (1, 0.25, 2 / 9),
        "1": (1, 0.25, 1 / 9),
        "no label": (1, 0.25, 2 / 9),
    }
    assert found.histogram(3) == [(5, 6, 3), (7, 8, 1)]
    assert found.histogram(1) == [(5, 8, 4)]
    said = dict(facts(found))
    assert said["rows"] == "4, and 1 bad"
    assert said["solutions a problem"] == "1 (2 problems), 2 (1 problems)"
    assert said["characters"] == "25; 5 to 8, median 6"
    assert "problems that validation has too" not in said


def test_with_a_tokenizer_lengths_are_tokens_and_long_rows_are_counted(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    found = looked_at(tmp_path, ROWS, tokenizer=tokenizer, max_length=9)
    # begin and end token, but none behind what was cut off
    assert found.lengths.tolist() == [7, 10, 7, 8]
    assert found.prompts == [5] * 4
    assert (found.unit, found.overlong) == ("tokens", 1)


def test_problems_of_validation_are_told(tmp_path: Path) -> None:
    other = write(tmp_path / "v.jsonl", [ROWS[0], ROWS[2], ROWS[2] | {"problem_id": "new"}])
    assert looked_at(tmp_path, ROWS, validation=other).shared == 2
    assert looked_at(tmp_path, ROWS, validation=0.5).shared is None


@pytest.mark.parametrize("spelling", ["{}/a.jsonl", "{}/./a.jsonl", "{}/link.jsonl", "{}/a.*l"])
def test_the_validation_data_itself_is_known_however_it_is_named(
    tmp_path: Path, spelling: str
) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    named = spelling.format(tmp_path)
    found = looked_at(tmp_path, ROWS, validation=named)
    assert dict(facts(found))["validation"] == "these very files"
    other = write(tmp_path / "v.jsonl", ROWS[2:3])
    said = dict(facts(looked_at(tmp_path, ROWS, validation=[other, named])))
    assert (said["files that validation has too"], "validation" in said) == ("1", False)
    assert said["problems that validation has too"] == "3"
    assert "files that validation has too" not in dict(
        facts(looked_at(tmp_path, ROWS, validation=other))
    )


def test_rows_are_shown_as_the_model_sees_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = looked_at(tmp_path, STEPS, fields="stepwise", tokenizer=tokenizer)
    (shown,) = found.first
    # the line end between the steps is a token that this vocabulary does not know
    expected = "<s>·1·+·2·? ▶ 1·+·2·=·3·;{0.75}·"
    expected += "↵\n·A·3{0}·</s>{0}"
    assert command.as_text(shown).partition("\n")[2] == expected
    assert found.with_targets == 1
    templated = looked_at(
        tmp_path, STEPS, fields="stepwise", tokenizer=tokenizer, template="A{prompt}={response};"
    )
    said = command.as_text(templated.first[0]).partition("\n")[2]
    assert said.startswith("<s>·A·1·+·2·?·= ▶ 1·+·2·=·3·;{0.75}")
    assert said.endswith("3{0}·;·</s>{0}")
    plain = looked_at(tmp_path, STEPS, fields="stepwise").first[0]
    assert [(piece.text, len(piece.targets)) for piece in plain.response] == [
        ("1+2=3;", 1),
        ("\nA3", 2),
    ]


def test_a_target_behind_the_last_token_makes_a_row_bad(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [ROWS[0] | {"targets": [{"at": at, "unit": "token", "value": 1.0}]} for at in (1, 1000)]
    found = looked_at(tmp_path, rows, fields={"targets": "targets"}, tokenizer=tokenizer)
    assert (found.rows, found.n_bad, found.with_targets) == (1, 1, 1)
    (bad,) = found.bad
    assert bad.line == 2
    assert "token 1000 of" in bad.reason


def test_targets_are_marked_on_the_page_where_they_lie(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    found = looked_at(tmp_path, STEPS, fields="stepwise", tokenizer=tokenizer)
    html = write_data_page("a", found, tmp_path / "page.html").read_text()
    assert '<span class="response">;<sup>0.75</sup></span>' in html
    assert '<span class="response">3<sup>0</sup></span>' in html
    assert html.count("<sup>") == 3


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["job.data", *map(str, arguments)])
    command.main()


def test_the_command_prints_and_writes_a_page(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path / "a.jsonl", ROWS)
    config = tmp_path / "critic.yaml"
    config.write_text(
        f"run: {{name: r, dir: r}}\nmodel: {{path: {tokenizer.folder}}}\n"
        f"data: {{train: none.jsonl, validation: {file}, max_length: 9}}\n"
    )
    page = tmp_path / "page.html"
    run(monkeypatch, file, "--config", config, "--page", page, "--rows", "1")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:20])) <= 80
    for said in (
        "4, and 1 bad",
        "longer than data.max_length",
        "25.0%",
        f"Bad rows: 1\n  {file}:5: ",
    ):
        assert said in out
    assert out.count("▶") == 1
    html = page.read_text()
    for said in (
        "<h1>",
        "the first 1 of 1",
        "the response begins",
        '<span class="response">2</span>',
    ):
        assert said in html


@pytest.mark.parametrize("configured", [False, True])
def test_the_range_of_rewards_is_that_of_the_command_line(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    configured: bool,
) -> None:
    file = write(tmp_path / "a.jsonl", [ROWS[0] | {"reward": 3}])
    config = tmp_path / "critic.yaml"
    config.write_text(
        f"run: {{name: r, dir: r}}\nmodel: {{path: {tokenizer.folder}}}\n"
        f"data: {{train: none.jsonl, validation: ./a.jsonl, reward_range: [0, 3]}}\n"
    )
    monkeypatch.chdir(tmp_path)
    given = ("--config", config) if configured else ()
    run(monkeypatch, file, "--reward-range", "0", "4", *given)
    out = capsys.readouterr().out
    assert "reward 0.75\n" in out
    assert ("these very files" in out) == configured
    fields = ("--fields", "processbench")
    with pytest.raises(InputError, match="the preset processbench has no rewards of a range"):
        run(monkeypatch, file, *fields, *(given or ("--reward-range", "0", "4")))


LABELS = ("2", "-1", '"yes"', '"0"', "[0]", "NaN", "Infinity", "1e400", '"2024-01-01T00:00:00"')


def test_labels_that_a_training_refuses_are_told_with_its_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [*LABELS, *["null"] * 5, "1"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"prompt": "p", "response": "r", "reward": {x}}}\n' for x in texts))
    run(monkeypatch, file, "--page", tmp_path / "page.html")
    out = capsys.readouterr().out
    with pytest.raises(InputError) as refused:
        load_split(
            DataConfig(str(file), str(file), cache_dir=str(tmp_path)), "train", made(tmp_path)
        )
    reasons = str(refused.value).splitlines()[1:]
    assert len(reasons) == 11
    assert "Rows that job.train refuses for their label: 14\n" + "\n".join(reasons[:10]) in out
    assert "\n  ... and 4 more\n" in out
    assert f"{file}:7: reward inf lies outside [0, 1]" in out
    assert "refuses for their label" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "p", "response": "r", "is_correct": True}] * 2, "no row has a label"),
        ([{"prompt": "p", "is_correct": True}] * 2, "no usable row (2 read)"),
    ],
)
def test_data_without_a_row_to_train_on_ends_so_and_names_its_fields(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, Any]],
    said: str,
) -> None:
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match=re.escape(said)):
        run(monkeypatch, file)
    assert f"{file}:1: field 're" in (out := capsys.readouterr().out)
    assert "is missing; the row has 'prompt', " in out
    assert "'is_correct'" in out


def test_solutions_of_one_row_are_refused_by_their_own_labels(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "responses": ["a", "b", " "], "labels": [1, 2, 1]}] * 2
    found = looked_at(tmp_path, rows, fields="attempts")
    assert (found.rows, found.n_bad, found.n_unlabelled) == (4, 2, 2)
    lines = [str(row).partition("a.jsonl:")[2] for row in found.unlabelled]
    assert lines == [f"{k}: labels[1] 2 lies outside [0, 1]" for k in (1, 2)]


def test_a_name_in_the_data_is_no_html(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"response": "<b>2</b>", "problem_id": "<i>"}]
    page = write_data_page("a<b", looked_at(tmp_path, rows), tmp_path / "page.html").read_text()
    assert "&lt;b&gt;2&lt;/b&gt;" in page
    assert "<b>2" not in page
    assert "<i>," not in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.jsonl"], "none.jsonl: cannot read the data"),
        (["embedded"], "embedded data is made, not read"),
        (["a.jsonl", "--fields", "prm"], "unknown preset 'prm'"),
        (["a.jsonl", "--fields", "[a"], "--fields [a: "),
        (["a.jsonl", "--reward-range", "1", "1"], "the lower one first"),
        (["a.jsonl", "--config", "none.yaml"], "none.yaml: cannot read the configuration"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        run(monkeypatch, *arguments)
    assert said in str(error.value)
