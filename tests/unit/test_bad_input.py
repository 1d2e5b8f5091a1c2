"""Bad input ends in exit code 78 and a short message that names what is at fault."""

from __future__ import annotations

import gzip
import io
import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml

import job.compare
import job.pretrain
import job.report
import job.train
from job.common.config import load_config
from job.common.errors import Exit, run_command
from job.common.nested import to_dict
from job.common.schema import CriticConfig
from job.data.arithmetic import ALPHABET
from job.data.tokenizer import write_character_tokenizer
from job.model.architecture import TransformerConfig
from job.model.transformer import Transformer
from job.model.weights import save_transformer
from job.training.trainer import train

pytestmark = pytest.mark.slow

ROWS = [
    {"prompt": "1+2?", "response": "1+2=3;A3", "reward": 1, "problem_id": "a"},
    {"prompt": "1+2?", "response": "1+2=4;A4", "reward": 0, "problem_id": "a"},
    {"prompt": "5-3?", "response": "5-3=2;A2", "reward": 1.0, "problem_id": "b"},
    {"prompt": "5-3?", "response": "5-3=1;A1", "reward": False, "problem_id": "b"},
]
CRITIC = """
run: {name: tiny, dir: "runs/${run.name}"}
model: {path: trunk}
data: {train: train.jsonl, validation: validation.jsonl, max_length: 32, cache_dir: cache}
training: {num_unfrozen_layers: 1, max_steps: 2, batch_size: 2, micro_batch_tokens: 64, threads: 1}
evaluation: {every_steps: 2}
distributed: {fsdp: {mixed_precision: false}}
mlflow: {enabled: false}
"""
PRETRAIN = """
out: trunk
architecture: {dim: 8, n_layers: 2, n_heads: 2, multiple_of: 8, n_future_tokens: 1}
data: {train: embedded, max_length: 64, cache_dir: cache, arithmetic: {train_examples: 8}}
training: {max_steps: 2, batch_size: 2, micro_batch_tokens: 64, threads: 1}
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


def _jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


SCREEN = (100, 25)  # columns and lines
Change = Callable[[Path], object]  # of the working directory


@pytest.fixture(scope="session")
def tiny_trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "trunk"
    vocab_size = len(ALPHABET) + 3  # and three special tokens
    torch.manual_seed(0)
    config = TransformerConfig(8, n_layers=2, n_heads=2, multiple_of=8, vocab_size=vocab_size)
    save_transformer(Transformer(config), folder)
    write_character_tokenizer(folder, ALPHABET)
    return folder


@pytest.fixture
def workplace(tmp_path: Path, tiny_trunk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a command, with everything for a training of two steps."""
    shutil.copytree(tiny_trunk, tmp_path / "trunk")
    (tmp_path / "critic.yaml").write_text(CRITIC)
    (tmp_path / "pretrain.yaml").write_text(PRETRAIN)
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text(_jsonl(*ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Run a command's main with the given arguments, as `python -m` would."""

    def run(main: Callable[[], None], *arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["job", *arguments])
        code: object = 0
        try:
            run_command(main)
        except SystemExit as end:
            code = end.code or 0
        assert isinstance(code, int)
        return Ended(code, *capsys.readouterr())

    logger = logging.getLogger("job")
    before = (logger.level, logger.handlers[:])
    yield run
    logger.level, logger.handlers = before  # they write to this test's stderr


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _check(ended: Ended, words: tuple[str, ...]) -> None:
    assert ended.code == Exit.BAD_INPUT, ended.err
    assert "Traceback" not in ended.err
    assert "\nerror: " in f"\n{ended.err}"
    columns, lines = SCREEN
    assert sum(math.ceil(len(line) / columns) for line in ended.err.splitlines()) <= lines
    for word in words:
        assert word in ended.err


def _refused(run: Callable[[], Ended], words: tuple[str, ...]) -> None:
    """The command is refused before its first step, and every file from before is as it was."""
    place = Path.cwd()
    before = _files(place)
    _check(run(), words)
    after = _files(place)
    assert before.items() <= after.items()
    for file in after.keys() - before.keys():
        assert file.name != "metrics.jsonl" or not after[file]
        assert file.suffix not in (".pth", ".safetensors")
        if file.name == "status.json":
            assert json.loads(after[file])["state"] == "failed"


@pytest.fixture
def refused(workplace: Path, command: Command) -> Callable[..., None]:
    """Refused by job.train with these overrides, in these words."""

    def check(*words: str, overrides: tuple[str, ...] = (), config: str = "critic.yaml") -> None:
        options = ["--config", config, *(["--override", *overrides] if overrides else [])]
        _refused(lambda: command(job.train.main, *options), words)

    return check


@pytest.fixture
def pretrain_refused(workplace: Path, command: Command) -> Callable[..., None]:
    """Refused by job.pretrain with these overrides, in these words; nothing is left behind."""

    def check(*words: str, overrides: tuple[str, ...] = ()) -> None:
        options = ["--config", "pretrain.yaml", "--override", "out=new", *overrides]
        _refused(lambda: command(job.pretrain.main, *options), words)
        assert not [p.name for p in workplace.iterdir() if p.name.startswith((".new", "new"))]

    return check


def test_the_input_that_the_cases_spoil_is_good(workplace: Path, command: Command) -> None:
    ended = command(job.train.main, "--config", "critic.yaml")
    assert ended.code == Exit.FINISHED, ended.err
    ended = command(job.pretrain.main, "--config", "pretrain.yaml", "--override", "out=new")
    assert ended.code == Exit.FINISHED, ended.err


# --- configuration ---------------------------------------------------------------------------

CONFIG_FILES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "unknown section": (f"{CRITIC}traning: {{max_steps: 3}}", ("traning", "nearest: training")),
    "unknown key": (
        CRITIC.replace("max_steps", "max_step"),
        ("training.max_step:", "nearest: max_steps"),
    ),
    "a hundred unknown keys": (
        CRITIC + "".join(f"k{i}: 1\n" for i in range(100)),
        ("100 key(s)", "k9:", "... and 90 more"),
    ),
    "key that is no text": (f"{CRITIC}3: 4", ("3: unknown key",)),
    "mandatory value not given": (
        CRITIC.replace("path: trunk", "path: '???'"),
        ("no value for model.path", "--override model.path=VALUE"),
    ),
    "empty": ("", ("no value for data.train, data.validation, model.path, run.dir, run.name",)),
    "empty text": (CRITIC.replace("name: tiny", "name: ''"), ("run.name: ''",)),
    "zero byte in a path": (
        CRITIC.replace("path: trunk", 'path: "a\\0b"'),
        ("model.path: 'a\\x00b'",),
    ),
    "unclosed brace": (f"{CRITIC}logging: {{every_steps: 3", ("not valid YAML", "line 9")),
    "tab": (f"{CRITIC}logging:\n\tevery_steps: 3", ("not valid YAML", "line 10, column 1")),
    "nested thousands deep": (f"{CRITIC}logging: {'[' * 2000}{']' * 2000}", ("recursion",)),
    "code": (f"{CRITIC}logging: !!python/object/apply:os.abort []", ("not valid YAML", "line 9")),
    "list": ("- run\n- model\n", ("a mapping of keys to values",)),
    "text": ("train the critic", ("train the critic",)),
    "no integer": (f"{CRITIC}logging: !!int three", ("invalid literal", "three")),
    "two documents": (f"{CRITIC}---\n{CRITIC}", ("not valid YAML", "another document")),
    "duplicate section": (f"{CRITIC}run: {{name: b}}", ("duplicate key run", "line 9")),
    "duplicate key": (f"{CRITIC}logging:\n  every_steps: 1\n  every_steps: 2", ("line 11",)),
    "not UTF-8": (CRITIC.encode() + b"# \xff\xfe", ("not UTF-8",)),
    "zero byte": (CRITIC.encode() + b"# \0", ("not valid YAML", "#x0000")),
    "number for a section": (f"{CRITIC}logging: 3", ("logging: a section with every_steps",)),
    "nothing for a section": (f"{CRITIC}logging:", ("logging: a section with", "not None")),
    "list for a section": (f"{CRITIC}logging: [1]", ("logging: a section with", "not [1]")),
    "section for a number": (
        f"{CRITIC}logging: {{every_steps: {{a: 1}}}}",
        ("logging.every_steps: a single value", "{'a': 1}"),
    ),
    "list for a number": (f"{CRITIC}logging: {{every_steps: [1]}}", ("logging.every_steps",)),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_configuration_file(case: str, workplace: Path, refused: Callable[..., None]) -> None:
    content, words = CONFIG_FILES[case]
    raw = content.encode() if isinstance(content, str) else content
    (workplace / "bad.yaml").write_bytes(raw)
    refused("bad.yaml", *words, config="bad.yaml")


@pytest.mark.parametrize(
    ("file", "reason"),
    [("none.yaml", "No such file"), ("trunk", "Is a directory"), ("critic.yaml/x", "Not a dir")],
)
def test_no_configuration_file(file: str, reason: str, refused: Callable[..., None]) -> None:
    refused(file, "cannot read the configuration", reason, config=file)


OVERRIDES: dict[str, tuple[str, ...]] = {
    # type
    "training.max_steps=many": ("training.max_steps", "'many'", "Integer"),
    "training.max_steps=2.5": ("training.max_steps", "2.5", "Integer"),
    "training.max_steps=true": ("training.max_steps", "True", "Integer"),
    "training.max_steps=": ("training.max_steps", "None"),
    f"training.max_steps={'9' * 5000}x": ("training.max_steps", "..."),
    "training.num_unfrozen_layers=1.5": ("training.num_unfrozen_layers", "1.5", "Integer"),
    "training.num_unfrozen_layers=true": ("training.num_unfrozen_layers", "True"),
    "training.learning_rate=fast": ("training.learning_rate", "'fast'", "Float"),
    "training.deterministic=perhaps": ("training.deterministic", "'perhaps'", "bool"),
    "training.deterministic=2": ("training.deterministic", "true or false, not 2"),
    "objective.loss=hinge": ("objective.loss", "'hinge'", "mse, huber, bce, pairwise, hl_gauss"),
    "distributed.fsdp.sharding_strategy=full": ("sharding_strategy", "'full'", "FULL_SHARD"),
    "training.betas=0.9": ("training.betas",),
    "training.betas.0=0.9": ("training.betas: a single value",),
    "training.betas=[a, b]": ("training.betas", "'a'", "Float"),
    "mlflow={experiment: {a: 1}}": ("mlflow.experiment: a single value",),
    "data.fields=[prompt]": ("data.fields", "a mapping or a preset (alpaca, "),
    "data.fields={prompt: {a: 1}}": ("data.fields.prompt: the name of a field",),
    # value
    "training.num_unfrozen_layers=-1": ("training.num_unfrozen_layers: -1 is below 0",),
    "training.learning_rate=nan": ("training.learning_rate: nan is not a finite number",),
    "training.learning_rate=.inf": ("training.learning_rate: inf is not a finite number",),
    "training.learning_rate=-1e-3": ("training.learning_rate: -0.001 is below 0",),
    "training.lr_decay_factor=1.5": ("training.lr_decay_factor: 1.5 is above 1",),
    "training.batch_size=0": ("training.batch_size: 0 is below 1",),
    "training.seed=-1": ("training.seed: -1 is below 0",),
    f"training.seed={10**30}": ("training.seed", "is above"),
    "training.betas=[0.9]": ("training.betas: [0.9] must be two numbers",),
    "training.betas=[0.9, 0.95, 0.99]": ("training.betas", "must be two numbers"),
    "training.betas=[0.9, 1.0]": ("training.betas", "[0, 1)"),
    "data.max_length=65": ("data.max_length: 65", "training.micro_batch_tokens: 64"),
    "data.fields=llama": ("data.fields: unknown preset 'llama'",),
    "data.fields={promt: q}": ("data.fields.promt: unknown field",),
    "data.train=embedded": ("data.train and data.validation: both embedded or neither",),
    "data.arithmetic.min_steps=9": ("data.arithmetic.min_steps: above",),
    # key
    "training.max_step=3": ("training.max_step: unknown key", "nearest: max_steps"),
    "max_steps=3": ("max_steps: unknown key", "valid here: run, model"),
    "training=3": ("training: a section with",),
    "training.max_steps.x=3": ("training.max_steps: a single value",),
    # form
    "training.max_steps": ("--override training.max_steps: write it as key=value",),
    "=3": ("--override =3: write it as key=value",),
    "training..max_steps=3": ("--override training..max_steps=3: write it as key=value",),
    "training.betas=[": ("--override training.betas=[",),
    "training.max_steps=@": ("--override training.max_steps=@", "character"),
    # interpolation
    "model.path=${oc.env:NO_SUCH_VARIABLE}": ("model.path", "NO_SUCH_VARIABLE"),
    "model.path=${run.nme}": ("model.path", "'run.nme' not found"),
    "run.name=${run.name}": ("run.name", "Recursive"),
    "model.path=${now:%Y}": ("model.path", "now"),
    "run.name=${run.dir": ("--override run.name=${run.dir",),
    "training.max_steps=${model.path}": ("training.max_steps", "'trunk'", "Integer"),
}


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: text[:40])
def test_override(override: str, refused: Callable[..., None]) -> None:
    refused(*OVERRIDES[override], overrides=(override,))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("training.batch_size=3",), ("training.batch_size: 3 is odd",)),
        (("data.max_length=33",), ("training.micro_batch_tokens", "2 x data.max_length")),
        (("objective.target=lambda_return",), ("objective.target", "pairwise")),
        (("objective.weighting=problem",), ("objective.weighting: the pairwise loss",)),
        (("objective.balance_labels=true",), ("objective.balance_labels: the pairwise loss",)),
    ],
)
def test_pairwise_loss(
    overrides: tuple[str, ...], words: tuple[str, ...], refused: Callable[..., None]
) -> None:
    refused(*words, overrides=("objective.loss=pairwise", *overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("objective.loss=pairwise",), ("objective.loss: pairwise is one of objective.terms",)),
        (("objective.target=lambda_return",), ("objective.target", "td is lambda_return")),
        (("objective.terms.monte_carlo=0",), ("pairwise alone is objective.loss=pairwise",)),
        (("objective.terms.td=-1",), ("objective.terms.td", "below 0")),
        (("data.max_length=33",), ("training.micro_batch_tokens", "2 x data.max_length")),
    ],
)
def test_joint_objective(
    overrides: tuple[str, ...], words: tuple[str, ...], refused: Callable[..., None]
) -> None:
    terms = ("objective.terms.monte_carlo=1", "objective.terms.pairwise=0.5")
    refused(*words, overrides=(*terms, *overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("objective.bins=4",), ("objective.bins: 4 leave nothing", "of 0.75 bins")),
        (("objective.sigma=9",), ("objective.bins: 51 leave nothing",)),
        (("objective.sigma=0",), ("objective.sigma", "below 0.01")),
        (("model.keep_head=true",), ("model.keep_head", "hl_gauss")),
        (("training.value_head.bias_init=0.5",), ("bias_init", "each of its bins")),
    ],
)
def test_histogram_loss(
    overrides: tuple[str, ...], words: tuple[str, ...], refused: Callable[..., None]
) -> None:
    refused(*words, overrides=("objective.loss=hl_gauss", *overrides))


def test_the_best_checkpoint_by_values_that_are_not_trained(refused: Callable[..., None]) -> None:
    given = ("objective.prompt_value=false", "checkpoint.keep_best=validation/value/prompt/mse")
    refused("checkpoint.keep_best", "needs objective.prompt_value", overrides=given)


def test_an_initial_bias_of_a_head_without_one(refused: Callable[..., None]) -> None:
    given = ("training.value_head.bias=false", "training.value_head.bias_init=0.5")
    refused("training.value_head.bias_init", "training.value_head.bias false", overrides=given)


def test_problems_of_a_configuration_are_told_together(refused: Callable[..., None]) -> None:
    bad = ("training.batch_size=0", "training.weight_decay=-1", "logging.every_steps=0")
    refused("batch_size: 0", "weight_decay: -1", "logging.every_steps: 0", overrides=bad)


# --- data ------------------------------------------------------------------------------------


def _row(**changes: Any) -> str:
    return json.dumps({k: v for k, v in (ROWS[0] | changes).items() if v is not ...})


BAD_ROWS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "broken JSON": ('{"prompt": "1+2?", ', ("broken JSON", "column")),
    "Python, not JSON": ("{'prompt': '1+2?'}", ("broken JSON", "column 2")),
    "nested thousands deep": ("[" * 100_000, ("broken JSON",)),
    "not UTF-8": (b'{"prompt": "\xff"}', ("not UTF-8",)),
    "array": ('["1+2?", "A3", 1]', ("a JSON object, not list",)),
    "null": ("null", ("a JSON object, not NoneType",)),
    "no prompt": (_row(prompt=...), ("'prompt' is missing", "'response'")),
    "no response": (_row(response=...), ("'response' is missing",)),
    "no reward": (_row(reward=...), ("'reward' is missing",)),
    "prompt is a number": (_row(prompt=3), ("'prompt' must be text, not int",)),
    "prompt is null": (_row(prompt=None), ("'prompt' must be text, not NoneType",)),
    "response is a list": (_row(response=["A3"]), ("'response' must be text, not list",)),
    "empty response": (_row(response=" \n"), ("'response' is empty",)),
    "reward above 1": (_row(reward=1.5), ("1.5", "[0, 1]")),
    "reward below 0": (_row(reward=-1), ("-1", "[0, 1]")),
    "reward is text": (_row(reward="1"), ("'reward'", "'1'")),
    "reward is null": (_row(reward=None), ("'reward'", "None")),
    "reward is NaN": (_row(reward=math.nan), ("'reward'", "nan")),
    "reward is infinite": (_row(reward=math.inf), ("reward inf",)),
    "problem is a list": (_row(problem_id=["a"]), ("problem_id", "list")),
    "too long": (_row(response="1" * 40), ("tokens, more than data.max_length 32",)),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_row(case: str, workplace: Path, refused: Callable[..., None]) -> None:
    content, words = BAD_ROWS[case]
    raw = content.encode() if isinstance(content, str) else content
    (workplace / "train.jsonl").write_bytes(_jsonl(*ROWS[:2]).encode() + raw + b"\n")
    refused("train.jsonl: 1 bad of 3 rows", "train.jsonl:3: ", *words)


def test_row_of_the_validation_set(workplace: Path, refused: Callable[..., None]) -> None:
    (workplace / "validation.jsonl").write_text(_jsonl(*ROWS, {"prompt": "1+2?"}))
    refused("validation.jsonl:5: ", "'response' is missing")


def test_row_under_other_names(workplace: Path, refused: Callable[..., None]) -> None:
    fields = "data.fields={reward: is_correct}"
    refused("train.jsonl:1: ", "'is_correct' is missing", "'reward'", overrides=(fields,))
    alpaca = ("run.name=alpaca", "data.fields=alpaca")
    refused("train.jsonl:1: ", "'instruction' is missing", overrides=alpaca)


def test_bad_rows_are_counted_and_the_first_ten_shown(
    workplace: Path, refused: Callable[..., None]
) -> None:
    (workplace / "train.jsonl").write_text(_jsonl(*ROWS, *[{"prompt": "1?"}] * 15))
    refused("15 bad of 19 rows", "train.jsonl:14: ", "... and 5 more", "data.bad_rows=skip")


def test_only_bad_rows(workplace: Path, refused: Callable[..., None]) -> None:
    (workplace / "train.jsonl").write_text(_jsonl({"prompt": "1?"}, {}))
    refused("train.jsonl: no usable row (2 read)", overrides=("data.bad_rows=skip",))


def _parquet(**columns: list[Any]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), stream)
    return stream.getvalue()


GOOD_PARQUET = _parquet(prompt=["1?"] * 99, response=["A1"] * 99, reward=[1.0] * 99)
DATA_FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("bad.jsonl", b"", ("the file is empty",)),
    "blank": ("bad.jsonl", b"\n\n", ("no usable row",)),
    "wrong suffix": ("bad.csv", b"1?,A1,1\n", ("unknown kind of data file", ".jsonl.gz")),
    "garbage gz": ("bad.jsonl.gz", b"garbage", ("damaged file",)),
    "truncated gz": ("bad.jsonl.gz", gzip.compress(_jsonl(*ROWS).encode())[:-9], ("damaged file",)),
    "garbage zst": ("bad.jsonl.zst", b"garbage", ("damaged file",)),
    "garbage parquet": ("bad.parquet", b"garbage" * 9, ("damaged file",)),
    "truncated parquet": ("bad.parquet", GOOD_PARQUET[:-20], ("damaged file",)),
    "parquet without a column": (
        "bad.parquet",
        _parquet(prompt=["1?"], response=["A1"]),
        ("bad.parquet:1: ", "'reward' is missing"),
    ),
    "parquet of wrong types": (
        "bad.parquet",
        _parquet(prompt=["1?", "1?"], response=["A1", "A1"], reward=["1", None]),
        ("2 bad of 2 rows", "bad.parquet:2: ", "'reward'"),
    ),
}


@pytest.mark.parametrize("case", DATA_FILES)
def test_data_file(case: str, workplace: Path, refused: Callable[..., None]) -> None:
    name, content, words = DATA_FILES[case]
    (workplace / name).write_bytes(content)
    refused(name, *words, overrides=(f"data.train={name}",))


@pytest.mark.parametrize(
    ("file", "reason"), [("none.jsonl", "No such file"), ("folder.jsonl", "Is a directory")]
)
def test_no_data_file(
    file: str, reason: str, workplace: Path, refused: Callable[..., None]
) -> None:
    (workplace / "folder.jsonl").mkdir()
    refused(file, "cannot read the data", reason, overrides=(f"data.validation={file}",))


def test_no_pairs(workplace: Path, refused: Callable[..., None]) -> None:
    (workplace / "train.jsonl").write_text(_jsonl(ROWS[0], ROWS[3]))
    refused(
        "train.jsonl", "no two solutions of one problem", overrides=("objective.loss=pairwise",)
    )


def test_cache_cannot_be_written(workplace: Path, refused: Callable[..., None]) -> None:
    refused(
        "data.cache_dir: cannot use train.jsonl/cache",
        overrides=("data.cache_dir=train.jsonl/cache",),
    )


# --- tokenizer -------------------------------------------------------------------------------

TOKENIZERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing": (lambda trunk: (trunk / "tokenizer.json").unlink(), ("no tokenizer.json",)),
    "garbage": (
        lambda trunk: (trunk / "tokenizer.json").write_text("{"),
        ("tokenizer.json: cannot read the tokenizer",),
    ),
    "not UTF-8": (
        lambda trunk: (trunk / "tokenizer.json").write_bytes(b"\xff"),
        ("tokenizer.json: cannot read the tokenizer",),
    ),
    "garbage settings": (
        lambda trunk: (trunk / "tokenizer_config.json").write_text("{"),
        ("tokenizer_config.json: not valid JSON",),
    ),
    "settings are a list": (
        lambda trunk: (trunk / "tokenizer_config.json").write_text("[]"),
        ("tokenizer_config.json", "a JSON object"),
    ),
    "garbage SentencePiece": (
        lambda trunk: (trunk / "tokenizer.json").rename(trunk / "tokenizer.model"),
        ("tokenizer.model: cannot read the tokenizer",),
    ),
    "more tokens than the model": (
        lambda trunk: write_character_tokenizer(trunk, "abcdefghijklmnop" + ALPHABET),
        ("tokenizer.path: token", "does not exist in the model", "vocabulary of 19"),
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer(case: str, workplace: Path, refused: Callable[..., None]) -> None:
    change, words = TOKENIZERS[case]
    change(workplace / "trunk")
    refused("trunk", *words) if "model" not in case else refused(*words)


def test_no_tokenizer_where_it_is_said_to_be(refused: Callable[..., None]) -> None:
    refused("nowhere", "set tokenizer.path", overrides=("tokenizer.path=nowhere",))


# --- trunk -----------------------------------------------------------------------------------


class _Code:
    """A pickle of this makes a file when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return (open, ("executed", "w"))


def _params(**changes: Any) -> Change:
    def change(trunk: Path) -> None:
        params = json.loads((trunk / "params.json").read_text()) | changes
        (trunk / "params.json").write_text(json.dumps(params))

    return change


def _raw_params(content: bytes) -> Change:
    return lambda trunk: (trunk / "params.json").write_bytes(content)


def _weights(change: Callable[[dict[str, Any]], object]) -> Change:
    """Store what `change` makes of the weights, or returns."""

    def apply(trunk: Path) -> None:
        weights = torch.load(trunk / "consolidated.pth")
        changed = change(weights)
        torch.save(weights if changed is None else changed, trunk / "consolidated.pth")

    return apply


def _raw_weights(change: Callable[[bytes], bytes]) -> Change:
    def apply(trunk: Path) -> None:
        file = trunk / "consolidated.pth"
        file.write_bytes(change(file.read_bytes()))

    return apply


def _zip(content: bytes) -> bytes:
    """A file laid out as torch.save does, with this pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3\n")
    return stream.getvalue()


def _without_embedding(trunk: Path) -> None:
    _params(vocab_size=-1)(trunk)
    _weights(lambda w: w.__delitem__("tok_embeddings.weight"))(trunk)


NORM = "norm.weight"
TRUNKS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no params": (lambda t: (t / "params.json").unlink(), ("params.json", "No such file")),
    "garbage params": (_raw_params(b"{"), ("params.json: not valid JSON", "line 1")),
    "binary params": (_raw_params(b"\xff\xfe"), ("params.json: not valid JSON",)),
    "deep params": (_raw_params(b"[" * 100_000), ("params.json: not valid JSON",)),
    "list of params": (_raw_params(b"[]"), ("params.json", "a JSON object")),
    "no sizes": (_raw_params(b"{}"), ("no value for dim, n_heads, n_layers",)),
    "unknown parameter": (_params(n_layer=2), ("params.json: unknown parameter(s) n_layer",)),
    "size is text": (_params(dim="8"), ("dim", "not '8'")),
    "size is a fraction": (_params(n_kv_heads=1.0), ("n_kv_heads", "not 1.0")),
    "size is zero": (_params(head_dim=0), ("head_dim", "not 0")),
    "size is negative": (_params(n_kv_heads=-2), ("n_kv_heads", "not -2")),
    "size is absurd": (_params(dim=10**12), ("dim", f"not {10**12}")),
    "indivisible": (_params(n_heads=3), ("dim 8 is not divisible by n_heads 3",)),
    "odd head width": (_params(head_dim=3), ("head width 3 must be even",)),
    "more heads than layers": (_params(n_future_tokens=3), ("n_future_tokens 3 exceeds n_layers",)),
    "theta is zero": (_params(rope_theta=0), ("rope_theta must be a positive number, not 0",)),
    "eps is NaN": (_params(norm_eps=math.nan), ("norm_eps must be a positive number, not nan",)),
    "flag is text": (_params(qkv_bias="no"), ("qkv_bias must be true or false, not 'no'",)),
    "scaled is text": (_params(use_scaled_rope="no"), ("use_scaled_rope must be true or false",)),
    "scaling is text": (_params(rope_scaling="8"), ("rope_scaling must hold factor",)),
    "scaling misspelt": (_params(rope_scaling={"fctor": 8}), ("rope_scaling", "'fctor'")),
    "scaling of text": (_params(rope_scaling={"factor": "8"}), ("factor must be", "'8'")),
    "scaling upside down": (_params(rope_scaling={"high_freq_factor": 1}), ("must exceed",)),
    "no weights": (lambda t: (t / "consolidated.pth").unlink(), ("consolidated.pth", "No such")),
    "empty weights": (_raw_weights(lambda _: b""), ("consolidated.pth: truncated",)),
    "truncated weights": (_raw_weights(lambda raw: raw[: len(raw) // 2]), ("truncated",)),
    "last bytes lacking": (_raw_weights(lambda raw: raw[:-10]), ("truncated",)),
    "Git LFS pointer": (_raw_weights(lambda _: b"version https://git-lfs"), ("torch.save",)),
    "code, zipped": (_raw_weights(lambda _: _zip(pickle.dumps(_Code(), 2))), ("never run",)),
    "code, bare": (_raw_weights(lambda _: pickle.dumps(_Code(), 2)), ("torch.save",)),
    "code among tensors": (_weights(lambda w: w.update(x=_Code())), ("never run",)),
    "damaged inside": (_raw_weights(lambda _: _zip(b"\x80\x02h\x07.")), ("consolidated.pth",)),
    "tensor missing": (_weights(lambda w: w.__delitem__(NORM)), (f"{NORM} is missing",)),
    "all missing": (_weights(lambda w: w.clear()), ("20 tensor(s) do not fit",)),
    "tensor surplus": (
        _weights(lambda w: w.update(spare=torch.ones(1))),
        ("spare in consolidated.pth is not part of the model",),
    ),
    "wrong shape": (
        _weights(lambda w: w.update({NORM: torch.ones(9)})),
        (f"{NORM} in consolidated.pth has shape (9,), params.json says (8,)",),
    ),
    "integers": (_weights(lambda w: w.update({NORM: w[NORM].to(torch.int8)})), (NORM, "int8")),
    "sparse": (_weights(lambda w: w.update({NORM: w[NORM].to_sparse()})), (NORM, "sparse")),
    "list of tensors": (_weights(lambda w: list(w.values())), ("a dictionary of named tensors",)),
    "nested": (_weights(lambda w: {"model": w}), ("a dictionary of named tensors",)),
    "numbered": (_weights(lambda w: dict(enumerate(w.values()))), ("of named tensors",)),
    "no embedding to count": (_without_embedding, ("no matrix tok_embeddings.weight",)),
}


@pytest.mark.parametrize("case", TRUNKS)
def test_trunk(case: str, workplace: Path, refused: Callable[..., None]) -> None:
    change, words = TRUNKS[case]
    change(workplace / "trunk")
    refused("trunk/", *words)
    assert not (workplace / "executed").exists()


@pytest.mark.parametrize(
    ("path", "reason"), [("nowhere", "No such file"), ("train.jsonl", "Not a directory")]
)
def test_no_trunk(path: str, reason: str, refused: Callable[..., None]) -> None:
    refused(
        f"{path}: cannot read the model: {reason}",
        "params.json",
        "config.json",
        "model.path",
        overrides=(f"model.path={path}",),
    )


RECIPES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "none": (lambda t: None, ("trunk: the trunk here was made by another recipe",)),
    "another": (
        lambda t: (t / "recipe.yaml").write_text("training: {seed: 5}"),
        ("trunk: the trunk here was made by another recipe",),
    ),
    "garbage": (lambda t: (t / "recipe.yaml").write_text("{"), ("recipe.yaml",)),
    "binary": (lambda t: (t / "recipe.yaml").write_bytes(b"\xff"), ("recipe.yaml",)),
    "list": (lambda t: (t / "recipe.yaml").write_text("[1]"), ("recipe.yaml",)),
}


@pytest.mark.parametrize("case", RECIPES)
def test_trunk_of_another_recipe(case: str, workplace: Path, refused: Callable[..., None]) -> None:
    change, words = RECIPES[case]
    change(workplace / "trunk")
    refused(*words, overrides=("model.recipe=pretrain.yaml",))


def test_the_difference_between_recipes_is_shown(workplace: Path, command: Command) -> None:
    ended = command(job.pretrain.main, "--config", "pretrain.yaml", "--override", "out=new")
    assert ended.code == 0, ended.err
    again = ("--config", "pretrain.yaml", "--override", "out=new", "training.seed=7")
    words = ("new: the trunk here", "training.seed: 0 -> 7")
    _refused(lambda: command(job.pretrain.main, *again), words)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("none.yaml", ("none.yaml", "No such file")), ("critic.yaml", ("critic.yaml", "unknown key"))],
)
def test_no_recipe(recipe: str, words: tuple[str, ...], refused: Callable[..., None]) -> None:
    refused(*words, overrides=(f"model.recipe={recipe}", "model.path=new"))


# --- run directory ---------------------------------------------------------------------------


def _unfinished(workplace: Path) -> Path:
    """A run directory that an attempt has left in the middle."""
    run = workplace / "runs" / "tiny"
    config = load_config(CriticConfig, "critic.yaml")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 1}))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


@pytest.mark.parametrize("path", ["train.jsonl", "train.jsonl/run"])
def test_run_directory_cannot_be_made(path: str, refused: Callable[..., None]) -> None:
    refused("run.dir: cannot write", path, overrides=(f"run.dir={path}",))


def test_run_directory_of_another_configuration(
    workplace: Path, refused: Callable[..., None]
) -> None:
    _unfinished(workplace)
    overrides = ("training.seed=7", "training.num_unfrozen_layers=0")
    words = ("training.seed: 0 -> 7", "training.num_unfrozen_layers: 1 -> 0", "run.dir")
    refused("runs/tiny", *words, overrides=overrides)


RUN_FILES: dict[str, tuple[str, bytes]] = {
    "configuration is garbage": ("config.yaml", b"{"),
    "configuration is binary": ("config.yaml", b"\xff\xfe"),
    "configuration is empty": ("config.yaml", b""),
    "configuration is a list": ("config.yaml", b"[1]"),
    "status is garbage": ("status.json", b"{"),
    "status is binary": ("status.json", b"\xff\xfe"),
    "status is a list": ("status.json", b"[1]"),
}


@pytest.mark.parametrize("case", RUN_FILES)
def test_a_damaged_file_of_a_run_counts_as_absent_and_is_named(
    case: str, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, content = RUN_FILES[case]
    run = _unfinished(workplace)
    (run / name).write_bytes(content)
    train(load_config(CriticConfig, "critic.yaml", ["report.enabled=false"]))
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert f"runs/tiny/{name}: not readable, and taken as absent" in caplog.text


def test_a_run_that_never_began_may_begin_with_another_configuration(
    workplace: Path, refused: Callable[..., None]
) -> None:
    refused("data.max_length", overrides=("data.max_length=2",))
    assert (workplace / "runs/tiny/config.yaml").exists()
    train(load_config(CriticConfig, "critic.yaml", ["report.enabled=false"]))
    status = json.loads((workplace / "runs/tiny/status.json").read_text())
    assert status["state"] == "finished"
    refused("different configuration", overrides=("data.max_length=2",))


def test_run_directory_with_hardly_any_configuration(
    workplace: Path, refused: Callable[..., None]
) -> None:
    (_unfinished(workplace) / "config.yaml").write_bytes(b"run: {name: tiny}")
    refused("runs/tiny", "different configuration")


def test_an_attempt_on_bad_data_keeps_what_the_last_one_measured(
    workplace: Path, refused: Callable[..., None]
) -> None:
    run = _unfinished(workplace)
    (run / "status.json").unlink()  # this may change
    (workplace / "train.jsonl").unlink()
    refused("train.jsonl", "cannot read the data")


# --- pre-training ----------------------------------------------------------------------------

PRETRAINING: dict[str, tuple[str, ...]] = {
    "architecture.dim=0": ("architecture.dim: 0 is below 1",),
    "architecture.n_heads=3": ("architecture", "dim 8 is not divisible by n_heads 3"),
    "architecture.dim=6": ("architecture", "head width 3 must be even"),
    "architecture.n_kv_heads=3": ("architecture", "no multiple of n_kv_heads 3"),
    "architecture.n_future_tokens=3": ("architecture", "n_future_tokens 3 exceeds n_layers"),
    "architecture.rope_theta=0": ("architecture.rope_theta: 0.0 is below 1",),
    "architecture.depth=3": ("architecture.depth: unknown key",),
    "data.vocab_size=100": ("data.vocab_size: 100 is below 257",),
    "data.max_length=100": ("data.max_length: 100", "training.micro_batch_tokens: 64"),
    "data.max_length=8": ("more than data.max_length 8",),
    "data.train=none.jsonl": ("none.jsonl", "No such file"),
    "data.train=bad.jsonl": ("bad.jsonl:2: ", "'response' is missing"),
    "out=train.jsonl/new": ("out: cannot write train.jsonl/new",),
    "out=": ("--override out=", "out"),
    "out=''": ("out: ''",),
}


@pytest.mark.parametrize("override", PRETRAINING)
def test_pretraining(override: str, workplace: Path, pretrain_refused: Callable[..., None]) -> None:
    (workplace / "bad.jsonl").write_text(_jsonl(ROWS[0], {"prompt": "1?"}))
    pretrain_refused(*PRETRAINING[override], overrides=(override,))


@pytest.mark.parametrize("out", ["full", "."])
def test_pretraining_into_a_folder_of_other_things(
    out: str, workplace: Path, command: Command
) -> None:
    (workplace / "full").mkdir()
    (workplace / "full" / "notes.txt").write_text("mine")
    options = ("--config", "pretrain.yaml", "--override", f"out={out}")
    _refused(lambda: command(job.pretrain.main, *options), ("out: ", out, "no trunk"))


# --- the other commands ----------------------------------------------------------------------


def test_comparison_of_runs_in_one_directory(workplace: Path, command: Command) -> None:
    options = ("--config", "critic.yaml", "--unfreeze", "0", "1")
    _refused(lambda: command(job.compare.main, *options), ("run.dir", "share a directory"))


def test_comparison_of_impossible_runs(workplace: Path, command: Command) -> None:
    options = ("--config", "critic.yaml", "--unfreeze", "0", "-1")
    words = ("training.num_unfrozen_layers: -1 is below 0",)
    _refused(lambda: command(job.compare.main, *options), words)


@pytest.mark.parametrize(
    ("run", "reason"), [("trunk", "is no run dir"), ("none", "does not exist")]
)
def test_report_on_no_run(run: str, reason: str, workplace: Path, command: Command) -> None:
    _refused(lambda: command(job.report.main, run), (run, reason, "job.train"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("--config", "usage: ", "--help")),
        (("--config",), ("--config", "expected one argument")),
        (("--config", "critic.yaml", "--overide", "training.seed=1"), ("--overide",)),
        (("--config", "critic.yaml", "training.seed=1"), ("training.seed=1",)),
    ],
)
def test_options(
    options: tuple[str, ...], words: tuple[str, ...], workplace: Path, command: Command
) -> None:
    _refused(lambda: command(job.train.main, *options), words)


@pytest.mark.parametrize("name", ["train", "pretrain", "compare", "report"])
def test_help_teaches(name: str, command: Command) -> None:
    main = {
        "train": job.train.main,
        "pretrain": job.pretrain.main,
        "compare": job.compare.main,
        "report": job.report.main,
    }[name]
    ended = command(main, "--help")
    assert ended.code == 0
    assert f"\n    python -m job.{name} " in ended.out
    if name != "report":
        assert "--config FILE" in ended.out
        assert "KEY=VALUE" in ended.out
        assert f"python -m job.{name} --config configs/" in ended.out


SUBPROCESSES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "configuration": (
        lambda place: (place / "critic.yaml").write_text(CRITIC.replace("max_steps", "max_step")),
        ("training.max_step: unknown key",),
    ),
    "row": (
        lambda place: (place / "train.jsonl").write_text(_jsonl(*ROWS, {"prompt": "1?"})),
        ("train.jsonl:5: ", "'response' is missing"),
    ),
    "code": (
        lambda place: TRUNKS["code, zipped"][0](place / "trunk"),
        ("consolidated.pth", "never run"),
    ),
}


@pytest.mark.parametrize("case", SUBPROCESSES)
def test_as_a_process(case: str, workplace: Path) -> None:
    change, words = SUBPROCESSES[case]
    change(workplace)

    def run() -> Ended:
        line = [sys.executable, "-m", "job.train", "--config", "critic.yaml"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
        return Ended(done.returncode, done.stdout, done.stderr)

    _refused(run, words)
    assert not (workplace / "executed").exists()
