"""What a critic's training keeps in the memory of one GPU, in closed form. Free of torch.

Notation: t tokens of a micro-batch, n of them response tokens, d model width, f width of the feed
forward layer, q and k widths of all query and all key/value heads, h query heads, c bytes of the
compute dtype, N trained blocks.

A step is followed through the moments at which memory can be highest. Each is the sum of its
components, and the highest is the peak:

    embedding    the embeddings, just gathered
    prefix       a frozen block's feed forward
    gather       a block's weights just gathered, the block's before it not yet given up
    suffix       the last block's end: everything that its backward pass needs is saved
    head         the value head, on the way back
    block j      the j-th trained block from the end on its way back, those before it still saved
    reduce j     its gradients complete, and about to be reduced
    embeddings   their gradient, in full training
    optimizer    the optimizer's step
    evaluate     an evaluation, in which every block is as a frozen one

What a block saves follows from `job.model.transformer`; which weights are gathered when, and how
long buffers live, from torch's FSDP2. `job.memory.simulation` runs that very code on tensors
without content, and the tests hold one against the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from job.config import FsdpConfig, ShardingStrategy
from job.model.architecture import TransformerConfig
from job.model.parameters import (
    GRADIENT_BYTES,
    MASTER_BYTES,
    OPTIMIZER_BYTES,
    block_parameters,
    count_parameters,
    select_trainable,
)

_FLOAT = 4
_TOKEN = 8  # of an index
_SPAN_TOKENS = 128  # of job.model.transformer, which shorter sequences share under one mask

STATE = ("frozen_weights", "masters", "gradients", "optimizer", "value_head")
COMPONENTS = (
    *STATE,
    "gathered_weights",
    "gradient_buffers",
    "activations",
    "working_set",
    "batch",
)


@dataclass(frozen=True)
class Setting:
    """What a rank's memory depends on.

    Attributes:
        micro_batch_tokens: t.
        response_tokens: n; None for all of them, the most there can be.
        world_size: GPUs of the job.
        per_node: GPUs of the job on one node.
        accumulates: whether a step may take several micro-batches, so that gradients are there
            already when a forward pass begins.
        prefix_cached: whether the frozen prefix's hidden states come from a cache, so that neither
            its weights nor the embeddings are on the GPU.
        cuda: whether attention and norms are CUDA's kernels.
        sequence_tokens: of a typical sequence; on a CPU, short ones need masks.
        evaluation_tokens: of a micro-batch of an evaluation; 0 for none.
        head_bias: whether the value head has a bias.
    """

    architecture: TransformerConfig
    num_unfrozen_layers: int
    fsdp: FsdpConfig
    micro_batch_tokens: int
    response_tokens: int | None = None
    world_size: int = 1
    per_node: int = 1
    accumulates: bool = True
    prefix_cached: bool = False
    cuda: bool = True
    sequence_tokens: int = 512
    evaluation_tokens: int = 0
    head_bias: bool = True

    @property
    def has_cache(self) -> bool:
        """Whether a cache stands for frozen blocks; full training has none."""
        blocks = self.architecture.n_trunk_layers
        return self.prefix_cached and self.num_unfrozen_layers <= blocks


@dataclass(frozen=True)
class Moment:
    """Bytes by component (see COMPONENTS) at one moment of a step."""

    name: str
    components: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.components.values())


@dataclass(frozen=True)
class Footprint:
    """All moments of a step, as the allocator sees them.

    Attributes:
        after_backward: the moment at which gradients are complete and nothing else is left.
        host: bytes that lie in host memory instead (`distributed.fsdp.cpu_offload`).
    """

    moments: tuple[Moment, ...]
    after_backward: Moment
    host: int

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)


def footprint(setting: Setting) -> Footprint:
    """The memory of the fullest rank of a training.

    Raises:
        InputError: N is negative or not an integer.
    """
    step = _Step(setting)
    on_gpu = not setting.fsdp.cpu_offload
    moments = [*step.forward(), *step.backward(), step.moment("optimizer", None)]
    if setting.evaluation_tokens:
        moments.append(step.evaluation())
    after = step.moment("after backward", None)
    return Footprint(
        moments=tuple(_kept(moment, on_gpu) for moment in moments),
        after_backward=_kept(after, on_gpu),
        host=0 if on_gpu else sum(after.components[name] for name in STATE),
    )


def _kept(moment: Moment, on_gpu: bool) -> Moment:
    """A moment without its state where that lies in host memory."""
    return moment if on_gpu else Moment(moment.name, moment.components | dict.fromkeys(STATE, 0))


class _Step:
    """One step of one rank."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        a = self.architecture = setting.architecture
        self.chosen = select_trainable(setting.num_unfrozen_layers, a.n_trunk_layers)
        self.n_blocks = self.chosen.blocks
        self.t = setting.micro_batch_tokens
        self.n = self.t if setting.response_tokens is None else setting.response_tokens
        fsdp = setting.fsdp
        self.c = 2 if fsdp.mixed_precision else _FLOAT
        self.sharded = setting.world_size > 1 or fsdp.mixed_precision or fsdp.cpu_offload
        self.shards = shards(fsdp.sharding_strategy, setting.world_size, setting.per_node)
        self.block = block_parameters(a)
        self.embedding = a.vocab_size * a.dim
        varlen = setting.cuda and fsdp.mixed_precision
        self.qk = a.n_heads * a.head_width, a.kv_heads * a.head_width
        self.kv_saved = self.qk[0] if varlen else self.qk[1]  # the kernel has keys repeated
        self.varlen = varlen
        self.reads_prefix = not self.chosen.embeddings and not setting.has_cache

    # What stays

    @cached_property
    def state(self) -> dict[str, int]:
        """What is kept from step to step, with the gradients of all blocks."""
        s = self.setting
        counts = count_parameters(self.architecture, s.num_unfrozen_layers, head_bias=s.head_bias)
        head = counts.value_head.total
        replicated = s.fsdp.sharding_strategy is ShardingStrategy.REPLICATE_FROZEN
        trainable = _share(counts.trainable - head, self.shards)
        norm = counts.norm.total - counts.norm.trainable
        frozen = norm if s.has_cache else counts.frozen
        # rows of the head: one, so that one rank has all of it
        return {
            "frozen_weights": _share(frozen, 1 if replicated else self.shards) * self.c,
            "masters": trainable * MASTER_BYTES,
            "gradients": trainable * GRADIENT_BYTES,
            "optimizer": trainable * OPTIMIZER_BYTES,
            "value_head": head * (MASTER_BYTES + GRADIENT_BYTES + OPTIMIZER_BYTES),
        }

    @property
    def _has_prefix(self) -> bool:
        return not self.chosen.embeddings

    @property
    def _gathers_frozen(self) -> bool:
        replicated = self.setting.fsdp.sharding_strategy is ShardingStrategy.REPLICATE_FROZEN
        return self.sharded and not replicated

    @property
    def _communicates(self) -> bool:
        """Whether gathered weights come through a buffer, or are cast in place."""
        return self.shards > 1

    def moment(self, name: str, blocks_done: int | None, **others: int) -> Moment:
        """State and what comes on top, with the gradients of the last `blocks_done` blocks.

        With None, or where an earlier micro-batch has left them, with all gradients.
        """
        state = dict(self.state)
        if blocks_done is not None and not self.setting.accumulates:
            state["gradients"] = _share(blocks_done * self.block, self.shards) * GRADIENT_BYTES
        batch = self.t * 2 * _TOKEN + self.n * _TOKEN
        if self.setting.has_cache:
            batch += self.t * self.architecture.dim * self.c
        others["batch"] = batch
        return Moment(name, dict.fromkeys(COMPONENTS, 0) | state | others)

    # Bytes of tensors

    @property
    def rotations(self) -> int:
        """A complex number for each token and pair of channels."""
        return self.t * self.architecture.head_width * _FLOAT

    def hidden(self, copies: float = 1) -> int:
        """[t, d] in the compute dtype."""
        return int(copies * self.t * self.architecture.dim * self.c)

    def inner(self, copies: float = 1) -> int:
        """[t, f] in the compute dtype."""
        return int(copies * self.t * self.architecture.ffn_width * self.c)

    def gathered(self, blocks: float) -> int:
        return int(blocks * self.block * self.c) if self.sharded else 0

    @cached_property
    def saved(self) -> int:
        """What the backward pass of a block needs.

        The input of both norms in float32 and their output; queries, keys, values and the result
        of attention with its log-sum-exp; four of the feed forward layer.
        """
        a, t, (q, _) = self.architecture, self.t, self.qk
        norms = 2 * t * (a.dim * (_FLOAT + self.c) + _FLOAT)
        attention = t * (self.c * (2 * q + 2 * self.kv_saved) + _FLOAT * a.n_heads)
        if not self.setting.cuda:
            norms += 2 * t * a.dim * _FLOAT  # scaled, before their weights
        if not self.varlen:
            masked = _SPAN_TOKENS * (2 * self.setting.sequence_tokens <= _SPAN_TOKENS)
            attention += t * (self.c * q + _FLOAT * masked)  # the spans' results put together
        return norms + attention + self.inner(4)

    @property
    def recomputes(self) -> bool:
        return self.setting.fsdp.activation_checkpointing

    def kept(self, blocks: int) -> int:
        """Activations of so many trained blocks between their forward and backward passes."""
        if not blocks:
            return 0
        saved = blocks * (self.hidden() if self.recomputes else self.saved) + self.rotations
        if self.setting.cuda or self.recomputes or not self._has_prefix:
            return saved
        return saved - self.t * self.architecture.dim * _FLOAT  # nothing asks for its gradient

    # Moments

    def forward(self) -> Iterator[Moment]:
        done = 0
        trained = self.n_blocks
        frozen = self.architecture.n_trunk_layers - trained
        if self.reads_prefix:
            yield from self._prefix(frozen)
        if not trained:
            return
        keeps = self._kept_gathered(trained)
        yield self.moment(
            "gather",
            done,
            activations=self.kept(trained - 1) + self.hidden(),
            gathered_weights=keeps + self.gathered(2 if self._communicates else 0),
        )
        end = self.hidden(4 if self.reads_prefix else 3)
        if self.recomputes:
            end += self.inner(3)
        yield self.moment(
            "suffix",
            done,
            activations=self.kept(trained) + self.hidden() * self.reads_prefix,
            working_set=end,
            gathered_weights=keeps + self.gathered(1 if self._communicates else 0),
        )

    def _kept_gathered(self, trained: int) -> int:
        """Weights of trained blocks that stay gathered up to the end of the forward pass."""
        strategy = self.setting.fsdp.sharding_strategy
        stay = strategy in (ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD)
        return self.gathered(trained if stay else 1)

    def _prefix(self, blocks: int) -> Iterator[Moment]:
        """The frozen blocks: nothing is saved, and one block at a time is gathered."""
        copies = 2 if self._communicates else 1
        embedding = self.embedding * self.c
        if not self._gathers_frozen:
            copies = embedding = 0
        yield self.moment(
            "embedding", 0, working_set=self.hidden(), gathered_weights=copies * embedding
        )
        if not blocks:
            return
        yield self.moment(
            "gather",
            0,
            working_set=self.hidden(),
            gathered_weights=self.gathered(copies and 2 * copies - 1),
        )
        yield self.moment(
            "prefix",
            0,
            working_set=self.hidden(3) + self.inner(3) + self.rotations,
            gathered_weights=self.gathered(copies),
        )

    def backward(self) -> Iterator[Moment]:
        yield self._head()
        for done in range(self.n_blocks):
            yield self._block(done)
            yield from self._reduce(done)
        if self.chosen.embeddings:
            yield self._embeddings()

    def _head(self) -> Moment:
        """Norm and head work in float32 on response tokens."""
        row = self.n * self.architecture.dim
        trained = self.n_blocks
        saved = 2 * row * _FLOAT if trained else row * _FLOAT
        return self.moment(
            "head",
            0,
            activations=self.kept(trained) + saved,
            working_set=row * _FLOAT if trained else self.hidden() + row * self.c,
            gathered_weights=self._kept_gathered(trained) if trained else self._last_gathered(),
        )

    def _last_gathered(self) -> int:
        """What the frozen blocks leave: the buffer of the last one."""
        return self.gathered(1) if self._communicates and self.reads_prefix else 0

    def _block(self, done: int) -> Moment:
        """On the way back through silu(a) * b, of which product and weights are done with."""
        left = self.n_blocks - done
        saved = self.kept(left) + (self.saved if self.recomputes else 0)
        gradient = self.architecture.dim * self.architecture.ffn_width * self.c
        if not self.sharded and self.setting.accumulates:
            gradient = 0  # added up at once
        return self.moment(
            f"block {done}",
            done,
            activations=saved - self.inner(),
            working_set=self.hidden() + self.inner(3) + gradient,
            gathered_weights=self._gathered_backward(left),
            gradient_buffers=self._reduced_before(done),
        )

    def _gathered_backward(self, left: int) -> int:
        """The block's own weights, and the next one's on their way."""
        strategy = self.setting.fsdp.sharding_strategy
        if strategy in (ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
            return self.gathered(left)
        return self.gathered(2 if left > 1 and self._communicates else 1)

    def _reducing(self) -> int:
        """A block's gradients in float32, on their way to the ranks that keep them."""
        return self.block * GRADIENT_BYTES if self.sharded else 0

    def _reduced_before(self, done: int) -> int:
        """What the block before has left on its way."""
        return (self._reducing() if done else 0) + self._between_replicas(done)

    def _between_replicas(self, done: int) -> int:
        """Gradients that replicas add up, which each block keeps until the end of the pass."""
        strategy = self.setting.fsdp.sharding_strategy
        replicas = strategy in (ShardingStrategy.HYBRID_SHARD, ShardingStrategy.NO_SHARD)
        return replicas * done * _share(self._reducing(), self.shards)

    def _reduce(self, done: int) -> Iterator[Moment]:
        left = self.n_blocks - done
        own = self.gathered(1)
        after = self._gathered_backward(left) - own
        saved, working = self.kept(left - 1), self.hidden()
        yield self.moment(
            f"reduce {done}",
            done,
            activations=saved,
            working_set=working + own,
            gathered_weights=own + after,
            gradient_buffers=self._reduced_before(done),
        )
        shard = _share(self._reducing(), self.shards)
        yield self.moment(
            f"reduce {done}",
            done,
            activations=saved,
            working_set=working,
            gathered_weights=after,
            gradient_buffers=self._between_replicas(done) + self._reducing() + max(own, shard),
        )

    def evaluation(self) -> Moment:
        """No gradients, nothing saved; the head's float32 rows may outweigh the feed forward."""
        t = self.setting.evaluation_tokens
        a = self.architecture
        block = self.c * (3 * a.dim + 3 * a.ffn_width) + a.head_width * _FLOAT
        head = self.c * 2 * a.dim + 2 * a.dim * _FLOAT
        copies = 2 if self._communicates else 1
        moment = self.moment(
            "evaluate",
            None,
            working_set=t * max(block, head),
            gathered_weights=self.gathered(copies),
        )
        return Moment(moment.name, moment.components | {"gradients": 0})

    def _embeddings(self) -> Moment:
        c = self.c if self.sharded else 0
        return self.moment(
            "embeddings",
            self.n_blocks,
            gathered_weights=self.embedding * c * (2 if self._communicates else 1),
            working_set=self.hidden() + self.embedding * self.c,
            gradient_buffers=self._reduced_before(self.n_blocks),
        )


def shards(strategy: ShardingStrategy, world_size: int, per_node: int) -> int:
    """Ranks that a parameter is split over: the shard dimension of `sharding.build_mesh`."""
    if strategy is ShardingStrategy.NO_SHARD:
        return 1
    return per_node if strategy is ShardingStrategy.HYBRID_SHARD else world_size


def _share(count: int, shards: int) -> int:
    return -(-count // shards)


def gigabytes(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:.2f}" if abs(count) >= 1e9 or not count else f"{count / 1e9:.4f}"
