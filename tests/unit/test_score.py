"""Values of a file: those of the run, for each row, in order, however often it was ended."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from launch import PYTHONPATH, ended, run_ranks, running
from micro_critic import MicroCritics, write_rows
from micro_job import MicroRun

from job import evaluate
from job.common.errors import InputError
from job.common.schema import EMBEDDED
from job.data import packing
from job.data.packing import Indices
from job.data.token_cache import TokenizedSet
from job.data.tokenizer import load_tokenizer
from job.evaluation.reading import Data, read_solutions
from job.model.packed_layout import PackedLayout
from job.run.evaluations import evaluation_folder
from job.run.manifest import FileSum, Manifest
from job.run.report_page import write_report
from job.run.trained import TrainedCritic
from job.training import scoring
from job.training.scoring import score

pytestmark = pytest.mark.slow


ROWS = [
    {
        "prompt": f"{a}+{b}?",
        "response": f"{a}+{b}={a + b + a % 2};A{a + b + a % 2}",
        "reward": 1 - a % 2,
    }
    for a in range(8)
    for b in range(5)
]


def _score(
    source: Path, data: Path | str, out: Path, *overrides: str, base: str | None = None
) -> list[dict[str, Any]]:
    score(lambda: TrainedCritic.find(source, base, overrides), str(data), out)
    return _read(out)


def _new_process(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )


def _read(out: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(out).to_pylist()


@pytest.fixture
def run(critics: MicroCritics) -> MicroRun:
    return critics.run("n1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def _alone(
    trained: TrainedCritic, prompt: str, response: str, before: int = 0
) -> tuple[list[int], list[float]]:
    """A response's tokens and head outputs, by a critic put together here, packed with nothing.

    Those of `before` tokens before the response come first.
    """
    critic = trained.on_meta().to_empty(device="cpu")
    base = torch.load(Path(trained.config.model.path) / "consolidated.pth", weights_only=True)
    for name, parameter in critic.named_parameters():
        source = (
            trained.weights.read(name) if parameter.requires_grad else base[name[len("trunk.") :]]
        )
        parameter.detach().copy_(source)
    (encoded,) = load_tokenizer(trained.config.model.path).encode([(prompt, response)])
    at = torch.arange(encoded.response_start - before, len(encoded.ids))
    with torch.no_grad():
        outputs = critic(torch.tensor(encoded.ids), PackedLayout([len(encoded.ids)]), at)
    return encoded.ids[encoded.response_start :], outputs.tolist()


def test_values_are_the_critics_one_by_one_in_the_order_of_the_file(
    run: MicroRun, data: Path, tmp_path: Path
) -> None:
    found = _score(run.path, data, tmp_path / "values.parquet")
    trained = TrainedCritic.find(run.path)
    assert [row["line"] for row in found] == list(range(1, len(ROWS) + 1))
    for row, value in zip(ROWS, found, strict=True):
        tokens, values = _alone(trained, str(row["prompt"]), str(row["response"]), before=1)
        assert value["tokens"] == tokens
        assert [value["prompt_value"], *value["values"]] == pytest.approx(values, abs=1e-6)
        assert value["final_value"] == value["values"][-1]
        assert (value["reward"], value["error"]) == (row["reward"], None)
    assert not (tmp_path / "values.parquet.parts").exists()


def test_metrics_of_the_validation_data_are_the_runs_own(
    run: MicroRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _score(run.path, EMBEDDED, tmp_path / "values.parquet")
    table = capsys.readouterr().out
    last = run.records[-1]
    names = ("mse", "r2", "std_prediction", "ece", "mse_optimal", "last_token_auc")
    for name in (*names, "prompt/mse", "prompt/distance_to_optimal", "r2_between_problems"):
        assert f"{name} " in table
        assert f"{last[f'validation/value/{name}']:.4f}" in table


def test_a_checkpoint_is_scored_as_it_was(run: MicroRun, data: Path, tmp_path: Path) -> None:
    early = _score(run.path / "checkpoints/step-00000003", data, tmp_path / "early.parquet")
    late = _score(run.path, data, tmp_path / "late.parquet")
    newest = _score(run.path / "checkpoints/step-00000006", data, tmp_path / "newest.parquet")
    assert late == newest
    differences = [
        abs(a["final_value"] - b["final_value"]) for a, b in zip(early, late, strict=True)
    ]
    assert min(differences) > 1e-4


def test_values_of_a_critic_trained_with_bce_are_probabilities(
    critics: MicroCritics, data: Path, tmp_path: Path
) -> None:
    run = critics.run("bce", "objective.loss=bce")
    trained = TrainedCritic.find(run.path)
    found = _score(run.path, data, tmp_path / "values.parquet")
    _, logits = _alone(trained, str(ROWS[0]["prompt"]), str(ROWS[0]["response"]))
    assert found[0]["values"] == pytest.approx(torch.tensor(logits).sigmoid().tolist(), abs=1e-6)


def test_a_head_without_bias_is_scored_without(
    critics: MicroCritics, data: Path, tmp_path: Path
) -> None:
    trained = TrainedCritic.find(critics.run("no-bias", "training.value_head.bias=false").path)
    assert "value_head.bias" not in trained.weights.shapes
    found = _score(trained.folder, data, tmp_path / "values.parquet")
    _, values = _alone(trained, str(ROWS[3]["prompt"]), str(ROWS[3]["response"]))
    assert found[3]["values"] == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_an_empty_prompt_is_valued_at_its_begin_token_and_none_is_made_up(
    run: MicroRun, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing stands before a response, as after a cut, it has no such value."""
    rows = [{"prompt": "", "response": "1+1=2;A2", "reward": 1}, ROWS[0], ROWS[1]]
    file, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / f"v{suffix}"
    trained = TrainedCritic.find(run.path)
    found = _score(run.path, file, tmp_path / "begins.parquet")
    _, values = _alone(trained, "", "1+1=2;A2", before=1)
    assert found[0]["prompt_value"] == pytest.approx(values[0], abs=1e-6)
    first_valued = packing.first_valued

    def without_begin(data: TokenizedSet, rows: Indices, prompt_value: bool) -> Indices:
        first = first_valued(data, rows, prompt_value)
        return first + (data.lines[rows] == 1)

    monkeypatch.setattr(packing, "first_valued", without_begin)
    for _ in range(2):  # the second time it is read, and measured
        score(lambda: TrainedCritic.find(run.path), str(file), out)
    if suffix == ".csv":
        with out.open(newline="") as text:
            given = [row["prompt_value"] for row in csv.DictReader(text)]
        assert [value == "" for value in given] == [True, False, False]
    else:
        assert [row["prompt_value"] is None for row in _read(out)] == [True, False, False]


# Labels and bad rows


def test_without_labels_there_are_the_same_values_and_no_table(
    run: MicroRun, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlabelled = [{k: v for k, v in row.items() if k != "reward"} for row in ROWS]
    file = write_rows(tmp_path / "unlabelled.jsonl", unlabelled)
    found = _score(run.path, file, tmp_path / "a.parquet")
    assert capsys.readouterr().out == ""
    labelled = _score(run.path, data, tmp_path / "b.parquet")
    assert "mse" in capsys.readouterr().out
    assert found == [row | {"reward": None} for row in labelled]


def test_texts_that_the_tokenizer_does_not_know_are_warned_of(
    run: MicroRun, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _score(run.path, data, tmp_path / "a.parquet")
    assert "does not know such texts" not in caplog.text
    file = write_rows(tmp_path / "words.jsonl", [{"prompt": "1+1", "response": "is two"}])
    _score(run.path, file, tmp_path / "b.parquet")
    # <s> 1 + 1, six of ten unknown characters, </s>
    assert f"{file}: 55 % of the tokens are <unk>: " in caplog.text


def test_the_table_counts_the_rows_that_have_a_label(
    run: MicroRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row if i % 4 else {k: row[k] for k in ("prompt", "response")} for i, row in enumerate(ROWS)
    ]
    found = _score(run.path, write_rows(tmp_path / "some.jsonl", rows), tmp_path / "v.parquet")
    labelled = [row for row in found if row["reward"] is not None]
    assert len(labelled) == 30
    table = " ".join(capsys.readouterr().out.split())
    assert "sequences │ 30" in table
    errors = np.concatenate([np.array(row["values"]) - row["reward"] for row in labelled])
    assert f"mse │ {np.square(errors).mean():.4f}" in table


def test_rows_left_out_keep_their_place(
    run: MicroRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(scoring, "MICRO_BATCHES", 1)
    bad = {"prompt": "1+1?", "response": " ", "reward": 0}
    rows = [
        bad,
        "",
        *ROWS[:4],
        "not JSON",
        bad,
        *ROWS[4:],
        bad,
        {"prompt": "1+1?", "response": "A2", "reward": 7},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "values.parquet"
    with pytest.raises(InputError, match=r"4 bad of 45 rows.*data\.bad_rows=skip") as caught:
        _score(run.path, file, out)
    assert f"{file}:1: field 'response' is empty" in str(caught.value)
    assert not list(tmp_path.glob("values*"))
    small = ("training.micro_batch_tokens=64", "data.bad_rows=skip")
    found = _score(run.path, file, out, *small)
    assert [row["line"] for row in found] == [1, *range(3, 47)]
    left_out = {row["line"]: row["error"] for row in found if row["values"] is None}
    assert left_out.keys() == {1, 7, 8, 45}
    assert all(row["final_value"] is row["tokens"] is None for row in found if row["error"])
    rewards = [row["reward"] for row in found if not row["error"]]
    assert rewards == [*(row["reward"] for row in ROWS), None], "7 is no label"
    odd = f"1 row(s) are scored and left out of the table, for their label: {file}:46: reward 7"
    assert odd in caplog.text


# Going on


def _outline(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(row["line"], len(row["values"])) for row in rows]


def _same_values(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    assert _outline(a) == _outline(b)
    x, y = (np.concatenate([row["values"] for row in rows]) for rows in (a, b))
    np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "many.jsonl", ROWS * 60)


def test_several_solutions_of_a_line_keep_their_order_and_problem(
    run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MICRO_BATCHES", 1)
    tries = ["1+1=2;A2", " ", "1+1=3;A3", "A2"]
    row = {"prompt": "1+1?", "responses": tries, "labels": [1, 0, 0, 1]}
    rows = [row, "", row | {"prompt": "1+2?"}, "not JSON", row | {"labels": [1]}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    shared = ("data.fields=attempts", "training.micro_batch_tokens=64", "data.bad_rows=skip")
    found = _score(run.path, file, tmp_path / "values.parquet", *shared)
    assert [one["line"] for one in found] == [1, 1, 1, 1, 3, 3, 3, 3, 4, 5]
    assert [one["values"] is None for one in found] == [False, True, False, False] * 2 + [True] * 2
    first, second = ({one["problem"] for one in found[k : k + 4] if one["values"]} for k in (0, 4))
    assert len(first) == len(second) == len(first | second) - 1 == 1
    asked = [(p, r) for p in ("1+1?", "1+2?") for r in tries if r != " "]
    plain = write_rows(
        tmp_path / "plain.jsonl", [{"prompt": p, "response": r, "reward": 0} for p, r in asked]
    )
    alone = _score(run.path, plain, tmp_path / "plain.parquet")
    for one, other in zip((f for f in found if f["values"]), alone, strict=True):
        assert (one["tokens"], one["ends"]) == (other["tokens"], other["ends"])
        assert one["values"] == pytest.approx(other["values"], abs=1e-6)
        assert one["ends"][-1] == len(tries[0]) or one["ends"][-1] == len("A2")


# Evaluation


def _evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["job.evaluate", *map(str, arguments)])
    evaluate.main()


def test_an_evaluation_of_a_run_is_shown_by_its_report(
    run: MicroRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_rows(
        tmp_path / "attempts.jsonl",
        [row | {"problem_id": k // 8} for k, row in enumerate(ROWS)],
    )
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    _evaluate(monkeypatch, "--critic", copy, "--data", file, "--answer", r"A(\d+)")
    assert "Reward of the solution chosen out of n" in capsys.readouterr().out
    folder = copy / "evaluations" / "attempts.jsonl"
    figures = json.loads((folder / "evaluation.json").read_text())
    assert (figures["problems"], figures["solutions_per_problem"]) == (5, [8, 8])
    values = pyarrow.parquet.read_table(folder / "values.parquet").to_pylist()
    assert values == _score(run.path, file, tmp_path / "values.parquet")
    best = [max(values[k : k + 8], key=lambda v: v["final_value"]) for k in range(0, 40, 8)]
    chosen = figures["choosing"]["rules"]["best_of_n"]["value"][7]
    assert chosen == pytest.approx(np.mean([one["reward"] for one in best]))
    report = write_report([copy]).read_text()
    for page in (report, (folder / "evaluation.html").read_text()):
        assert "<h2>Evaluation: attempts.jsonl</h2>" in page
        assert "majority weighted by the critic" in page
    assert (
        report.count("data:image/png")
        > (folder / "evaluation.html").read_text().count("data:image/png")
        > 0
    )


def test_names_that_change_no_value_leave_those_that_are_kept(
    run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    places = [tmp_path / name / "test.jsonl" for name in ("d1", "d2")]
    for k, place in enumerate(places):
        place.parent.mkdir()
        rows = [r | {"reward": 4 * r["reward"], "ans": i % 3} for i, r in enumerate(ROWS[: 8 + k])]
        write_rows(place, rows)
    found = []
    for place, *fields in ((places[0],), (places[0], "--fields", "{answer: ans}"), (places[1],)):
        options = ("--critic", copy, "--data", place, "--reward-range", "0", "4")
        _evaluate(monkeypatch, *options, *fields)
        file = evaluation_folder(copy, str(place)) / "evaluation.json"
        found.append((file.parent.name, json.loads(file.read_text())))
    assert [name for name, _ in found] == ["test.jsonl", "test.jsonl", "d2-test.jsonl"]
    assert ["majority" in figures["choosing"]["rules"] for _, figures in found] == [0, 1, 0]
    assert [figures["labelled"] for _, figures in found] == [8, 8, 9]
    right = [1 - a % 2 for a in (0, 1) for _ in range(5)]
    assert found[0][1]["choosing"]["rules"]["random"]["value"][0] == pytest.approx(
        np.mean(right[:8])
    )


@pytest.mark.parametrize(
    ("given", "bad_rows", "fields"),
    [
        ("{answer: a, part: p}", "error", None),
        ("{preset: stepwise, part: p}", "error", "stepwise"),
        ("{preset: stepwise, prompt: q, part: p}", "error", {"preset": "stepwise", "prompt": "q"}),
        ("processbench", "error", "processbench"),
        ("{answer: a}", "skip", {"answer": "a"}),  # a row without such a field is left out
    ],
)
def test_values_depend_on_names_that_rows_and_tokens_do(
    run: MicroRun, given: str, bad_rows: str, fields: Any
) -> None:
    overrides = (f"data.fields={given}", f"data.bad_rows={bad_rows}")
    trained = evaluate._of_tokens(TrainedCritic.find(run.path, None, overrides))
    assert trained.config.data.fields == fields


def test_a_critic_of_pairs_only_ranks_in_an_evaluation_too(
    critics: MicroCritics, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("objective.loss=pairwise", "data.arithmetic.attempts=4")
    pairs = critics.run("pairs", *settings)
    out = tmp_path / "out"
    _evaluate(monkeypatch, "--critic", pairs.path, "--data", data, "--out", out)
    before = json.loads((out / "evaluation.json").read_text())["calibration"]["before"]
    values = np.array([row["final_value"] for row in _read(out / "values.parquet")])
    rewards = np.array([row["reward"] for row in ROWS])
    expected = np.square(1 / (1 + np.exp(-values)) - rewards).mean()
    assert before["brier"] == pytest.approx(expected)
    assert before["brier"] != pytest.approx(np.square(values.clip(0, 1) - rewards).mean())


def test_the_first_errors_of_an_evaluation_are_at_the_ends_of_its_steps(
    run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"id": f"{part}-{k}", "problem": f"{k}+1?", "steps": ["1+1=2;", "A2"], "label": k % 3 - 1}
        for k in range(6)
        for part in ("gsm8k", "math")
    ]
    file = write_rows(tmp_path / "bench.jsonl", rows)
    out = tmp_path / "out"
    shared = ("--data", file, "--fields", "processbench", "--out", out, "--tune-on", "math")
    _evaluate(monkeypatch, "--critic", run.path, *shared)
    figures = json.loads((out / "evaluation.json").read_text())["steps"]
    assert figures["tuned_on"] == "math"
    assert figures["drop"]["parts"].keys() == {"gsm8k", "math"}
    data = Data(str(file), "processbench")
    solutions = read_solutions(out / "values.parquet", data)
    stored = pyarrow.parquet.read_table(out / "values.parquet").to_pylist()
    for row, solution in zip(stored, solutions, strict=True):
        # characters are tokens here, but for the blank lines, which are one unknown token each
        at = [row["ends"].index(end) for end in (6, 10)]
        assert solution.step_values == tuple(row["values"][k] for k in at)
    before = (out / "evaluation.json").read_text()
    _evaluate(monkeypatch, "--values", out / "values.parquet", *shared)
    assert (out / "evaluation.json").read_text() == before


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--fields", "{answer: nothere}"], r"--fields: .*\.jsonl:1: field 'nothere' is missing"),
        (["--fields", "{part: nothere}"], r"--fields: .*\.jsonl:1: field 'nothere' is missing"),
        (["--tune-on", "math"], "--tune-on math: no solution has labelled steps"),
    ],
)
def test_names_that_the_data_lacks_are_refused_before_anything_is_scored(
    run: MicroRun,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    problem: str,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=problem):
        _evaluate(monkeypatch, "--critic", run.path, "--data", data, "--out", out, *given)
    assert not out.exists()


def _command(run: MicroRun, data: Path, out: str) -> list[str]:
    script = (
        "import job.training.scoring as s, job.score; s.MICRO_BATCHES = 1; "
        "job.score.run_and_leave(job.score.main)"
    )
    return ["-c", script, "--critic", str(run.path), "--data", str(data), "--out", out]


def _parts(out: Path) -> int:
    return len(list(out.with_name(f"{out.name}.parts").glob("*-*.parquet")))


@pytest.mark.parametrize(("number", "world"), [(signal.SIGKILL, 1), (signal.SIGTERM, 2)])
def test_a_scoring_that_was_ended_goes_on_where_it_was(
    run: MicroRun, many: Path, tmp_path: Path, number: signal.Signals, world: int
) -> None:
    out = tmp_path / "values.parquet"
    command = _command(run, many, "values.parquet")
    if number == signal.SIGTERM:
        command[1] = (
            "from job.common.signals import install_handlers; install_handlers(); " + command[1]
        )
    with running(command, world, tmp_path) as ranks:
        ranks.wait_until(lambda: _parts(out) >= 3, "three parts")
        ranks.signal(number)
        codes = ranks.wait()
    assert codes == [75 if number == signal.SIGTERM else -signal.SIGKILL] * world
    assert not out.exists()
    kept = {
        file: file.stat().st_mtime_ns for file in out.with_name("values.parquet.parts").glob("*-*")
    }
    assert len(kept) >= 3
    with running(command, world, tmp_path) as ranks:
        ranks.wait_until(lambda: _parts(out) > len(kept), "another part")
        assert all(file.stat().st_mtime_ns == before for file, before in kept.items())
        assert ranks.wait() == [0] * world
    _same_values(_read(out), _score(run.path, many, tmp_path / "whole.parquet"))


def test_parts_that_are_damaged_or_renamed_are_scored_again_or_left_alone(
    run: MicroRun, many: Path, tmp_path: Path
) -> None:
    out, parts = tmp_path / "values.parquet", tmp_path / "values.parquet.parts"
    with running(_command(run, many, "values.parquet"), 1, tmp_path) as ranks:
        ranks.wait_until(lambda: _parts(out) >= 4, "four parts")
    second, third, *_ = sorted(parts.glob("*-*.parquet"))[1:]
    shutil.copy(second, parts / f"{second.stem} copy.parquet")
    shutil.copy(second, parts / "mine-1.parquet")
    third.write_bytes(bytes(third.stat().st_size))
    whole = _score(run.path, many, tmp_path / "whole.parquet")
    _same_values(_score(run.path, many, out), whole)


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"[]"])
def test_without_a_readable_plan_a_scoring_starts_over(
    run: MicroRun, many: Path, tmp_path: Path, content: bytes
) -> None:
    out, parts = tmp_path / "values.parquet", tmp_path / "values.parquet.parts"
    with running(_command(run, many, "values.parquet"), 1, tmp_path) as ranks:
        ranks.wait_until(lambda: _parts(out) >= 2, "two parts")
    (parts / "plan.json").write_bytes(content)
    whole = _score(run.path, many, tmp_path / "whole.parquet")
    _same_values(_score(run.path, many, out), whole)


def test_ranks_score_what_one_process_scores_and_go_on_as_another_number(
    run: MicroRun, data: Path, tmp_path: Path
) -> None:
    whole = _score(run.path, data, tmp_path / "whole.parquet")
    run_ranks(_command(run, data, "three.parquet"), 3, tmp_path)
    _same_values(_read(tmp_path / "three.parquet"), whole)
    many = write_rows(tmp_path / "many.jsonl", ROWS * 60)
    out = tmp_path / "values.parquet"
    with running(_command(run, many, "values.parquet"), 2, tmp_path) as ranks:
        ranks.wait_until(lambda: _parts(out) >= 2, "two parts")
    found = _score(run.path, many, out)
    _same_values(found, [row | {"line": i} for i, row in enumerate(whole * 60, 1)])


def test_a_finished_file_is_left_as_it_is_and_measured_again(
    run: MicroRun, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "values.parquet"
    _score(run.path, data, out)
    before, table = out.stat(), capsys.readouterr().out
    _score(run.path, data, out)
    assert out.stat() == before
    assert capsys.readouterr().out == table


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv"])
def test_text_holds_what_parquet_holds(
    run: MicroRun, data: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*data.read_text().splitlines(), '{"prompt": "1+1?", "response": ""}']
    data.write_text("\n".join(rows) + "\n")
    expected = _score(run.path, data, tmp_path / "values.parquet", "data.bad_rows=skip")
    table = capsys.readouterr().out
    out = tmp_path / f"values{suffix}"
    for _ in range(2):  # the second time it is finished already
        score(lambda: TrainedCritic.find(run.path, None, ("data.bad_rows=skip",)), str(data), out)
        assert capsys.readouterr().out == table
    opened = gzip.open if suffix.endswith("gz") else open
    with opened(out, "rt", encoding="utf-8", newline="") as text:
        found = (
            [_typed(row) for row in csv.DictReader(text)]
            if suffix == ".csv"
            else [json.loads(line) for line in text]
        )
    numbers = dict.fromkeys(("prompt_value", "values", "final_value"))
    assert [row | numbers for row in found] == [row | numbers for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert (row["prompt_value"] is None) == (row["error"] is not None)
        if row["error"] is None:
            assert np.float32(row["prompt_value"]) == np.float32(other["prompt_value"])
        assert np.array_equal(
            np.asarray(row["values"] or [], np.float32),
            np.asarray(other["values"] or [], np.float32),
        )
    assert found[0]["final_value"] == found[0]["values"][-1]
    assert found[-1]["error"] == "field 'response' is empty"
    with pytest.raises(InputError, match=r"(?s)values of something else.*step: 6 -> 3"):
        _score(run.path / "checkpoints/step-00000003", data, out, "data.bad_rows=skip")
    (tmp_path / f"values{suffix}.plan.json").unlink()
    with pytest.raises(InputError, match="does not say of what"):
        _score(run.path, data, out, "data.bad_rows=skip")


def _typed(row: dict[str, str]) -> dict[str, Any]:
    """A row of a table as JSON has it."""
    return {
        k: v if k in ("error", "problem", "response") and v else json.loads(v) if v else None
        for k, v in row.items()
    }


def test_a_suffix_that_is_no_format_is_refused_before_the_critic_is_looked_for(
    tmp_path: Path,
) -> None:
    command = ("-m", "job.score", "--critic", "nowhere", "--data", "none.jsonl", "--out", "a.txt")
    done = ended([*command], tmp_path)
    assert done.returncode == 78
    assert "a.txt: --out is a file that ends in .parquet, .jsonl, .jsonl.gz, .csv" in done.stderr


def test_values_of_something_else_are_refused(
    run: MicroRun, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "values.parquet"
    _score(run.path, data, out)
    content = out.read_bytes()
    with pytest.raises(InputError, match=r"(?s)values of something else.*step: 6 -> 3"):
        _score(run.path / "checkpoints/step-00000003", data, out)
    with pytest.raises(
        InputError,
        match=r"something else.*\n  the rows of the data, .* differ \(\w{8} -> \w{8}\)$",
    ):
        _score(run.path, write_rows(tmp_path / "other.jsonl", ROWS[1:]), out)
    assert out.read_bytes() == content
    parts = tmp_path / "b.parquet.parts"
    parts.mkdir()
    shutil.copy(_plan_of_a_part(out, parts), parts / "plan.json")
    with pytest.raises(InputError, match=r"(?s)b\.parquet\.parts: values of something else.*step"):
        _score(run.path / "checkpoints/step-00000003", data, tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_text("a letter")
    with pytest.raises(InputError, match=r"c\.parquet: is there already, and no file of values"):
        _score(run.path, data, tmp_path / "c.parquet")
    assert (tmp_path / "c.parquet").read_text() == "a letter"


def _plan_of_a_part(out: Path, folder: Path) -> Path:
    file = folder / "of-another"
    file.write_bytes(pyarrow.parquet.read_schema(out).metadata[b"critic-job"])
    return file


def test_two_processes_do_not_score_into_one_file(
    run: MicroRun, many: Path, tmp_path: Path
) -> None:
    with running(_command(run, many, "values.parquet"), 1, tmp_path) as ranks:
        out = tmp_path / "values.parquet"
        ranks.freeze_when(lambda: _parts(out) >= 1, "a part")
        with pytest.raises(InputError, match="another process is scoring into it"):
            _score(run.path, many, out)


def test_a_full_disk_ends_a_scoring_and_keeps_its_parts(
    run: MicroRun, many: Path, tmp_path: Path
) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    command = _command(run, many, "values.parquet")
    command[1] = limit + command[1].replace("MICRO_BATCHES = 1", "MICRO_BATCHES = 64")
    done = ended(command, tmp_path)
    assert done.returncode == 74
    assert "cannot write the values: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "values.parquet.parts").exists()


# Which critic, which base


def test_a_critic_is_used_with_its_own_base_alone(
    critics: MicroCritics, run: MicroRun, data: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(critics.trunk, moved)
    found = _score(run.path, data, tmp_path / "a.parquet", base=str(moved))
    assert found == _score(run.path, data, tmp_path / "b.parquet")
    weights = torch.load(moved / "consolidated.pth", weights_only=True)
    weights["layers.0.attention.wq.weight"][0, 0] += 1
    torch.save(weights, moved / "consolidated.pth")
    with pytest.raises(
        InputError, match=r"(?s)not trained on the trunk .*moved.*trunk differ \(\w{8} -> \w{8}\)"
    ):
        _score(run.path, data, tmp_path / "c.parquet", base=str(moved))
    params = json.loads((moved / "params.json").read_text())
    (moved / "params.json").write_text(json.dumps(params | {"rope_theta": 5e5}))
    with pytest.raises(InputError, match=r"architecture\.rope_theta: 10000\.0 -> 500000\.0"):
        _score(run.path, data, tmp_path / "d.parquet", base=str(moved))
    with pytest.raises(
        InputError, match=r"nowhere: the trunk .* is not here; name its folder with --trunk"
    ):
        _score(run.path, data, tmp_path / "e.parquet", base="nowhere")


def test_a_run_with_relative_paths_is_used_from_anywhere(
    critics: MicroCritics, run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "project" / "runs" / "n1"
    shutil.copytree(run.path, copy)
    shutil.copytree(critics.trunk, tmp_path / "project" / "trunk")
    file = copy / "checkpoints" / "step-00000006" / "config.yaml"
    text = file.read_text().replace(f"{critics.folder}/trunk", "trunk")
    text = text.replace("prefix_cache_dir: null", "prefix_cache_dir: states")
    (tmp_path / "project" / "states").mkdir()
    file.write_text(text.replace(str(run.path), "runs/n1"))
    manifest = Manifest.read(file.parent)  # it knows the configuration's checksum
    sums = manifest.files | {"config.yaml": FileSum.of(file)}
    replace(manifest, files=sums).write(file.parent)
    monkeypatch.chdir(tmp_path)
    assert TrainedCritic.find(copy).config.model.path == f"{tmp_path}/project/trunk"
    assert TrainedCritic.find(copy, "other").config.model.path == "other"
    assert TrainedCritic.find(copy).config.prefix_cache_folder == f"{tmp_path}/project/states"
    shutil.rmtree(tmp_path / "project" / "trunk")
    with pytest.raises(InputError, match=r"trunk: the trunk .* is not here; name its .* --trunk"):
        TrainedCritic.find(copy).check()


def test_another_tokenizer_is_refused(
    critics: MicroCritics, run: MicroRun, data: Path, tmp_path: Path
) -> None:
    shutil.copy(critics.trunk / "tokenizer.json", tmp_path)
    settings = {"bos_token": "</s>", "eos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        InputError,
        match=r"with another tokenizer: the vocabulary .* differ \(\w{8} -> \w{8}\); name",
    ):
        _score(run.path, data, tmp_path / "v.parquet", f"tokenizer.path={tmp_path}")


@pytest.mark.parametrize(
    "override",
    ["training.num_unfrozen_layers=2", "objective.loss=bce", "training.value_head.bias=false"],
)
def test_what_belongs_to_the_critic_cannot_be_set(run: MicroRun, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(InputError, match=rf"belongs to the critic and cannot be set.*\n  {key}"):
        TrainedCritic.find(run.path, None, (override,))


def test_the_command_line(run: MicroRun, data: Path, tmp_path: Path) -> None:
    arguments = ["--critic", str(run.path), "--data", str(data), "--out", "values.parquet"]
    command = ["-m", "job.score", *arguments]
    done = _new_process(command, tmp_path)
    assert (done.returncode, "mse_constant" in done.stdout) == (0, True), done.stderr
    assert len(_read(tmp_path / "values.parquet")) == len(ROWS)
    for change in (["--data", "nowhere.jsonl"], ["--critic", "nowhere"]):
        wrong = ended([*command, *change], tmp_path)
        assert wrong.returncode == 78
        assert "nowhere" in wrong.stderr
        assert "Traceback" not in wrong.stderr
