"""One rank of test_gradients.py: measures cases one after the other, as one process start is slow.

    python gradients_worker.py cases.json results.json

runs in a folder with `trunk-L/` for trunks of L blocks and `rows.jsonl`. Rank 0 writes a result
for each case.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from job.common.schema import (
    CriticConfig,
    DataConfig,
    DistributedConfig,
    FsdpConfig,
    Loss,
    ModelConfig,
    ObjectiveConfig,
    ShardingStrategy,
    StageConfig,
    TrainingConfig,
)
from job.data.packing import Batch, Packer, single_units
from job.data.shared_prompts import SharedPrompts
from job.data.token_cache import TokenizedSet, load_split
from job.data.tokenizer import load_tokenizer
from job.distributed.fsdp import shard
from job.distributed.world import World, joined_world
from job.model.architecture_file import read_architecture
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.shards import full_tensor
from job.model.weights import load_trunk
from job.run.value_metrics import ValueMetrics
from job.training.checkpoint import trained_tensors
from job.training.learner import Learner, StepResult
from job.training.objective import Objective

Result = dict[str, Any]
Tensors = dict[str, Tensor]
BIAS = 0.2  # far from the mean reward: the bias's gradient is no difference of near equals
MAX_NORM = 0.05  # clips every gradient
COLLECTIVES = {  # as FSDP calls them
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


@dataclass(frozen=True)
class Case:
    """What to measure (`kind` names a function of MEASURES), and of which critic."""

    kind: str
    n: int
    strategy: str = "FULL_SHARD"
    layers: int = 4
    sequences: int = 12  # of an optimizer step
    budget: int = 1024  # tokens of a micro-batch
    steps: int = 1
    mixed: bool = False
    recompute: bool = False
    bins: int = 0  # of the histogram loss
    share: bool = False  # prompts of one problem
    stages: str = ""  # blocks:steps, one after the other
    gather_frozen: bool = False  # undo what keeps frozen blocks from being gathered in backward

    def __str__(self) -> str:
        """The kind, and what differs from the defaults."""
        plain = asdict(Case(self.kind, -1))
        changed = {k: v for k, v in asdict(self).items() if v != plain[k]}
        return "-".join([self.kind, *(f"{k}={v}" for k, v in changed.items())])


# What this file uses of the code under change: the world, the critic, the learner and its step.


def _joined_world() -> AbstractContextManager[World]:
    return joined_world(DistributedConfig())


def _config(case: Case) -> CriticConfig:
    config = CriticConfig()
    config.model = ModelConfig(f"trunk-{case.layers}")
    config.training = TrainingConfig(
        num_unfrozen_layers=case.n,
        stages=[StageConfig(*map(int, one.split(":"))) for one in case.stages.split()],
        learning_rate=1e-3,
        warmup_steps=0,
        max_steps=max(case.steps, 1),
        max_grad_norm=MAX_NORM if case.kind == "steps" else 1e9,
    )
    if case.bins:
        config.objective = ObjectiveConfig(loss=Loss.hl_gauss, bins=case.bins)
    strategy = ShardingStrategy[case.strategy]
    config.distributed = DistributedConfig(FsdpConfig(strategy, mixed_precision=case.mixed))
    return config


def _packer(case: Case, world: World) -> Packer:
    data = _data()
    return Packer(
        data,
        single_units(len(data)),
        dim=read_architecture(f"trunk-{case.layers}").dim,
        budget=case.budget,
        device=world.device,
        rank=world.rank,
        world=world.size,
        prompt_value=True,
        prompts=SharedPrompts(data) if case.share else None,
    )


def _critic(case: Case, world: World) -> Critic:
    """A critic in shards, made as job.train makes one."""
    config = _config(case)
    with torch.device("meta"):
        critic = Critic(
            read_architecture(config.model.path), head_outputs=config.objective.head_outputs
        )
    unfreeze_last_blocks(critic, case.n)
    if case.recompute:
        critic.trunk.recompute_trainable_blocks()
    shard(critic, config.distributed.fsdp, world)
    load_trunk(critic.trunk, config.model.path)
    critic.initialise_head(BIAS, config.training.seed)
    if case.gather_frozen:
        for block in critic.trunk.layers[: critic.trunk.first_trainable_block()]:
            assert isinstance(block, FSDPModule)
            block.set_unshard_in_backward(True)
    return critic


def _learner(case: Case, critic: Critic, world: World) -> Learner:
    config = _config(case)
    return Learner(critic, Objective(config.objective), config.training, world)


def _step(learner: Learner, step: int, batches: Sequence[Batch]) -> StepResult:
    return learner.step(step, batches, ValueMetrics())


def _checkpointed(learner: Learner) -> Tensors:
    """Copies of what a checkpoint would hold, whole."""
    return {name: full_tensor(t).clone() for name, t in trained_tensors(learner).items()}


@functools.cache
def _data() -> TokenizedSet:
    config = DataConfig("rows.jsonl", "rows.jsonl", max_length=64, cache_dir="cache")
    return load_split(config, "train", load_tokenizer("trunk-4"))


def _batches(case: Case, world: World, step: int = 0) -> list[Batch]:
    return _packer(case, world).step(step, case.sequences, seed=0)


def _plain_critic(case: Case) -> Critic:
    """The critic without FSDP, in float32."""
    outputs = _config(case).objective.head_outputs
    critic = Critic(read_architecture(f"trunk-{case.layers}"), head_outputs=outputs)
    unfreeze_last_blocks(critic, case.n)
    load_trunk(critic.trunk, f"trunk-{case.layers}")
    critic.initialise_head(BIAS, _config(case).training.seed)
    return critic


# Gradients


def gradients(case: Case, world: World) -> Result:
    """The gradients of one Learner.step against those of a plain critic on all sequences."""
    critic = _critic(case, world)
    learner = _learner(case, critic, world)
    kept: Tensors = {}
    dtypes: set[str] = set()

    def keep(*_: Any) -> None:
        for name, parameter in critic.named_parameters():
            if parameter.grad is not None:
                kept[name] = full_tensor(parameter.grad).clone()
                dtypes.add(str(parameter.grad.dtype))

    learner.optimizer.register_step_pre_hook(keep)
    batches = _batches(case, world)
    norm = _step(learner, 0, batches).grad_norm
    reference = _reference(case.n, case.layers, case.sequences, case.bins)
    assert kept.keys() == reference.keys()
    return {
        "overall": _distance(list(kept.values()), list(reference.values())),
        "by_parameter": {n: _distance([kept[n]], [g]) for n, g in reference.items()},
        "norms": world.gather(norm),
        "reference_norm": _norm(list(reference.values())),
        "micro_batches": world.gather(len(batches)),
        "tokens": world.gather(sum(batch.layout.n_tokens for batch in batches)),
        "of_sequences": world.gather(sum(batch.layout.n_keys for batch in batches)),
        "sequences": world.gather(sum(len(batch.rewards) for batch in batches)),
        "gradient_dtypes": sorted(dtypes),
    }


@functools.cache
def _reference(n: int, layers: int, sequences: int, bins: int) -> Tensors:
    case = Case("gradients", n, layers=layers, sequences=sequences, budget=10**6, bins=bins)
    critic = _plain_critic(case)
    objective = Objective(_config(case).objective)
    (batch,) = _batches(case, World())
    output = critic(batch.tokens, batch.layout, batch.positions)
    objective.loss(output, batch, 0, objective.counts(batch)).backward()
    return {n: p.grad for n, p in critic.named_parameters() if p.grad is not None}


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in tensors)) ** 0.5


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of theirs, both computed in float64."""
    differences = [a.double() - b.double() for a, b in zip(ours, theirs, strict=True)]
    return _norm(differences) / _norm(theirs)


# Weights after many steps


def steps(case: Case, world: World) -> Result:
    """What every rank holds, computes and reports after some steps, and how one process fares."""
    critic, results = _trained(case, world)
    trained = critic.trained_tensors()
    named = {n: p for n, p in critic.named_parameters() if p.requires_grad}
    replicas = {n: [_slice_of(p), _digest(_local(p))] for n, p in named.items()}
    (same,) = _batches(case, World())[:1]
    with torch.no_grad():
        outputs = critic(same.tokens, same.layout, same.positions)
    gathered = world.gather(
        {
            "norms": [result.grad_norm.hex() for result in results],
            "losses": [result.loss.hex() for result in results],
            "whole": {n: _digest(t) for n, t in trained.items()},
            "replicas": replicas,
            "outputs": _digest(outputs),
        }
    )
    clipped = all(result.grad_norm > MAX_NORM for result in results)
    drift = _drift(case, trained) if world.is_main else None
    return {"ranks": gathered, "clipped": clipped, "drift": drift}


def _drift(case: Case, trained: Tensors) -> float:
    """Distance to the weights that one process trains, over the way these have gone."""
    single = _single(replace(case, strategy="FULL_SHARD"))
    start = _plain_critic(case).trained_tensors()
    apart = _norm([trained[n] - t for n, t in single.items()])
    return apart / _norm([t - start[n] for n, t in single.items()])


@functools.cache
def _single(case: Case) -> Tensors:
    return _trained(case, World())[0].trained_tensors()


def _slice_of(parameter: nn.Parameter) -> list[int]:
    """Which slice of a parameter this rank holds: equal on ranks that hold the same."""
    if not isinstance(parameter, DTensor):
        return []
    where = parameter.device_mesh.get_coordinate()
    assert where is not None
    return [w for w, p in zip(where, parameter.placements, strict=True) if p.is_shard()]


def _trained(case: Case, world: World) -> tuple[Critic, list[StepResult]]:
    critic = _critic(case, world)
    learner = _learner(case, critic, world)
    results = [_step(learner, s, _batches(case, world, s)) for s in range(case.steps)]
    return critic, results


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


# Tensors kept for the backward pass


def saved(case: Case, world: World) -> Result:
    """Bytes that the forward pass keeps, and the nodes of the graph that it builds."""
    critic = _critic(case, world)
    objective = Objective(_config(case).objective)
    (batch,) = _batches(case, world)
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # asked at each tensor: FSDP puts gathered weights in place and takes them out again
        weights = {_local(p).untyped_storage().data_ptr() for p in critic.parameters()}
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = critic(batch.tokens, batch.layout, batch.positions)
    loss = objective.loss(output, batch, 0, objective.counts(batch))
    nodes = _count_nodes(loss.grad_fn)
    loss.backward()
    return {"bytes": world.gather(sum(storages.values())), "nodes": world.gather(nodes)}


def _count_nodes(root: Node | None) -> int:
    assert root is not None
    seen, waiting = {root}, [root]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return len(seen)


# Collectives


class _Counter(TorchDispatchMode):
    """Counts collectives, those called while autograd runs apart from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # seen again as what the DTensor does
        if func.namespace in ("c10d", "_c10d_functional"):
            running = torch._C._current_graph_task_id() != -1
            name = func.overloadpacket.__name__
            (self.backward if running else self.forward)[COLLECTIVES.get(name, name)] += 1
        return func(*args, **(kwargs or {}))


def collectives(case: Case, world: World) -> Result:
    """Collectives during the last of some optimizer steps, in and outside its backward passes."""
    critic = _critic(case, world)
    learner = _learner(case, critic, world)
    for step in range(case.steps):
        batches = _batches(case, world, step)
        with _Counter() as counter:
            _step(learner, step, batches)
    ours = {"forward": counter.forward, "backward": counter.backward}
    return {"micro_batches": len(batches), "ranks": world.gather(ours)}


# What lies where


def shards(case: Case, world: World) -> Result:
    """Every parameter's dtype, sizes on each rank, and whether it holds what is in the file."""
    named = dict(_critic(case, world).named_parameters())
    plain = _plain_critic(case)
    expected = {n: p.detach().to(named[n].dtype) for n, p in plain.named_parameters()}
    sizes = world.gather({n: (_local(p).numel(), _stored(p)) for n, p in named.items()})
    return {
        name: {
            "frozen": not parameter.requires_grad,
            "dtype": str(parameter.dtype),
            "numel": parameter.numel(),
            "rows": len(parameter),
            "local": [rank[name][0] for rank in sizes],
            "stored": [rank[name][1] for rank in sizes],
            "loaded": full_tensor(parameter.detach()).equal(expected[name]),
        }
        for name, parameter in named.items()
    }


def _stored(parameter: nn.Parameter) -> int:
    """Elements of the memory behind a parameter on this rank, FSDP's padding included."""
    local = _local(parameter)
    return local.untyped_storage().nbytes() // local.element_size()


def evaluated(case: Case, world: World) -> Result:
    """What a checkpoint would hold otherwise after an evaluation, and after one cut short."""
    critic = _critic(case, world)
    learner = _learner(case, critic, world)
    _step(learner, 0, _batches(case, world))
    before = _checkpointed(learner)
    learner.evaluate(_packer(case, world), lambda *_: None)
    after = _checkpointed(learner)

    def interrupt(*_: Any) -> None:
        raise InterruptedError

    with suppress(InterruptedError):
        learner.evaluate(_packer(case, world), interrupt)
    cut_short = _checkpointed(learner)
    return {"after": _differences(before, after), "cut_short": _differences(before, cut_short)}


def _differences(ours: Tensors, theirs: Tensors) -> list[str]:
    assert ours.keys() == theirs.keys()
    same = {n: t.dtype == theirs[n].dtype and t.equal(theirs[n]) for n, t in ours.items()}
    return [name for name, equal in same.items() if not equal]


MEASURES = {f.__name__: f for f in (gradients, steps, saved, collectives, shards, evaluated)}


def main() -> None:
    cases = [Case(**case) for case in json.loads(Path(sys.argv[1]).read_text())]
    results = []
    with _joined_world() as world:
        for case in cases:
            try:
                results.append(MEASURES[case.kind](case, world))
            except Exception as error:
                error.add_note(f"in case {case}")
                raise
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
