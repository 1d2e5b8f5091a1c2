"""A step of a critic on many GPUs, on paper: bytes that travel, seconds that this takes.

Nothing here is measured. One micro-batch of t tokens a GPU and step. Only blocks count, and the
embeddings' gathering; attention's products, norms, head and the reading of data do not. P are a
block's parameters, w GPUs share one copy of it, r = GPUs / w copies there are, c bytes has a weight
in the compute dtype.

Bytes that one GPU receives or sends in a ring (NCCL's own accounting):

    gathering a block               (w - 1) / w  c P
    reducing its gradient to w      (w - 1) / w  4 P
    adding gradients of r copies    2 (r - 1) / r  4 P / w

`job.distributed.fsdp` says what is gathered when: a frozen block on the way forward alone; a
trained one forward, and again backward, but for the last block and SHARD_GRAD_OP. With the prefix
from a cache frozen blocks are neither there nor gathered. The seconds of a ring are its bytes over
the slowest link's rate, and the time of its steps.

Overlap: while a block computes, the next one's weights are gathered and the last one's gradient is
reduced, one after the other over the same links. A block takes its own time or its links', the
longer of both; what has nothing to hide behind, the first gathering and the last reduction, is
added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from job.common.schema import FsdpConfig, ShardingStrategy
from job.memory.fit import fit
from job.memory.footprint import Setting
from job.model.architecture import TransformerConfig
from job.model.parameters import block_parameters

STRATEGIES = (
    ShardingStrategy.NO_SHARD,
    ShardingStrategy.REPLICATE_FROZEN,
    ShardingStrategy.HYBRID_SHARD,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.FULL_SHARD,
)
_GRADIENT = 4  # bytes, reduced in float32
_ADAMW = 28  # bytes read and written a trained parameter: gradient, master and two moments
_GATHERS_ONCE = (ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD)


@dataclass(frozen=True)
class Cluster:
    """GPUs and what lies between them.

    Attributes:
        forward, backward: operations a second in matrix products of a block.
        memory: bytes of a GPU.
        memory_rate: bytes a second of its memory.
        inside: bytes a second between GPUs of a node, in one direction.
        between: the same between nodes, of a whole node.
        hop_inside, hop_between: seconds of a step of a ring.
    """

    forward: float
    backward: float
    memory: float
    memory_rate: float
    inside: float
    between: float
    per_node: int = 8
    hop_inside: float = 3e-6
    hop_between: float = 12e-6


@dataclass(frozen=True)
class Job:
    """A training, and how it lies on its GPUs; `tokens` of a GPU's micro-batch."""

    architecture: TransformerConfig
    n: int
    tokens: int
    gpus: int
    strategy: ShardingStrategy
    per_node: int = 8
    cached: bool = False
    weight_bytes: int = 2

    @property
    def on_node(self) -> int:
        return min(self.gpus, self.per_node)

    @property
    def sharing(self) -> int:
        """w: GPUs that share one copy of what is trained."""
        if self.strategy is ShardingStrategy.NO_SHARD:
            return 1
        return self.on_node if self.strategy is ShardingStrategy.HYBRID_SHARD else self.gpus

    @property
    def sharing_frozen(self) -> int:
        """The same of what is frozen."""
        whole = self.strategy is ShardingStrategy.REPLICATE_FROZEN
        return 1 if whole else self.sharing

    @property
    def frozen_blocks(self) -> int:
        """Frozen blocks that are there."""
        return 0 if self.cached else self.architecture.n_trunk_layers - self.n

    @property
    def gathered_again(self) -> int:
        """Trained blocks whose weights are gathered on the way back."""
        return 0 if self.strategy in _GATHERS_ONCE else max(0, self.n - 1)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one GPU in one step."""

    gathered_forward: float
    gathered_backward: float
    reduced: float
    added: float

    @property
    def total(self) -> float:
        return self.gathered_forward + self.gathered_backward + self.reduced + self.added


def traffic(job: Job) -> Traffic:
    block, w = block_parameters(job.architecture), job.sharing
    frozen = _gathered(block, job.sharing_frozen, job.weight_bytes)
    trained = _gathered(block, w, job.weight_bytes)
    return Traffic(
        gathered_forward=_embeddings(job) + job.frozen_blocks * frozen + job.n * trained,
        gathered_backward=job.gathered_again * trained,
        reduced=job.n * _gathered(block, w, _GRADIENT),
        added=job.n * _added(block, w, job.gpus // w),
    )


def _gathered(parameters: int, w: int, nbytes: int) -> float:
    return (w - 1) / w * nbytes * parameters


def _added(parameters: int, w: int, copies: int) -> float:
    return 2 * (copies - 1) / copies * _GRADIENT * parameters / w


def _embeddings(job: Job) -> float:
    """Bytes of the embeddings' gathering; a cache has what comes after them."""
    if job.cached:
        return 0.0
    a = job.architecture
    return _gathered(a.vocab_size * a.dim, job.sharing_frozen, job.weight_bytes)


def ring_seconds(nbytes: float, w: int, on_node: int, cluster: Cluster) -> float:
    """Of a ring over w neighbouring GPUs: each link carries `nbytes`, the slowest one decides."""
    if w == 1:
        return 0.0
    nodes = -(-w // on_node)
    between = nodes if nodes > 1 else 0
    rate = min(cluster.inside, cluster.between) if between else cluster.inside
    hops = (w - 1 - between) * cluster.hop_inside + between * cluster.hop_between
    return nbytes / rate + max(hops, 0.0)


def _adding_seconds(job: Job, block: int, cluster: Cluster) -> float:
    """Of the gradients of several copies of a block."""
    w, copies = job.sharing, job.gpus // job.sharing
    nbytes = _added(block, w, copies)
    if w == 1:  # reduced around the ring, and then gathered
        return 2 * ring_seconds(nbytes / 2, copies, job.on_node, cluster)
    if copies == 1:
        return 0.0
    # the GPUs of a node each add their own shard over the node's one link
    return nbytes * w / cluster.between + 2 * (copies - 1) * cluster.hop_between


@dataclass(frozen=True)
class Seconds:
    """Of one step.

    Attributes:
        compute: without any waiting.
        forward, backward: with it.
        optimizer: AdamW, bound by memory.
    """

    compute: float
    forward: float
    backward: float
    optimizer: float

    @property
    def step(self) -> float:
        return self.forward + self.backward + self.optimizer


def step_seconds(job: Job, cluster: Cluster, *, overlap: bool = True) -> Seconds:
    """What a step takes; without `overlap` links work while nothing is computed."""
    a, block, w = job.architecture, block_parameters(job.architecture), job.sharing
    forward = 2 * block * job.tokens / cluster.forward
    backward = 4 * block * job.tokens / cluster.backward

    def gathering(parameters: int, sharing: int) -> float:
        nbytes = _gathered(parameters, sharing, job.weight_bytes)
        return ring_seconds(nbytes, sharing, job.on_node, cluster)

    def reducing() -> float:
        nbytes = _gathered(block, w, _GRADIENT)
        alone = ring_seconds(nbytes, w, job.on_node, cluster)
        return alone + _adding_seconds(job, block, cluster)

    embeddings = [] if job.cached else [gathering(a.vocab_size * a.dim, job.sharing_frozen)]
    frozen, trained = gathering(block, job.sharing_frozen), gathering(block, w)
    gathers = [*embeddings, *[frozen] * job.frozen_blocks, *[trained] * job.n]
    computed = [0.0] * len(embeddings) + [forward] * (job.frozen_blocks + job.n)
    again = [0.0] * (job.n - job.gathered_again) + [trained] * job.gathered_again
    reductions = [reducing()] * job.n
    back = [backward] * job.n
    if overlap:
        ways = forward_chain(computed, gathers), backward_chain(back, again, reductions)
    else:
        ways = sum(computed) + sum(gathers), sum(back) + sum(again) + sum(reductions)
    optimizer = _ADAMW * job.n * block / w / cluster.memory_rate
    return Seconds(sum(computed) + sum(back) + optimizer, *ways, optimizer)


def forward_chain(computed: Sequence[float], gathers: Sequence[float]) -> float:
    """Each block computes while the next one's weights come; the first one's are waited for."""
    if not computed:
        return 0.0
    following = [*gathers[1:], 0.0]
    return gathers[0] + sum(max(c, g) for c, g in zip(computed, following, strict=True))


def backward_chain(
    computed: Sequence[float], gathers: Sequence[float], reductions: Sequence[float]
) -> float:
    """The same on the way back, from the last block on, with reductions of the block before."""
    if not computed:
        return 0.0
    following = [*gathers[1:], 0.0]
    before = [0.0, *reductions[:-1]]
    terms = zip(computed, following, before, strict=True)
    return gathers[0] + sum(max(c, g + r) for c, g, r in terms) + reductions[-1]


def fits(job: Job, capacity: float) -> bool:
    """Whether the closed form of memory has room for it on a GPU."""
    setting = Setting(
        architecture=job.architecture,
        num_unfrozen_layers=job.n,
        fsdp=FsdpConfig(sharding_strategy=job.strategy),
        micro_batch_tokens=job.tokens,
        world_size=job.gpus,
        per_node=job.on_node,
        accumulates=False,
        prefix_cached=job.cached,
        compiled=True,
    )
    return fit(setting, int(capacity)).fits


def rates(
    architecture: TransformerConfig, tokens: int, seconds: dict[int, float]
) -> tuple[float, float]:
    """Operations a second forward and backward, from the seconds of a micro-batch by N.

    With N = 0 all blocks are on their way forward; each trained one adds its way back.

    Raises:
        ValueError: N = 0 and another N are needed.
    """
    if 0 not in seconds or len(seconds) < 2:
        raise ValueError(f"block times need N = 0 and another N, not {sorted(seconds)}")
    block, most = block_parameters(architecture), max(seconds)
    forward = seconds[0] / architecture.n_trunk_layers
    backward = (seconds[most] - seconds[0]) / most
    return 2 * block * tokens / forward, 4 * block * tokens / backward


def described(job: Job, cluster: Cluster) -> dict[str, Any]:
    """Everything about a job on paper."""
    seconds, moved = step_seconds(job, cluster), traffic(job)
    return {
        "strategy": job.strategy.name,
        "gpus": job.gpus,
        "fits": fits(job, cluster.memory),
        "seconds": seconds.step,
        "efficiency": seconds.compute / seconds.step,
        "tokens_per_second": job.gpus * job.tokens / seconds.step,
        "gigabytes": moved.total / 1e9,
        "gathered_gigabytes": (moved.gathered_forward + moved.gathered_backward) / 1e9,
    }
