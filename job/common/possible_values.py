"""Values that have the right type and cannot work. Free of torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from job.common.errors import quoted, short
from job.common.nested import flatten, to_dict
from job.common.schema import (
    AUTO,
    CHAT,
    EMBEDDED,
    FIELD_PRESETS,
    PLAIN_FIELDS,
    PRESET_FIELDS,
    UNSCALED,
    CriticConfig,
    DataConfig,
    Loss,
    ObjectiveConfig,
    PretrainConfig,
    ShardingStrategy,
    Target,
    TrainingConfig,
    Weighting,
    is_chat_template,
    preset_of,
)
from job.common.text_values import is_utf8

_CONTROL = re.compile(r"[\x01-\x1f\x7f-\x9f\u2028\u2029]")  # \0 is in no path at all
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
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
    "training.prefix_cache_gb": (0, None),
    "objective.gamma": (0, 1),
    "objective.lambda_start": (0, 1),
    "objective.lambda_end": (0, 1),
    "objective.lambda_steps": (1, None),
    "objective.huber_delta": (1e-6, None),
    "objective.bins": (2, 10_000),
    "objective.sigma": (0.01, None),
    "objective.terms.monte_carlo": (0, None),
    "objective.terms.td": (0, None),
    "objective.terms.pairwise": (0, None),
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
_NAMES = ("run.name", "run.dir")  # that stand in a line with others
_STAGE_RATES = (("learning_rate", 0), ("head_learning_rate", 0))


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
    if not _are_two(betas) or not all(0 <= beta < 1 for beta in betas):
        yield f"training.betas: {betas} must be two numbers in [0, 1)"
    yield from _impossible_sources("data.train", config.data.train)
    yield from _impossible_data(config)
    if isinstance(config, CriticConfig):
        yield from _impossible_critic(config)


def impossible_in_new(config: Any) -> Iterator[str]:
    """`impossible_values`, and what no new run may have, though an old one may go on with it."""
    flat = flatten(to_dict(config))
    for key in _NAMES:
        if _CONTROL.search(str(flat.get(key, ""))):
            yield f"{key}: {short(flat[key])!r} has a line end or another control sign in it"
    yield from _without_effect(config)
    yield from impossible_values(config)


def _without_effect(config: CriticConfig | PretrainConfig) -> Iterator[str]:
    """Values that change nothing, because of others."""
    data = config.data
    if EMBEDDED in (data.train, getattr(data, "validation", None)):
        for key in ("fields", "reward_range"):
            if getattr(data, key, None) is not None:
                yield f"data.{key}: the embedded data has a form of its own; leave it out"
    if isinstance(config, CriticConfig):
        yield from _bins_without_effect(config.objective)
        yield from _rates_without_effect(config.training)


def _bins_without_effect(objective: ObjectiveConfig) -> Iterator[str]:
    if objective.loss is Loss.hl_gauss:
        return
    for key in ("bins", "sigma"):
        value, loss = getattr(objective, key), objective.loss.name
        if value != getattr(ObjectiveConfig, key):
            yield f"objective.{key}: {value:g} is of hl_gauss; objective.loss is {loss}"


def _rates_without_effect(training: TrainingConfig) -> Iterator[str]:
    """A stage's rate of the trunk, where only the head learns and has a rate of its own."""
    head = training.value_head.learning_rate
    for i, stage in enumerate(training.stages):
        heads_alone = stage.num_unfrozen_layers == 0 and stage.head_learning_rate is None
        if heads_alone and head is not None and stage.learning_rate is not None:
            yield (
                f"training.stages[{i}].learning_rate: {stage.learning_rate:g} is the trunk's, of "
                f"which nothing learns there; the head's is training.value_head.learning_rate: "
                f"{head:g}, or the stage's head_learning_rate"
            )


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
    yield from impossible_fields(data.fields)


def impossible_fields(fields: Any) -> Iterator[str]:
    """What is wrong with `data.fields`."""
    preset = preset_of(fields)
    if isinstance(fields, dict):
        yield from _impossible_names(fields, preset)
    if isinstance(preset, str) and preset not in FIELD_PRESETS:
        known = ", ".join(FIELD_PRESETS)
        yield f"data.fields: unknown preset {preset!r}; the presets are {known}"
    elif preset is not None and not isinstance(preset, str):
        yield f"data.fields: a mapping or a preset ({', '.join(FIELD_PRESETS)}), not {preset!r}"


def _impossible_names(fields: dict[Any, Any], preset: Any) -> Iterator[str]:
    """Names that are none, and names for what the layout does not read, which change nothing."""
    known = isinstance(preset, str) and preset in FIELD_PRESETS
    read = PRESET_FIELDS[preset] if known else PLAIN_FIELDS
    why = f"not read by the preset {preset}" if known else "unknown field"
    for key, name in fields.items():
        if key not in (*read, "preset"):
            yield f"data.fields.{key}: {why}; valid: {', '.join((*read, 'preset'))}"
        elif not isinstance(name, str):
            yield f"data.fields.{key}: the name of a field, not {quoted(name)}"


def _impossible_sources(key: str, source: Any, share: str = "") -> Iterator[str]:
    """What no file, glob, folder or list of these can be."""
    each = source if isinstance(source, list | tuple) else [source]
    if not each:
        yield f"{key}: an empty list"
    for one in each:
        if not isinstance(one, str):
            yield (
                f"{key}: a file, a glob, a folder or a list of these{share}, not {quoted(one)}; "
                f"a file of that name is ./{one}"
            )
        elif one is not source and (not one.strip() or "\0" in one or not is_utf8(one)):
            yield f"{key}: {short(one)!a} is no name or path"
        elif one == EMBEDDED and len(each) > 1:
            yield f"{key}: {EMBEDDED} stands alone"


def impossible_range(span: list[float] | None, fields: Any = None) -> Iterator[str]:
    """What is wrong with `data.reward_range`, beside `data.fields`."""
    if span is None:
        return
    if not _are_two(span) or not -math.inf < span[0] < span[1] < math.inf:
        yield f"data.reward_range: {span} must be two numbers, the lower one first, and finite"
    if (preset := preset_of(fields)) in UNSCALED:
        yield f"data.reward_range: the preset {preset} has no rewards of a range; leave it out"


def _are_two(numbers: list[float]) -> bool:
    """Whether a list is of two numbers; OmegaConf takes lists and sections for some as well."""
    return len(numbers) == 2 and all(isinstance(one, int | float) for one in numbers)


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


def _impossible_terms(objective: ObjectiveConfig) -> Iterator[str]:
    if not objective.is_joint:
        return
    if objective.loss is Loss.pairwise:
        yield "objective.loss: pairwise is one of objective.terms; loss is that of values"
    if objective.target is not Target.monte_carlo:
        yield "objective.target: objective.terms says what the targets are; td is lambda_return"
    if objective.ranks_only:
        yield "objective.terms: pairwise alone is objective.loss=pairwise"


def _impossible_histogram(config: CriticConfig) -> Iterator[str]:
    objective = config.objective
    if objective.loss is not Loss.hl_gauss:
        return
    if objective.bins <= 6 * objective.sigma + 1:
        yield (
            f"objective.bins: {objective.bins} leave nothing for [0, 1] beside three "
            f"objective.sigma of {objective.sigma:g} bins on either side"
        )
    if config.model.keep_head:
        yield "model.keep_head: a head of one label cannot begin objective.loss=hl_gauss"
    if config.training.value_head.bias_init is not None:
        yield "training.value_head.bias_init: hl_gauss has a bias for each of its bins"


def _impossible_stages(training: TrainingConfig) -> Iterator[str]:
    stages = training.stages
    if not stages:
        return
    for i, stage in enumerate(stages):
        for name, low in (("num_unfrozen_layers", 0), ("steps", 1), *_STAGE_RATES):
            value = getattr(stage, name)
            if value is not None and not low <= value < math.inf:
                yield f"training.stages[{i}].{name}: {value} is no possible value ({low} or more)"
    steps, last = sum(stage.steps for stage in stages), training.max_steps
    if steps != last:
        yield f"training.stages: {steps} steps in all, and training.max_steps is {last}"
    most = max(stage.num_unfrozen_layers for stage in stages)
    if most != training.num_unfrozen_layers:
        yield (
            f"training.num_unfrozen_layers: {training.num_unfrozen_layers}, and the most that "
            f"training.stages unfreeze is {most}; set it to that"
        )


def _impossible_validation(source: Any) -> Iterator[str]:
    if isinstance(source, str) and _is_no_share(source):
        name = f"a file of that name is ./{source}"
        yield f"data.validation: {source}: a share lies between 0 and 1; {name}"
    else:
        share = ", or a share between 0 and 1"
        yield from _impossible_sources("data.validation", source, share)


def _is_no_share(text: str) -> bool:
    """Whether a text is a number that is no share; a year, say, may be a folder's name."""
    if not _NUMBER.fullmatch(text) or 0 < float(text) < 1:
        return False
    return not text.isdigit() or int(text) <= 1


def _impossible_critic(config: CriticConfig) -> Iterator[str]:
    yield from _impossible_template(config.data)
    yield from impossible_range(config.data.reward_range, config.data.fields)
    if not isinstance(config.data.validation, float):
        yield from _impossible_validation(config.data.validation)
    yield from _impossible_stages(config.training)
    objective, training = config.objective, config.training
    yield from _impossible_terms(objective)
    yield from _impossible_histogram(config)
    if objective.loss is Loss.pairwise and objective.target is not Target.monte_carlo:
        yield "objective.target: the pairwise loss compares outcomes; use monte_carlo"
    choices = {
        "training.compile": training.compile,
        "data.group_by_problem": config.data.group_by_problem,
    }
    for key, choice in choices.items():
        if isinstance(choice, str) and choice != AUTO:
            yield f"{key}: {choice!r} is neither true nor false nor {AUTO}"
    if training.value_head.bias_init is not None and not training.value_head.bias:
        yield "training.value_head.bias_init: with training.value_head.bias false there is no bias"
    if objective.ranks_only and objective.weighting is not Weighting.token:
        yield "objective.weighting: the pairwise loss weighs pairs, one like the other; use token"
    if objective.ranks_only and objective.balance_labels:
        yield "objective.balance_labels: the pairwise loss has as many right ones as wrong ones"
    if objective.ranks_only and training.batch_size % 2:
        yield f"training.batch_size: {training.batch_size} is odd; the pairwise loss takes pairs"
    tokens = training.micro_batch_tokens
    paired = isinstance(tokens, int) and 2 * config.data.max_length > tokens
    if objective.all_terms.pairwise and paired:
        yield "training.micro_batch_tokens: a pair needs 2 x data.max_length"
    fsdp = config.distributed.fsdp
    if fsdp.cpu_offload and fsdp.sharding_strategy is ShardingStrategy.REPLICATE_FROZEN:
        yield (
            "distributed.fsdp.cpu_offload: REPLICATE_FROZEN keeps the frozen weights on the GPU; "
            "choose FULL_SHARD to have them in host memory"
        )
    kept = config.checkpoint.keep_best or ""
    if "/prompt/" in kept and not objective.trains_prompts:
        yield f"checkpoint.keep_best: {kept} needs objective.prompt_value, and more than pairs"
    if (config.data.train == EMBEDDED) != (config.data.validation == EMBEDDED):
        yield "data.train and data.validation: both embedded or neither"
