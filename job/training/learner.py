"""One optimizer step and one evaluation of a critic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from job.common.errors import InputError
from job.common.progress import Advance
from job.common.schema import TrainingConfig
from job.data.packing import Batch, Packer
from job.data.state_shards import EVALUATION
from job.distributed.world import World
from job.model.critic import Critic
from job.model.shards import full_tensor, local_shard
from job.run.value_metrics import ValueMetrics
from job.training.objective import Counts, Objective
from job.training.optimizer import build_optimizer, set_learning_rate
from job.training.prefix_cache import PrefixCache
from job.training.stages import Stages

ADVICE = "Lower training.learning_rate"
Phase = Callable[[str], AbstractContextManager[object]]  # marks what memory is used for
AllReduce = Callable[[Sequence[float]], list[float]]  # the sums of all ranks' values


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: loss before it, global gradient norm, learning rate."""

    loss: float
    grad_norm: float
    learning_rate: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Learner:
    """A critic with its objective and optimizer; `phase` is told what is being done.

    Frozen blocks' states come from `cache`, as far as it has them.
    """

    def __init__(
        self,
        critic: Critic,
        objective: Objective,
        config: TrainingConfig,
        world: World,
        phase: Phase = nullcontext,
        cache: PrefixCache | None = None,
    ) -> None:
        self.critic, self.objective, self.config, self.world = critic, objective, config, world
        self.cache = cache
        self._phase = phase
        self.optimizer = build_optimizer(critic, config)
        self.trainable = [p for p in critic.parameters() if p.requires_grad]
        self.stages = Stages(critic, config)
        self._ids = {id(p) for p in self.trainable}
        self._checked: set[int] = set()  # how many parameters learned when gradients were looked at

    def step(
        self,
        step: int,
        batches: Sequence[Batch],
        metrics: ValueMetrics,
        all_reduce: AllReduce | None = None,
    ) -> StepResult:
        """Optimizer step `step` (from 0) on this rank's micro-batches.

        The loss is a weighted sum over all that carries a target, on all ranks, divided by its
        global weight: `all_reduce` sums the weights, and may raise before anything has changed.
        Predictions go into `metrics`. If the loss or the gradient norm is not finite on some rank,
        nothing is changed anywhere.
        """
        # all ranks' counts, before anything is computed: gradients of two ranks could not be put
        # together later if each had divided by its own
        own = Counts.of([self.objective.counts(batch) for batch in batches])
        lacking = [] if self.cache is None else [self.cache.lacks(b.stored, step) for b in batches]
        sums = (all_reduce or self.world.sum)([own.weight, own.pairs, *lacking])
        whole, computed = Counts(*sums[:2]), sums[2:] or [True] * len(batches)
        rate = set_learning_rate(self.optimizer, self.config, step)
        learning = self.stages.enter(step)
        losses, values = [], []
        for batch, compute in zip(batches, computed, strict=True):
            with self._phase("forward"):
                output = self.outputs(batch, step, compute=compute > 0)  # [n]
                loss = self.objective.loss(output, batch, step, whole)
            with self._phase("backward"):
                (loss * self.world.size).backward()  # FSDP averages gradients over ranks
            # without their graph, which would keep the activations of every micro-batch
            losses.append(loss.detach())
            values.append(self.objective.values(output.detach()))
        self._keep_gradients(learning)
        with self._phase("optimizer"):
            # over the shards of all ranks, and so the same on each of them
            norm = torch.nn.utils.clip_grad_norm_(learning, self.config.max_grad_norm)
            # exact sums: the loss does not hang on how a step is cut into micro-batches
            (loss_of_all,) = self.world.sum([math.fsum(loss.item() for loss in losses)])
            result = StepResult(loss_of_all, full_tensor(norm).item(), rate)
            if result.is_finite:
                self.optimizer.step()
            self.optimizer.zero_grad()
        if result.is_finite:  # what was predicted before the step learned from it
            for batch, one in zip(batches, values, strict=True):
                self._record(metrics, one, batch)
        return result

    @torch.no_grad()
    def evaluate(self, packer: Packer, advance: Advance) -> ValueMetrics:
        """Metrics over every unit of a packer's data, from all ranks.

        Raises:
            InputError: a prediction is not finite.
        """
        metrics = ValueMetrics()
        plan = packer.everything
        computed = [True] * len(plan) if self.cache is None else self.cache.evaluate(packer)
        try:
            for done, (units, compute) in enumerate(zip(plan, computed, strict=True), 1):
                batch = packer.assemble(units)
                outputs = self.outputs(batch, EVALUATION, compute=compute)
                if not outputs.isfinite().all():
                    raise InputError(f"evaluation: predictions are not finite. {ADVICE}")
                self._record(metrics, self.objective.values(outputs), batch)
                advance(done, f"of {len(plan)} evaluation batches")
        finally:
            self._reshard()
        return self.merged(metrics)

    def weights_are_finite(self) -> bool:
        """Whether every trainable weight is finite, on every rank."""
        damaged = any(not local_shard(p).isfinite().all() for p in self.trainable)
        return not self.world.sum([damaged])[0]

    def _reshard(self) -> None:
        """Give up gathered weights, which without a backward pass nothing else would do."""
        if isinstance(self.critic, FSDPModule):
            for module in self.critic.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def merged(self, metrics: ValueMetrics) -> ValueMetrics:
        """The metrics of all ranks together."""
        merged = ValueMetrics()
        for part in self.world.gather(metrics):
            merged.merge(part)
        return merged

    def outputs(self, batch: Batch, step: int = EVALUATION, *, compute: bool = True) -> Tensor:
        """Head outputs at the batch's valued positions, float32 [n].

        Args:
            step: the optimizer step (from 0), or EVALUATION.
            compute: whether all ranks run the frozen blocks, since one of them has to.
        """
        reads = batch.layout.reads(batch.positions)
        if self.cache is None:
            return self.critic(batch.tokens, batch.layout, reads)
        prefix = self.cache.take(batch, reads, step, compute=compute)
        outputs = self.critic(batch.tokens, batch.layout, reads, prefix)
        self.cache.keep(batch, reads, prefix, step)
        return outputs

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's moments of a trainable parameter, sharded as it is; zeros before the first step.

        torch's own optimizer state dictionaries would add the settings of each group, which the
        configuration holds already.
        """
        assert id(parameter) in self._ids, "a gathered parameter is none of the optimizer's"
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    def set_updates(self, step: int, skipped: int, skipped_at: Sequence[int]) -> None:
        """Tell the optimizer how many updates it has made, for its bias correction.

        Args:
            step, skipped, skipped_at: as in `Stages.updates`.
        """
        for parameter, state in self.optimizer.state.items():
            state["step"].fill_(self.stages.updates(parameter, step, skipped, skipped_at))

    def _record(self, metrics: ValueMetrics, values: Tensor, batch: Batch) -> None:
        self.objective.record(metrics, values.cpu().numpy(), batch)

    def _keep_gradients(self, learning: Sequence[nn.Parameter]) -> None:
        """Drop the gradients of what rests; what learns, and nothing else, has one then."""
        ids = {id(p) for p in learning}
        for parameter in self.trainable:
            if id(parameter) not in ids:
                parameter.grad = None
        if len(ids) not in self._checked:
            self._checked.add(len(ids))
            for name, parameter in self.critic.named_parameters():
                has = parameter.grad is not None
                assert has == (id(parameter) in ids), f"{name}: gradient {has}"
