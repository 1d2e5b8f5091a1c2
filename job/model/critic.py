"""The critic: a trunk, its final norm and one linear value head."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from job.model.architecture import TransformerConfig
from job.model.packed_layout import PackedLayout, Reads
from job.model.parameters import Count, ParameterCounts, bytes_text, select_trainable
from job.model.prefix import Prefix
from job.model.shards import fill, full_tensor
from job.model.transformer import Trunk

_log = logging.getLogger(__name__)


class Critic(nn.Module):
    """Values at chosen tokens of a packed stream."""

    def __init__(
        self, config: TransformerConfig, *, head_bias: bool = True, head_outputs: int = 1
    ) -> None:
        super().__init__()
        self.trunk = Trunk(config)
        self.value_head = nn.Linear(config.dim, head_outputs, bias=head_bias)
        self.num_unfrozen_layers = len(self.trunk.layers) + 1  # all, until some are frozen

    def forward(
        self,
        tokens: Tensor,
        layout: PackedLayout,
        at: Tensor | Reads,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Head outputs at positions `at` (int64 [n]) of the stream tokens [t]: float32 [n], or
        [n, k] of a head with k > 1 outputs.

        What `layout.reads` makes of positions does as well, and a GPU need not be waited for:
        FSDP would move the positions there first.
        """
        reads = at if isinstance(at, Reads) else layout.reads(at)
        return self.evaluate_hidden(self.trunk.hidden(tokens, layout, reads, prefix), reads)

    def evaluate_hidden(self, hidden: Tensor, reads: Reads) -> Tensor:
        """As `forward`, from the last block's output [r, d] on what is read."""
        chosen = hidden if reads.at is None else hidden[reads.at]
        outputs: Tensor = self.value_head(self.trunk.norm(chosen.float()))
        # a sum, since FSDP loses its backward hook on a view that is changed in place
        return outputs.sum(-1) if self.value_head.out_features == 1 else outputs

    @torch.no_grad()
    def initialise_head(self, bias: float | Sequence[float], seed: int) -> None:
        """Small weights and the given bias, or one for each output, where the head has one: first
        predictions spread by about 1 / sqrt(d).
        """
        d, k = self.trunk.config.dim, self.value_head.out_features
        generator = torch.Generator().manual_seed(seed)  # the same on every kind of device
        fill(self.value_head.weight, torch.randn(k, d, generator=generator) / d)
        if self.value_head.bias is not None:
            fill(self.value_head.bias, torch.tensor(bias).expand(k))

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
        """A table of 60 columns: a terminal's 80 without what the log puts before a line."""
        lines = [_row("component", "parameters", "trainable", "weights", "training")]
        for name, count in self.components.items():
            held = bytes_text(self.weight_bytes[name])
            training = bytes_text(count.gradient_bytes + count.optimizer_bytes)
            lines.append(_row(name, f"{count.total:,}", f"{count.trainable:,}", held, training))
        share = f"{self.trainable:,} of {self.total:,} ({self.trainable / self.total:.2%})"
        lines.append(f"trainable: {share}")
        return "\n".join([*lines, "training: gradients and AdamW's moments"])


def _row(name: str, total: str, trainable: str, weights: str, training: str) -> str:
    return f"{name:<12}{total:>15}{trainable:>15}{weights:>9}{training:>9}"


def parameter_report(critic: Critic) -> ParameterReport:
    """Count a critic's parameters; works on the meta device too.

    What of the trunk is left out counts too, but for the bytes of its weights.
    """
    with torch.device("meta"):
        whole = Trunk(critic.trunk.config)
    held = {"value_head": critic.value_head, **_parts(critic.trunk)}
    all_ = {"value_head": critic.value_head, **_parts(whole)}
    return ParameterReport(
        **{name: _count(all_[name], held[name]) for name in held},
        num_unfrozen_layers=critic.num_unfrozen_layers,
        num_layers=len(critic.trunk.layers),
        weight_bytes={name: _bytes(module) for name, module in held.items()},
    )


def _parts(trunk: Trunk) -> dict[str, nn.Module]:
    return {"norm": trunk.norm, "trunk_blocks": trunk.layers, "embeddings": trunk.tok_embeddings}


def _count(whole: nn.Module, held: nn.Module) -> Count:
    return Count(
        total=sum(p.numel() for p in whole.parameters()),
        trainable=sum(p.numel() for p in held.parameters() if p.requires_grad),
    )


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
