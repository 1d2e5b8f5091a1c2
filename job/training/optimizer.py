"""AdamW groups with layer-wise decay, and the learning-rate schedule.

Depth counts from the head downwards: the value head has 0; the final norm and the last block 1;
the block before it 2; the embeddings one more than the first block. A parameter's rate is
`learning_rate * lr_decay_factor ** depth`; the head may have a rate of its own. Each stage of a
training may have its own rates; the schedule is one over all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from job.common.schema import PretrainTrainingConfig, StageConfig, TrainingConfig
from job.model.critic import Critic

_Rates = tuple[float, ...]  # of each stage


def build_optimizer(critic: Critic, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW over exactly the trainable parameters."""
    groups: dict[tuple[_Rates, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in critic.named_parameters():
        if parameter.requires_grad:
            rates = tuple(_rate(critic, name, config, one) for one in config.all_stages)
            groups[rates, _decay(parameter, config)].append(parameter)
    _check_partition(critic, groups)
    return _fused_adamw(groups, config)


def build_language_model_optimizer(
    model: nn.Module, config: PretrainTrainingConfig
) -> torch.optim.AdamW:
    """Fused AdamW over all parameters of a language model."""
    groups: dict[tuple[_Rates, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        groups[(config.learning_rate,), _decay(parameter, config)].append(parameter)
    return _fused_adamw(groups, config)


def depth(critic: Critic, name: str) -> int:
    """Distance of a parameter from the head (see the module)."""
    n_blocks = len(critic.trunk.layers)
    parts = name.split(".")
    if parts[0] == "value_head":
        return 0
    match parts[1]:
        case "layers":
            return n_blocks - int(parts[2])
        case "tok_embeddings":
            return n_blocks + 1
        case _:
            return 1


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: TrainingConfig | PretrainTrainingConfig, step: int
) -> float:
    """Set every group's rate for optimizer step `step` (from 0); training.learning_rate's."""
    factor, stage, rate = schedule(config, step), 0, config.learning_rate
    if isinstance(config, TrainingConfig):
        stage = config.stage_at(step)
        rate = config.all_stages[stage].learning_rate or 0.0
    for group in optimizer.param_groups:
        group["lr"] = group["base_lrs"][stage] * factor
    return rate * factor


def schedule(config: TrainingConfig | PretrainTrainingConfig, step: int) -> float:
    """Linear warm-up, then a half cosine down to min_lr_ratio (Loshchilov & Hutter 2017)."""
    if step < config.warmup_steps:  # from step 0 on above zero, or it would be a step for nothing
        return (step + 1) / config.warmup_steps
    # the last step, max_steps - 1, has min_lr_ratio itself
    span = max(1, config.max_steps - 1 - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def _rate(critic: Critic, name: str, config: TrainingConfig, stage: StageConfig) -> float:
    levels = depth(critic, name)
    if levels == 0 and stage.head_learning_rate is not None:
        return stage.head_learning_rate
    assert stage.learning_rate is not None, "a stage without its rates"
    return stage.learning_rate * config.lr_decay_factor**levels


def _decay(parameter: nn.Parameter, config: TrainingConfig | PretrainTrainingConfig) -> float:
    """Norms and biases, the one-dimensional parameters, are not decayed."""
    return config.weight_decay if parameter.dim() > 1 else 0.0


def _fused_adamw(
    groups: dict[tuple[_Rates, float], list[nn.Parameter]],
    config: TrainingConfig | PretrainTrainingConfig,
) -> torch.optim.AdamW:
    # sorted: the same groups in the same order on every rank and in every attempt
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": rates[0], "base_lrs": rates, "weight_decay": decay}
        for (rates, decay), parameters in sorted(groups.items(), reverse=True)
    ]
    return torch.optim.AdamW(settings, betas=(config.betas[0], config.betas[1]), fused=True)


def _check_partition(
    critic: Critic, groups: dict[tuple[_Rates, float], list[nn.Parameter]]
) -> None:
    grouped = [id(p) for members in groups.values() for p in members]
    trainable = {id(p) for p in critic.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)), "a parameter is in two optimizer groups"
    assert set(grouped) == trainable, "optimizer groups and trainable parameters differ"
