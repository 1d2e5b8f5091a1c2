"""Value targets and losses.

For a response of T tokens with reward r, V_t is the value after token t, and the target is

    Monte-Carlo     G_t = gamma^(T - t) r
    lambda-return   G_T = r,  G_t = gamma ((1 - lambda) V_{t+1} + lambda G_{t+1})

(Sutton & Barto 2018, sections 3.3 and 12.1), with no gradient through V. The loss is a sum over
response tokens divided by their count in the whole step; the pairwise loss sums over pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from job.common.schema import Loss, ObjectiveConfig, Target
from job.data.packing import Batch
from job.model.transformer import to_device

_EDGE = 1e-4  # keeps the logit of a mean reward of 0 or 1 finite


class Objective:
    """Turns head outputs [n] of a packed batch into values, targets and a loss sum."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    @property
    def ranks_only(self) -> bool:
        """Whether outputs lie on no scale of rewards: only their differences are trained."""
        return self.config.loss is Loss.pairwise

    def initial_bias(self, mean_reward: float) -> float:
        """The head bias that predicts the mean reward (0 for pairwise: only differences count)."""
        if self.ranks_only:
            return 0.0
        if self.config.loss is Loss.bce:
            p = min(max(mean_reward, _EDGE), 1 - _EDGE)
            return math.log(p / (1 - p))
        return mean_reward

    def values(self, outputs: Tensor) -> Tensor:
        """Predicted values [n]: the outputs, through a sigmoid where the loss is bce."""
        return outputs.sigmoid() if self.config.loss is Loss.bce else outputs

    def labels(self, batch: Batch) -> Tensor:
        """Monte-Carlo targets [n] on the host, what the metrics compare values with."""
        rewards = batch.rewards.repeat_interleave(batch.response_lengths)
        return rewards * self.config.gamma ** _tokens_left(batch).to(rewards.dtype)

    def targets(self, outputs: Tensor, batch: Batch, step: int) -> Tensor:
        """Targets [n] at optimizer step `step` (from 0), without gradient."""
        if self.config.target is Target.monte_carlo:
            return self.labels(batch)
        lam = self.lambda_at(step)
        return lambda_return(self.values(outputs).detach(), batch, self.config.gamma, lam)

    def lambda_at(self, step: int) -> float:
        """Lambda goes linearly from lambda_start to lambda_end in lambda_steps."""
        done = min(1.0, step / self.config.lambda_steps)
        return self.config.lambda_start + done * (self.config.lambda_end - self.config.lambda_start)

    def count(self, batch: Batch) -> int:
        """What the loss is a mean over: response tokens, or pairs."""
        return len(batch.pairs) if self.config.loss is Loss.pairwise else len(batch.responses)

    def loss_sum(self, outputs: Tensor, batch: Batch, step: int) -> Tensor:
        """Sum of the loss over the batch's response tokens or pairs."""
        if self.config.loss is Loss.pairwise:
            return pairwise_loss_sum(outputs, batch)
        targets = to_device(self.targets(outputs, batch, step), outputs.device)
        match self.config.loss:
            case Loss.huber:
                delta = self.config.huber_delta
                return F.huber_loss(outputs, targets, reduction="sum", delta=delta)
            case Loss.bce:
                return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
            case _:
                return F.mse_loss(outputs, targets, reduction="sum")


def lambda_return(values: Tensor, batch: Batch, gamma: float, lam: float) -> Tensor:
    """Lambda-returns [n] of all sequences at once, from values [n].

    The recursion G_t = b_t + a_t G_{t+1} has a = 0 at each last token, so that it can run over
    the whole stream; it is solved in log2(T) doublings (Hillis & Steele 1986).
    """
    if not len(values):
        return values
    left, device = _tokens_left(batch), values.device
    last = to_device(left == 0, device)
    rewards = batch.rewards.repeat_interleave(batch.response_lengths).to(values.dtype)
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
    """Mean output of each response [b]."""
    b = len(batch.response_lengths)
    index = to_device(torch.arange(b).repeat_interleave(batch.response_lengths), outputs.device)
    sums = outputs.new_zeros(b).index_add(0, index, outputs)
    return sums / to_device(batch.response_lengths, outputs.device)


def _tokens_left(batch: Batch) -> Tensor:
    """Response tokens after each response token, int64 [n]."""
    ends = batch.response_lengths.cumsum(0)
    index = torch.arange(len(batch.responses), device=ends.device)
    return ends.repeat_interleave(batch.response_lengths) - 1 - index
