"""The configuration: typed schema, merge of file and overrides, validation. Free of torch.

Every wrong key, type or value is an InputError that names the key and its source.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import functools
import math
import reprlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from job.outcome import InputError, listing

Schema = TypeVar("Schema")
EMBEDDED = "embedded"  # as data source: the chains of job.data.arithmetic
AUTO = "auto"
CHAT = "chat"  # as data.template: the tokenizer's chat template
_WIDTH = 200  # characters of an override or a library's message in it


class BadRows(enum.Enum):
    error = "error"
    skip = "skip"


class Overlong(enum.Enum):
    error = "error"
    skip = "skip"
    truncate_prompt = "truncate_prompt"


class Target(enum.Enum):
    monte_carlo = "monte_carlo"
    lambda_return = "lambda_return"


class Loss(enum.Enum):
    mse = "mse"
    huber = "huber"
    bce = "bce"
    pairwise = "pairwise"


class ShardingStrategy(enum.Enum):
    FULL_SHARD = "FULL_SHARD"
    SHARD_GRAD_OP = "SHARD_GRAD_OP"
    HYBRID_SHARD = "HYBRID_SHARD"
    NO_SHARD = "NO_SHARD"
    REPLICATE_FROZEN = "REPLICATE_FROZEN"


@dataclass
class RunConfig:
    name: str = MISSING
    dir: str = MISSING


@dataclass
class ModelConfig:
    path: str = MISSING  # folder of a language model, in Meta's layout or Hugging Face's
    init_from: str | None = None  # a run, checkpoint or delta whose trained weights to begin with
    recipe: str | None = None  # pre-training config that makes the trunk where path is missing


@dataclass
class TokenizerConfig:
    path: str | None = None  # file or folder; default: beside the trunk


@dataclass
class ArithmeticConfig:
    """Parameters of the embedded data."""

    train_examples: int = 100_000
    validation_examples: int = 2_000
    attempts: int = 4  # solutions per problem
    min_steps: int = 2
    max_steps: int = 4
    error_probability: float = 0.15
    seed: int = 0


@dataclass
class DataConfig:
    train: str = MISSING  # file, or `embedded`
    validation: str = MISSING
    fields: Any = None  # {prompt: NAME, ...} or the preset `alpaca`
    template: str | None = None  # `chat`, a chat template, or a text with {prompt} and {response}
    max_length: int = 2048  # tokens of prompt and response together
    overlong: Overlong = Overlong.error
    bad_rows: BadRows = BadRows.error
    cache_dir: str = "runs/cache"
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)


@dataclass
class ValueHeadConfig:
    bias: bool = True  # sequence classification in transformers knows none
    bias_init: float | None = None  # default: what the loss makes of the mean reward
    learning_rate: float | None = None  # default: training.learning_rate


@dataclass
class TrainingConfig:
    num_unfrozen_layers: int = 4
    max_steps: int = 1000
    batch_size: int = 16  # sequences per optimizer step, over all GPUs
    micro_batch_tokens: int | str = 8192  # per GPU; auto: the most that its memory takes
    learning_rate: float = 1e-5
    lr_decay_factor: float = 1.0
    min_lr_ratio: float = 0.1
    warmup_steps: int = 50
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float = 1.0
    max_bad_steps: int = 5  # in a row, with a loss or gradient that is not finite
    seed: int = 0
    threads: int | None = None  # CPU threads of one process; default: torch's own choice
    deterministic: bool = False  # on a GPU: the same bits each time, more slowly
    value_head: ValueHeadConfig = field(default_factory=ValueHeadConfig)

    @property
    def token_budget(self) -> int:
        """`micro_batch_tokens`, once `auto` has been replaced by what it stands for."""
        assert isinstance(self.micro_batch_tokens, int), "auto is not yet resolved"
        return self.micro_batch_tokens


@dataclass
class ObjectiveConfig:
    target: Target = Target.monte_carlo
    loss: Loss = Loss.mse
    gamma: float = 1.0
    lambda_start: float = 1.0
    lambda_end: float = 0.95
    lambda_steps: int = 1000
    huber_delta: float = 0.5


@dataclass
class EvaluationConfig:
    every_steps: int = 100
    max_sequences: int | None = None  # the first so many of the validation set
    alarm_evaluations: int = 3  # constant predictions in a row before the alarm


@dataclass
class LoggingConfig:
    every_steps: int = 10


@dataclass
class FsdpConfig:
    sharding_strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD
    mixed_precision: bool = True  # bf16 compute on fp32 masters
    cpu_offload: bool = False
    activation_checkpointing: bool = False


@dataclass
class DistributedConfig:
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    start_timeout_seconds: int = 300  # for all processes to meet
    timeout_seconds: int = 600  # of a step or an evaluation's batch; then the job ends


@dataclass
class CheckpointConfig:
    """What is kept besides the newest."""

    every_steps: int = 200
    keep_last: int = 2
    keep_every: int | None = None  # steps that are multiples of this
    keep_best: str | None = None  # by this metric of evaluations, validation/value/mse for instance


@dataclass
class MlflowConfig:
    enabled: bool = True
    tracking_uri: str | None = None  # default: MLFLOW_TRACKING_URI, else a database beside the runs
    experiment: str = "critic"


@dataclass
class CriticConfig:
    """What `job.train` takes."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)


@dataclass
class ArchitectureConfig:
    """The trunk that `job.pretrain` makes, in the terms of params.json."""

    dim: int = 128
    n_layers: int = 5
    n_heads: int = 4
    n_kv_heads: int | None = None
    multiple_of: int = 32
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    n_future_tokens: int = 2


@dataclass
class PretrainDataConfig:
    train: str = MISSING  # JSONL with prompt and response, or `embedded`
    fields: Any = None
    max_length: int = 2048
    cache_dir: str = "runs/cache"
    vocab_size: int = 8192  # of the byte-level BPE tokenizer that is trained first
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)


@dataclass
class PretrainTrainingConfig:
    max_steps: int = 400
    batch_size: int = 64
    micro_batch_tokens: int = 8192
    learning_rate: float = 2e-3
    min_lr_ratio: float = 0.05
    warmup_steps: int = 50
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float = 1.0
    seed: int = 0
    threads: int | None = None


@dataclass
class PretrainConfig:
    """What `job.pretrain` takes."""

    out: str = MISSING
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    training: PretrainTrainingConfig = field(default_factory=PretrainTrainingConfig)


def load_config(schema: type[Schema], file: str | Path, overrides: Sequence[str] = ()) -> Schema:
    """Merge schema defaults, YAML file and `key=value` overrides, and check every value.

    Raises:
        InputError: the file cannot be read; a key is unknown, has no value, or a value has the
            wrong type or an impossible size. Keys, sources and the nearest valid keys are named.
    """
    config = merge_config(schema, file, overrides)
    problems = list(_impossible_values(config))
    if problems:
        raise InputError(f"{file}: impossible configuration" + listing(problems))
    return config


def merge_config(schema: type[Schema], file: str | Path, overrides: Sequence[str] = ()) -> Schema:
    """Merge schema defaults, YAML file and overrides into an object of any dataclass.

    Raises:
        InputError: the file cannot be read; a key is unknown, has no value or the wrong type.
    """
    layers = [(str(file), _read_yaml(Path(file))), *map(_parse_override, overrides)]
    for source, layer in layers:
        _check_keys(schema, layer, source)
    return cast(Schema, _to_object(_merge(schema, layers), file))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\n{self.format_usage()}see {self.prog} --help")


def command_line(
    description: str, command: str | None = None, *, of_a_critic: bool = False
) -> argparse.ArgumentParser:
    """The options that all commands with a configuration share, or all with a trained critic."""
    parser = _Parser(
        prog=f"python -m job.{command or Path(sys.argv[0]).stem}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if of_a_critic:
        about = "a run, one of its checkpoints, or a delta"
        parser.add_argument("--critic", required=True, type=Path, metavar="PATH", help=about)
        parser.add_argument("--base", metavar="DIR", help="default: as the run was configured")
    else:
        parser.add_argument("--config", required=True, metavar="FILE", help="a YAML configuration")
    parser.add_argument(
        "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="may repeat"
    )
    return parser


def is_chat_template(template: str) -> bool:
    """Whether a data.template is written in Jinja, for a list of messages."""
    return "{{" in template or "{%" in template


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain nested dicts, enums by name."""
    return dataclasses.asdict(config, dict_factory=_by_name)


def _by_name(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {k: v.name if isinstance(v, enum.Enum) else v for k, v in items}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per key that differs between two nested configurations."""
    a, b = flatten(old), flatten(new)
    keys = [key for key in sorted(a | b) if a.get(key, "absent") != b.get(key, "absent")]
    return [f"{key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}" for key in keys]


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{path}: cannot read the configuration: {reason}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    except (OmegaConfBaseException, RecursionError) as error:
        raise InputError(f"{path}: {_first_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{path}: a configuration is a mapping of keys to values")
    return loaded


def _parse_override(text: str) -> tuple[str, DictConfig]:
    source = f"--override {_short(text)}"
    key, equals, _ = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise InputError(f"{source}: write it as key=value, with dots between key parts")
    try:
        return source, OmegaConf.from_dotlist([text])
    except (OmegaConfBaseException, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{source}: {_first_line(error)}") from None


def _check_keys(schema: type, layer: DictConfig, source: str) -> None:
    plain = cast(dict[str, Any], OmegaConf.to_container(layer))
    unknown = list(_unknown_keys(plain, schema))
    if unknown:
        raise InputError(f"{source}: {len(unknown)} key(s) do not fit" + listing(unknown))


def _merge(schema: type, layers: Sequence[tuple[str, DictConfig]]) -> DictConfig:
    """All layers at once, which takes as long as one; each by itself only to say which is wrong."""
    try:
        return cast(DictConfig, OmegaConf.merge(_defaults(schema), *(one for _, one in layers)))
    except OmegaConfBaseException:
        for end, (source, _) in enumerate(layers, 1):
            try:
                OmegaConf.merge(_defaults(schema), *(one for _, one in layers[:end]))
            except OmegaConfBaseException as error:
                where = f"{error.full_key}: " if error.full_key else ""
                raise InputError(f"{source}: {where}{_first_line(error)}") from None
        raise


@functools.cache
def _defaults(schema: type) -> DictConfig:
    """A schema's own values; a merge copies them before it changes any."""
    return OmegaConf.structured(schema)


def _unknown_keys(tree: dict[Any, Any], schema: type, prefix: str = "") -> Iterator[str]:
    """One line per key of `tree` that the schema lacks, or that is a section on one side only."""
    sections = _sections(schema)
    types = {f.name: f.type for f in dataclasses.fields(schema)}
    valid = list(types)
    for key, value in tree.items():
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, 3, 0.5)
            hint = f"nearest: {', '.join(near)}; " if near else ""
            yield f"{prefix}{key}: unknown key ({hint}valid here: {', '.join(valid)})"
        elif key in sections and isinstance(value, dict):
            yield from _unknown_keys(value, sections[key], f"{prefix}{key}.")
        elif key in sections:
            inside = ", ".join(f.name for f in dataclasses.fields(sections[key]))
            yield f"{prefix}{key}: a section with {inside}; not {reprlib.repr(value)}"
        elif isinstance(value, dict) and not str(types[key]).startswith(("Any", "dict")):
            yield f"{prefix}{key}: a single value, not the section {reprlib.repr(value)}"
        elif types[key] == "bool" and type(value) in (int, float):  # else 2 would be true
            yield f"{prefix}{key}: true or false, not {value}"


def _sections(schema: type) -> dict[str, type]:
    return {
        f.name: cast(type, f.default_factory)
        for f in dataclasses.fields(schema)
        if dataclasses.is_dataclass(f.default_factory)
    }


def _to_object(merged: DictConfig, file: str | Path) -> object:
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise InputError(
                f"{file}: no value for {', '.join(missing)}; "
                f"give one in the file or with --override {missing[0]}=VALUE"
            )
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise InputError(f"{file}: {where}{_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    """The essence of a library's message; YAML keeps it apart from where it stood."""
    return _short((getattr(error, "problem", None) or str(error)).partition("\n")[0])


def _short(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."


_LARGEST_SEED = 2**63 - 1  # of torch's generators
# Smallest and largest possible value per key; None is no bound. Keys are the same in the
# critic's and the pre-training schema wherever both have them.
_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "training.num_unfrozen_layers": (0, None),
    "training.max_steps": (1, None),
    "training.batch_size": (1, None),
    "training.micro_batch_tokens": (2, None),
    "training.learning_rate": (0, None),
    "training.value_head.learning_rate": (0, None),
    "training.lr_decay_factor": (1e-6, 1),
    "training.min_lr_ratio": (0, 1),
    "training.warmup_steps": (0, None),
    "training.weight_decay": (0, None),
    "training.max_grad_norm": (1e-12, None),
    "training.max_bad_steps": (1, None),
    "training.seed": (0, _LARGEST_SEED),
    "training.threads": (1, 4096),
    "objective.gamma": (0, 1),
    "objective.lambda_start": (0, 1),
    "objective.lambda_end": (0, 1),
    "objective.lambda_steps": (1, None),
    "objective.huber_delta": (1e-6, None),
    "evaluation.every_steps": (1, None),
    "evaluation.max_sequences": (1, None),
    "evaluation.alarm_evaluations": (1, None),
    "logging.every_steps": (1, None),
    "checkpoint.every_steps": (1, None),
    "checkpoint.keep_last": (1, None),
    "checkpoint.keep_every": (1, None),
    "distributed.start_timeout_seconds": (1, None),
    "distributed.timeout_seconds": (1, None),
    "data.max_length": (2, None),
    "data.vocab_size": (257, None),
    "data.arithmetic.train_examples": (1, None),
    "data.arithmetic.validation_examples": (1, None),
    "data.arithmetic.attempts": (1, None),
    "data.arithmetic.min_steps": (1, None),
    "data.arithmetic.max_steps": (1, None),
    "data.arithmetic.error_probability": (0, 0.99),
    "data.arithmetic.seed": (0, _LARGEST_SEED),
    "architecture.dim": (1, None),
    "architecture.n_layers": (1, None),
    "architecture.n_heads": (1, None),
    "architecture.n_kv_heads": (1, None),
    "architecture.multiple_of": (1, None),
    "architecture.norm_eps": (1e-12, None),
    "architecture.rope_theta": (1, None),
    "architecture.n_future_tokens": (1, None),
}
_FIELD_NAMES = ("prompt", "response", "reward", "problem_id")


def _impossible_values(config: Any) -> Iterator[str]:
    """One line per value that has the right type and cannot work."""
    flat = flatten(to_dict(config))
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}: {value} is not a finite number"
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            yield f"{key}: {value!r} is no name or path"
    for key, (low, high) in _BOUNDS.items():
        value = flat.get(key)
        if value is None or isinstance(value, str):
            continue
        if low is not None and value < low:
            yield f"{key}: {value} is below {low:g}, the smallest possible value"
        if high is not None and value > high:
            yield f"{key}: {value} is above {high:g}, the largest possible value"
    betas = config.training.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"training.betas: {betas} must be two numbers in [0, 1)"
    yield from _impossible_data(config)
    if isinstance(config, CriticConfig):
        yield from _impossible_critic(config)


def _impossible_data(config: CriticConfig | PretrainConfig) -> Iterator[str]:
    data = config.data
    if data.arithmetic.min_steps > data.arithmetic.max_steps:
        yield "data.arithmetic.min_steps: above data.arithmetic.max_steps"
    tokens = config.training.micro_batch_tokens
    if isinstance(tokens, str) and tokens != AUTO:
        yield f"training.micro_batch_tokens: {tokens!r} is neither a number of tokens nor {AUTO}"
    elif isinstance(tokens, int) and data.max_length > tokens:
        yield (
            f"data.max_length: {data.max_length} does not fit into "
            f"training.micro_batch_tokens: {tokens}"
        )
    if isinstance(data.fields, str) and data.fields != "alpaca":
        yield f"data.fields: unknown preset {data.fields!r}; the one preset is alpaca"
    elif isinstance(data.fields, dict):
        for key, name in data.fields.items():
            if key not in _FIELD_NAMES:
                yield f"data.fields.{key}: unknown field; valid: {', '.join(_FIELD_NAMES)}"
            elif not isinstance(name, str):
                yield f"data.fields.{key}: the name of a field, not {reprlib.repr(name)}"
    elif data.fields is not None and not isinstance(data.fields, str):
        yield f"data.fields: a mapping or the preset alpaca, not {data.fields!r}"


def _impossible_template(data: DataConfig) -> Iterator[str]:
    template = data.template
    if template is None:
        return
    if EMBEDDED in (data.train, data.validation):
        yield "data.template: the embedded data has a form of its own; leave it out"
    if template == CHAT or is_chat_template(template):
        return
    before, _, after = template.partition("{prompt}")
    if "{response}" in before or after.count("{response}") != 1 or "{prompt}" in after:
        yield (
            f"data.template: {_short(template)!r} is neither {CHAT} nor a chat template in Jinja "
            "nor a text with {prompt} and then {response}, once each"
        )


def _impossible_critic(config: CriticConfig) -> Iterator[str]:
    yield from _impossible_template(config.data)
    objective, training = config.objective, config.training
    if objective.loss is Loss.pairwise and objective.target is not Target.monte_carlo:
        yield "objective.target: the pairwise loss compares outcomes; use monte_carlo"
    if training.value_head.bias_init is not None and not training.value_head.bias:
        yield "training.value_head.bias_init: with training.value_head.bias false there is no bias"
    if objective.loss is Loss.pairwise and training.batch_size % 2:
        yield f"training.batch_size: {training.batch_size} is odd; the pairwise loss takes pairs"
    tokens = training.micro_batch_tokens
    paired = isinstance(tokens, int) and 2 * config.data.max_length > tokens
    if objective.loss is Loss.pairwise and paired:
        yield "training.micro_batch_tokens: a pair needs 2 x data.max_length"
    fsdp = config.distributed.fsdp
    if fsdp.cpu_offload and fsdp.sharding_strategy is ShardingStrategy.REPLICATE_FROZEN:
        yield (
            "distributed.fsdp.cpu_offload: REPLICATE_FROZEN keeps the frozen weights on the GPU; "
            "choose FULL_SHARD to have them in host memory"
        )
    if (config.data.train == EMBEDDED) != (config.data.validation == EMBEDDED):
        yield "data.train and data.validation: both embedded or neither"
