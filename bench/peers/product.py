"""The product: packed sequences, the frozen prefix without gradients; and the floor below it."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from job.common.schema import (
    CriticConfig,
    DistributedConfig,
    FsdpConfig,
    Loss,
    ModelConfig,
    ObjectiveConfig,
    TrainingConfig,
)
from job.data.packing import Indices, Packer, single_units
from job.data.token_cache import TokenizedSet
from job.distributed.world import World, joined_world
from job.memory.footprint import copy_share
from job.model.architecture_file import read_architecture
from job.run.value_metrics import ValueMetrics
from job.training.compilation import choose_compilation
from job.training.data import CriticData, training_prompts
from job.training.learner import Learner
from job.training.objective import Objective
from job.training.preparation import load_critic, set_up_torch
from peers.turns import Settings, Turns


class Contestant(abc.ABC):
    """A way to train on the data's units, in the product's own order.

    Attributes:
        group_by_problem: as `data.group_by_problem`.
    """

    loss = Loss.mse
    group_by_problem = False
    model: nn.Module | None = None
    groups: Iterable[dict[str, Any]] = ()

    def __init__(self, settings: Settings, world: World) -> None:
        self.config = critic_config(settings)
        self.config.objective.loss = self.loss
        self.config.data.group_by_problem = self.group_by_problem
        self.data = TokenizedSet(Path(settings.data))
        architecture = read_architecture(settings.folder)
        prompts, grouped = training_prompts(self.config, self.data)
        self.packer = Packer(
            self.data,
            self.units(),
            dim=architecture.dim,
            budget=self.config.training.token_budget,
            device=world.device,
            prompts=prompts,
            together=grouped,
            copy_share=copy_share(architecture),
        )

    def units(self) -> Indices:
        return single_units(len(self.data))

    def plan(self, step: int) -> list[Indices]:
        training = self.config.training
        return self.packer.plan(step, training.batch_size, training.seed)

    @abc.abstractmethod
    def step(self, step: int) -> float | None:
        """Take step `step` (from 0); the loss before its update, if there is one."""


class Packed(Contestant):
    """The product's own path from lengths to an update."""

    def __init__(self, settings: Settings, world: World) -> None:
        super().__init__(settings, world)
        set_up_torch(self.config)
        choose_compilation(self.config, world)
        data = CriticData(self.packer, self.packer, 0.5, "")
        critic = self.model = load_critic(self.config, data, world, lambda: None)
        objective = Objective(self.config.objective)
        self.learner = Learner(critic, objective, self.config.training, world)
        self.groups = self.learner.optimizer.param_groups

    def step(self, step: int) -> float:
        training = self.config.training
        batches = self.packer.step(step, training.batch_size, training.seed)
        return self.learner.step(step, batches, ValueMetrics()).loss


class Grouped(Packed):
    """The same with solutions of one problem in a row, which compute their prompt once."""

    group_by_problem = True


class PackedPairs(Packed):
    """The same with the pairwise loss; it compares mean outputs, and no last ones.

    A pair of one problem computes its prompt once.
    """

    loss = Loss.pairwise

    def units(self) -> Indices:
        return single_units(len(self.data)).reshape(-1, 2)


class Floor(Contestant):
    """Matrix products into buffers: all linear layers forward, the trainable ones backward."""

    def __init__(self, settings: Settings, world: World) -> None:
        super().__init__(settings, world)
        config = read_architecture(settings.folder)
        self.dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        self.device, head = world.device, config.head_width
        shapes = [
            (config.n_heads * head, config.dim),
            *[(config.kv_heads * head, config.dim)] * 2,
            (config.dim, config.n_heads * head),
            *[(config.ffn_width, config.dim)] * 2,
            (config.dim, config.ffn_width),
        ]
        trained = config.n_trunk_layers - settings.n
        # weights of their own in each block: caches would keep what is used again and again
        blocks = [[self._random(*shape) for shape in shapes] for _ in range(config.n_trunk_layers)]
        self.forward_only = [matrix for block in blocks[:trained] for matrix in block]
        self.trained = [matrix for block in blocks[trained:] for matrix in block]
        rows, sizes = self._most_tokens(), {size for shape in shapes for size in shape}
        self.inputs, self.outputs, self.input_gradients = (
            {size: self._random(rows, size) for size in sizes} for _ in range(3)
        )
        self.gradients = {matrix.shape: torch.empty_like(matrix) for matrix in self.trained}

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def _most_tokens(self) -> int:
        return int(self.data.lengths.max()) * self.config.training.batch_size

    def step(self, step: int) -> None:
        t = sum(self.packer.size(units)[0] for units in self.plan(step))
        for matrix in [*self.forward_only, *self.trained]:
            out, inner = matrix.shape
            torch.mm(self.inputs[inner][:t], matrix.T, out=self.outputs[out][:t])
        for matrix in self.trained:
            out, inner = matrix.shape
            upstream = self.outputs[out][:t]
            torch.mm(upstream.T, self.inputs[inner][:t], out=self.gradients[matrix.shape])
            torch.mm(upstream, matrix, out=self.input_gradients[inner][:t])


KINDS: dict[str, type[Contestant]] = {
    "packed": Packed,
    "grouped": Grouped,
    "pairs": PackedPairs,
    "floor": Floor,
}


def critic_config(settings: Settings) -> CriticConfig:
    """What a run of the product would be told."""
    return CriticConfig(
        model=ModelConfig(path=settings.folder, keep_head=True),
        training=TrainingConfig(
            num_unfrozen_layers=settings.n,
            batch_size=settings.sequences,
            learning_rate=settings.learning_rate,
            min_lr_ratio=1.0,
            warmup_steps=0,
            betas=list(settings.betas),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
        ),
        objective=ObjectiveConfig(prompt_value=False),  # its peers learn at response tokens
        distributed=DistributedConfig(FsdpConfig(mixed_precision=settings.device == "cuda")),
    )


def main() -> None:
    turns = Turns()
    settings = turns.settings
    with joined_world(DistributedConfig()) as world:
        contestant = KINDS[settings.options["kind"]](settings, world)
        turns.ready(contestant.model, contestant.groups)
        for step in range(1_000_000):
            plan = contestant.plan(step)
            rows = [int(row) for units in plan for row in units.flat]
            turns.batch(rows, sum(contestant.packer.size(units).tokens for units in plan))
            if not turns.wait():
                return
            turns.loss(contestant.step(step))
            turns.done()


if __name__ == "__main__":
    main()
