"""Parameter groups, layer-wise decay and the schedule."""

from __future__ import annotations

import pytest
import torch

from job.common.schema import TrainingConfig, ValueHeadConfig
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.training.optimizer import build_optimizer, schedule, set_learning_rate

CONFIG = TransformerConfig(dim=16, n_layers=4, n_heads=2, vocab_size=9, multiple_of=8)


def _critic(n: int) -> Critic:
    critic = Critic(CONFIG)
    unfreeze_last_blocks(critic, n)
    return critic


def _settings(critic: Critic, config: TrainingConfig) -> dict[str, tuple[float, float]]:
    """Rate and weight decay by parameter name."""
    names = {id(p): name for name, p in critic.named_parameters()}
    groups = build_optimizer(critic, config).param_groups
    return {
        names[id(p)]: (g["base_lrs"][0], g["weight_decay"]) for g in groups for p in g["params"]
    }


@pytest.mark.parametrize("n", [0, 2, 4, 5])
def test_groups_hold_exactly_the_trainable_parameters(n: int) -> None:
    critic = _critic(n)
    expected = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert _settings(critic, TrainingConfig()).keys() == expected


def test_rates_decay_from_the_head_downwards() -> None:
    rates = _settings(_critic(5), TrainingConfig(learning_rate=1.0, lr_decay_factor=0.5))
    by_depth = {
        "value_head.weight": 1.0,
        "trunk.norm.weight": 0.5,
        "trunk.layers.3.attention.wq.weight": 0.5,
        "trunk.layers.2.ffn_norm.weight": 0.25,
        "trunk.layers.0.feed_forward.w1.weight": 0.0625,
        "trunk.tok_embeddings.weight": 0.03125,
    }
    assert {name: rates[name][0] for name in by_depth} == by_depth


def test_a_decay_factor_of_one_is_off() -> None:
    rates = _settings(_critic(4), TrainingConfig(learning_rate=3e-4, lr_decay_factor=1.0))
    assert {rate for rate, _ in rates.values()} == {3e-4}


def test_the_head_may_have_a_rate_of_its_own() -> None:
    config = TrainingConfig(learning_rate=1e-5, value_head=ValueHeadConfig(learning_rate=1e-4))
    rates = _settings(_critic(1), config)
    assert rates["value_head.weight"][0] == rates["value_head.bias"][0] == 1e-4
    assert rates["trunk.norm.weight"][0] == 1e-5


def test_norms_and_biases_are_not_decayed() -> None:
    settings = _settings(_critic(1), TrainingConfig(weight_decay=0.1))
    undecayed = {name for name, (_, decay) in settings.items() if decay == 0}
    assert undecayed == {
        "value_head.bias",
        "trunk.norm.weight",
        "trunk.layers.3.attention_norm.weight",
        "trunk.layers.3.ffn_norm.weight",
    }


def test_adamw_is_fused_with_the_stated_betas() -> None:
    group = build_optimizer(_critic(1), TrainingConfig()).param_groups[0]
    assert group["fused"] is True
    assert group["betas"] == (0.9, 0.95)


def test_schedule_warms_up_linearly_and_falls_by_half_a_cosine() -> None:
    config = TrainingConfig(max_steps=21, warmup_steps=10, min_lr_ratio=0.1)
    assert [schedule(config, s) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert schedule(config, 15) == pytest.approx(0.55)
    assert schedule(config, 20) == pytest.approx(0.1)


def test_a_run_that_is_all_warm_up_never_exceeds_the_peak() -> None:
    config = TrainingConfig(max_steps=3, warmup_steps=50)
    assert [schedule(config, s) for s in range(3)] == pytest.approx([0.02, 0.04, 0.06])


def test_every_group_follows_the_schedule() -> None:
    config = TrainingConfig(
        learning_rate=1.0, lr_decay_factor=0.5, max_steps=10, warmup_steps=4, min_lr_ratio=0.0
    )
    optimizer = build_optimizer(_critic(2), config)
    assert set_learning_rate(optimizer, config, 1) == 0.5
    assert sorted({g["lr"] for g in optimizer.param_groups}) == [0.125, 0.25, 0.5]


def test_one_step_of_adamw_by_hand() -> None:
    critic = _critic(0)
    config = TrainingConfig(learning_rate=0.1, weight_decay=0.5, warmup_steps=0, max_steps=1)
    optimizer = build_optimizer(critic, config)
    set_learning_rate(optimizer, config, 0)
    weight, bias = critic.value_head.weight, critic.value_head.bias
    before = weight.detach().clone(), bias.detach().clone()
    weight.grad, bias.grad = torch.full_like(weight, 3.0), torch.full_like(bias, -2.0)
    optimizer.step()  # Adam's first step is lr * sign(gradient), after lr * decay * weight
    torch.testing.assert_close(weight.detach(), before[0] * (1 - 0.05) - 0.1)
    torch.testing.assert_close(bias.detach(), before[1] + 0.1)
