"""Value targets and losses.

For a response of T tokens with reward r, V_t is the value after token t, V_0 the one after the
last token before the response, and the target is

    Monte-Carlo     G_t = gamma^(T - t) r
    lambda-return   G_T = r,  G_t = gamma ((1 - lambda) V_{t+1} + lambda G_{t+1})

(Sutton & Barto 2018, sections 3.3 and 12.1), with no gradient through V. The loss is a weighted sum
over the positions that carry a target divided by their weight in the whole step, or a sum over
pairs divided by their number; a joint objective adds up such terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from job.common.schema import Loss, ObjectiveConfig
from job.data.packing import Batch
from job.model.packed_layout import to_device
from job.run.value_metrics import ValueMetrics
from job.training.histogram import Histogram, histogram_loss

_EDGE = 1e-4  # keeps the logit of a mean reward of 0 or 1 finite


@dataclass(frozen=True)
class Counts:
    """What terms of a loss are means over: the weight of positions, and pairs."""

    weight: float
    pairs: float

    @classmethod
    def of(cls, parts: Sequence[Counts]) -> Counts:
        """All of them together, exactly: it does not hang on how a step is cut into parts."""
        return cls(math.fsum(one.weight for one in parts), math.fsum(one.pairs for one in parts))


class Objective:
    """Turns head outputs of a packed batch into values, targets and a loss."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        by_bins = config.loss is Loss.hl_gauss
        self._histogram = Histogram(config.bins, config.sigma) if by_bins else None

    @property
    def ranks_only(self) -> bool:
        """Whether outputs lie on no scale of rewards: only their differences are trained."""
        return self.config.ranks_only

    def initial_bias(self, mean_reward: float) -> float | list[float]:
        """The head bias, or one for each output, that predicts the mean reward (0 for pairwise:
        only differences count).
        """
        if self.ranks_only:
            return 0.0
        if self._histogram is not None:
            return self._histogram.logits(mean_reward)
        if self.config.loss is Loss.bce:
            p = min(max(mean_reward, _EDGE), 1 - _EDGE)
            return math.log(p / (1 - p))
        return mean_reward

    def values(self, outputs: Tensor) -> Tensor:
        """Predicted values [n]: the outputs, through a sigmoid where the loss is bce, or their
        distribution's mean where it is hl_gauss.
        """
        if self._histogram is not None:
            return self._histogram.expectation(outputs)
        return outputs.sigmoid() if self.config.loss is Loss.bce else outputs

    def labels(self, batch: Batch) -> Tensor:
        """Monte-Carlo targets [n] on the host, what the metrics compare values with."""
        rewards = batch.rewards.repeat_interleave(batch.lengths)
        return rewards * self.config.gamma ** _tokens_left(batch).to(rewards.dtype)

    def record(self, metrics: ValueMetrics, values: NDArray[Any], batch: Batch) -> None:
        """Count a batch's values [n] in."""
        labels, rewards = self.labels(batch).cpu().numpy(), batch.rewards.cpu().numpy()
        at_prompts = batch.at_prompts.cpu().numpy()
        first, inside = np.flatnonzero(at_prompts), ~at_prompts
        lengths, answers = batch.lengths.cpu().numpy(), batch.response_lengths.cpu().numpy()
        if batch.given is not None:
            given = batch.given.cpu().numpy()
            there = (batch.weights.cpu().numpy() > 0) & ~np.isnan(given)
            metrics.add_targets(values[there], given[there])
        # optimal values are undiscounted
        optimal = batch.optimal if self.config.gamma == 1 else None
        metrics.add(
            values[inside],
            labels[inside],
            answers,
            rewards,
            batch.problems,
            None if optimal is None else optimal[inside],
        )
        metrics.add_prompts(
            values[first],
            values[first + 1],
            labels[first],
            rewards[lengths > answers],
            None if optimal is None else (optimal[first], optimal[first + 1]),
        )

    def targets(self, batch: Batch) -> Tensor:
        """Monte-Carlo targets [n], and in their place those that rows have at positions."""
        labels = self.labels(batch)
        if batch.given is None:
            return labels
        return torch.where(batch.given.isnan(), labels, batch.given)

    def returns(self, outputs: Tensor, batch: Batch, step: int) -> Tensor:
        """Lambda-returns [n] at optimizer step `step` (from 0), without gradient."""
        lam = self.lambda_at(step)
        return lambda_return(self.values(outputs).detach(), batch, self.config.gamma, lam)

    def lambda_at(self, step: int) -> float:
        """Lambda goes linearly from lambda_start to lambda_end in lambda_steps."""
        done = min(1.0, step / self.config.lambda_steps)
        return self.config.lambda_start + done * (self.config.lambda_end - self.config.lambda_start)

    @staticmethod
    def counts(batch: Batch) -> Counts:
        """What the batch adds to that which the terms are means over."""
        return Counts(batch.weight, float(len(batch.pairs)))

    def loss(self, outputs: Tensor, batch: Batch, step: int, whole: Counts) -> Tensor:
        """The batch's share of the loss of optimizer step `step` (from 0).

        Args:
            outputs: [n], or [n, k] for hl_gauss.
            whole: the counts of all batches of the step, on all ranks.
        """
        terms, found = self.config.all_terms, []
        weights = to_device(batch.weights, outputs.device)
        if terms.monte_carlo:
            targets = to_device(self.targets(batch), outputs.device)
            errors = weights @ self._errors(outputs, targets)
            found.append(terms.monte_carlo * errors / (whole.weight or 1.0))
        if terms.td:
            errors = weights @ self._errors(outputs, self.returns(outputs, batch, step))
            found.append(terms.td * errors / (whole.weight or 1.0))
        if terms.pairwise:  # of a step without pairs, nothing
            scores = outputs if self._histogram is None else self.values(outputs)
            errors = pairwise_loss_sum(scores, batch)
            found.append(terms.pairwise * errors / (whole.pairs or 1.0))
        return torch.stack(found).sum()

    def _errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss at each position [n]."""
        if self._histogram is not None:
            return histogram_loss(self._histogram, outputs, targets)
        match self.config.loss:
            case Loss.huber:
                delta = self.config.huber_delta
                return F.huber_loss(outputs, targets, reduction="none", delta=delta)
            case Loss.bce:
                return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
            case _:
                return F.mse_loss(outputs, targets, reduction="none")


def lambda_return(values: Tensor, batch: Batch, gamma: float, lam: float) -> Tensor:
    """Lambda-returns [n] of all sequences at once, from values [n].

    The recursion G_t = b_t + a_t G_{t+1} has a = 0 at each last token, so that it can run over
    the whole stream; it is solved in log2(T) doublings (Hillis & Steele 1986).
    """
    if not len(values):
        return values
    left, device = _tokens_left(batch), values.device
    last = to_device(left == 0, device)
    rewards = batch.rewards.repeat_interleave(batch.lengths).to(values.dtype)
    rewards = to_device(rewards, device)
    bootstrap = gamma * (1 - lam) * values.roll(-1)
    returns = torch.where(last, rewards, bootstrap)
    carry = (~last).to(values.dtype) * (gamma * lam)
    reach, longest = 1, int(left.max()) + 1
    while reach < longest:
        ahead, ahead_carry = returns[reach:], carry[reach:]
        returns = torch.cat((returns[:-reach] + carry[:-reach] * ahead, returns[-reach:]))
        carry = torch.cat((carry[:-reach] * ahead_carry, torch.zeros_like(carry[-reach:])))
        reach *= 2
    return returns


def pairwise_loss_sum(outputs: Tensor, batch: Batch) -> Tensor:
    """-log sigmoid of the difference of mean outputs, summed over pairs (Bradley & Terry 1952)."""
    means = _sequence_means(outputs, batch)
    better, worse = means[to_device(batch.pairs.T, means.device)]
    return F.softplus(worse - better).sum()


def _sequence_means(outputs: Tensor, batch: Batch) -> Tensor:
    """Mean output of each response [b]; two of one problem have the same before it."""
    # as numbers: a GPU would be waited for to know how many a mask takes
    inside = to_device((~batch.at_prompts).nonzero()[:, 0], outputs.device)
    b = len(batch.response_lengths)
    index = to_device(torch.arange(b).repeat_interleave(batch.response_lengths), outputs.device)
    sums = outputs.new_zeros(b).index_add(0, index, outputs[inside])
    return sums / to_device(batch.response_lengths, outputs.device)


def _tokens_left(batch: Batch) -> Tensor:
    """Response tokens after each position, int64 [n]."""
    ends = batch.lengths.cumsum(0)
    index = torch.arange(len(batch.positions), device=ends.device)
    return ends.repeat_interleave(batch.lengths) - 1 - index
