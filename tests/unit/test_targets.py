"""Targets at positions: read, placed at tokens, and all that is trained of their rows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from kinds_of_tokenizers import write_llama_3
from micro_job import write_job

from job.common.config import load_config
from job.common.errors import InputError
from job.common.schema import CriticConfig
from job.data.arithmetic import ALPHABET
from job.data.packing import Batch
from job.data.targets import END, TOKEN, Target, TargetError, by_token, read_targets, step_ends
from job.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    write_bpe_tokenizer,
    write_character_tokenizer,
)
from job.distributed.world import World
from job.run.directory import RunDirectory
from job.run.value_metrics import ValueMetrics
from job.training.data import CriticData, load_critic_data
from job.training.objective import Counts, Objective
from job.training.trainer import train

TEXTS = [
    f"{a} plus {b} equals {a + b}\nso the answer is {a + b}" for a in range(9) for b in range(9)
]


def read(given: Any, response: str = "2+3=5\n\n5+4=9 \nA9") -> tuple[Target, ...]:
    return read_targets(given, "labels", response, lambda value, name: float(value))


# Reading


def test_characters_tokens_and_steps_by_hand() -> None:
    given = [
        {"at": 0, "value": 0.5},
        {"at": 5, "value": 1, "weight": 2},
        {"at": 3, "unit": "token", "value": 0.25},
        {"at": 2, "unit": "step", "value": 0.0, "weight": None},
        {"at": 0, "unit": "step", "value": 0.75},
    ]
    assert read(given) == (
        *(Target(0, 0.5), Target(5, 1.0, 2.0), Target(3, 0.25, 1.0, TOKEN)),
        *(Target(12, 0.0), Target(0, 0.75)),
    )
    assert step_ends("2+3=5\n\n5+4=9 \nA9") == [5, 12, 16]
    assert step_ends("") == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"at": 1, "value": 1}, "must be a list of targets"),
        ([], "must be a list"),
        ([3], r"labels\[0\]: an object with at, value"),
        ([{"at": 1}], "an object with at, value"),
        ([{"at": 1, "value": 1, "wait": 2}], "an object with at, value"),
        ([{"at": 1, "value": 1}, {"at": -1, "value": 1}], r"labels\[1\].at: -1"),
        ([{"at": 1.5, "value": 1}], "at: 1.5"),
        ([{"at": True, "value": 1}], "at: true"),
        ([{"at": 17, "value": 1}], "at: 17, and the response has 16 characters"),
        ([{"at": 4, "unit": "step", "value": 1}], "at: 4, and the response has 3 steps"),
        ([{"at": 1, "unit": "word", "value": 1}], "'word' is none of character, token, step"),
        ([{"at": 1, "value": 1, "weight": 0}], "weight: 0 is no number above 0"),
    ],
)
def test_what_is_no_list_of_targets_is_refused_by_its_place(given: Any, words: str) -> None:
    with pytest.raises(TargetError, match=f"(?i){words}"):
        read(given)


# Placing


def characters(folder: Path) -> Tokenizer:
    write_character_tokenizer(folder, "".join(sorted(set("".join(TEXTS)))))
    return load_tokenizer(folder)


def byte_pairs(folder: Path) -> Tokenizer:
    write_bpe_tokenizer(folder, TEXTS, 320)
    return load_tokenizer(folder)


def llama_3(folder: Path) -> Tokenizer:
    byte_pairs(folder / "small")
    trained = tokenizers.Tokenizer.from_file(str(folder / "small/tokenizer.json"))
    write_llama_3(folder, trained)
    return load_tokenizer(folder)


def pieces(kind: str) -> Callable[[Path], Tokenizer]:
    def made(folder: Path) -> Tokenizer:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=model,
            vocab_size=320 if kind == "bpe" else 60,
            model_type=kind,
            byte_fallback=kind == "bpe",
            hard_vocab_limit=False,
            minloglevel=2,
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        return load_tokenizer(folder)

    return made


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(characters, id="characters"),
        pytest.param(byte_pairs, id="byte-level BPE"),
        pytest.param(pieces("bpe"), id="sentencepiece BPE"),
        pytest.param(pieces("unigram"), id="sentencepiece unigram"),
        pytest.param(llama_3, id="tiktoken", marks=pytest.mark.slow),
    ],
)
def test_a_character_belongs_to_the_token_that_ends_at_or_after_it(
    made: Callable[[Path], Tokenizer], tmp_path: Path
) -> None:
    tokenizer = made(tmp_path / "tokenizer")
    prompt, response = "3 plus 4 equals", " 7\nso the answer is 7"
    (encoded,) = tokenizer.encode([(prompt, response)])
    start, ends = encoded.response_start, encoded.ends
    longest = 0
    for at in range(1, len(response) + 1):
        ((token, found),) = by_token([Target(at, 0.5, 2.0)], prompt, ends, start).items()
        assert found == (0.5, 2.0)
        assert token >= start
        assert ends[token] >= len(prompt) + at
        before = [end for end in ends[start:token] if end >= len(prompt) + at]
        assert before == []
        longest = max(longest, ends[token] - len(prompt) - at)
    assert (longest > 0) == (made is not characters)  # some lie inside their tokens
    if made is characters:
        assert token == len(encoded.ids) - 2  # the end token stands behind it


def test_tokens_the_end_and_what_stands_before_the_response() -> None:
    ends, start = [0, 1, 2, 4, 6, 6], 2  # a begin token, one of the prompt, three, an end token
    given = [Target(0, 0.1), Target(1, 0.2, 1.0, TOKEN), Target(0, 0.9, 1.0, END)]
    assert by_token(given, "x", ends, start) == {1: (0.1, 1.0), 2: (0.2, 1.0), 5: (0.9, 1.0)}
    # at the same token: (1 * 0 + 3 * 1) / 4
    both = [Target(2, 0.0), Target(3, 1.0, 3.0)]
    assert by_token(both, "x", ends, start) == {3: (0.75, 4.0)}
    assert by_token([Target(0, 0.1)], "", [1, 2], 0) == {}  # nothing stands before it
    with pytest.raises(TargetError, match="token 5 of 4"):
        by_token([Target(5, 0.2, 1.0, TOKEN)], "x", ends, start)


# In a training

ROWS: list[dict[str, Any]] = [
    # 1+2=3;A3 and an end token: nine positions, and one before
    {"prompt": "1+2?", "response": "1+2=3;A3", "reward": 1, "labels": [{"at": 5, "value": 0.8}]},
    {"prompt": "1+3?", "response": "1+3=4;A4", "reward": 0, "labels": None},
    {
        "prompt": "1+4?",
        "response": "1+4=6;A6",
        "labels": [
            {"at": 0, "value": 0.5},
            {"at": 6, "value": 0.25, "weight": 2.0},
            {"at": 8, "unit": "token", "value": 0.0},
        ],
    },
]
FIELDS = "data.fields={targets: labels}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_job(tmp_path)
    write_character_tokenizer(tmp_path / "trunk", ALPHABET)
    params = {"dim": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 32}
    (tmp_path / "trunk/params.json").write_text(json.dumps(params))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(*overrides: str) -> tuple[CriticConfig, CriticData]:
    files = ("data.train=rows.jsonl", "data.validation=rows.jsonl")
    config = load_config(CriticConfig, "critic.yaml", (*files, FIELDS, *overrides))
    return config, load_critic_data(config, RunDirectory("run", is_main=False), World())


def whole(data: CriticData) -> Batch:
    return data.train.assemble(data.train.units)


def shown(batch: Batch, objective: Objective) -> list[list[tuple[float, float]]]:
    """Target and weight of each position, by sequence; only those that weigh something."""
    pairs = zip(objective.targets(batch).tolist(), batch.weights.tolist(), strict=True)
    found, lengths = list(pairs), batch.lengths.tolist()
    ends = np.cumsum(lengths)
    parts = [found[end - n : end] for end, n in zip(ends, lengths, strict=True)]
    return [[(round(t, 4), w) for t, w in part if w] for part in parts]


def test_nothing_is_trained_between_targets_but_for_the_reward_at_the_end(folder: Path) -> None:
    config, data = loaded()
    batch, objective = whole(data), Objective(config.objective)
    assert shown(batch, objective) == [
        [(0.8, 1.0), (1.0, 1.0)],
        [(0.0, 1.0)] * 10,
        [(0.5, 1.0), (0.25, 2.0), (0.0, 1.0)],
    ]
    first, _, last = batch.weights.split(batch.lengths.tolist())
    assert first.nonzero().flatten().tolist() == [5, 9]
    assert last.nonzero().flatten().tolist() == [0, 6, 8]
    assert batch.weight == 2 + 10 + 4
    outputs = torch.full((30,), 2.0, requires_grad=True)
    objective.loss(outputs, batch, 0, Counts(1, 1)).backward()
    assert outputs.grad is not None
    assert torch.equal(outputs.grad != 0, batch.weights > 0)


def test_targets_spread_to_what_comes_before_them(folder: Path) -> None:
    config, data = loaded("objective.spread=next")
    assert shown(whole(data), Objective(config.objective)) == [
        [(0.8, 1.0)] * 6 + [(1.0, 1.0)] * 4,
        [(0.0, 1.0)] * 10,
        [(0.5, 1.0)] + [(0.25, 2.0)] * 6 + [(0.0, 1.0)] * 2,
    ]


def test_a_target_before_the_response_needs_a_value_there(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded()
    assert "not learnt" not in caplog.text
    config, data = loaded("objective.prompt_value=false")
    assert "1 of 5 targets are not learnt" in caplog.text
    assert shown(whole(data), Objective(config.objective))[2] == [(0.25, 2.0), (0.0, 1.0)]


def test_sequences_that_weigh_alike_do_so_by_their_targets(folder: Path) -> None:
    _, data = loaded("objective.weighting=sequence")
    batch = whole(data)
    sums = [float(part.sum()) for part in batch.weights.split(batch.lengths.tolist())]
    assert sums == pytest.approx([1, 1, 1])


def test_sequences_weigh_alike_by_what_their_targets_are_spread_to(folder: Path) -> None:
    _, data = loaded("objective.weighting=sequence", "objective.spread=next")
    batch = whole(data)
    sums = [float(part.sum()) for part in batch.weights.split(batch.lengths.tolist())]
    assert sums == pytest.approx([1, 1, 1])


def test_metrics_of_tokens_are_of_rewards_and_those_of_targets_apart(folder: Path) -> None:
    config, data = loaded()
    batch, metrics = data.validation.assemble(data.validation.units), ValueMetrics()
    Objective(config.objective).record(metrics, np.full(30, 0.5, np.float32), batch)
    got = metrics.compute()
    assert got["tokens"] == 27
    # rewards 1 and 0, and the last target of a row without one
    assert got["mean_target"] == pytest.approx(9 / 27)
    assert got["targets/count"] == 5
    errors = [0.3, 0.5, 0.0, 0.25, 0.5]
    assert got["targets/mse"] == pytest.approx(sum(x * x for x in errors) / 5)


def test_a_cut_prompt_and_a_template_move_targets_along(folder: Path) -> None:
    config, data = loaded("data.max_length=12", "data.overlong=truncate_prompt")
    assert shown(whole(data), Objective(config.objective))[0] == [(0.8, 1.0), (1.0, 1.0)]
    tokens = whole(data).layout.lengths
    assert tokens == [12, 12, 12]
    config, data = loaded('data.template="{prompt}={response};A"')
    batch = whole(data)
    at = batch.positions[batch.weights.split(batch.lengths.tolist())[0].nonzero().flatten()[0]]
    assert batch.tokens[: int(at) + 1].tolist()[-1] == batch.tokens[int(at)]
    text = "".join(["", "", "", *ALPHABET][token] for token in batch.tokens[: int(at) + 1])
    assert text.endswith("?=1+2=3")


@pytest.mark.parametrize(
    ("rows", "overrides", "words"),
    [
        (ROWS, ("objective.target=lambda_return",), "learnt by objective.target=monte_carlo"),
        (ROWS, ("objective.terms={monte_carlo: 1, td: 1}",), "objective.terms without td"),
        (ROWS[1:2], ("objective.spread=next",), "objective.spread: no row of rows.jsonl"),
        ([ROWS[0] | {"labels": [{"at": 99, "value": 1}]}], (), r"rows.jsonl:1: labels\[0\].at: 99"),
        ([ROWS[0] | {"labels": [{"at": 1, "value": 7}]}], (), r"labels\[0\].value 7 lies outside"),
        (
            [ROWS[0] | {"labels": [{"at": 99, "unit": "token", "value": 1}]}],
            (),
            "rows.jsonl:1: targets: token 99 of 9",
        ),
        ([{"prompt": "1", "response": "2", "labels": None}], (), "field 'reward' is missing"),
    ],
)
def test_targets_that_cannot_be_trained_are_refused(
    folder: Path, rows: list[dict[str, Any]], overrides: tuple[str, ...], words: str
) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=words):
        loaded(*overrides)


@pytest.mark.slow
def test_a_critic_learns_targets_that_contradict_the_reward(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards are 1, and half of the way the target is 0.2: with rewards alone it would be 1."""
    rows = [
        {"prompt": f"{a}+1?", "response": f"{a}+1={a + 1};A{a + 1}", "reward": 1, "labels": labels}
        for a in range(8)
        for labels in [[{"at": 6, "value": 0.2}]]
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in (folder / "trunk").iterdir():
        file.unlink()
    (folder / "trunk").rmdir()
    steps = ("training.max_steps=120", "training.batch_size=8", "training.learning_rate=0.01")
    files = ("data.train=rows.jsonl", "data.validation=rows.jsonl", "evaluation.every_steps=120")
    train(load_config(CriticConfig, "critic.yaml", (*files, FIELDS, *steps)))
    last = RunDirectory("runs/critic").records()[-1]
    assert last["validation/value/targets/count"] == 16
    assert last["validation/value/targets/mse"] < 0.02
    assert last["validation/value/targets/mse_constant"] == pytest.approx(0.16)
