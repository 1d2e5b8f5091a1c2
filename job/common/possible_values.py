"""Values that have the right type and cannot work. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from job.common.errors import quoted, short
from job.common.nested import flatten, to_dict
from job.common.schema import (
    AUTO,
    CHAT,
    EMBEDDED,
    CriticConfig,
    DataConfig,
    Loss,
    PretrainConfig,
    ShardingStrategy,
    Target,
    is_chat_template,
)
from job.common.text_values import is_utf8

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
_FIELD_NAMES = ("prompt", "response", "reward", "problem_id", "truncated")


def impossible_values(config: Any) -> Iterator[str]:
    """One line per value that has the right type and cannot work."""
    flat = flatten(to_dict(config))
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}: {value} is not a finite number"
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            yield f"{key}: {value!r} is no name or path"
        if isinstance(value, str) and not is_utf8(value):
            yield f"{key}: {short(value)!a} is not UTF-8 text"
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
                yield f"data.fields.{key}: the name of a field, not {quoted(name)}"
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
            f"data.template: {short(template)!r} is neither {CHAT} nor a chat template in Jinja "
            "nor a text with {prompt} and then {response}, once each"
        )


def _impossible_critic(config: CriticConfig) -> Iterator[str]:
    yield from _impossible_template(config.data)
    objective, training = config.objective, config.training
    if objective.loss is Loss.pairwise and objective.target is not Target.monte_carlo:
        yield "objective.target: the pairwise loss compares outcomes; use monte_carlo"
    if isinstance(training.compile, str) and training.compile != AUTO:
        yield f"training.compile: {training.compile!r} is neither true nor false nor {AUTO}"
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
