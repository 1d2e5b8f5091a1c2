"""Each layout in which the field keeps solutions, from a small file made here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.common.possible_values import impossible_fields, impossible_range
from job.common.schema import FIELD_PRESETS, PLAIN_FIELDS, PRESET_FIELDS
from job.data.layouts import PRESETS
from job.data.rows import BadRow, Message, Row, read_rows
from job.data.targets import END, Target

USER, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}
WRONG, SYSTEM = {"role": "assistant", "content": "6"}, {"role": "system", "content": "Be brief."}


def read(folder: Path, row: Any, fields: Any, **options: Any) -> list[Row]:
    found = list(_all(folder, row, fields, **options))
    return [row for row in found if isinstance(row, Row) or pytest.fail(str(row))]


def refused(folder: Path, row: Any, fields: Any, **options: Any) -> str:
    (bad,) = [row for row in _all(folder, row, fields, **options) if isinstance(row, BadRow)]
    return bad.reason


def _all(folder: Path, row: Any, fields: Any, **options: Any) -> list[Row | BadRow]:
    file = folder / "a.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    return [found for _, found in read_rows(file, fields, **options)]


def test_every_preset_of_the_schema_is_read() -> None:
    assert tuple(PRESETS) == FIELD_PRESETS


STEP = {"completions": [{"text": "r", "rating": 1}], "chosen_completion": 0}
EACH_LAYOUT: dict[str | None, dict[str, Any]] = {
    None: {"prompt": "q", "response": "r", "reward": 1},
    "alpaca": {"instruction": "q", "output": "r", "is_correct": 1},
    "attempts": {"prompt": "q", "responses": ["r"], "labels": [1]},
    "stepwise": {"prompt": "q", "completions": ["r"], "labels": [1]},
    "math_shepherd": {"input": "q Step 1: r ки", "label": "q Step 1: r +"},
    "prm800k": {"question": {"problem": "q"}, "label": {"steps": [STEP]}},
    "processbench": {"problem": "q", "steps": ["r"], "label": -1},
    "preference": {"prompt": "q", "chosen": "r", "rejected": "s"},
    "trl_conversational": {"prompt": [USER], "completion": [ANSWER], "label": 1},
    "helpsteer2": {"prompt": "q", "response": "r", "correctness": 1},
    "messages": {"messages": [USER, ANSWER], "reward": 1},
}


@pytest.mark.parametrize("preset", EACH_LAYOUT)
def test_a_layout_reads_just_the_names_that_it_may_be_given(
    tmp_path: Path, preset: str | None
) -> None:
    row, own = EACH_LAYOUT[preset], {} if preset is None else {"preset": preset}
    expected = read(tmp_path, row, own)
    names = {name for one in PRESET_FIELDS.values() for name in one}
    for name in names:
        fields = own | {name: "elsewhere"}
        changed = _all(tmp_path, row | {"elsewhere": 7}, fields) != expected
        assert changed == (name in (PRESET_FIELDS[preset] if preset else PLAIN_FIELDS)), name
        assert bool(list(impossible_fields(fields))) != changed


@pytest.mark.parametrize("preset", [name for name in EACH_LAYOUT if name is not None])
def test_an_error_names_the_layouts_that_would_read_the_row(tmp_path: Path, preset: str) -> None:
    said = refused(tmp_path, EACH_LAYOUT[preset], None)
    assert said.startswith("field ")
    assert preset in said.partition("(data.fields=")[2].removesuffix(" reads it)").split(" or ")


def _spoiled(value: Any) -> Iterator[Any]:
    """The value with half of a surrogate pair behind one of its texts, for each of them."""
    if isinstance(value, str):
        yield value + "\ud800"
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from (value | {key: changed} for changed in _spoiled(one))
    elif isinstance(value, list):
        for k, one in enumerate(value):
            yield from ([*value[:k], changed, *value[k + 1 :]] for changed in _spoiled(one))


@pytest.mark.parametrize("preset", EACH_LAYOUT)
def test_no_layout_takes_half_of_a_surrogate_pair_for_a_text(
    tmp_path: Path, preset: str | None
) -> None:
    fields = {"part": "part"} | ({"preset": preset} if preset else {})
    file = tmp_path / "a.jsonl"
    for row in _spoiled(EACH_LAYOUT[preset] | {"part": "a"}):
        file.write_text(json.dumps(row) + "\n")
        assert any(isinstance(found, BadRow) for _, found in read_rows(file, fields)), row


def test_an_error_names_no_layout_where_none_reads_the_row_or_one_is_named(tmp_path: Path) -> None:
    assert "data.fields" not in refused(tmp_path, {"prompt": "q", "reward": 1}, None)
    row = EACH_LAYOUT["preference"]
    assert "data.fields" not in refused(tmp_path, row, {"prompt": "prompt"})
    assert "data.fields" not in refused(tmp_path, row, "messages")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"preset": "attempts", "targets": "t"},
            "data.fields.targets: not read by the preset attempts; valid: prompt, response, "
            "reward, problem_id, answer, part, preset",
        ),
        ({"preset": "preference", "response": "r"}, "data.fields.response: not read by the preset"),
        ({"messages": "m"}, "data.fields.messages: unknown field; valid: prompt, response"),
        ({"preset": "messages", "prompt": "p"}, "data.fields.prompt: not read by the preset"),
    ],
)
def test_a_name_for_what_a_layout_does_not_read_is_refused(
    fields: dict[str, str], said: str
) -> None:
    (problem,) = impossible_fields(fields)
    assert problem.startswith(said)


@pytest.mark.parametrize("preset", EACH_LAYOUT)
def test_a_reward_range_is_refused_where_it_changes_nothing(
    tmp_path: Path, preset: str | None
) -> None:
    row = EACH_LAYOUT[preset] | ({"margin": 1} if preset == "preference" else {})
    rewards = [one.reward for one in read(tmp_path, row, preset)]
    changed = rewards != [one.reward for one in read(tmp_path, row, preset, reward_range=(0, 5))]
    assert changed != bool(list(impossible_range([0, 5], preset)))
    assert changed != bool(list(impossible_range([0, 5], {"preset": preset})))


@pytest.mark.parametrize("span", [[0, math.inf], [-math.inf, 1], [0, math.nan], [1, 1], [1], []])
def test_a_reward_range_is_two_finite_numbers(span: list[float]) -> None:
    (problem,) = impossible_range(span)
    assert (
        problem == f"data.reward_range: {span} must be two numbers, the lower one first, and finite"
    )


def test_attempts_are_rows_of_one_problem_on_one_line(tmp_path: Path) -> None:
    row = {"question": "2+3?", "generations": ["5", "6"], "correctness": [True, False]}
    a, b = read(tmp_path, row, "attempts")
    assert (a.prompt, a.response, a.reward) == ("2+3?", "5", 1.0)
    assert (b.response, b.reward, b.problem_id) == ("6", 0.0, a.problem_id)
    named = {"task": 7, "q": "2+3?", "tries": ["5", "6"], "ok": [0.25, 1], "said": ["five", None]}
    fields = {
        "preset": "attempts", "prompt": "q", "response": "tries", "reward": "ok",
        "problem_id": "task", "answer": "said",
    }  # fmt: skip
    a, b = read(tmp_path, named, fields)
    assert (a.reward, a.problem_id, a.answer, b.answer) == (0.25, "7", "five", None)


def test_a_bad_attempt_leaves_the_others(tmp_path: Path) -> None:
    row = {"prompt": "2+3?", "responses": ["5", " ", "6", "7"], "labels": [1, 0, "no", 0]}
    found = _all(tmp_path, row, "attempts")
    assert [isinstance(one, Row) for one in found] == [True, False, False, True]
    assert "'responses[1]' is empty" in str(found[1])
    assert "'labels[2]' must be a number or true/false, not 'no'" in str(found[2])
    assert "3 entries, for 4 responses" in refused(
        tmp_path, row | {"labels": [1, 0, 1]}, "attempts"
    )
    assert all(math.isnan(r.reward) for r in read(
        tmp_path, {"prompt": "p", "responses": ["5"]}, "attempts", rewards="optional"
    ))  # fmt: skip


def test_steps_have_their_labels_where_they_end(tmp_path: Path) -> None:
    row = {"prompt": "q", "completions": ["one", "two", "three"], "labels": [True, False, -100]}
    (found,) = read(tmp_path, row, "stepwise")
    assert found.response == "one\ntwo\nthree"
    assert found.step_ends == (3, 7, 13)
    assert found.targets == (Target(3, 1.0), Target(7, 0.0), Target(0, 0.0, 1.0, END))
    assert (found.first_error, found.reward) == (1, 0.0)


def test_soft_step_labels_are_not_rounded(tmp_path: Path) -> None:
    row = {"prompt": "q", "completions": ["one", "two"], "labels": [0.875, 0.625]}
    (found,) = read(tmp_path, row, "stepwise")
    assert [target.value for target in found.targets] == [0.875, 0.625, 0.625]
    assert (found.first_error, found.reward) == (-1, 0.625)
    (found,) = read(tmp_path, row | {"labels": [0.875, None]}, "stepwise")
    assert (found.first_error, found.reward) == (None, 0.875)
    assert refused(tmp_path, row | {"labels": [None, None]}, "stepwise") == "no step has a label"
    (found,) = read(tmp_path, row | {"labels": [None, None]}, "stepwise", rewards="optional")
    assert math.isnan(found.reward)


def test_math_shepherds_marks_are_labels_and_no_text(tmp_path: Path) -> None:
    text = "Two and three? Step 1: 2+3=5 {}\nStep 2: So 6. {}"
    row = {"input": text.format("ки", "ки"), "label": text.format("+", "-"), "task": "GSM8K"}
    (found,) = read(tmp_path, row, "math_shepherd")
    assert found.prompt == "Two and three? "
    assert found.response == "Step 1: 2+3=5\nStep 2: So 6."
    assert found.targets == (Target(13, 1.0), Target(27, 0.0), Target(0, 0.0, 1.0, END))
    assert found.first_error == 1
    other = refused(tmp_path, row | {"label": text.format("+", "*")}, "math_shepherd")
    assert other == "field 'label' differs from 'input' before the mark of step 2"
    assert "'Step 1:'" in refused(tmp_path, row | {"input": "no steps"}, "math_shepherd")


@pytest.mark.parametrize(
    ("text", "response", "ends", "first_error"),
    [
        ("Q?\nStep 1: a {} Step 2: b {}", "Step 1: a Step 2: b", (9, 19), -1),
        ("Q?\nStep 1: a\n{}\n\nStep 2: b\n{}\n", "Step 1: a\n\nStep 2: b", (9, 20), -1),
        ("Q?\nStep 1: a {}Step 2: b{}", "Step 1: a Step 2: b", (9, 19), -1),
        ("Q?\nStep 1: a{}Step 2: b{}", "Step 1: a\nStep 2: b", (9, 19), -1),
        ("Q?\nStep 1: a {}\nStep 2: b {} So c.\n", "Step 1: a\nStep 2: b So c.", (9, 19, 25), None),
    ],
)  # fmt: skip
def test_math_shepherds_text_stays_as_it_lies(
    tmp_path: Path, text: str, response: str, ends: tuple[int, ...], first_error: int | None
) -> None:
    row = {"input": text.format("ки", "ки"), "label": text.format("+", "+")}
    (found,) = read(tmp_path, row, "math_shepherd")
    assert (found.prompt, found.response, found.step_ends) == ("Q?\n", response, ends)
    assert [t.at for t in found.targets] == [*ends[:2], 0]
    assert (found.reward, found.first_error) == (1.0, first_error)


def test_prm800k_goes_the_way_that_was_chosen(tmp_path: Path) -> None:
    def step(chosen: int | None, *rated: tuple[str, int | None]) -> dict[str, Any]:
        completions = [{"text": t, "rating": r, "flagged": None} for t, r in rated]
        return {"completions": completions, "human_completion": None, "chosen_completion": chosen}

    human = step(None, ("bad", -1)) | {"human_completion": {"text": "better", "rating": None}}
    steps = [step(1, ("no", -1), ("a", 1)), step(0, ("b", 0)), human, step(None, ("c", -1))]
    row = {"question": {"problem": "q"}, "label": {"steps": steps, "finish_reason": "found_error"}}
    (found,) = read(tmp_path, row, "prm800k")
    assert (found.prompt, found.response) == ("q", "a\nb\nbetter\nc")
    assert [target.value for target in found.targets] == [1, 1, 1, 0, 0]
    assert found.first_error == 3
    odd = {"question": {"problem": "q"}, "label": {"steps": [step(0, ("a", 2))]}}
    said = "label.steps[0].completions[0].rating must be -1, 0 or 1, not 2"
    assert refused(tmp_path, odd, "prm800k") == said


@pytest.mark.parametrize(("label", "targets"), [(-1, [1, 1, 1]), (0, [0]), (2, [1, 1, 0])])
def test_processbench_says_the_first_wrong_step(
    tmp_path: Path, label: int, targets: list[float]
) -> None:
    row = {"id": "gsm8k-12", "problem": "q", "steps": ["a", "bc", "d"], "label": label}
    (found,) = read(tmp_path, row, "processbench")
    assert (found.response, found.step_ends) == ("a\n\nbc\n\nd", (1, 5, 8))
    assert [target.value for target in found.targets] == [*targets, targets[-1]]
    assert (found.first_error, found.part) == (label, "gsm8k")
    assert found.reward == (label == -1)
    assert "of 3 steps or -1, not 3" in refused(tmp_path, row | {"label": 3}, "processbench")


def test_a_preference_is_a_better_and_a_worse_row_of_one_problem(tmp_path: Path) -> None:
    row = {"prompt": "2+3?", "chosen": "5", "rejected": "6"}
    better, worse = read(tmp_path, row, "preference")
    assert (better.response, better.reward, worse.response, worse.reward) == ("5", 1, "6", 0)
    assert better.problem_id == worse.problem_id
    better, worse = read(tmp_path, row | {"margin": 0.5}, "preference")
    assert (better.reward, worse.reward) == (0.75, 0.25)
    better, worse = read(tmp_path, row | {"margin": 1}, "preference", reward_range=(0, 4))
    assert (better.reward, worse.reward) == (0.625, 0.375)


def test_preferences_may_be_conversations_with_the_prompt_within(tmp_path: Path) -> None:
    whole = {"chosen": [USER, ANSWER], "rejected": [USER, WRONG]}
    answers = {"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]}
    for row in (whole, answers, whole | {"prompt": "2+3?"}):
        better, worse = read(tmp_path, row, "preference")
        assert (better.prompt, better.response, worse.response) == ("2+3?", "5", "6")
        assert better.messages == ()
        assert better.problem_id == worse.problem_id


def test_reward_bench_has_several_of_each_and_subsets(tmp_path: Path) -> None:
    row = {"prompt": "2+3?", "chosen": ["5"], "rejected": ["6", "7", "8"], "subset": "Math"}
    found = read(tmp_path, row, "preference")
    assert [one.reward for one in found] == [1, 0, 0, 0]
    assert {one.part for one in found} == {"Math"}
    assert len({one.problem_id for one in found}) == 1


def test_conversations_keep_their_turns(tmp_path: Path) -> None:
    row = {"prompt": [SYSTEM, USER], "completion": [ANSWER], "label": True}
    (found,) = read(tmp_path, row, "trl_conversational")
    assert found.messages == (Message("system", "Be brief."), Message("user", "2+3?"))
    assert (found.response, found.reward) == ("5", 1.0)
    row = {"messages": [USER, WRONG, USER, ANSWER], "reward": 0.5}
    (found,) = read(tmp_path, row, "messages")
    assert [turn.role for turn in found.messages] == ["user", "assistant", "user"]
    assert (found.response, found.reward) == ("5", 0.5)
    (found,) = read(tmp_path, {"messages": [USER, ANSWER], "score": 1}, "messages")
    assert (found.prompt, found.messages) == ("2+3?", ())


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER], "must end with the assistant's turn, not 'user'"),
        ([ANSWER], "has no turn before the response"),
        ([USER, "5"], "messages[1] must be a message with role and content, not '5'"),
        ([USER, {"role": "assistant", "content": None}], "content' must be text, not NoneType"),
        ("2+3?", "must be a list of messages, not '2+3?'"),
        ([], "must be a list of messages, not []"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(
    tmp_path: Path, messages: object, said: str
) -> None:
    assert said in refused(tmp_path, {"messages": messages, "reward": 1}, "messages")


def test_helpsteers_scale_ends_at_four(tmp_path: Path) -> None:
    row = {"prompt": "p", "response": "r", "helpfulness": 1, "correctness": 3}
    (found,) = read(tmp_path, row, "helpsteer2")
    assert found.reward == 0.75
    fields = {"preset": "helpsteer2", "reward": "helpfulness"}
    (found,) = read(tmp_path, row, fields)
    assert found.reward == 0.25
    assert "correctness 5 lies outside [0, 4]" in refused(
        tmp_path, row | {"correctness": 5}, "helpsteer2"
    )


def test_ranges_are_those_of_steps_and_of_targets_too(tmp_path: Path) -> None:
    steps = {"prompt": "q", "completions": ["one", "two"], "labels": [1, 4]}
    (found,) = read(tmp_path, steps, "stepwise", reward_range=(0, 4))
    assert [target.value for target in found.targets] == [0.25, 1.0, 1.0]
    row = {"prompt": "p", "response": "r", "reward": 2, "targets": [{"at": 1, "value": 3}]}
    (found,) = read(tmp_path, row, None, reward_range=(0, 4))
    assert [target.value for target in found.targets] == [0.75, 0.5]


def test_problems_and_parts_are_read_by_the_names_that_are_given(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "r", "rejected": "s", "task": 7, "kind": "hard"}
    names = {"problem_id": "task", "part": "kind"}
    found = read(tmp_path, row, {"preset": "preference", **names})
    assert [(one.problem_id, one.part) for one in found] == [("7", "hard")] * 2
    row = {"prompt": "q", "responses": ["r"], "labels": [1], "task": 7, "kind": "hard"}
    (one,) = read(tmp_path, row, {"preset": "attempts", **names})
    assert (one.problem_id, one.part) == ("7", "hard")


# --- targets -----------------------------------------------------------------------------------

TARGETS = [{"at": 2, "unit": "step", "value": 0}, {"at": 5, "value": 1}]
WITH_TARGETS = {"prompt": "p", "response": "2+3=5\n5+4=8", "targets": TARGETS}


@pytest.mark.parametrize("preset", ["helpsteer2", "alpaca", "messages", "trl_conversational", None])
def test_targets_are_read_by_their_usual_name(tmp_path: Path, preset: str | None) -> None:
    row = EACH_LAYOUT[preset] | {"targets": [{"at": 1, "value": 0.5}]}
    (found,) = read(tmp_path, row, preset)
    assert found.targets[0].at == 1
    assert (len(found.targets), found.targets[1].unit) == (2, END)


@pytest.mark.parametrize(
    "value", [None, 3, "5", [], ["5"], [[1]], [{"place": 1}], {"at": 1}, [{"at": 1}, 2]]
)
def test_a_field_of_that_name_that_has_none_is_somebody_elses(tmp_path: Path, value: Any) -> None:
    row = {"prompt": "p", "response": "r", "reward": 1, "targets": value}
    (found,) = read(tmp_path, row, None)
    assert (found.targets, found.reward) == ((), 1.0)
    said = refused(tmp_path, row | {"targets": [{"at": 1}, {"at": 2, "value": 1}]}, None)
    assert "targets[0]: an object with at, value" in said


def test_without_a_reward_the_target_furthest_on_is_it(tmp_path: Path) -> None:
    for targets in (TARGETS, TARGETS[::-1]):
        (found,) = read(tmp_path, WITH_TARGETS | {"targets": targets}, None)
        assert found.reward == 0.0
        assert {target.at for target in found.targets} == {5, 11}
    tokens = [{"at": k, "unit": "token", "value": k / 9} for k in (3, 9, 6)]
    (found,) = read(tmp_path, WITH_TARGETS | {"targets": tokens}, None)
    assert found.reward == 1.0


@pytest.mark.parametrize("reward", [None, -100, math.nan, ...])
def test_beside_targets_a_row_needs_no_reward(tmp_path: Path, reward: Any) -> None:
    row = WITH_TARGETS | ({} if reward is ... else {"reward": reward})
    for rewards in (True, "optional"):
        (found,) = read(tmp_path, row, None, rewards=rewards)
        assert (found.reward, len(found.targets), found.odd_label) == (0.0, 2, None)


@pytest.mark.parametrize("reward", ["yes", 7, [1], {"score": 1}, -99])
def test_beside_targets_an_odd_reward_is_refused_as_without(tmp_path: Path, reward: Any) -> None:
    bare = {key: value for key, value in WITH_TARGETS.items() if key != "targets"}
    said = refused(tmp_path, bare | {"reward": reward}, None)
    assert refused(tmp_path, WITH_TARGETS | {"reward": reward}, None) == said
    (found,) = read(tmp_path, WITH_TARGETS | {"reward": reward}, None, rewards="optional")
    assert math.isnan(found.reward)
    assert (found.odd_label, len(found.targets)) == (said, 2)


@pytest.mark.parametrize(("reward", "value"), [(1, 0.0), (2.5, 0.375), (5, 1.0), (True, 1.0)])
def test_rewards_of_another_range(tmp_path: Path, reward: float, value: float) -> None:
    row = {"prompt": "p", "response": "r", "reward": reward}
    (found,) = read(tmp_path, row, None, reward_range=(1, 5))
    assert found.reward == value


def test_minus_100_is_no_label_and_words_are_refused_by_name(tmp_path: Path) -> None:
    row = {"prompt": "p", "response": "r", "reward": -100}
    assert refused(tmp_path, row, None) == "field 'reward' has no label (-100)"
    (found,) = read(tmp_path, row, None, rewards="optional")
    assert math.isnan(found.reward)
    assert found.odd_label is None
    said = "field 'reward' must be a number or true/false, not 'yes'"
    assert refused(tmp_path, row | {"reward": "yes"}, None) == said
    for rewards in (True, "optional"):
        (found,) = read(tmp_path, row, None, reward_range=(-200, 0), rewards=rewards)
        assert found.reward == 0.5


def test_lists_of_a_parquet_file_are_read_as_those_of_json(tmp_path: Path) -> None:
    row = {"prompt": [SYSTEM, USER], "responses": ["5", "6"], "labels": [1.0, 0.5]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    found = [row for _, row in read_rows(tmp_path / "a.parquet", "attempts")]
    assert found == _all(tmp_path, row, "attempts")
    assert [one.reward for one in found if isinstance(one, Row)] == [1.0, 0.5]
