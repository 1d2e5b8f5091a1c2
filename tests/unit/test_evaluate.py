"""What job.evaluate reads of values and data, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job import evaluate
from job.common.errors import InputError
from job.data.fields import of_prompt
from job.data.rows import text_key
from job.data.values_text import write_rows
from job.evaluation.reading import Data, read_solutions
from job.evaluation.solutions import Solution
from job.evaluation.summary import summarise
from job.run.evaluations import data_place, evaluation_folder, evaluations

ROWS = [
    {"prompt": "1+1?", "steps": ["ab", "cd"], "label": -1, "id": "x-1"},
    {"prompt": "1+1?", "steps": ["ef"], "label": 0, "id": "y-2"},
    {"prompt": "1+1?", "steps": [], "label": -1, "id": "y-3"},
]


def key(text: str) -> str:
    return f"{text_key(text):016x}"


PROBLEM = key(of_prompt("1+1?"))
VALUES: list[dict[str, Any]] = [
    {"line": 1, "values": [0.5, 0.25, 0.75, 0.125], "final_value": 0.125, "tokens": [1, 2, 3, 4],
     "reward": 1.0, "problem": PROBLEM, "response": key("ab\n\ncd"), "ends": [1, 3, 5, 6],
     "error": None},
    {"line": 2, "values": [0.5], "final_value": 0.5, "tokens": [1],
     "reward": 0.0, "problem": PROBLEM, "response": key("ef"), "ends": [2], "error": None},
    {"line": 3, "values": None, "final_value": None, "tokens": None,
     "reward": None, "problem": None, "response": None, "ends": None, "error": "no step"},
]  # fmt: skip


def stored(folder: Path, name: str = "values.parquet", rows: Any = VALUES) -> Path:
    file = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        plain = [row | {"prompt_value": None} for row in rows]
        with file.open("wb") as stream:
            write_rows(file, stream, list(plain[0]), plain)
    return file


def values_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Values as a critic would have them for plain rows, whatever it would give."""
    texts = ((key(of_prompt(row["prompt"])), key(row["response"])) for row in rows)
    return [
        value | {"problem": problem, "response": response}
        for value, (problem, response) in zip(VALUES, texts, strict=False)
    ]


def data(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def same(a: Solution, b: Solution) -> bool:
    return a.values.tolist() == b.values.tolist() and repr(a) == repr(b)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv"])
def test_values_of_each_kind_are_the_same_solutions(tmp_path: Path, name: str) -> None:
    found = read_solutions(stored(tmp_path, name), None)
    first, second = found
    assert (first.problem, first.reward, first.score) == (PROBLEM, 1.0, 0.125)
    assert second.problem == first.problem
    expected = read_solutions(stored(tmp_path), None)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_the_value_of_a_step_is_that_of_the_token_in_which_it_ends(tmp_path: Path) -> None:
    given = Data(str(data(tmp_path)), "processbench")
    first, second = read_solutions(stored(tmp_path), given)
    # "ab", a blank line, "cd": character 2 is within the second token, and 6 ends the last
    assert first.step_values == (0.25, 0.125)
    assert (first.first_error, first.part) == (-1, "x")
    assert (second.step_values, second.first_error, second.part) == ((0.5,), 0, "y")
    assert np.isnan(first.prompt_value)


@pytest.mark.parametrize(
    ("pattern", "answer"), [(r"A(\d)", "7"), (r"A\d", "A7"), ("(B)?A", ""), ("C", None)]
)
def test_an_answer_is_the_last_match_or_its_first_group(
    tmp_path: Path, pattern: str, answer: str | None
) -> None:
    rows = [{"prompt": "p", "response": "A5 then A7"}, {"prompt": "p", "response": "A"}]
    options = evaluate._pattern(pattern)
    given = Data(str(data(tmp_path, rows)), None, None, options)
    file = stored(tmp_path, rows=values_of(rows))
    assert read_solutions(file, given)[0].answer == answer


def test_answers_and_parts_may_be_columns(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "r", "said": k, "of": "b"} for k in (5, 5.0)]
    given = Data(str(data(tmp_path, rows)), {"answer": "said", "part": "of"})
    found = read_solutions(stored(tmp_path, rows=values_of(rows)), given)
    assert [(one.answer, one.part) for one in found] == [("5", "b"), ("5", "b")]


def test_rewards_of_the_data_go_before_those_of_the_values(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "r", "reward": 3}, {"prompt": "p", "response": "s"}]
    given = Data(str(data(tmp_path, rows)), None, [0, 4])
    found = read_solutions(stored(tmp_path, rows=values_of(rows)), given)
    assert [one.reward for one in found] == [0.75, 0.0]


def test_values_of_other_data_are_refused(tmp_path: Path) -> None:
    given = Data(str(data(tmp_path, ROWS[:2])), "processbench")
    with pytest.raises(InputError, match="row 3 is line 3, and in the data missing"):
        read_solutions(stored(tmp_path), given)
    file = data(tmp_path)
    file.write_text("\n" + file.read_text())
    with pytest.raises(InputError, match=r"row 1 is line 1, and in the data .*data\.jsonl:2"):
        read_solutions(stored(tmp_path), given)


PLAIN = [{"prompt": "p", "response": text, "reward": 1} for text in ("A", "B")]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([PLAIN[1], PLAIN[0]], r"row 1 and .*data\.jsonl:1 .*another response"),
        ([PLAIN[0], PLAIN[1] | {"response": "C"}], r"row 2 and .*data\.jsonl:2 .*another response"),
        ([PLAIN[0], PLAIN[1] | {"prompt": "q"}], r"row 2 and .*data\.jsonl:2 .*another problem"),
        ([PLAIN[0], {"prompt": "p", "text": "B"}], r"data\.jsonl:2 .*'response' is missing"),
    ],
)
def test_values_of_other_rows_or_in_another_order_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], said: str
) -> None:
    file = stored(tmp_path, rows=values_of(PLAIN))
    assert len(read_solutions(file, Data(str(data(tmp_path, PLAIN))))) == 2
    with pytest.raises(InputError, match=said):
        read_solutions(file, Data(str(data(tmp_path, rows))))


def test_other_labels_are_taken_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = stored(tmp_path, rows=values_of(PLAIN))
    read_solutions(file, Data(str(data(tmp_path, [PLAIN[0], PLAIN[1] | {"reward": 0}]))))
    assert not caplog.messages
    found = read_solutions(file, Data(str(data(tmp_path, PLAIN))))
    assert [one.reward for one in found] == [1, 1]
    assert "1 of 2 labels differ from those that the values were made with" in caplog.text


def test_values_that_know_no_problems_need_the_data(tmp_path: Path) -> None:
    old = [
        {k: v for k, v in row.items() if k not in ("problem", "response", "ends")} for row in VALUES
    ]
    file = stored(tmp_path, rows=old)
    with pytest.raises(InputError, match="name the data with --data"):
        read_solutions(file, None)
    found = read_solutions(file, Data(str(data(tmp_path)), "processbench"))
    assert found[0].problem == found[1].problem != ""
    assert found[0].step_values == ()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"{}\n"])
def test_what_holds_no_values_is_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("a.parquet", "a.jsonl"):
        (tmp_path / name).write_bytes(content if name == "a.parquet" else b"{}\n")
        with pytest.raises(InputError, match=f"{name}: "):
            read_solutions(tmp_path / name, None)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("values", [0.5, math.nan], "values[1] must be a finite number, not nan"),
        ("values", [-math.inf], "values[0] must be a finite number, not -inf"),
        ("values", ["high"], "values[0] must be a finite number, not 'high'"),
        ("values", [0.5, None], "values[1] must be a finite number, not None"),
        ("values", "high", "values must be a list of numbers or null, not 'high'"),
        ("prompt_value", math.nan, "prompt_value must be a finite number or null, not nan"),
        ("reward", 7, "reward must be a number from 0 to 1 or null, not 7"),
        ("reward", math.nan, "reward must be a number from 0 to 1 or null, not nan"),
        ("reward", "good", "reward must be a number from 0 to 1 or null, not 'good'"),
    ],
)
def test_what_is_no_value_or_reward_is_refused_by_its_row(
    tmp_path: Path, key: str, value: Any, said: str
) -> None:
    file = tmp_path / "values.jsonl"
    rows = [VALUES[0], VALUES[1] | {key: value}, VALUES[2]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for given in (None, Data(str(data(tmp_path)), "processbench")):
        with pytest.raises(InputError) as error:
            read_solutions(file, given)
        assert str(error.value) == f"{file}: row 2: {said}"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["job.evaluate", *map(str, arguments)])
    evaluate.main()


def test_the_command_writes_beside_the_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stored(tmp_path)
    run(monkeypatch, "--values", file, "--error", "0.5", "0.1")
    folder = tmp_path / "values.parquet.evaluation"
    found = json.loads((folder / "evaluation.json").read_text())
    # of two the right one has the lower value
    assert found["choosing"]["rules"]["best_of_n"]["value"] == [0.5, 0.0]
    assert found["choosing"]["errors"] == [0.5, 0.1]
    assert found["choosing"]["needed"]["oracle"] == [1, 2]
    said = capsys.readouterr().out
    assert "Accuracy of the last value read, on 1 pairs" in " ".join(said.split())
    assert str(folder / "evaluation.html") in said
    assert "critic" in said
    page = (folder / "evaluation.html").read_text()
    assert "<h2>Evaluation: values.parquet</h2>" in page
    assert "2 solutions of 1 problems, 2 labelled solutions each" in page


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("ZZZ(.*)", "in 0 of 2 responses; no majorities: 1 of 1 problems have no answer\n"),
        ("A", "in 1 of 2 responses\n"),
    ],
)
def test_it_is_said_in_how_many_responses_there_is_an_answer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pattern: str,
    said: str,
) -> None:
    values = stored(tmp_path, rows=values_of(PLAIN))
    run(monkeypatch, "--values", values, "--data", data(tmp_path, PLAIN), "--answer", pattern)
    assert f"--answer matches {said}" in capsys.readouterr().out


def test_an_out_that_is_a_file_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tmp_path / "values.parquet"
    values.write_bytes(b"no values")
    for out in (values, values / "below"):
        with pytest.raises(InputError, match=f"--out {out}: {values} is a file, where a folder"):
            run(monkeypatch, "--values", values, "--out", out)


def test_a_range_of_rewards_is_that_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [PLAIN[0] | {"reward": 3}, PLAIN[1] | {"reward": 1}]
    options = ["--values", stored(tmp_path, rows=values_of(rows)), "--data", data(tmp_path, rows)]
    run(monkeypatch, *options, "--reward-range", "0", "4", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert found["choosing"]["rules"]["oracle"]["value"] == [0.5, 0.75]


@pytest.mark.parametrize("own_problems", [False, True])
def test_rows_of_best_of_four_that_have_one_prompt_are_two(
    tmp_path: Path, own_problems: bool
) -> None:
    """Of four rows, two with one prompt, the right solution is ahead in two."""
    prompts, ahead = ("p", "q", "p", "r"), (0.9, 0.9, 0.1, 0.1)
    rows = [
        {"prompt": p, "chosen": [f"{k}"], "rejected": [f"{k}{x}" for x in "abc"], "subset": "Math"}
        | ({"problem_id": f"id {k}"} if own_problems else {})
        for k, p in enumerate(prompts)
    ]
    values = [
        VALUES[1] | {
            "line": k + 1, "values": [ahead[k] if right else 0.5], "reward": float(right),
            "problem": key(str(row.get("problem_id") or of_prompt(prompts[k]))),
            "response": key(text),
        }
        for k, row in enumerate(rows)
        for right, text in [(True, row["chosen"][0]), *((False, t) for t in row["rejected"])]
    ]  # fmt: skip
    file = stored(tmp_path, rows=values)
    for given in (None, Data(str(data(tmp_path, rows)), "preference")):
        found = summarise(read_solutions(file, given))["best_of_four"]
        (part,) = found["parts"].values()
        assert (part["problems"], part["value"], found["left_out"]) == (4, 0.5, 0)


def test_the_data_changes_no_figure_that_the_values_alone_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{k // 2}?", "response": f"r{k}", "problem_id": k // 2} for k in range(24)]
    chances = np.random.default_rng(0).random(24)
    values = [
        VALUES[1] | {
            "line": k + 1, "values": [float(x)], "reward": float(k % 5 < 2),
            "problem": key(str(row["problem_id"])), "response": key(str(row["response"])),
        }
        for k, (row, x) in enumerate(zip(rows, chances, strict=True))
    ]  # fmt: skip
    file = stored(tmp_path, rows=values)
    figures = []
    for options in ([], ["--data", data(tmp_path, rows)]):
        run(monkeypatch, "--values", file, *options, "--out", tmp_path / "out")
        figures.append(json.loads((tmp_path / "out/evaluation.json").read_text()))
    assert figures[1].pop("data") == str(tmp_path / "data.jsonl")
    assert figures[0] == figures[1]
    before, after = (figures[0]["calibration"][side]["log_loss"] for side in ("before", "after"))
    assert before != after


def test_values_that_only_rank_have_chances_by_the_sigmoid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = stored(tmp_path)
    briers = []
    for option in ([], ["--logits"]):
        run(monkeypatch, "--values", file, *option, "--out", tmp_path / "out")
        found = json.loads((tmp_path / "out/evaluation.json").read_text())
        briers.append(found["calibration"]["before"]["brier"])
    chances = 1 / (1 + np.exp([-0.125, -0.5]))
    expected = [((1 - x) ** 2 + y**2) / 2 for x, y in ((0.125, 0.5), chances)]
    assert briers == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either --critic and --data, or --values"),
        (["--critic", "run"], "--critic: name the solutions with --data"),
        (["--critic", "run", "--values", "v"], "give either"),
        (["--values", "none.parquet"], "none.parquet: no such file"),
        (["--values", "values.parquet", "--answer", "A"], "name it with --data"),
        (["--values", "values.parquet", "--data", "d", "--answer", "("], "--answer (: missing )"),
        (["--values", "values.parquet", "--data", "d", "--fields", "prm"], "preset 'prm'"),
        (["--values", "values.parquet", "--data", "d", "--fields", "{a: b"], "--fields {a: b: "),
        (["--values", "values.parquet", "--error", "2"], "--error 2: a share from 0 to 1"),
        (["--critic", "run", "--data", "d", "--reward-range", "4", "0"], "the lower one first"),
        (["--critic", "run", "--data", "d", "--reward-range", "nan", "1"], "reward_range: "),
        (["--critic", "run", "--data", "d", "--reward-range", "0", "inf"], "reward_range: "),
        (
            ["--critic", "run", "--data", "d", "--fields", "prm800k", "--reward-range", "0", "4"],
            "the preset prm800k has no rewards of a range",
        ),
        (["--values", "values.parquet", "--data", "none.jsonl"], "none.jsonl: cannot read"),
        (["--critic", "run", "--data", "embedded"], "--data embedded: an evaluation takes files"),
        (["--values", "values.parquet", "--tune-on", "math"], "--tune-on: it is about the data"),
        (["--values", "values.parquet", "--fields", "attempts"], "--fields: it is about the data"),
        (["--values", "values.parquet", "--reward-range", "0", "4"], "--reward-range: it is about"),
        (["--values", "values.parquet", "--trunk", "t"], "--trunk: it is about a critic"),
        (["--values", "values.parquet", "--override", "a=b"], "--override: it is about a critic"),
        (["--values", "values.parquet", "--verify"], "--verify: it is about a critic"),
        (["--critic", "run", "--data", "d", "--logits"], "--logits: it is about --values"),
        (["--critic", "values.parquet", "--data", "d"], "not a run; say with --out"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    stored(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        run(monkeypatch, *arguments)
    assert said in str(error.value)


STEPWISE = [
    {"prompt": "p", "completions": ["ab", "cd"], "labels": [True, False], "part": "A"},
    {"prompt": "p", "completions": ["ef"], "labels": [None], "part": "B"},
]


@pytest.mark.parametrize(
    ("part", "labels", "said"),
    [
        ("B", [True, False], "--tune-on B: no such part with labelled steps; there is A"),
        ("A", [None, None], "--tune-on A: no solution has labelled steps"),
    ],
)
def test_a_threshold_is_chosen_only_where_steps_are_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, labels: list[Any], said: str
) -> None:
    texts = [{"prompt": "p", "response": text} for text in ("ab\ncd", "ef")]
    options: list[str | Path] = ["--values", stored(tmp_path, rows=values_of(texts))]
    options += ["--data", data(tmp_path, [STEPWISE[0] | {"labels": labels}, STEPWISE[1]])]
    options += ["--fields", "{preset: stepwise, part: part}", "--tune-on", part]
    with pytest.raises(InputError) as error:
        run(monkeypatch, *options)
    assert str(error.value) == said


def test_evaluations_of_a_run_lie_by_the_names_of_their_data(tmp_path: Path) -> None:
    names = ("a/math.jsonl", "math-*.parquet", "a.jsonl and 2 more", "...", "prüfung.jsonl")
    folders = [evaluation_folder(tmp_path, name).name for name in names]
    assert folders == [
        "math.jsonl",
        "math--.parquet",
        "a.jsonl-and-2-more",
        "data",
        "pr-fung.jsonl",
    ]
    for name in folders[:2]:
        (tmp_path / "evaluations" / name).mkdir(parents=True)
    file = tmp_path / "evaluations" / "math.jsonl" / "evaluation.json"
    file.write_text('{"solutions": 1}')
    (tmp_path / "evaluations" / folders[1] / "evaluation.json").write_text("{")
    assert [(found.name, found.figures) for found in evaluations(tmp_path)] == [
        ("math.jsonl", {"solutions": 1})
    ]


def test_data_of_one_name_in_two_folders_has_two_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (str(tmp_path / f"{x}/test.jsonl") for x in ("d1", "d2", "e/d2"))
    for place, name in (
        (first, "test.jsonl"), (second, "d2-test.jsonl"), (third, "e-d2-test.jsonl"),
    ):  # fmt: skip
        folder = evaluation_folder(tmp_path, place)
        assert folder.name == name
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(json.dumps({"data": place}))
        assert evaluation_folder(tmp_path, place) == folder
    # embedded data are the same wherever the command is given
    embedded = evaluation_folder(tmp_path, "embedded")
    embedded.mkdir()
    (embedded / "evaluation.json").write_text(json.dumps({"data": data_place("embedded")}))
    monkeypatch.chdir(tmp_path)
    assert evaluation_folder(tmp_path, "embedded") == embedded
    # one of which nobody knows the data may be this one's
    (tmp_path / "evaluations/test.jsonl/evaluation.json").write_text('{"solutions": 1}')
    assert evaluation_folder(tmp_path, second).name == "test.jsonl"


def test_csv_values_have_lists_of_ends(tmp_path: Path) -> None:
    with stored(tmp_path, "a.csv").open(newline="") as file:
        assert [row["ends"] for row in csv.DictReader(file)] == ["[1, 3, 5, 6]", "[2]", ""]
