"""Bad values of a configuration end in exit code 78 and a short message that names the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from spoiled_input import (
    CRITIC,
    ROWS,
    Command,
    assert_refused,
    json_lines,
)

import job.pretrain
import job.train
from job.common.errors import Exit

pytestmark = pytest.mark.slow


def test_the_input_that_the_cases_spoil_is_good(workplace: Path, command: Command) -> None:
    ended = command(job.train.main, "--config", "critic.yaml")
    assert ended.code == Exit.FINISHED, ended.err
    ended = command(job.pretrain.main, "--config", "pretrain.yaml", "--override", "out=new")
    assert ended.code == Exit.FINISHED, ended.err


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
    "training.prefix_cache_gb=-1": ("training.prefix_cache_gb: -1.0 is below 0",),
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
    (workplace / "bad.jsonl").write_text(json_lines(ROWS[0], {"prompt": "1?"}))
    pretrain_refused(*PRETRAINING[override], overrides=(override,))


@pytest.mark.parametrize("out", ["full", "."])
def test_pretraining_into_a_folder_of_other_things(
    out: str, workplace: Path, command: Command
) -> None:
    (workplace / "full").mkdir()
    (workplace / "full" / "notes.txt").write_text("mine")
    options = ("--config", "pretrain.yaml", "--override", f"out={out}")
    assert_refused(lambda: command(job.pretrain.main, *options), ("out: ", out, "no trunk"))
