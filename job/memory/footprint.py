"""What a critic's training keeps in the memory of one GPU, in closed form. Free of torch.

Notation: t tokens of a micro-batch, values read at n of them, d model width, f width of the feed
forward layer, q and k widths of all query and all key/value heads, h query heads, c bytes of the
compute dtype, N trained blocks.

A step is followed through the moments at which memory can be highest. Each is the sum of its
components, and the highest is the peak:

    embedding     the embeddings, just gathered
    gather        a block's weights just gathered, the block's before it not yet given up
    prefix        a frozen block's attention or feed forward
    suffix        the last block's end: everything that its backward pass needs is saved
    value head    norm and head, the last block's gathering buffer not yet given up
    head          the same, on the way back
    block j       the j-th trained block from the end (from 0) on its way back through the feed
                  forward layer, those before it still saved
    attention j   its attention's end: of the block only the input's norm is left to go through
    reduce j      its gradients on their way to the ranks that keep them
    embeddings    their gradient, in full training
    optimizer     the optimizer's step
    evaluate      an evaluation, in which every block is as a frozen one

What a block saves follows from `job.model.transformer`; which weights are gathered when, and how
long buffers live, from torch's FSDP2. `job.training.simulation` runs that very code on tensors
without content, and the tests hold one against the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from job.common.schema import FsdpConfig, ShardingStrategy
from job.model.architecture import TransformerConfig, flash_attention_takes
from job.model.parameters import (
    GRADIENT_BYTES,
    MASTER_BYTES,
    OPTIMIZER_BYTES,
    block_parameters,
    count_parameters,
    select_trainable,
)

_FLOAT = 4
_HISTOGRAMS = 4  # of a position in the loss, at most at once
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
    "workspaces",  # of cuBLAS: no moment has them, `job.memory.fit` counts them
)


@dataclass(frozen=True)
class Setting:
    """What a rank's memory depends on.

    Attributes:
        micro_batch_tokens: t.
        response_tokens: n, tokens of responses and those before them that are valued; None for all
            t, the most there can be.
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
        head_outputs: k, outputs of the value head.
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
    head_outputs: int = 1

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
    if t := setting.evaluation_tokens:
        evaluated = replace(setting, micro_batch_tokens=t, response_tokens=None)
        moments.append(_Step(evaluated).evaluation())
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
        fsdp, a = setting.fsdp, setting.architecture
        self.chosen = select_trainable(setting.num_unfrozen_layers, a.n_trunk_layers)
        self.n_blocks = self.chosen.blocks
        self.n_frozen = a.n_trunk_layers - self.n_blocks
        self.t = setting.micro_batch_tokens
        self.n = self.t if setting.response_tokens is None else setting.response_tokens
        self.c = 2 if fsdp.mixed_precision else _FLOAT
        self.strategy = fsdp.sharding_strategy
        self.sharded = setting.world_size > 1 or fsdp.mixed_precision or fsdp.cpu_offload
        self.shards = shards(self.strategy, setting.world_size, setting.per_node)
        flash = flash_attention_takes(a.head_width)
        self.varlen = setting.cuda and fsdp.mixed_precision and flash
        self.block = block_parameters(a)
        self.embedding = a.vocab_size * a.dim
        self.d, self.h = a.dim, a.n_heads
        self.q, self.k = a.n_heads * a.head_width, a.kv_heads * a.head_width

    # What the setting says

    @property
    def has_prefix(self) -> bool:
        """Whether hidden states come from blocks or embeddings that are frozen."""
        return not self.chosen.embeddings

    @property
    def reads_prefix(self) -> bool:
        return self.has_prefix and not self.setting.has_cache

    @property
    def recomputes(self) -> bool:
        return self.setting.fsdp.activation_checkpointing

    @property
    def communicates(self) -> bool:
        """Whether gathered weights come through a buffer, or are cast in place."""
        return self.shards > 1

    @property
    def gathers_frozen(self) -> bool:
        return self.sharded and self.strategy is not ShardingStrategy.REPLICATE_FROZEN

    @property
    def stays_gathered(self) -> bool:
        """Whether what is trained stays gathered from its forward to its backward pass."""
        return self.strategy in (ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD)

    # What stays

    @cached_property
    def state(self) -> dict[str, int]:
        """What is kept from step to step, with the gradients of all blocks."""
        counts = count_parameters(
            self.setting.architecture,
            self.setting.num_unfrozen_layers,
            head_bias=self.setting.head_bias,
            head_outputs=self.setting.head_outputs,
        )
        head = counts.value_head.total
        replicated = self.strategy is ShardingStrategy.REPLICATE_FROZEN
        trainable = _share(counts.trainable - head, self.shards)
        norm = counts.norm.total - counts.norm.trainable
        frozen = norm if self.setting.has_cache else counts.frozen
        # of the head each rank has whole rows: of a single one, one rank has all
        k = self.setting.head_outputs
        rows = _share(k, self.shards) * (head // k)
        return {
            "frozen_weights": _share(frozen, 1 if replicated else self.shards) * self.c,
            "masters": trainable * MASTER_BYTES,
            "gradients": trainable * GRADIENT_BYTES,
            "optimizer": trainable * OPTIMIZER_BYTES,
            "value_head": rows * (MASTER_BYTES + GRADIENT_BYTES + OPTIMIZER_BYTES),
        }

    def moment(self, name: str, blocks_done: int | None, **others: int) -> Moment:
        """State and what comes on top, with the gradients of the last `blocks_done` blocks.

        With None, or where an earlier micro-batch has left them, with all gradients.
        """
        state = dict(self.state)
        if blocks_done is not None and not self.setting.accumulates:
            state["gradients"] = _share(blocks_done * self.block, self.shards) * GRADIENT_BYTES
        batch = self.t * 2 * _TOKEN + self.n * _TOKEN
        if self.setting.has_cache:
            batch += self.hidden()
        others["batch"] = batch
        return Moment(name, dict.fromkeys(COMPONENTS, 0) | state | others)

    # Bytes of tensors

    @property
    def rotations(self) -> int:
        """A complex number for each token and pair of channels."""
        return self.t * self.setting.architecture.head_width * _FLOAT

    def hidden(self, copies: int = 1) -> int:
        """[t, d] in the compute dtype."""
        return copies * self.t * self.d * self.c

    def inner(self, copies: int = 1) -> int:
        """[t, f] in the compute dtype."""
        return copies * self.t * self.setting.architecture.ffn_width * self.c

    def rows(self, copies: int) -> int:
        """[n, d] in float32, in which norm and head work."""
        return copies * self.n * self.d * _FLOAT

    @property
    def histograms(self) -> int:
        """[n, k] in float32: outputs, what is predicted and what is to be."""
        return _HISTOGRAMS * self.outputs

    @property
    def outputs(self) -> int:
        """[n, k] in float32, which is next to nothing where k is 1."""
        k = self.setting.head_outputs
        return self.n * k * _FLOAT if k > 1 else 0

    def gathered(self, blocks: int) -> int:
        return blocks * self.block * self.c if self.sharded else 0

    @property
    def gathered_embedding(self) -> int:
        return self.embedding * self.c if self.sharded else 0

    @property
    def float_input(self) -> int:
        """[t, d] in float32, a norm's input."""
        return self.t * self.d * _FLOAT

    @property
    def saved_norm(self) -> int:
        """A norm's input and the root of its mean square in float32, and its output."""
        scaled = 0 if self.setting.cuda else self.float_input  # before its weights
        return self.float_input + self.t * _FLOAT + scaled + self.hidden()

    @property
    def saved_attention(self) -> int:
        """Queries, keys, values, the result of attention and its log-sum-exp."""
        keys = self.q if self.setting.cuda else self.k  # CUDA's kernels have them repeated
        saved = self.c * (2 * self.q + 2 * keys) + _FLOAT * self.h
        if not self.varlen:
            masked = _SPAN_TOKENS * (2 * self.setting.sequence_tokens <= _SPAN_TOKENS)
            saved += self.c * self.q + _FLOAT * masked  # the spans' results put together
        if self.setting.architecture.qk_norm:
            heads = self.h + self.setting.architecture.kv_heads
            copies = 1 if self.setting.cuda else 2
            saved += _FLOAT * (copies * (self.q + self.k) + heads)
        return self.t * saved

    @cached_property
    def saved(self) -> int:
        """What the backward pass of a block needs: both norms, attention, feed forward layer."""
        return 2 * self.saved_norm + self.saved_attention + self.inner(4)

    def kept(self, blocks: int) -> int:
        """Activations of so many trained blocks between their forward and backward passes."""
        if not blocks:
            return 0
        each = self.hidden() if self.recomputes else self.saved
        return blocks * each + self.rotations - self._not_kept

    @property
    def _not_kept(self) -> int:
        """Of the first block's input, which needs no gradient and may be kept elsewhere."""
        cached = self.setting.has_cache
        if self.recomputes:
            return self.hidden() * cached  # the batch has it
        elsewhere = not self.setting.cuda or (cached and self.c == _FLOAT)
        return self.float_input * (self.has_prefix and elsewhere)

    @property
    def frozen_block(self) -> int:
        """The most that a block works with while nothing is saved, without its input.

        In the feed forward layer: hidden states, the norm's, and three times [t, f]. In attention:
        the norm's, queries, keys and values, and the rotation of the queries, in float32; or, where
        that needs no copy, rotated queries and keys and twice the result.
        """
        feed_forward = self.hidden(2) + self.inner(3)
        qkv = self.c * (self.q + 2 * self.k)
        if self.c < _FLOAT:
            mixing = (2 * _FLOAT + self.c) * self.q
        else:
            mixing = self.c * (3 * self.q + self.k) + _FLOAT * self.h
        return max(feed_forward, self.hidden() + self.t * (qkv + mixing))

    # Moments

    def forward(self) -> Iterator[Moment]:
        if self.reads_prefix:
            yield from self._prefix()
        if self.n_blocks:
            yield from self._suffix()
        yield self._value_head()

    def _prefix(self) -> Iterator[Moment]:
        """The frozen blocks: nothing is saved, and one block at a time is gathered."""
        copies = (2 if self.communicates else 1) * self.gathers_frozen
        embedding = copies * self.gathered_embedding
        yield self.moment("embedding", 0, working_set=self.hidden(), gathered_weights=embedding)
        if not self.n_frozen:
            return
        carried = self.hidden() + self.rotations
        gathered = self.gathered(copies and 2 * copies - 1)
        yield self.moment("gather", 0, working_set=carried, gathered_weights=gathered)
        yield self.moment(
            "prefix",
            0,
            working_set=carried + self.frozen_block,
            gathered_weights=self.gathered(copies),
        )

    def _suffix(self) -> Iterator[Moment]:
        trained, keeps = self.n_blocks, self._kept_gathered
        yield self.moment(
            "gather",
            0,
            activations=self.kept(trained - 1) + self.hidden(),
            gathered_weights=keeps + self.gathered(2 if self.communicates else 0),
        )
        yield self.moment(
            "suffix",
            0,
            activations=self.kept(trained),
            working_set=self._end_of_block(),
            gathered_weights=keeps + self._last_buffer,
        )

    def _end_of_block(self) -> int:
        """What the last trained block works with beyond what is kept."""
        if self.recomputes:
            return self.frozen_block
        if self.c == _FLOAT:  # its norms keep the hidden states themselves
            return self.hidden(2 + (not self.setting.cuda and self.has_prefix))
        is_first = self.n_blocks == 1 and self.has_prefix
        return self.hidden(4 + self.reads_prefix - is_first)

    @property
    def _kept_gathered(self) -> int:
        """Trained weights that are still gathered at the end of the forward pass."""
        if not self.stays_gathered:
            return self.gathered(1)
        return self.gathered(self.n_blocks) + self._kept_embedding

    @property
    def _kept_embedding(self) -> int:
        return self.gathered_embedding * (self.stays_gathered and self.chosen.embeddings)

    @property
    def _last_buffer(self) -> int:
        """That of the last block gathered, kept until the next module is."""
        return self.gathered(1) if self.communicates else 0

    def _value_head(self) -> Moment:
        """Norm and head, where values are read."""
        hidden = self.hidden() * (self.n_blocks > 0 or self.reads_prefix)
        buffer = self._last_buffer if self.n_blocks or self._gathers_last else 0
        return self.moment(
            "value head",
            0,
            activations=self.kept(self.n_blocks),
            working_set=hidden + self.rows(2 if self.setting.cuda else 3) + self.histograms,
            gathered_weights=buffer + (self._kept_gathered if self.n_blocks else 0),
        )

    @property
    def _gathers_last(self) -> bool:
        return self.reads_prefix and self.gathers_frozen

    def backward(self) -> Iterator[Moment]:
        if self.n_blocks:
            yield self._head()
        for done in range(self.n_blocks):
            yield self._block(done)
            yield self._attention(done)
            yield self._reduce(done)
        if self.chosen.embeddings:
            yield from self._embeddings()

    def _head(self) -> Moment:
        return self.moment(
            "head",
            0,
            activations=self.kept(self.n_blocks),
            working_set=self.rows(3 if self.setting.cuda else 6) + self.histograms,
            gathered_weights=self._kept_gathered,
        )

    def _block(self, done: int) -> Moment:
        """On the way back through silu(a) * b, of which product and weights are done with."""
        gradient = self._weight_gradients(self.d * self.setting.architecture.ffn_width)
        return self.moment(
            f"block {done}",
            done,
            activations=self._saved_on_the_way(done) - self.inner(),
            working_set=self.hidden() + self.inner(3) + gradient + self.outputs,
            gathered_weights=self._gathered_backward(done),
            gradient_buffers=self._reduced_before(done),
        )

    def _saved_on_the_way(self, done: int) -> int:
        """What is saved when a block's backward pass begins."""
        saved = self.kept(self.n_blocks - done)
        if not self.recomputes:
            return saved
        return saved + self.saved - self.hidden() * (self.c == _FLOAT)  # the input is kept already

    def _attention(self, done: int) -> Moment:
        is_first = self._ends_at(done)
        return self.moment(
            f"attention {done}",
            done,
            activations=self.kept(self.n_blocks - done - 1) + self.saved_norm,
            working_set=self.hidden(3 if is_first else 4)
            + self._weight_gradients(self.block)
            + self.outputs,
            gathered_weights=self._gathered_backward(done),
            gradient_buffers=self._reduced_before(done),
        )

    def _ends_at(self, done: int) -> bool:
        """Whether gradients go no further than this block."""
        return self.has_prefix and done == self.n_blocks - 1

    def _weight_gradients(self, count: int) -> int:
        """Of so many weights; outside FSDP they are added up at once where there are any yet."""
        if self.sharded:
            return count * self.c
        return 0 if self.setting.accumulates else count * GRADIENT_BYTES

    def _gathered_backward(self, done: int) -> int:
        """The block's own weights, and the next one's on their way."""
        left = self.n_blocks - done
        if self.stays_gathered:
            return self.gathered(left) + self._kept_embedding
        return self.gathered(2 if left > 1 and self.communicates else 1)

    def _reducing(self, count: int) -> int:
        """So many gradients in float32, on their way to the ranks that keep them."""
        return count * GRADIENT_BYTES if self.sharded else 0

    def _reduced_before(self, done: int) -> int:
        """What the block before has left on its way."""
        before = self._reducing(self.block) if done else 0
        return before + self._between_replicas(done)

    def _between_replicas(self, done: int) -> int:
        """Gradients that replicas add up, which each block keeps until the end of the pass."""
        replicas = self.strategy in (ShardingStrategy.HYBRID_SHARD, ShardingStrategy.NO_SHARD)
        return replicas * done * _share(self._reducing(self.block), self.shards)

    def _reduce(self, done: int) -> Moment:
        """The gradients once more in float32, or the rank's share of them."""
        return self.moment(
            f"reduce {done}",
            done,
            activations=self.kept(self.n_blocks - done - 1),
            working_set=self.outputs + (0 if self._ends_at(done) else self.hidden()),
            gathered_weights=self._gathered_backward(done) - self.gathered(1),
            gradient_buffers=self._between_replicas(done) + self._reduced,
        )

    @property
    def _reduced(self) -> int:
        whole = self._reducing(self.block)
        return whole + max(self.gathered(1), _share(whole, self.shards))

    def _embeddings(self) -> Iterator[Moment]:
        """Their gradient, which is held to the end, unlike those of blocks."""
        gradient = self.embedding * self.c
        yield self.moment(
            "embeddings",
            self.n_blocks,
            gathered_weights=self.gathered_embedding,
            working_set=self.hidden() + gradient,
            gradient_buffers=self._reduced_before(self.n_blocks),
        )
        if self.sharded:
            whole = self._reducing(self.embedding)
            buffers = gradient + whole + _share(whole, self.shards)
            buffers += self._between_replicas(self.n_blocks)
            yield self.moment("embeddings", self.n_blocks, gradient_buffers=buffers)

    def evaluation(self) -> Moment:
        """No gradients, nothing saved; trained blocks may stay gathered from batch to batch."""
        copies = 2 if self.communicates else 1
        if not (self.gathers_frozen or self.n_blocks):
            copies = 0
        stays = self._kept_gathered if self.n_blocks else 0
        head = self.hidden() + self.rows(2 if self.setting.cuda else 3) + self.histograms
        moment = self.moment(
            "evaluate",
            None,
            working_set=max(self.hidden() + self.rotations + self.frozen_block, head),
            gathered_weights=stays + self.gathered(copies),
        )
        return Moment(moment.name, moment.components | {"gradients": 0})


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
