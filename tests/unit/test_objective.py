"""Targets and losses against cases computed by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from job.common.schema import Loss, ObjectiveConfig, Target, TermsConfig
from job.data.packing import Batch
from job.model.packed_layout import PackedLayout
from job.run.value_metrics import ValueMetrics
from job.training.objective import Counts, Objective, lambda_return

ONE = Counts(1, 1)  # so that a loss is a sum


def _batch(lengths: list[int], rewards: list[float], pairs: list[list[int]] | None = None) -> Batch:
    """A batch whose sequences are all response."""
    n = sum(lengths)
    return Batch(
        tokens=torch.zeros(n, dtype=torch.int64),
        layout=PackedLayout(lengths),
        positions=torch.arange(n),
        lengths=torch.tensor(lengths),
        response_lengths=torch.tensor(lengths),
        weights=torch.ones(n),
        weight=float(n),
        rewards=torch.tensor(rewards),
        problems=np.zeros(len(lengths), np.uint64),
        optimal=None,
        pairs=torch.tensor(pairs or [], dtype=torch.int64).reshape(-1, 2),
    )


def _with_prompts(batch: Batch, *prompted: int) -> Batch:
    """The batch, with one token before the response of each sequence of that number."""
    before = torch.zeros(len(batch.lengths), dtype=torch.int64)
    before[list(prompted)] = 1
    lengths = batch.lengths + before
    n = int(lengths.sum())
    return dataclasses.replace(
        batch,
        tokens=torch.zeros(n, dtype=torch.int64),
        layout=PackedLayout(lengths.tolist()),
        positions=torch.arange(n),
        lengths=lengths,
        weights=torch.ones(n),
        weight=float(n),
    )


def _objective(**settings: object) -> Objective:
    return Objective(ObjectiveConfig(**settings))  # type: ignore[arg-type]


def test_monte_carlo_targets_are_the_discounted_outcome() -> None:
    targets = _objective(gamma=0.5).labels(_batch([3, 2], [1.0, 0.5]))
    assert targets.tolist() == [0.25, 0.5, 1.0, 0.25, 0.5]


def test_the_value_before_a_response_of_t_tokens_is_discounted_t_times() -> None:
    batch = _with_prompts(_batch([3, 2, 1], [1.0, 0.5, 1.0]), 0, 2)
    targets = _objective(gamma=0.5).labels(batch)
    assert targets.tolist() == [0.125, 0.25, 0.5, 1.0, 0.25, 0.5, 0.5, 1.0]
    assert batch.at_prompts.nonzero().flatten().tolist() == [0, 6]
    assert _objective().counts(batch) == Counts(8, 0)


def test_lambda_return_before_a_response_by_hand() -> None:
    # as below, and G0 = .9 (.5 * .2 + .5 * .5535) = .339075
    values = torch.tensor([0.7, 0.2, 0.6, 0.4, 0.3])
    batch = _with_prompts(_batch([3, 1], [1.0, 0.0]), 0)
    returns = lambda_return(values, batch, gamma=0.9, lam=0.5)
    torch.testing.assert_close(returns, torch.tensor([0.339075, 0.5535, 0.63, 1.0, 0.0]))


def test_the_pairwise_loss_takes_the_outputs_of_responses_alone() -> None:
    plain = _batch([2, 1], [1.0, 0.0], [[0, 1]])
    batch, objective = _with_prompts(plain, 0, 1), _objective(loss=Loss.pairwise)
    outputs = torch.tensor([9.0, 0.5, 1.5, -7.0, 0.0])
    expected = objective.loss(outputs[[1, 2, 4]], plain, 0, ONE)
    assert objective.loss(outputs, batch, 0, ONE) == expected


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_metrics_of_responses_and_of_prompts_are_told_apart(gamma: float) -> None:
    optimal = np.array([0.5, 0.6, 1.0, 0.0, 0.5, 0.2], np.float32)
    batch = dataclasses.replace(
        _with_prompts(_batch([2, 1, 1], [1.0, 0.0, 0.0]), 0, 2), optimal=optimal
    )
    values = np.array([0.4, 0.7, 0.9, 0.2, 0.3, 0.1], np.float32)
    metrics = ValueMetrics()
    _objective(gamma=gamma).record(metrics, values, batch)
    got = metrics.compute()
    assert got["tokens"] == 4
    labels = [gamma, 1.0, 0.0, 0.0]
    errors = [(v - g) ** 2 for v, g in zip([0.7, 0.9, 0.2, 0.1], labels, strict=True)]
    assert got["mse"] == pytest.approx(sum(errors) / 4)
    assert got["prompt/mse"] == pytest.approx(((0.4 - gamma**2) ** 2 + 0.3**2) / 2)
    assert got["prompt/first_step"] == pytest.approx((0.3 - 0.2) / 2)
    assert ("prompt/distance_to_optimal" in got) == ("mse_optimal" in got) == (gamma == 1)
    if gamma == 1:
        assert got["prompt/distance_to_optimal"] == pytest.approx(((0.01 + 0.04) / 2) ** 0.5)
        assert got["prompt/next_distance_to_optimal"] == pytest.approx(((0.01 + 0.01) / 2) ** 0.5)


def test_lambda_return_by_hand() -> None:
    # G3 = r = 1; G2 = .9 (.5 * .4 + .5 * 1) = .63; G1 = .9 (.5 * .6 + .5 * .63) = .5535
    values = torch.tensor([0.2, 0.6, 0.4])
    returns = lambda_return(values, _batch([3], [1.0]), gamma=0.9, lam=0.5)
    torch.testing.assert_close(returns, torch.tensor([0.5535, 0.63, 1.0]))


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_lambda_return_equals_the_recursion_in_each_sequence(lam: float) -> None:
    lengths, rewards = [1, 7, 33, 2, 64], [1.0, 0.0, 1.0, 0.25, 1.0]
    values = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0)).double()
    batch, gamma = _batch(lengths, rewards), 0.97
    expected = []
    for part, reward in zip(values.split(lengths), rewards, strict=True):
        g = [reward]
        for after in reversed(part[1:].tolist()):
            g.append(gamma * ((1 - lam) * after + lam * g[-1]))
        expected += g[::-1]
    returns = lambda_return(values, batch, gamma, lam)
    torch.testing.assert_close(returns, torch.tensor(expected, dtype=torch.float64))


def test_lambda_one_is_monte_carlo() -> None:
    batch = _batch([4, 6], [1.0, 0.0])
    returns = lambda_return(torch.rand(10), batch, 0.9, 1.0)
    torch.testing.assert_close(returns, _objective(gamma=0.9).labels(batch))


def test_bootstrapped_targets_carry_no_gradient() -> None:
    objective = _objective(target=Target.lambda_return, lambda_start=0.5, lambda_end=0.5)
    outputs = torch.tensor([0.2, 0.6, 0.4], requires_grad=True)
    batch = _batch([3], [1.0])
    objective.loss(outputs, batch, 0, ONE).backward()
    targets = objective.returns(outputs, batch, 0)
    assert not targets.requires_grad
    torch.testing.assert_close(outputs.grad, 2 * (outputs.detach() - targets))


def test_lambda_schedule_is_linear_and_stays() -> None:
    objective = _objective(lambda_start=1.0, lambda_end=0.8, lambda_steps=10)
    assert [objective.lambda_at(step) for step in (0, 5, 10, 99)] == pytest.approx(
        [1, 0.9, 0.8, 0.8]
    )


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # outputs .5 and -1 against 1 and 1: errors .5 and 2
        (Loss.mse, 0.25 + 4.0),
        (Loss.huber, 0.5 * 0.25 + 0.5 * (2 - 0.25)),
        (Loss.bce, math.log1p(math.exp(-0.5)) + math.log1p(math.exp(1.0))),
    ],
)
def test_losses_by_hand(loss: Loss, expected: float) -> None:
    objective = _objective(loss=loss, huber_delta=0.5)
    outputs, batch = torch.tensor([0.5, -1.0]), _batch([2], [1.0])
    assert objective.loss(outputs, batch, 0, ONE).item() == pytest.approx(expected, rel=1e-6)
    assert objective.counts(batch) == Counts(2, 0)


def test_the_loss_weighs_each_position_by_hand() -> None:
    """Errors .25 and 4 of a right solution, 0.01 of a wrong one, at weights 1/2, 1/2 and 1."""
    batch = _batch([2, 1], [1.0, 0.0])
    batch = dataclasses.replace(batch, weights=torch.tensor([0.5, 0.5, 1.0]), weight=2.0)
    outputs, objective = torch.tensor([0.5, -1.0, 0.1]), _objective()
    found = objective.loss(outputs, batch, 0, objective.counts(batch)).item()
    assert found == pytest.approx((0.5 * 0.25 + 0.5 * 4 + 0.01) / 2, rel=1e-6)


def test_pairwise_loss_by_hand() -> None:
    # means 1, 0 and .5; pairs (0 beats 1), (2 beats 1)
    batch = _batch([2, 1, 2], [1.0, 0.0, 1.0], [[0, 1], [2, 1]])
    objective = _objective(loss=Loss.pairwise)
    outputs = torch.tensor([0.5, 1.5, 0.0, 1.0, 0.0])
    expected = math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-0.5))
    assert objective.loss(outputs, batch, 0, ONE).item() == pytest.approx(expected, rel=1e-6)
    assert objective.counts(batch) == Counts(5, 2)


def test_a_joint_loss_is_each_term_s_mean_times_its_share_by_hand() -> None:
    """Three sequences, of which the first two are a pair; weights and counts of a larger step."""
    batch = _batch([2, 1, 1], [1.0, 0.0, 1.0], [[0, 1]])
    batch = dataclasses.replace(batch, weights=torch.tensor([1.0, 1.0, 2.0, 0.5]), weight=4.5)
    terms = TermsConfig(monte_carlo=1.0, td=0.5, pairwise=0.25)
    objective = _objective(terms=terms, gamma=0.5, lambda_start=0.0, lambda_end=0.0)
    outputs, whole = torch.tensor([0.2, 0.6, 0.4, 0.9]), Counts(10, 4)
    # returns: .5 * .6, then rewards
    monte_carlo = (0.3**2 + 0.4**2 + 2 * 0.4**2 + 0.5 * 0.1**2) / 10
    td = ((0.2 - 0.3) ** 2 + 0.4**2 + 2 * 0.4**2 + 0.5 * 0.1**2) / 10
    pairwise = math.log1p(math.exp(0.0)) / 4  # both have the mean .4
    found = objective.loss(outputs, batch, 0, whole).item()
    assert found == pytest.approx(monte_carlo + 0.5 * td + 0.25 * pairwise, rel=1e-6)
    assert not objective.ranks_only
    assert objective.initial_bias(0.3) == 0.3


def test_a_term_of_a_joint_loss_alone_is_the_loss_of_that_name() -> None:
    batch, outputs = _batch([2, 3], [1.0, 0.0], [[0, 1]]), torch.tensor([0.2, 0.6, 0.4, 0.9, 0.1])
    short = {
        "monte_carlo": _objective(),
        "td": _objective(target=Target.lambda_return, lambda_start=0.5),
        "pairwise": _objective(loss=Loss.pairwise),
    }
    for name, objective in short.items():
        joint = _objective(terms=TermsConfig(**{name: 1.0}), lambda_start=0.5)
        assert joint.loss(outputs, batch, 0, ONE) == objective.loss(outputs, batch, 0, ONE)


def test_a_step_without_pairs_trains_the_other_terms() -> None:
    objective = _objective(terms=TermsConfig(monte_carlo=1.0, pairwise=1.0))
    outputs, batch = torch.tensor([0.5, 0.0], requires_grad=True), _batch([2], [1.0])
    loss = objective.loss(outputs, batch, 0, objective.counts(batch))
    assert loss.item() == pytest.approx((0.25 + 1) / 2)
    loss.backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


def test_initial_bias_predicts_the_mean_reward() -> None:
    assert _objective().initial_bias(0.3) == 0.3
    assert _objective(loss=Loss.huber).initial_bias(0.3) == 0.3
    assert _objective(loss=Loss.bce).initial_bias(0.3) == pytest.approx(math.log(0.3 / 0.7))
    assert math.isfinite(_objective(loss=Loss.bce).initial_bias(1.0))
    assert _objective(loss=Loss.pairwise).initial_bias(0.3) == 0.0


def test_values_are_probabilities_under_bce_and_outputs_otherwise() -> None:
    outputs = torch.tensor([0.0, 2.0])
    assert _objective(loss=Loss.bce).values(outputs).tolist() == pytest.approx([0.5, 0.880797])
    assert _objective().values(outputs).tolist() == [0.0, 2.0]
