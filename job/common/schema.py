"""Every key of the configurations, with its type and default. Free of torch.

A key whose default is not what the code did before the key existed says that in its metadata:
`field(default=True, metadata={"before": False})`. Configurations that were stored then mean that.
"""

from __future__ import annotations

import enum
import itertools
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

RIGHT = 0.5  # rewards and labels of steps from here on count as right
EMBEDDED = "embedded"  # as data source: the chains of job.data.arithmetic
AUTO = "auto"
_ABOUT = ("problem_id", "truncated", "answer", "part")  # what may be said of any one solution
_WHOLE = ("prompt", "response", "reward", "targets", *_ABOUT)
_STEPS = ("prompt", "response", "reward", *_ABOUT)
PLAIN_FIELDS = _WHOLE  # what data.fields may name without a preset
PRESET_FIELDS = {  # and with one: what the layouts of job.data.layouts read
    "alpaca": _WHOLE,
    "attempts": ("prompt", "response", "reward", "problem_id", "answer", "part"),
    "stepwise": _STEPS,
    "math_shepherd": ("response", "reward", *_ABOUT),
    "prm800k": ("prompt", "response", *_ABOUT),
    "processbench": _STEPS,
    "preference": ("prompt", "reward", "problem_id", "part"),
    "trl_conversational": _WHOLE,
    "helpsteer2": _WHOLE,
    "messages": ("messages", "reward", "targets", *_ABOUT),
}
FIELD_PRESETS = tuple(PRESET_FIELDS)
UNSCALED = ("math_shepherd", "prm800k", "processbench")  # whose labels are no rewards of a range
# A text that stays what was typed, or a list of such; or a number between 0 and 1.
SOURCES = "sources"
Sources = Annotated[Any, SOURCES]
CHAT = "chat"  # as data.template: the tokenizer's chat template


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
    hl_gauss = "hl_gauss"


class Spread(enum.Enum):
    none = "none"
    next = "next"


class Weighting(enum.Enum):
    token = "token"
    sequence = "sequence"
    problem = "problem"


class ShardingStrategy(enum.Enum):
    auto = "auto"  # REPLICATE_FROZEN on GPUs where it fits, else FULL_SHARD
    FULL_SHARD = "FULL_SHARD"
    SHARD_GRAD_OP = "SHARD_GRAD_OP"
    HYBRID_SHARD = "HYBRID_SHARD"
    NO_SHARD = "NO_SHARD"
    REPLICATE_FROZEN = "REPLICATE_FROZEN"


class PrefixCacheMode(enum.Enum):
    none = "none"
    validation = "validation"  # only the states of evaluations
    all = "all"
    auto = "auto"  # what the disk and the first minutes say


@dataclass
class RunConfig:
    name: str = MISSING
    dir: str = MISSING


@dataclass
class ModelConfig:
    path: str = MISSING  # folder of a language model, in Meta's layout or Hugging Face's
    init_from: str | None = None  # a run, checkpoint or delta whose trained weights to begin with
    recipe: str | None = None  # pre-training config that makes the trunk where path is missing
    keep_head: bool = False  # begin with the head of one label that lies beside the trunk


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
    train: Sources = MISSING  # file, glob, folder, a list of these, or `embedded`
    validation: Sources = MISSING  # the same, or which share of the training data's problems
    fields: Any = None  # {prompt: NAME, ...}, a preset, or both: {preset: NAME, answer: NAME}
    reward_range: list[float] | None = None  # the data's rewards for 0 and 1; default: 0 and 1
    template: str | None = None  # `chat`, a chat template, or a text with {prompt} and {response}
    max_length: int = 2048  # tokens of prompt and response together
    overlong: Overlong = Overlong.error
    bad_rows: BadRows = BadRows.error
    # solutions of one problem come one after the other, and compute their prompt once; auto: where
    # that saves enough
    group_by_problem: bool | str = False
    cache_dir: str = "runs/cache"
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)


@dataclass
class ValueHeadConfig:
    bias: bool = True  # sequence classification in transformers knows none
    bias_init: float | None = None  # default: what the loss makes of the mean reward
    learning_rate: float | None = None  # default: training.learning_rate


@dataclass
class StageConfig:
    """A part of a training."""

    num_unfrozen_layers: int = MISSING
    steps: int = MISSING
    learning_rate: float | None = None  # default: training.learning_rate
    head_learning_rate: float | None = None  # default: training.value_head.learning_rate


@dataclass
class TrainingConfig:
    num_unfrozen_layers: int = 4
    stages: list[StageConfig] = field(default_factory=list)  # in order; default: one of all steps
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
    # torch.compile for each block; auto: on a GPU where there is a C compiler
    compile: bool | str = field(default="auto", metadata={"before": False})
    # on a GPU: the same bits each time; where an operation has no such form it is an error
    deterministic: bool = field(default=True, metadata={"before": False})
    # whether the frozen blocks' states are kept on disk, instead of being computed again
    prefix_cache: PrefixCacheMode = field(default=PrefixCacheMode.auto, metadata={"before": "none"})
    prefix_cache_dir: str | None = None  # default: prefix, beside the tokenised data
    prefix_cache_gb: float | None = None  # on disk; default: most of what is free there
    value_head: ValueHeadConfig = field(default_factory=ValueHeadConfig)

    @property
    def all_stages(self) -> list[StageConfig]:
        """The stages, with every learning rate; one if none are given."""
        given = self.stages or [StageConfig(self.num_unfrozen_layers, self.max_steps)]
        rate, head = self.learning_rate, self.value_head.learning_rate
        return [
            StageConfig(
                one.num_unfrozen_layers,
                one.steps,
                rate if one.learning_rate is None else one.learning_rate,
                head if one.head_learning_rate is None else one.head_learning_rate,
            )
            for one in given
        ]

    def stage_at(self, step: int) -> int:
        """The stage of optimizer step `step` (from 0); the last one's when all are done."""
        ends = itertools.accumulate(one.steps for one in self.all_stages[:-1])
        return sum(step >= end for end in ends)

    @property
    def token_budget(self) -> int:
        """`micro_batch_tokens`, once `auto` has been replaced by what it stands for."""
        assert isinstance(self.micro_batch_tokens, int), "auto is not yet resolved"
        return self.micro_batch_tokens


@dataclass
class TermsConfig:
    """How much each term of a joint objective counts; 0 is not at all."""

    monte_carlo: float = 0.0
    td: float = 0.0  # lambda-returns
    pairwise: float = 0.0


@dataclass
class ObjectiveConfig:
    prompt_value: bool = field(default=True, metadata={"before": False})  # V_0 too
    target: Target = Target.monte_carlo
    loss: Loss = Loss.mse
    gamma: float = 1.0
    lambda_start: float = 1.0
    lambda_end: float = 0.95
    lambda_steps: int = 1000
    huber_delta: float = 0.5
    bins: int = 51  # of hl_gauss
    sigma: float = 0.75  # of hl_gauss, in bins
    weighting: Weighting = Weighting.token  # what weighs alike
    balance_labels: bool = False  # right and wrong solutions weigh alike
    spread: Spread = Spread.none  # of targets at positions: to none, or to all up to the next
    terms: TermsConfig = field(default_factory=TermsConfig)  # default: as loss and target say

    @property
    def trains_prompts(self) -> bool:
        """Whether the value before the first token has a target; pairs share their prompt's."""
        return self.prompt_value and not self.ranks_only

    @property
    def head_outputs(self) -> int:
        """Outputs of the value head."""
        return self.bins if self.loss is Loss.hl_gauss else 1

    @property
    def is_joint(self) -> bool:
        return self.terms != TermsConfig()

    @property
    def all_terms(self) -> TermsConfig:
        """The terms, or the one that `loss` and `target` stand for."""
        if self.is_joint:
            return self.terms
        if self.loss is Loss.pairwise:
            return TermsConfig(pairwise=1.0)
        by_lambda = self.target is Target.lambda_return
        return TermsConfig(td=1.0) if by_lambda else TermsConfig(monte_carlo=1.0)

    @property
    def ranks_only(self) -> bool:
        """Whether outputs lie on no scale of rewards: only their differences are trained."""
        return not (self.all_terms.monte_carlo or self.all_terms.td)


@dataclass
class EvaluationConfig:
    every_steps: int = 100
    max_sequences: int | None = None  # at most so many for validation, problem by problem
    alarm_evaluations: int = 3  # constant predictions in a row before the alarm


@dataclass
class LoggingConfig:
    every_steps: int = 10
    product_rate: bool = False  # also how fast matrix products are, at each log line


@dataclass
class FsdpConfig:
    sharding_strategy: ShardingStrategy = field(
        default=ShardingStrategy.auto, metadata={"before": "FULL_SHARD"}
    )
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

    def at_once(self, steps: int) -> int:
        """How many checkpoints a training of so many steps has on the disk, at most."""
        every = self.keep_every and math.lcm(self.keep_every, self.every_steps)
        milestones = steps // every if every else 0
        return self.keep_last + 1 + (self.keep_best is not None) + milestones


@dataclass
class MlflowConfig:
    enabled: bool = True
    tracking_uri: str | None = None  # default: MLFLOW_TRACKING_URI, else a database beside the runs
    experiment: str = "critic"


@dataclass
class ReportConfig:
    enabled: bool = True  # draw the page when the training is finished


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
    report: ReportConfig = field(default_factory=ReportConfig)

    @property
    def prefix_cache_folder(self) -> str:
        """Where the frozen blocks' states of all trunks and boundaries are kept."""
        given = self.training.prefix_cache_dir
        return f"{self.data.cache_dir}/prefix" if given is None else given


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
    train: Sources = MISSING  # files with prompt and response, or `embedded`
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


def preset_of(fields: Any) -> Any:
    """The preset that `data.fields` names, by itself or beside names."""
    return fields.get("preset") if isinstance(fields, dict) else fields


def is_chat_template(template: str) -> bool:
    """Whether a data.template is written in Jinja, for a list of messages."""
    return "{{" in template or "{%" in template
