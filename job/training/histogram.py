"""Values as histograms: targets become distributions over bins, a value is an expectation.

The histogram loss with Gaussian targets (HL-Gauss: Imani & White 2018, arXiv 1806.04613;
Farebrother et al. 2024, arXiv 2403.03950) is the cross-entropy of the predicted distribution to a
normal one around the target, cut off at the ends of the bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REACH = 3.0  # sigmas beyond 0 and 1 that have bins, so that hardly anything is cut off


class Histogram:
    """k bins of equal width, over [0, 1] and three sigma beyond on either side.

    Args:
        bins: k, more than 6 sigma.
        sigma: of a target's distribution, in bins.
    """

    def __init__(self, bins: int, sigma: float) -> None:
        width = 1 / (bins - 2 * REACH * sigma)
        self.sigma = sigma * width
        first = -REACH * self.sigma
        edges = first + width * torch.arange(bins + 1, dtype=torch.float64)
        self._edges, self.centres = edges.float(), ((edges[1:] + edges[:-1]) / 2).float()  # [k]

    def distribution(self, targets: Tensor) -> Tensor:
        """The probability of each bin around targets [n]: float32 [n, k]."""
        edges = self._edges.to(targets.device)
        below = torch.erf((edges - targets[:, None]) / (self.sigma * math.sqrt(2)))
        return (below[:, 1:] - below[:, :-1]) / (below[:, -1:] - below[:, :1])

    def expectation(self, outputs: Tensor) -> Tensor:
        """The mean [n] of the distributions whose logits are outputs [n, k]."""
        return outputs.softmax(-1) @ self.centres.to(outputs.device)

    def logits(self, mean: float) -> list[float]:
        """Those of the rewards 0 and 1 in the share that has this mean, [k]."""
        ends = self.distribution(torch.tensor([0.0, 1.0]))
        mixed = (1 - mean) * ends[0] + mean * ends[1]
        return [float(x) for x in mixed.clamp_min(1e-4).log()]


def histogram_loss(histogram: Histogram, outputs: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy [n] of outputs, logits [n, k], to the distributions around targets [n]."""
    return -(histogram.distribution(targets) * outputs.log_softmax(-1)).sum(-1)
