"""Stages of a training: at each step some of the trainable parameters learn, the others rest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from job.common.schema import TrainingConfig
from job.model.critic import Critic
from job.model.parameters import Selection, select_trainable


class Stages:
    """What of a critic learns at which step; its trainable parameters are those of all stages."""

    def __init__(self, critic: Critic, config: TrainingConfig) -> None:
        self._trunk, self._config = critic.trunk, config
        self._n_blocks = len(critic.trunk.layers)
        ns = [stage.num_unfrozen_layers for stage in config.all_stages]
        self._chosen = [select_trainable(n, self._n_blocks) for n in ns]
        self._rests = [n < max(ns) for n in ns]
        trainable = [(n, p) for n, p in critic.named_parameters() if p.requires_grad]
        self._learning = [
            [p for name, p in trainable if _learns(name, chosen, self._n_blocks)]
            for chosen in self._chosen
        ]

    def enter(self, step: int) -> list[nn.Parameter]:
        """What learns at optimizer step `step` (from 0); gradients go so far and no further."""
        index = self._config.stage_at(step)
        first = self._n_blocks - self._chosen[index].blocks
        if len(self._chosen) > 1:
            self._trunk.gradients_from = first if self._rests[index] else None
            for block in self._trunk.layers[self._trunk.first_trainable_block() :]:
                if isinstance(block, FSDPModule):  # what rests is not gathered for gradients
                    block.set_unshard_in_backward(block in self._trunk.layers[first:])
        return self._learning[index]

    def updates(self, parameter: Tensor, step: int, skipped: int, skipped_at: Sequence[int]) -> int:
        """How often a parameter was updated in the first `step` steps.

        Args:
            skipped: steps that changed nothing.
            skipped_at: these steps, from 1; those of which it is not known were the first stage's.
        """
        done, start = [], 0
        for stage in self._config.all_stages[:-1]:
            done.append(min(stage.steps, max(0, step - start)))
            start += stage.steps
        done.append(max(0, step - start))
        for one in skipped_at:
            done[self._config.stage_at(one - 1)] -= 1
        done[0] -= skipped - len(skipped_at)
        learns = [any(p is parameter for p in learning) for learning in self._learning]
        return sum(n for n, learning in zip(done, learns, strict=True) if learning)


def _learns(name: str, chosen: Selection, n_blocks: int) -> bool:
    match name.split("."):
        case ["trunk", "layers", index, *_]:
            return int(index) >= n_blocks - chosen.blocks
        case ["trunk", "norm", *_]:
            return chosen.norm
        case ["trunk", "tok_embeddings", *_]:
            return chosen.embeddings
        case _:
            return True
