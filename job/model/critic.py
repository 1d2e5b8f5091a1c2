"""The critic: a trunk, its final norm and one linear value head."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from job.model.architecture import TransformerConfig
from job.model.parameters import Count, ParameterCounts, select_trainable
from job.model.shards import fill, full_tensor
from job.model.transformer import PackedLayout, Reads, Trunk

_log = logging.getLogger(__name__)


class Critic(nn.Module):
    """Values at chosen tokens of a packed stream."""

    def __init__(self, config: TransformerConfig, *, head_bias: bool = True) -> None:
        super().__init__()
        self.trunk = Trunk(config)
        self.value_head = nn.Linear(config.dim, 1, bias=head_bias)
        self.num_unfrozen_layers = len(self.trunk.layers) + 1  # all, until some are frozen

    def forward(self, tokens: Tensor, layout: PackedLayout, at: Tensor | Reads) -> Tensor:
        """Head outputs, float32 [n], at positions `at` (int64 [n]) of the stream tokens [t].

        What `layout.reads` makes of positions does as well, and a GPU need not be waited for:
        FSDP would move the positions there first.
        """
        reads = at if isinstance(at, Reads) else layout.reads(at)
        return self.evaluate_hidden(self.trunk.hidden(tokens, layout, reads), reads)

    def evaluate_hidden(self, hidden: Tensor, reads: Reads) -> Tensor:
        """Head outputs, float32 [n], from the last block's output [r, d] on what is read."""
        chosen = hidden if reads.at is None else hidden[reads.at]
        # a sum, since FSDP loses its backward hook on a view that is changed in place
        return self.value_head(self.trunk.norm(chosen.float())).sum(-1)

    @torch.no_grad()
    def initialise_head(self, bias: float, seed: int) -> None:
        """Small weights and the given bias, where the head has one: first predictions spread by
        about 1 / sqrt(d).
        """
        d = self.trunk.config.dim
        generator = torch.Generator().manual_seed(seed)  # the same on every kind of device
        fill(self.value_head.weight, torch.randn(1, d, generator=generator) / d)
        if self.value_head.bias is not None:
            fill(self.value_head.bias, torch.full((1,), bias))

    @torch.no_grad()
    def set_head(self, weight: Tensor, bias: Tensor) -> None:
        """Begin with the given head: weight [1, d] and, where this head has one, bias [1]."""
        fill(self.value_head.weight, weight)
        if self.value_head.bias is not None:
            fill(self.value_head.bias, bias)

    def trained_tensors(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The trainable parameters, whole and on the host, or none where `keep` is false.

        Every rank must take part.
        """
        named = ((n, p.detach()) for n, p in self.named_parameters() if p.requires_grad)
        gathered = ((n, full_tensor(p)) for n, p in named)
        return {n: tensor.cpu() for n, tensor in gathered if keep}


def unfreeze_last_blocks(critic: Critic, n: int) -> None:
    """Make the head and the last `n` blocks trainable, and nothing else (see `select_trainable`).

    Raises:
        InputError: n is negative or not an integer.
    """
    trunk, n_blocks = critic.trunk, len(critic.trunk.layers)
    chosen = select_trainable(n, n_blocks)
    critic.num_unfrozen_layers = n
    # by index, never by name: "layers.3" is a part of "layers.31" too
    critic.requires_grad_(False)
    critic.value_head.requires_grad_(True)
    trunk.layers[n_blocks - chosen.blocks :].requires_grad_(True)
    trunk.norm.requires_grad_(chosen.norm)
    trunk.tok_embeddings.requires_grad_(chosen.embeddings)
    if chosen.embeddings:
        _log.warning(
            "training.num_unfrozen_layers is %d and the trunk has %d blocks: full training of "
            "all %s parameters, embeddings included",
            n,
            n_blocks,
            f"{sum(p.numel() for p in critic.parameters()):,}",
        )


@dataclass(frozen=True)
class ParameterReport(ParameterCounts):
    """What a critic trains, and the bytes of its weights as they are."""

    num_unfrozen_layers: int
    num_layers: int
    weight_bytes: Mapping[str, int]  # by component

    def to_dict(self) -> dict[str, Any]:
        """Flat `model_...` entries for tracking, and the components."""
        return {
            "model_num_unfrozen_layers": self.num_unfrozen_layers,
            "model_num_layers": self.num_layers,
            "model_total_params": self.total,
            "model_trainable_params": self.trainable,
            "model_trainable_trunk_params": self.trunk_blocks.trainable,
            "model_trainable_share": self.trainable / self.total,
            "components": [self._component(name) for name in self.components],
        }

    def _component(self, name: str) -> dict[str, Any]:
        count = self.components[name]
        return {
            "name": name,
            "total": count.total,
            "trainable": count.trainable,
            "weight_bytes": self.weight_bytes[name],
            "gradient_bytes": count.gradient_bytes,
            "optimizer_bytes": count.optimizer_bytes,
        }

    def __str__(self) -> str:
        head = f"{'component':<14}{'parameters':>16}{'trainable':>16}{'weights':>11}"
        lines = [head + f"{'gradients':>11}{'optimizer':>11}"]
        for name, count in self.components.items():
            sizes = (self.weight_bytes[name], count.gradient_bytes, count.optimizer_bytes)
            cells = "".join(f"{size / 1e6:>8,.1f} MB" for size in sizes)
            lines.append(f"{name:<14}{count.total:>16,}{count.trainable:>16,}{cells}")
        share = f"{self.trainable:,} of {self.total:,} ({self.trainable / self.total:.2%})"
        return "\n".join([*lines, f"trainable: {share}"])


def parameter_report(critic: Critic) -> ParameterReport:
    """Count a critic's parameters; works on the meta device too."""
    trunk = critic.trunk
    parts = {
        "value_head": list(critic.value_head.parameters()),
        "norm": list(trunk.norm.parameters()),
        "trunk_blocks": list(trunk.layers.parameters()),
        "embeddings": list(trunk.tok_embeddings.parameters()),
    }
    return ParameterReport(
        **{name: _count(parameters) for name, parameters in parts.items()},
        num_unfrozen_layers=critic.num_unfrozen_layers,
        num_layers=len(trunk.layers),
        weight_bytes={name: _bytes(parameters) for name, parameters in parts.items()},
    )


def _count(parameters: Sequence[nn.Parameter]) -> Count:
    return Count(
        total=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
    )


def _bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
