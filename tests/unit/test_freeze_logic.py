"""What N means: which parameters are trained, how many they are, and that nothing else moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from job.common.errors import InputError
from job.common.schema import ObjectiveConfig, TrainingConfig
from job.data.packing import Batch
from job.distributed.world import World
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, ParameterReport, parameter_report, unfreeze_last_blocks
from job.model.packed_layout import PackedLayout
from job.run.value_metrics import ValueMetrics
from job.training.learner import Learner
from job.training.objective import Objective

SEVEN_B = TransformerConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32000)
SMALL = TransformerConfig(dim=32, n_layers=4, n_heads=4, vocab_size=50, multiple_of=8)


def _critic(config: TransformerConfig, n: int, device: str = "cpu") -> Critic:
    torch.manual_seed(0)
    with torch.device(device):
        critic = Critic(config)
    unfreeze_last_blocks(critic, n)
    return critic


def _trainable(critic: Critic) -> set[str]:
    return {name for name, p in critic.named_parameters() if p.requires_grad}


def _seven_b_report(n: int) -> ParameterReport:
    return parameter_report(_critic(SEVEN_B, n, "meta"))


def _batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = [7, 12, 5]
    starts = np.cumsum([0, *lengths[:-1]])
    positions = np.concatenate([s + np.arange(2, n) for s, n in zip(starts, lengths, strict=True)])
    return Batch(
        tokens=torch.from_numpy(rng.integers(0, 50, sum(lengths))),
        layout=PackedLayout(lengths),
        positions=torch.from_numpy(positions),
        lengths=torch.tensor(lengths) - 2,
        response_lengths=torch.tensor(lengths) - 2,
        weights=torch.ones(len(positions)),
        weight=float(len(positions)),
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        problems=np.zeros(3, np.uint64),
        optimal=None,
        pairs=torch.empty((0, 2), dtype=torch.int64),
    )


def _learner(n: int) -> Learner:
    critic = _critic(SMALL, n)
    critic.initialise_head(0.5, 0)
    config = TrainingConfig(num_unfrozen_layers=n, learning_rate=1e-3, max_steps=20, warmup_steps=2)
    return Learner(critic, Objective(ObjectiveConfig()), config, World())


def test_num_unfrozen_layers_zero() -> None:
    critic = _critic(SMALL, 0)
    assert _trainable(critic) == {"value_head.weight", "value_head.bias"}
    assert _seven_b_report(0).trainable == 4_097
    assert _seven_b_report(0).trunk_blocks.trainable == 0


def test_num_unfrozen_layers_four() -> None:
    report = _seven_b_report(4)
    assert report.trainable == 809_541_633
    assert report.trunk_blocks.trainable == 809_533_440
    assert report.to_dict()["model_trainable_trunk_params"] == 809_533_440
    assert report.total == 6_607_347_713
    assert round(100 * report.trainable / report.total, 2) == 12.25


@pytest.mark.parametrize(("n", "count"), [(8, 1_619_075_073), (32, 6_476_275_713)])
def test_trainable_counts_of_a_seven_b_trunk(n: int, count: int) -> None:
    assert _seven_b_report(n).trainable == count


def test_num_unfrozen_layers_exceeds_total(caplog: pytest.LogCaptureFixture) -> None:
    report = _seven_b_report(33)
    assert report.trainable == report.total == 6_607_347_713
    assert "full training of all 6,607,347,713 parameters" in caplog.text
    assert "the trunk has 32 blocks" in caplog.text


def test_all_blocks_leave_the_embeddings_frozen() -> None:
    names = _trainable(_critic(SMALL, 4))
    assert "trunk.tok_embeddings.weight" not in names
    assert "trunk.layers.0.attention.wq.weight" in names


def test_n_counts_the_trunks_own_blocks_with_multi_token_heads() -> None:
    config = TransformerConfig(
        dim=4096, n_layers=32, n_heads=32, vocab_size=32000, n_future_tokens=4
    )
    critic = _critic(config, 4, "meta")
    blocks = {int(name.split(".")[2]) for name in _trainable(critic) if ".layers." in name}
    assert len(critic.trunk.layers) == 29
    assert blocks == {25, 26, 27, 28}


def test_block_one_is_not_confused_with_block_thirty_one() -> None:
    critic = _critic(SEVEN_B, 1, "meta")
    blocks = {int(name.split(".")[2]) for name in _trainable(critic) if ".layers." in name}
    assert blocks == {31}


def test_zero_does_not_select_every_block_through_a_minus_zero_slice() -> None:
    critic = _critic(SMALL, 0)
    assert not any(p.requires_grad for p in critic.trunk.parameters())


@pytest.mark.parametrize("n", [-1, -32, 1.5, 2.0, "4", None, True])
def test_negative_and_fractional_n_are_refused(n: object) -> None:
    with torch.device("meta"):
        critic = Critic(SMALL)
    with pytest.raises(InputError, match="num_unfrozen_layers"):
        unfreeze_last_blocks(critic, n)  # type: ignore[arg-type]


def test_a_smaller_n_freezes_what_a_larger_one_had_unfrozen() -> None:
    critic = _critic(SMALL, 4)
    unfreeze_last_blocks(critic, 1)
    assert _trainable(critic) == _trainable(_critic(SMALL, 1))


@pytest.mark.parametrize("n", [0, 1, 2, 4, 5])
def test_every_trainable_parameter_has_a_finite_non_zero_gradient(n: int) -> None:
    learner, batch = _learner(n), _batch(0)
    counts = learner.objective.counts(batch)
    learner.objective.loss(learner.outputs(batch), batch, 0, counts).backward()
    for name, parameter in learner.critic.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("n", [0, 2])
def test_no_frozen_parameter_changes_in_twenty_steps_and_every_trainable_one_does(n: int) -> None:
    learner = _learner(n)
    before = {name: p.detach().clone() for name, p in learner.critic.named_parameters()}
    for step in range(20):
        learner.step(step, [_batch(step)], ValueMetrics(), lambda _: [1.0, 0.0])
    for name, parameter in learner.critic.named_parameters():
        unchanged = torch.equal(before[name], parameter)
        assert unchanged != parameter.requires_grad, name


def test_report_counts_bytes_by_component() -> None:
    report = parameter_report(_critic(SMALL, 2))
    assert list(report.components) == ["value_head", "norm", "trunk_blocks", "embeddings"]
    blocks = report.trunk_blocks
    per_block = 4 * 32 * 32 + 3 * 32 * SMALL.ffn_width + 2 * 32
    assert (blocks.total, blocks.trainable) == (4 * per_block, 2 * per_block)
    assert report.weight_bytes["trunk_blocks"] == 4 * 4 * per_block
    assert blocks.gradient_bytes == 4 * 2 * per_block
    assert blocks.optimizer_bytes == 8 * 2 * per_block
