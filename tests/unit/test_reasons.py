"""Refusals say what is wrong, and not what else could be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import job.data.__main__ as data
import job.memory.__main__ as memory
from job import cache
from job.common.config import load_config, load_stored_config
from job.common.data_file import check_readable
from job.common.errors import InputError
from job.common.schema import CriticConfig, DataConfig, ObjectiveConfig
from job.data.arithmetic import ALPHABET
from job.data.rows import read_rows
from job.data.token_cache import load_split
from job.data.tokenizer import load_tokenizer, write_character_tokenizer
from job.run.checkpoint_store import newest_intact
from job.training.objective import Objective
from job.training.scoring import _show

NEEDED = (
    "run.name=r", "run.dir=d", "model.path=m", "data.train=t.jsonl", "data.validation=v.jsonl"
)  # fmt: skip


def refusal(folder: Path, *overrides: str, content: str = "{}\n") -> str:
    file = folder / "critic.yaml"
    file.write_text(content)
    with pytest.raises(InputError) as refused:
        load_config(CriticConfig, file, [*NEEDED, *overrides])
    return str(refused.value)


@pytest.mark.parametrize("share", ["1.0", "1.5", "0.0", "0", "1", "-0.1", "1e3"])
def test_a_share_that_is_none_is_named_as_such(tmp_path: Path, share: str) -> None:
    said = f"data.validation: {share}: a share lies between 0 and 1; a file of that name is ./"
    assert said in refusal(tmp_path, f"data.validation={share}")
    content = f"data: {{validation: {share}}}\n"
    file = tmp_path / "critic.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match="a share lies between 0 and 1"):
        load_config(CriticConfig, file, NEEDED[:-1])


@pytest.mark.parametrize("name", ["./1.0", "2024", ".", "v1.5"])
def test_files_and_folders_may_have_a_number_in_their_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "critic.yaml").write_text("{}\n")
    overrides = [*NEEDED, f"data.validation={name}"]
    found = load_config(CriticConfig, tmp_path / "critic.yaml", overrides)
    assert found.data.validation == name


@pytest.mark.parametrize(
    ("share", "split", "said"),
    [
        (1e-5, "validation", "1e-05 holds out 0 of 5 problems of "),
        (1 - 1e-5, "train", "0.99999 holds out 5 of 5 problems of "),
    ],
)
def test_a_share_of_no_problem_says_of_how_many(
    tmp_path: Path, share: float, split: str, said: str
) -> None:
    (tmp_path / "trunk").mkdir()
    write_character_tokenizer(tmp_path / "trunk", ALPHABET)
    rows = [{"prompt": f"{k % 5}+1?", "response": "A1", "reward": 1} for k in range(10)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(str(file), share, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=f"data.validation: {said}.*a.jsonl"):
        load_split(config, split, load_tokenizer(tmp_path / "trunk"))


def test_data_that_is_not_there_is_of_no_kind(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="nope: no such file or folder"):
        check_readable([str(tmp_path / "train.jsonl"), str(tmp_path / "nope")])


@pytest.mark.parametrize("content", ["5\n", "5.5\n", "true\n", "[1]\n"])
def test_a_configuration_of_one_value_is_no_mapping(tmp_path: Path, content: str) -> None:
    said = refusal(tmp_path, content=content)
    assert said.endswith("critic.yaml: a configuration is a mapping of keys to values")


def test_a_configuration_that_is_no_text_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "critic.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read the configuration: not UTF-8 text"):
        load_config(CriticConfig, tmp_path / "critic.yaml", NEEDED)


@pytest.mark.parametrize("key", ["run.name", "run.dir"])
@pytest.mark.parametrize("sign", ["\n", "\t", "\x1b", "\x85", "\u2028"])
def test_names_have_no_control_signs(tmp_path: Path, key: str, sign: str) -> None:
    said = refusal(tmp_path, f"{key}=a{sign}b")
    assert f"{key}: {f'a{sign}b'!r} has a line end or another control sign in it" in said


def test_keys_of_stages_are_named_whole(tmp_path: Path) -> None:
    said = refusal(tmp_path, content="training: {stages: [{steps: 3}, {step: 3}, 4]}\n")
    assert "training.stages[1].step: unknown key (nearest: steps; valid here: num_unf" in said
    assert "training.stages[2]: a section with num_unfrozen_layers, steps, " in said
    said = refusal(tmp_path, "training.stages=[{num_unfrozen_layer: 1}]")
    assert "training.stages[0].num_unfrozen_layer: unknown key" in said
    content = "training: {stages: [{num_unfrozen_layers: 0, steps: few}]}\n"
    assert "training.stages[0].steps: " in refusal(tmp_path, content=content)


@pytest.mark.parametrize("value", ["3", "foo", "null", "true", "2.5", "{steps: 3}", '"x"'])
def test_what_is_no_list_of_stages_is_named(tmp_path: Path, value: str) -> None:
    said = "training.stages: a list of sections with num_unfrozen_layers, steps, learning_rate, "
    assert said in refusal(tmp_path, f"training.stages={value}")
    assert said in refusal(tmp_path, content=f"training: {{stages: {value}}}\n")


@pytest.mark.parametrize("key", ["training.betas", "data.reward_range"])
@pytest.mark.parametrize("value", ["3", "foo", "[[0.5], [0.75]]", "[0.5, {a: 1}]", "[0.5, x]"])
def test_what_are_no_two_numbers_are_named(tmp_path: Path, key: str, value: str) -> None:
    assert f"{key}" in refusal(tmp_path, f"{key}={value}").replace(f"{key}={value}", "")


HEAD_FIRST = "training: {stages: [{num_unfrozen_layers: 0, steps: 600, learning_rate: 0.01}, "
HEAD_FIRST += "{num_unfrozen_layers: 4, steps: 400}], value_head: {learning_rate: 0.001}}\n"


@pytest.mark.parametrize(
    ("overrides", "content", "said"),
    [
        (("objective.bins=21",), "", "objective.bins: 21 is of hl_gauss; objective.loss is mse"),
        (
            ("objective.sigma=2", "objective.loss=bce"),
            "",
            "objective.sigma: 2 is of hl_gauss; objective.loss is bce",
        ),
        (
            ("data.fields=attempts", "data.train=embedded", "data.validation=embedded"),
            "",
            "data.fields: the embedded data has a form of its own; leave it out",
        ),
        (
            ("data.reward_range=[0, 4]", "data.train=embedded", "data.validation=embedded"),
            "",
            "data.reward_range: the embedded data has a form of its own; leave it out",
        ),
        (
            (),
            HEAD_FIRST,
            "training.stages[0].learning_rate: 0.01 is the trunk's, of which nothing learns there; "
            "the head's is training.value_head.learning_rate: 0.001, or the stage's head_learning_",
        ),
    ],
)
def test_what_would_change_nothing_is_refused_in_new_runs_alone(
    tmp_path: Path, overrides: tuple[str, ...], content: str, said: str
) -> None:
    assert f"\n  {said}" in refusal(tmp_path, *overrides, content=content)
    load_stored_config(CriticConfig, tmp_path / "critic.yaml", [*NEEDED, *overrides])


def test_a_stage_s_rate_is_the_head_s_too_where_that_has_none(tmp_path: Path) -> None:
    file = tmp_path / "critic.yaml"
    file.write_text(HEAD_FIRST)
    load_config(CriticConfig, file, [*NEEDED, "training.value_head.learning_rate=null"])
    load_config(
        CriticConfig,
        file,
        [
            *NEEDED,
            "objective.loss=hl_gauss",
            "objective.bins=21",
            "training.value_head.learning_rate=null",
        ],
    )


def ended(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(InputError) as refused:
        main()
    return str(refused.value)


@pytest.mark.parametrize("number", ["-1", "nan", "inf"])
@pytest.mark.parametrize(
    ("main", "arguments", "low"),
    [
        (memory.main, ["predict", "--config", "c", "--gpu-memory"], "0.001"),
        (cache.main, ["prune", "--dir", ".", "--keep-gb"], "0"),
    ],
)
def test_a_number_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[[], None],
    arguments: list[str],
    low: str,
    number: str,
) -> None:
    said = ended(main, monkeypatch, *arguments, number)
    assert f"argument {arguments[-1]}: {number}: {low} or more" in said
    assert f"argument {arguments[-1]}: invalid float value" in ended(
        main, monkeypatch, *arguments, "few"
    )


def test_rows_that_are_shown_are_not_fewer_than_none(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ended(data.main, monkeypatch, "a.jsonl", "--rows", "-1")
    assert "argument --rows: -1: 0 or more" in said


def test_a_page_that_cannot_be_written_is_refused_before_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    said = ended(data.main, monkeypatch, "none.jsonl", "--page", tmp_path / "file/page.html")
    assert said == f"--page {tmp_path}/file: {tmp_path}/file is a file, where a folder should be"


def test_only_folders_of_caches_are_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prune = ("prune", "--keep-gb", "0", "--dir", tmp_path)
    (tmp_path / "notes").mkdir()
    assert ended(cache.main, monkeypatch, *prune) == f"{tmp_path}: there is no cache here"
    (tmp_path / "notes").rmdir()
    cache.main()  # where all caches are gone already
    assert "0.000 GB removed" in capsys.readouterr().out


def test_a_response_of_blanks_is_not_called_empty(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": "p", "response": text, "reward": 1} for text in (" ", "\n", "")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [str(row).partition("'response' is ")[2] for _, row in read_rows(file)]
    assert said == ["empty but for blanks", "empty but for blanks", "empty"]


def test_pairs_of_mean_values_are_named_apart_from_those_of_last_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _show({"pairwise_accuracy": 0.5}, Objective(ObjectiveConfig()))
    assert "pairwise_accuracy (of mean values)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (None, "no such file or folder"),
        ("", "a file"),
        ({}, "none of a critic's files"),
        ({"config.yaml": "{}"}, "a run that has not saved any yet"),
        ({"params.json": "{}", "consolidated.pth": ""}, "a trunk"),
        ({"config.json": '{"architectures": ["LlamaForCausalLM"]}'}, "a trunk"),
        ({"config.json": '{"architectures": ["LlamaForTokenClassification"]}'}, "an export: "),
        ({"config.json": '{"architectures": ["Qwen2ForSequenceClassification"]}'}, "an export: "),
        ({"params.json": "{}", "value_head.safetensors": ""}, "an export: "),
        ({"manifest.json": "{"}, "damaged"),
    ],
)
def test_what_is_no_critic_is_named_for_what_it_is(
    tmp_path: Path, files: dict[str, str] | str | None, what: str
) -> None:
    place = tmp_path / "place"
    if isinstance(files, str):
        place.write_text(files)
    elif files is not None:
        place.mkdir()
        for name, content in files.items():
            (place / name).write_text(content)
    with pytest.raises(InputError) as refused:
        newest_intact(place)
    said = str(refused.value)
    assert said.startswith(f"{place}: no intact checkpoint here: {what}")
    assert said.endswith(
        "name a run, one of its checkpoints, or a delta (job.export --format delta)"
    )
