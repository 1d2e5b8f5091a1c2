"""Reading labelled rows: formats agree, and a bad row has its line and a reason."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.common.data_file import check_readable
from job.common.errors import InputError
from job.data.first_rows import first_bad_rows
from job.data.json_array import array_items
from job.data.layouts import ALPACA_FIELDS
from job.data.rows import BadRow, Row, read_rows

RawRow = dict[str, Any]
KINDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".ndjson", ".parquet")
HALF = "half of a surrogate pair"


def rows(count: int = 30) -> list[RawRow]:
    """Rows that need care: several scripts, line separators inside texts, blanks at the ends."""
    texts = [
        "plain",
        " é漢字😀 ",
        "two\nlines\r\nmore",
        "line\u2028separator\u0085",
        '"\\/\t\x00\x7f',
    ]
    return [
        {
            "prompt": f"{texts[i % len(texts)]}{i // 2}",
            "response": f"{texts[-1 - i % len(texts)]}!{i}" * (1 + i % 3),
            "reward": [0, 1, 0.25, 1.0][i % 4],
            "problem_id": f"problem {i // 2}",
        }
        for i in range(count)
    ]


def expected(given: list[RawRow]) -> list[Row]:
    return [
        Row(r["prompt"], r["response"], float(r["reward"]), str(r["problem_id"])) for r in given
    ]


def lines(given: list[RawRow]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in given)


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def streamed_zstd(content: bytes) -> bytes:
    """A frame that does not say how long its content is."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_parquet(path: Path, given: list[RawRow], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(given), path, **options)
    return path


def read(path: Path, fields: Any = None, **options: Any) -> list[Row]:
    """The examples of a file that has no bad rows."""
    found = [row for _, row in read_rows(path, fields, **options)]
    return [row for row in found if isinstance(row, Row) or pytest.fail(str(row))]


def reason(tmp_path: Path, line: str | bytes, fields: Any = None) -> str:
    """What is said about a line that follows a good one, a blank one and one more good one."""
    good = {"prompt": "p", "response": "r", "reward": 1, "question": "q"}
    good |= {"instruction": "p", "output": "r", "is_correct": True, "task": 1}
    content = line.encode() if isinstance(line, str) else line
    path = write(tmp_path / "a.jsonl", lines([good]) + b"\n" + lines([good]) + content + b"\n")
    (first, a), (second, b), (number, bad) = read_rows(path, fields)
    assert isinstance(a, Row)
    assert isinstance(b, Row)
    assert isinstance(bad, BadRow)
    assert (first, second, number) == (1, 3, 4)
    assert (bad.file, bad.line) == (str(path), 4)
    assert str(bad) == f"{path}:4: {bad.reason}"
    return bad.reason


# --- formats ---------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[list[RawRow]], bytes]] = {
    "plain.jsonl": lines,
    "plain.json": lines,
    "plain.ndjson": lines,
    "escaped.jsonl": lambda r: b"".join(json.dumps(row).encode() + b"\n" for row in r),
    "no_newline_at_end.jsonl": lambda r: lines(r).rstrip(b"\n"),
    "carriage_returns.jsonl": lambda r: lines(r).replace(b"\n", b"\r\n"),
    "byte_order_mark.jsonl": lambda r: b"\xef\xbb\xbf" + lines(r),
    "one.jsonl.gz": lambda r: gzip.compress(lines(r)),
    "byte_order_mark.jsonl.gz": lambda r: gzip.compress(b"\xef\xbb\xbf" + lines(r)),
    "members.jsonl.gz": lambda r: gzip.compress(lines(r)[:777]) + gzip.compress(lines(r)[777:]),
    "padded.jsonl.gz": lambda r: gzip.compress(lines(r)) + bytes(100),
    "one.jsonl.zst": lambda r: zstd(lines(r)),
    "streamed.jsonl.zst": lambda r: streamed_zstd(lines(r)),
    "frames.jsonl.zst": lambda r: (
        zstd(lines(r)[:777]) + streamed_zstd(lines(r)[777:900]) + zstd(lines(r)[900:])
    ),
    "empty_frame.jsonl.zst": lambda r: zstd(b"") + zstd(lines(r)) + zstd(b""),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_json_format_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    given = rows()
    path = write(tmp_path / name, WRITERS[name](given))
    assert read(path) == expected(given)
    assert [number for number, _ in read_rows(path)] == list(range(1, 31))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_parquet_gives_the_same_examples(tmp_path: Path, compression: str) -> None:
    given = [row | {"reward": float(row["reward"])} for row in rows(2500)]
    options = {"compression": compression, "row_group_size": 700}
    path = write_parquet(tmp_path / "a.parquet", given, **options)
    assert read(path) == expected(given)
    assert [number for number, _ in read_rows(path)] == list(range(1, 2501))


@pytest.mark.parametrize(
    "rewards",
    [
        pa.array([True, False]),
        pa.array([1, 0], pa.int8()),
        pa.array([1, 0], pa.uint64()),
        pa.array(np.array([1, 0], np.float16)),
        pa.array([1, 0], pa.float32()),
    ],
    ids=lambda array: str(array.type),
)
def test_parquet_columns_may_have_any_numeric_or_text_type(
    tmp_path: Path, rewards: pa.Array
) -> None:
    prompts = pa.array(["p", "q"], pa.large_string())
    responses = pa.array(["same", "same"]).dictionary_encode()
    table = pa.table({"prompt": prompts, "response": responses, "reward": rewards})
    pq.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert [(e.prompt, e.response, e.reward) for e in found] == [("p", "same", 1), ("q", "same", 0)]


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    a, b, c = (lines([row]) for row in rows(3))
    path = write(tmp_path / "a.jsonl", b"\n" + a + b"  \t\n\r\n" + b + b"\n" + c + b"\n\n")
    found = list(read_rows(path))
    assert [number for number, _ in found] == [2, 5, 7]
    assert [row for _, row in found] == expected(rows(3))


# --- fields ----------------------------------------------------------------------------------


def test_fields_are_read_under_the_names_that_are_given(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "ok": True, "task": 12, "prompt": 0, "reward": 0}
    path = write(tmp_path / "a.jsonl", lines([row]))
    fields = {"prompt": "question", "response": "answer", "reward": "ok", "problem_id": "task"}
    assert read(path, fields) == [Row("q", "a", 1.0, "12")]


def test_fields_that_are_not_renamed_keep_their_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([{"prompt": "p", "response": "r", "is_correct": 1}]))
    (found,) = read(path, {"reward": "is_correct"})
    assert (found.prompt, found.response, found.reward) == ("p", "r", 1.0)


@pytest.mark.parametrize(
    ("reward", "value"),
    [("true", 1.0), ("false", 0.0), ("0", 0.0), ("1", 1.0), ("0.5", 0.5), ("1e-3", 0.001)],
)
def test_a_reward_is_a_number_or_true_or_false(tmp_path: Path, reward: str, value: float) -> None:
    line = f'{{"prompt": "p", "response": "r", "reward": {reward}}}'
    (found,) = read(write(tmp_path / "a.jsonl", line.encode()))
    assert found.reward == value
    assert type(found.reward) is float


def test_without_rewards_rows_need_none_and_a_wrong_one_does_not_matter(tmp_path: Path) -> None:
    given = [{"prompt": "p", "response": "r"}, {"prompt": "p", "response": "r", "reward": "high"}]
    found = read(write(tmp_path / "a.jsonl", lines(given)), rewards=False)
    assert [e.reward for e in found] == [0.0, 0.0]


def test_an_optional_reward_is_taken_where_there_is_one(tmp_path: Path) -> None:
    given = rows(4)
    del given[0]["reward"]
    given[1]["reward"] = None
    given[3]["reward"] = float("nan")
    found = read(write(tmp_path / "a.jsonl", lines(given)), rewards="optional")
    rewards = [row.reward for row in found]
    np.testing.assert_array_equal(rewards, [np.nan, np.nan, given[2]["reward"], np.nan])
    assert [row.odd_label for row in found] == [None] * 4


@pytest.mark.parametrize("label", [7, -1, 1.01, "right", [1], {"score": 1}, float("inf")])
def test_a_row_whose_label_is_not_needed_is_not_refused_for_it(
    tmp_path: Path, label: object
) -> None:
    given = [rows(1)[0] | {"reward": label}]
    (found,) = read(write(tmp_path / "a.jsonl", lines(given)), rewards="optional")
    assert np.isnan(found.reward)
    assert found.odd_label is not None
    assert found.odd_label.startswith(("reward ", "field 'reward' must be a number"))
    ((_, bad),) = read_rows(tmp_path / "a.jsonl")
    assert isinstance(bad, BadRow)
    assert bad.reason == found.odd_label


def test_a_number_means_the_same_in_each_type_that_holds_it(tmp_path: Path) -> None:
    columns = {
        "reward": pa.array(["0.25", "1.00", "0.00"]).cast(pa.decimal128(5, 2)),
        "problem_id": pa.array([3.0, None, 4.5]),
        "prompt": ["p", "q", "r"],
        "response": ["a", "b", "c"],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert [row.reward for row in found] == [0.25, 1.0, 0.0]
    assert [row.problem_id for row in found][::2] == ["3", "4.5"]
    assert len(found[1].problem_id) == 32, "of the prompt, as without the field"


@pytest.mark.parametrize(
    ("label", "expected"),
    [(1.0000001192092896, 1.0), (-9e-7, 0.0), (1.000002, None), (-1.1e-6, None)],
)
def test_a_label_may_be_off_by_what_float32_rounds(
    tmp_path: Path, label: float, expected: float | None
) -> None:
    file = write(tmp_path / "a.jsonl", lines([rows(1)[0] | {"reward": label}]))
    ((_, found),) = read_rows(file)
    assert (found.reward if isinstance(found, Row) else None) == expected


def test_a_field_may_lie_within_others_and_the_exact_name_comes_first(tmp_path: Path) -> None:
    inner = {"prompt": "p", "response": "r", "extra": {"score": {"value": 0.5}}}
    fields = {"reward": "extra.score.value"}
    (found,) = read(write(tmp_path / "a.jsonl", lines([inner])), fields)
    assert found.reward == 0.5
    exact = inner | {"extra.score.value": 0.25}
    (found,) = read(write(tmp_path / "b.jsonl", lines([exact])), fields)
    assert found.reward == 0.25
    wrong = inner | {"extra": {"score": 3}}
    ((_, bad),) = read_rows(write(tmp_path / "c.jsonl", lines([wrong])), fields)
    assert isinstance(bad, BadRow)
    assert "field 'extra.score.value' is missing" in bad.reason


def test_a_row_of_thousands_of_columns_is_told_of_on_one_screen(tmp_path: Path) -> None:
    row = {f"column_{i}": i for i in range(3000)} | {"response": "r", "promt": "p", "reward": 1}
    said = reason(tmp_path, json.dumps(row))
    assert said.startswith("field 'prompt' is missing; the row has 'promt', 'column_0', ")
    assert said.endswith(" and 2991 more")
    assert len(said) < 400


def test_problem_ids_may_be_numbers_or_text(tmp_path: Path) -> None:
    ids = [3, "3", "drei", 2**70]
    given = [{"prompt": "p", "response": "r", "reward": 1, "problem_id": i} for i in ids]
    found = read(write(tmp_path / "a.jsonl", lines(given)))
    assert [e.problem_id for e in found] == ["3", "3", "drei", str(2**70)]


@pytest.mark.parametrize("absent", [{}, {"problem_id": None}])
def test_rows_without_problem_id_belong_together_if_their_prompts_are_equal(
    tmp_path: Path, absent: RawRow
) -> None:
    given = [{"prompt": p, "response": "r", "reward": 1} | absent for p in ("p", "q", "p", "p ")]
    a, b, c, d = (e.problem_id for e in read(write(tmp_path / "a.jsonl", lines(given))))
    assert a == c
    assert len({a, b, d}) == 3


ALPACA_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add the numbers.

### Input:
3 and 4

### Response:"""
ALPACA_WITHOUT_INPUT = """\
Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Add the numbers.

### Response:"""


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [
        ({"input": "3 and 4"}, ALPACA_WITH_INPUT),
        ({"input": ""}, ALPACA_WITHOUT_INPUT),
        ({"input": None}, ALPACA_WITHOUT_INPUT),
        ({}, ALPACA_WITHOUT_INPUT),
    ],
)
def test_alpaca_rows_get_the_alpaca_template(tmp_path: Path, extra: RawRow, prompt: str) -> None:
    row = {"instruction": "Add the numbers.", "output": "7", "is_correct": True} | extra
    (found,) = read(write(tmp_path / "a.jsonl", lines([row])), "alpaca")
    assert (found.prompt, found.response, found.reward) == (prompt, "7", 1.0)


def test_alpaca_rows_with_other_inputs_are_other_problems(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "output": "7", "is_correct": True}
    given = [row, row | {"input": "1"}, row | {"input": "2"}, row | {"input": "1"}]
    found = read(write(tmp_path / "a.jsonl", lines(given)), "alpaca")
    ids = [e.problem_id for e in found]
    assert ids[1] == ids[3]
    assert len(set(ids)) == 3


def test_the_alpaca_template_is_for_the_preset_alone(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "output": "7", "is_correct": True, "input": "1"}
    (found,) = read(write(tmp_path / "a.jsonl", lines([row])), ALPACA_FIELDS)
    assert found.prompt == "Add."


# --- bad rows --------------------------------------------------------------------------------

BAD_ROWS: list[tuple[str | bytes, str]] = [
    ("{", "broken JSON: .* at column 2"),
    ('{"prompt": "p"} {}', "broken JSON: Extra data at column 17"),
    ("7", "a row must be a JSON object, not int"),
    ("[]", "a row must be a JSON object, not list"),
    ("null", "a row must be a JSON object, not NoneType"),
    ("[" * 100_000, "broken JSON: maximum recursion depth"),
    (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 12"),
    (b'{"prompt": "\xc3', "not UTF-8: unexpected end of data"),
    (bytes(16), "broken JSON|not UTF-8"),
    ("{}", "field 'prompt' is missing"),
    ('{"prompt": "p", "reward": 1}', "field 'response' is missing; .* 'prompt', 'reward'"),
    ('{"prompt": "p", "response": "r"}', "field 'reward' is missing"),
    ('{"prompt": 3, "response": "r", "reward": 1}', "field 'prompt' must be text, not int"),
    ('{"prompt": "p", "response": ["r"], "reward": 1}', "'response' must be text, not list"),
    ('{"prompt": null, "response": "r", "reward": 1}', "'prompt' must be text, not NoneType"),
    ('{"prompt": "p", "response": "", "reward": 1}', "field 'response' is empty"),
    ('{"prompt": "p", "response": " \\n\\t", "reward": 1}', "field 'response' is empty"),
    (r'{"prompt": "\ud800", "response": "r", "reward": 1}', f"'prompt', character 1: {HALF}"),
    (r'{"prompt": "p", "response": "ab\udc00", "reward": 1}', f"'response', character 3: {HALF}"),
    (b'{"prompt": "\xed\xa0\x80", "response": "r", "reward": 1}', f"'prompt', character 1: {HALF}"),
    (
        '{"prompt": "p", "response": "r", "reward": 1, "problem_id": ["a"]}',
        "field 'problem_id' must be text or a number, not list",
    ),
]
BAD_REWARDS = {
    '"1"': "must be a number or true/false, not '1'",
    "null": "must be a number or true/false, not None",
    "[1]": r"must be a number or true/false, not \[1\]",
    "NaN": "must be a number or true/false, not nan",
    "1.5": "1.5 lies outside",
    "-1": "-1 lies outside",
    "Infinity": "inf lies outside",
    "-1e999": "-inf lies outside",
    "9" * 400: r"999\.\.\.9+ lies outside",
    '"' + "long" * 1000 + '"': r"must be a number or true/false, not '(long){25}\.\.\.$",
}


def shortened(value: object) -> str:
    return repr(value)[:60]


@pytest.mark.parametrize(("line", "pattern"), BAD_ROWS, ids=shortened)
def test_a_bad_row_has_its_line_and_a_reason(
    tmp_path: Path, line: str | bytes, pattern: str
) -> None:
    assert re.search(pattern, reason(tmp_path, line))


@pytest.mark.parametrize(("reward", "pattern"), BAD_REWARDS.items(), ids=shortened)
def test_a_reward_that_is_no_number_from_0_to_1_is_a_bad_row(
    tmp_path: Path, reward: str, pattern: str
) -> None:
    said = reason(tmp_path, f'{{"prompt": "p", "response": "r", "reward": {reward}}}')
    assert "reward" in said
    assert re.search(pattern, said)


def test_a_number_of_thousands_of_digits_is_a_bad_row(tmp_path: Path) -> None:
    line = f'{{"prompt": "p", "response": "r", "reward": 1, "id": {"9" * 5000}}}'
    assert reason(tmp_path, line).startswith("broken JSON: ")


RENAMED = {"prompt": "question", "response": "output", "reward": "is_correct", "problem_id": "task"}
RENAMED_ROW = {"question": "q", "output": "o", "is_correct": 1, "task": "t"}


@pytest.mark.parametrize("name", RENAMED_ROW)
def test_a_reason_names_the_field_as_the_file_does(tmp_path: Path, name: str) -> None:
    without = {key: value for key, value in RENAMED_ROW.items() if key != name}
    assert f"field {name!r} is missing" in reason(tmp_path, json.dumps(without), RENAMED)
    wrong = RENAMED_ROW | {name: {"a": 1}}
    assert f"field {name!r} must be " in reason(tmp_path, json.dumps(wrong), RENAMED)


def test_reasons_about_values_name_renamed_fields_too(tmp_path: Path) -> None:
    empty = json.dumps(RENAMED_ROW | {"output": " "})
    assert reason(tmp_path, empty, RENAMED) == "field 'output' is empty but for blanks"
    high = json.dumps(RENAMED_ROW | {"is_correct": 3})
    assert reason(tmp_path, high, RENAMED) == "is_correct 3 lies outside [0, 1]"


@pytest.mark.parametrize(
    ("context", "pattern"),
    [(7, "field 'input' must be text, not int"), ("\ud800", f"field 'input', character 1: {HALF}")],
)
def test_a_bad_alpaca_input_is_a_bad_row(tmp_path: Path, context: object, pattern: str) -> None:
    row = {"instruction": "i", "output": "o", "is_correct": 1, "input": context}
    assert re.search(pattern, reason(tmp_path, json.dumps(row), "alpaca"))


def test_half_a_surrogate_pair_outside_the_texts_does_no_harm(tmp_path: Path) -> None:
    line = rb'{"prompt": "p", "response": "r", "reward": 1, "problem_id": "\ud800", "x": "\udfff"}'
    (found,) = read(write(tmp_path / "a.jsonl", line))
    assert (found.prompt, found.response) == ("p", "r")


def test_a_surrogate_pair_written_as_escapes_is_one_character(tmp_path: Path) -> None:
    line = rb'{"prompt": "\ud83d\ude00", "response": "r", "reward": 1}'
    (found,) = read(write(tmp_path / "a.jsonl", line))
    assert found.prompt == "\U0001f600"


def test_bad_parquet_rows_have_their_number_and_a_reason(tmp_path: Path) -> None:
    rewards = [0.5, None, float("nan"), 2.0]
    given = [{"prompt": "p", "response": "r", "reward": reward} for reward in rewards]
    found = list(read_rows(write_parquet(tmp_path / "a.parquet", given)))
    assert [number for number, _ in found] == [1, 2, 3, 4]
    said = [row.reason for _, row in found if isinstance(row, BadRow)]
    assert said == [
        "field 'reward' must be a number or true/false, not None",
        "field 'reward' must be a number or true/false, not nan",
        "reward 2.0 lies outside [0, 1]",
    ]


# --- one array -------------------------------------------------------------------------------

ARRAYS: dict[str, Callable[[list[RawRow]], str]] = {
    "one line": json.dumps,
    "indented": lambda r: json.dumps(r, indent=2, ensure_ascii=False),
    "a row a line": lambda r: "[\n" + ",\n".join(map(json.dumps, r)) + "\n]\n",
    "byte order mark and blanks": lambda r: "\ufeff \n\t" + json.dumps(r) + "\n\n",
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("layout", ARRAYS)
def test_an_array_holds_the_rows_that_lines_hold(tmp_path: Path, layout: str, suffix: str) -> None:
    content = ARRAYS[layout](rows()).encode()
    packed = gzip.compress(content) if suffix.endswith("gz") else content
    assert read(write(tmp_path / f"a{suffix}", packed)) == expected(rows())


def test_an_array_is_read_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.data.json_array._CHUNK", 7)  # so that each value is cut somewhere
    given = [*rows(12), {"prompt": "long" * 999, "response": "r", "reward": 1, "problem_id": "x"}]
    assert read(write(tmp_path / "a.json", json.dumps(given).encode())) == expected(given)
    assert list(array_items(io.StringIO("[ 1234567, true,null ,[2] ] "))) == [
        1234567,
        True,
        None,
        [2],
    ]
    assert list(array_items(io.StringIO("[]"))) == []


def test_items_of_an_array_that_are_no_rows_are_bad_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", json.dumps([rows(1)[0], 7, {"prompt": "p"}, []]).encode())
    found = list(read_rows(file))
    assert [number for number, _ in found] == [1, 2, 3, 4]
    assert [str(row).partition(": ")[2] for _, row in found[1:]] == [
        "a row must be a JSON object, not int",
        "field 'response' is missing; the row has 'prompt'",
        "a row must be a JSON object, not list",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"a": 1}, {"a": ', "item 2 of the array: Expecting value"),
        ('[{"a": 1} {"a": 2}]', "item 2 of the array: ',' is expected, not '{'"),
        ('[{"a": 1},', "item 2 of the array: Expecting value"),
        ('[{"a": 1}', "the end: it is cut off"),
        ('[{"a": 1}]\n[{"a": 2}]', "more follows behind the array of 1 items"),
        ("[" * 99_999, "item 1 of the array: "),
        ("[1, 2,, 3]", "item 3 of the array: Expecting value"),
    ],
)
def test_a_damaged_array_is_refused_where_it_ends(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        list(read_rows(write(tmp_path / "a.json", content.encode())))
    assert str(caught.value).startswith(f"{tmp_path}/a.json: damaged file: ")


def test_an_array_that_is_no_text_is_refused(tmp_path: Path) -> None:
    assert "damaged file" in refused(write(tmp_path / "a.json", b'[{"prompt": "\xff"}]'))


# --- damaged and impossible files ------------------------------------------------------------


def refused(path: Path) -> str:
    """The InputError that reading all of a file ends with, which must name the file."""
    with pytest.raises(InputError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_cut_off_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    compress = gzip.compress if suffix.endswith("gz") else zstd
    content = compress(lines(rows(6)))
    path = tmp_path / f"a{suffix}"
    for length in range(1, len(content)):
        refused(write(path, content[:length]))
        refused(write(path, content + content[:length]))


def test_a_changed_byte_in_a_gzip_file_is_refused_or_changes_no_row(tmp_path: Path) -> None:
    content = gzip.compress(lines(rows(6)))
    path, n_refused = tmp_path / "a.jsonl.gz", 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 255
        write(path, bytes(changed))
        try:
            found = [row for _, row in read_rows(path)]
        except InputError:
            n_refused += 1
        else:
            assert found == expected(rows(6))
    assert n_refused >= len(content) - 10  # the header's time and system say nothing


@pytest.mark.parametrize("compress", [gzip.compress, zstd, streamed_zstd])
def test_bytes_behind_a_compressed_file_are_refused(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    suffix = "gz" if compress is gzip.compress else "zst"
    path = write(tmp_path / f"a.jsonl.{suffix}", compress(lines(rows(6))) + b"more text\n")
    assert "damaged file: " in refused(path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_of_another_kind_than_its_name_says_is_refused(tmp_path: Path, suffix: str) -> None:
    for content in (b"x", lines(rows(6)), bytes(1000), np.random.default_rng(0).bytes(1000)):
        assert "damaged file: " in refused(write(tmp_path / f"a{suffix}", content))


def test_a_damaged_parquet_file_gives_an_input_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    options = {"row_group_size": 50, "compression": "zstd"}
    given = [row | {"reward": float(row["reward"])} for row in rows(200)]
    content = write_parquet(path, given, **options).read_bytes()
    rng = np.random.default_rng(0)
    for length in rng.integers(1, len(content), 20):
        assert "damaged file: " in refused(write(path, content[:length]))
    n_refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 5):
            damaged[place] = rng.integers(0, 256)
        write(path, bytes(damaged))
        try:
            list(read_rows(path))
        except InputError:
            n_refused += 1
    assert n_refused > 50


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    text = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": text, "response": ["r"]}), tmp_path / "a.parquet")
    assert "damaged file: " in refused(tmp_path / "a.parquet")


def test_a_file_of_an_unknown_kind_is_refused_with_the_kinds_that_are_known(tmp_path: Path) -> None:
    for name in ("a.csv", "a.txt", "jsonl", "a.jsonl.bz2", "a.JSONL"):
        said = refused(write(tmp_path / name, lines(rows(1))))
        assert "unknown kind of data file; known: .jsonl, .jsonl.gz, .jsonl.zst" in said


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "cannot read the data: No such file or directory"),
        (Path.touch, "the file is empty"),
        (Path.mkdir, f"a folder without data files; known: {', '.join(KINDS)}"),
    ],
    ids=["missing", "empty", "directory"],
)
def test_what_cannot_be_a_data_file_is_refused_at_once(
    tmp_path: Path, suffix: str, make: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / f"a{suffix}"
    make(path)
    assert refused(path) == f"{path}: {said}"
    with pytest.raises(InputError, match=said):
        check_readable(path)


# --- memory ----------------------------------------------------------------------------------

BIG = 40_000_000


def big_lines() -> Iterator[bytes]:
    row = lines([{"prompt": "p" * 300, "response": "r" * 700, "reward": 1}])
    return itertools.repeat(row, BIG // len(row))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_big_file_is_streamed(tmp_path: Path, suffix: str) -> None:
    content = b"".join(big_lines())
    compress = {".gz": lambda c: gzip.compress(c, 1), ".zst": zstd}
    path = tmp_path / f"a{suffix}"
    write(path, compress.get(path.suffix, bytes)(content))
    del content
    assert memory_of_reading(path) < BIG / 20


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_big_parquet_row_group_is_streamed(tmp_path: Path, compression: str) -> None:
    noise = np.random.default_rng(0).bytes(BIG // 4).hex()
    texts = [noise[i : i + 1000] for i in range(0, len(noise), 1000)]
    table = pa.table({"prompt": texts, "response": texts, "reward": [1] * len(texts)})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=len(texts), compression=compression)
    del table, texts, noise
    assert memory_of_reading(path) < BIG / 2


def memory_of_reading(path: Path) -> int:
    """Bytes that Python and Arrow hold at most, or after 3000 rows, while a file is read."""
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        found = read_rows(path)
        for _ in itertools.islice(found, 3000):
            pass
        return tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
    finally:
        tracemalloc.stop()


# The first rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
def test_of_the_first_rows_the_bad_ones_are_given(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "1?", "response": "1" if k % 2 else "", "reward": 1} for k in range(30)]
    path = tmp_path / name
    if name.endswith(".parquet"):
        write_parquet(path, rows)
    else:
        content = json.dumps(rows).encode() if name.endswith(".json") else lines(rows)
        pack = {".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)
        write(path, pack(content))
    bad, looked_at = first_bad_rows(path)
    assert ([one.line for one in bad], looked_at) == (list(range(1, 21, 2)), 20)
    assert bad[0].reason == "field 'response' is empty"


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet"])
def test_without_pyarrow_a_file_of_its_kind_is_known_by_how_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, rows = tmp_path / name, [{"prompt": "1?"}]
    write_parquet(path, rows) if name == "a.parquet" else write(path, zstd(lines(rows)))
    monkeypatch.setattr("job.data.first_rows.find_spec", lambda name: None)
    assert first_bad_rows(path) == ([], 0)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"damaged file: it does not begin as \.\w+ files do"):
        first_bad_rows(path)
