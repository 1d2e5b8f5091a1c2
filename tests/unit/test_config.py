"""The configuration: merge order, types, the shipped files, and that no key is dead."""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.common import possible_values as module
from job.common.config import command_line, load_config, load_stored_config, merge_config
from job.common.errors import InputError, listing
from job.common.nested import differences, flatten, to_dict
from job.common.schema import CriticConfig, Loss, PretrainConfig, ShardingStrategy, Target
from job.common.text_values import dump, load_plain

ROOT = Path(__file__).parents[2]
MANDATORY = ("run.name=a", "run.dir=b", "model.path=c", "data.train=d", "data.validation=e")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "critic.yaml"
    path.write_text(
        "run: {name: from-file, dir: 'runs/${run.name}'}\n"
        "model: {path: trunk}\n"
        "data: {train: t.jsonl, validation: v.jsonl}\n"
        "training: {max_steps: 7, learning_rate: 0.5}\n"
    )
    return path


def _load(file: Path, *overrides: str) -> CriticConfig:
    return load_config(CriticConfig, file, overrides)


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all values."""
    for f in dataclasses.fields(schema):
        inside: Any = f.default_factory
        if dataclasses.is_dataclass(inside):
            yield from _keys(inside, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}"


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def test_the_file_goes_before_defaults_and_overrides_before_the_file(file: Path) -> None:
    config = _load(file, "training.max_steps=8", "run.name=x", "training.max_steps=9")
    assert config.training.max_steps == 9
    assert config.training.learning_rate == 0.5
    assert config.training.batch_size == CriticConfig().training.batch_size
    assert config.run.dir == "runs/x"


def test_a_section_of_an_override_leaves_the_rest_of_the_section(file: Path) -> None:
    training = _load(file, "training={max_steps: 3}").training
    assert (training.max_steps, training.learning_rate) == (3, 0.5)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.max_steps=12", 12),
        ("training.max_steps=1_000", 1000),
        ("training.learning_rate=1e-4", 1e-4),
        ("training.learning_rate=1.5E-3", 1.5e-3),
        ("training.learning_rate=3", 3.0),
        ("training.learning_rate=0", 0.0),
        ("training.betas=[0.8, 1e-1]", [0.8, 0.1]),
        ("training.threads=null", None),
        ("training.threads=2", 2),
        ("training.num_unfrozen_layers=0", 0),
        ("training.num_unfrozen_layers=99", 99),
        ("training.deterministic=true", True),
        ("training.deterministic=False", False),
        ("training.value_head.bias_init=-2", -2.0),
        ("evaluation.max_sequences=null", None),
        ("run.name=2", "2"),
        ("run.name=a=b", "a=b"),
        ("model.recipe=r.yaml", "r.yaml"),
        ("data.fields=alpaca", "alpaca"),
        ("data.fields={reward: is_correct}", {"reward": "is_correct"}),
        ("data.fields.reward=is_correct", {"reward": "is_correct"}),
        ("objective.loss=huber", Loss.huber),
        ("objective.target=lambda_return", Target.lambda_return),
        ("distributed.fsdp.sharding_strategy=NO_SHARD", ShardingStrategy.NO_SHARD),
        ("run.name=${oc.env:CRITIC_NAME}", "from-environment"),
        ("training.max_steps=${training.batch_size}", 16),
    ],
)
def test_values_have_the_type_of_their_key(
    override: str, value: object, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRITIC_NAME", "from-environment")
    found = _at(_load(file, override), override.partition("=")[0].removesuffix(".reward"))
    if override.startswith("data.fields.reward"):
        found = _load(file, override).data.fields
    assert found == value
    assert type(found) is type(value)


PARTS = "{prompt}{response}"
TEXTS = (
    *("1.10", "1e5", "9e54321", "007", "0x1F", "1_000", "2024_01_15", "2024-01-15", "12:30"),
    *("yes", "No", "true", "off", "exp #4", "#4", "a: b", "a:", "- a", "[", "[1, 2]", "{a: 1}"),
    *(
        "@",
        "%a",
        "&a",
        "*a",
        "!a",
        "|",
        ">",
        "`a",
        "a, b",
        "it's",
        'say "a"',
        '"a" b',
        "null.",
        " a",
    ),
    *("=", "<<", "...", "---", "null # 4", "\\n", "a\\b", "é", "🂡", "a\tb", "a\nb"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_what_was_typed(text: str, file: Path) -> None:
    keys = ["model.recipe", "mlflow.experiment"]
    if text.isprintable():
        keys.append("run.name")
    config = _load(
        file, *(f"{key}={text}" for key in keys), f"data.template={text}{{prompt}}{{response}}"
    )
    assert [_at(config, key) for key in keys] == [text] * len(keys)
    assert config.data.template == f"{text}{PARTS}"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("'1.10'", "1.10"),
        ('"a # b"', "a # b"),
        (r'"a\nb"', "a\nb"),
        (r"'a\nb'", r"a\nb"),
        ("'null'", "null"),
        ("'it''s'", "it's"),
        ("null", None),
        ("~", None),
        ("", None),
        (r"\${a}", "${a}"),
        ("${run.name}-1e5", "from-file-1e5"),
    ],
)
def test_quotes_null_and_references_in_text(typed: str, meant: str | None, file: Path) -> None:
    assert _load(file, f"model.recipe={typed}").model.recipe == meant


PLAIN = ("1.10", "1e5", "007", "0x1F", "1_000", "2024-01-15", "12:30", "yes", "No", "true", "a=b")


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_in_a_file_or_a_section_stays_text(text: str, file: Path) -> None:
    assert _load(file, f"mlflow={{experiment: {text}}}").mlflow.experiment == text
    file.write_text(file.read_text() + f"mlflow:\n  experiment: {text}\n")
    assert _load(file).mlflow.experiment == text


def test_null_in_a_file_is_no_text(file: Path) -> None:
    file.write_text(file.read_text() + "tokenizer: {path: ~}\nmlflow: {tracking_uri: null}\n")
    assert (_load(file).tokenizer.path, _load(file).mlflow.tracking_uri) == (None, None)


def test_text_behind_merge_keys_and_aliases(file: Path) -> None:
    file.write_text(
        file.read_text().replace("model:", "mlflow: {<<: &a {experiment: 1.10}}\nmodel:")
    )
    assert _load(file).mlflow.experiment == "1.10"


@pytest.mark.parametrize(
    "text", [*TEXTS, "${a}", r"\${a}", r"\\${a", "$", "${", "null", "~", "1e5\\", "????", "x" * 200]
)
def test_a_stored_configuration_says_what_was_meant(text: str, file: Path, tmp_path: Path) -> None:
    config = CriticConfig()
    config.model.path, config.run.dir = "trunk", "runs"
    config.data.train, config.data.validation = "t.jsonl", "v.jsonl"
    config.run.name, config.data.template = f"n{text}", f"{text}{PARTS}"
    config.data.fields = {"prompt": text if text.strip() else "a"}
    stored = tmp_path / "config.yaml"
    stored.write_text(dump(to_dict(config)), encoding="utf-8")
    assert load_stored_config(CriticConfig, stored) == config
    assert load_plain(stored.read_text(encoding="utf-8")) == to_dict(config)


@dataclasses.dataclass
class _Others:
    names: list[str] = dataclasses.field(default_factory=list)
    table: dict[str, str] = dataclasses.field(default_factory=dict)
    number: int | str = 0
    anything: Any = None


def test_text_in_lists_and_tables(tmp_path: Path) -> None:
    file = tmp_path / "others.yaml"
    file.write_text("names: [1.10, yes, null-]\ntable: {A: 007, B: true, C: 12:30}\nnumber: 1_0\n")
    found = merge_config(_Others, file, ["anything=007"])
    assert found.names == ["1.10", "yes", "null-"]
    assert found.table == {"A": "007", "B": "true", "C": "12:30"}
    assert (found.number, found.anything) == (10, 7)
    given = ["names=[1e5, 007]", "table.A=1e5", "table={B: 1.10}"]
    found = merge_config(_Others, file, given)
    assert (found.names, found.table) == (["1e5", "007"], {"A": "1e5", "B": "1.10", "C": "12:30"})


def test_what_is_no_utf8_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAME", os.fsdecode(b"a\xff"))
    with pytest.raises(InputError, match=r"run.name: 'a\\udcff' is not UTF-8 text"):
        _load(file, "run.name=${oc.env:NAME}")
    monkeypatch.setattr(sys, "argv", ["train", "--config", os.fsdecode(b"\xe9.yaml")])
    with pytest.raises(InputError, match=r"'\\udce9.yaml': this argument is not UTF-8 text"):
        command_line("about").parse_args()


@pytest.mark.parametrize("loss", ["mse", "huber", "bce"])
def test_only_pairs_need_even_batches_and_room_for_two(loss: str, file: Path) -> None:
    tight = ("training.batch_size=3", "data.max_length=8", "training.micro_batch_tokens=8")
    assert _load(file, f"objective.loss={loss}", *tight).training.batch_size == 3


def test_plain_form(file: Path) -> None:
    plain = to_dict(_load(file, "objective.loss=bce", "data.fields={reward: ok}"))
    assert plain["run"] == {"name": "from-file", "dir": "runs/from-file"}
    assert plain["objective"]["loss"] == "bce"
    assert plain["distributed"]["fsdp"]["sharding_strategy"] == "auto"
    assert plain["data"]["fields"] == {"reward": "ok"}
    assert plain["training"]["betas"] == [0.9, 0.95]


def test_flatten() -> None:
    tree = {"a": {"b": 1, "c": {"d": [2]}}, "e": None, "f": {}}
    assert flatten(tree) == {"a.b": 1, "a.c.d": [2], "e": None, "f": {}}


def test_differences() -> None:
    old = {"a": {"b": 1, "same": 2}, "gone": None}
    new = {"a": {"b": 3, "same": 2}, "new": 0}
    assert differences(old, new) == ["a.b: 1 -> 3", "gone: None -> absent", "new: absent -> 0"]
    assert differences(old, old) == []


def test_a_listing_shows_ten_lines() -> None:
    lines = [f"line {i}" for i in range(12)]
    assert listing(lines[:1]) == "\n  line 0"
    assert listing(lines[:10]).splitlines()[1:] == [f"  {line}" for line in lines[:10]]
    assert listing(lines).splitlines()[-2:] == ["  line 9", "  ... and 2 more"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/critic").glob("*.yaml")), ids=str)
def test_shipped_critic_configuration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSM8K_DIR", "/data/gsm8k")
    given = () if "???" not in path.read_text() else MANDATORY[2:]
    config = load_config(CriticConfig, path, given)
    assert f"n{config.training.num_unfrozen_layers}" in config.run.dir
    if config.model.recipe is not None:
        recipe = load_config(PretrainConfig, ROOT / config.model.recipe)
        assert recipe.out == config.model.path
        assert recipe.data.max_length <= recipe.training.micro_batch_tokens


@pytest.mark.parametrize("path", sorted((ROOT / "configs/pretrain").glob("*.yaml")), ids=str)
def test_shipped_pretraining_configuration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSM8K_DIR", "/data/gsm8k")
    assert load_config(PretrainConfig, path).training.max_steps > 0


def test_keys_that_scripts_rely_on() -> None:
    names = """
        run.dir run.name model.path tokenizer.path data.train data.validation data.fields
        training.num_unfrozen_layers training.learning_rate training.lr_decay_factor
        training.max_steps training.batch_size distributed.fsdp.sharding_strategy
        distributed.fsdp.mixed_precision distributed.fsdp.cpu_offload
        distributed.fsdp.activation_checkpointing mlflow.tracking_uri mlflow.experiment
    """
    assert set(names.split()) <= set(_keys(CriticConfig))
    assert CriticConfig().training.num_unfrozen_layers == 4


def test_every_bound_is_of_a_key() -> None:
    assert module._BOUNDS.keys() <= {*_keys(CriticConfig), *_keys(PretrainConfig)}


def test_every_number_has_a_bound() -> None:
    for schema in (CriticConfig, PretrainConfig):
        numbers = {k for k, v in _defaults(schema).items() if type(v) in (int, float)}
        assert numbers <= module._BOUNDS.keys()


def _defaults(schema: type) -> dict[str, Any]:
    return flatten(dataclasses.asdict(schema()))


@pytest.mark.slow
@pytest.mark.parametrize("schema", [CriticConfig, PretrainConfig])
def test_bounds_hold_at_the_bound_and_not_beyond(schema: type, tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    needed = MANDATORY if schema is CriticConfig else ("out=a", "data.train=b")
    for key, (low, high) in module._BOUNDS.items():
        if key not in set(_keys(schema)):
            continue
        for bound, beyond in ((low, -1), (high, 1)):
            if bound is not None:
                with pytest.raises(InputError, match=f"  {key}: .* possible value"):
                    load_config(schema, empty, [*needed, f"{key}={bound + beyond}"])


def test_no_key_is_dead() -> None:
    """Each name of a key is read somewhere, or is one of the transformer's own."""
    files = [path for path in (ROOT / "job").rglob("*.py") if path.name != "config.py"]
    used = {name for path in files for name in _names_read(ast.parse(path.read_text()))}
    keys = {*_keys(CriticConfig), *_keys(PretrainConfig)}
    assert {key for key in keys if key.rpartition(".")[2] not in used} == set()


def _names_read(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            yield str(node.slice.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_the_login_node_needs_no_torch() -> None:
    code = "import sys, job.common.config; print({'torch', 'numpy', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
