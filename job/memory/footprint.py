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
        between: frozen blocks behind the cached states, which are on the GPU and run: where states
            are those of a training with more trained blocks.
        may_shard: whether the strategy is what `auto` chose, which shards frozen weights where they
            do not fit whole.
        cuda: whether attention and norms are CUDA's kernels.
        compiled: whether torch.compile has made the blocks' kernels.
        repeats_keys: whether CUDA's attention wants as many heads of keys as of queries, as before
            torch 2.12.
        segments_grow: whether segments of torch's CUDA allocator grow, which leaves fewer gaps.
        sequence_tokens: of a sequence; only a simulation needs to know.
        keys_per_token: tokens of all sequences over those of the micro-batch: more than 1 where
            sequences share prompts, whose keys each of them has.
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
    between: int = 0
    may_shard: bool = False
    cuda: bool = True
    compiled: bool = False
    repeats_keys: bool = False
    segments_grow: bool = True
    sequence_tokens: int = 512
    keys_per_token: float = 1.0
    evaluation_tokens: int = 0
    head_bias: bool = True
    head_outputs: int = 1

    @property
    def read_tokens(self) -> int:
        """Tokens that the last block computes; one if none is read."""
        n = self.micro_batch_tokens if self.response_tokens is None else self.response_tokens
        return max(n, 1)

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
        self.n_frozen = setting.between if setting.has_cache else a.n_trunk_layers - self.n_blocks
        self.t = setting.micro_batch_tokens
        self.n = setting.read_tokens
        self.n_keys = round(self.t * setting.keys_per_token)
        self.c = 2 if fsdp.mixed_precision else _FLOAT
        self.strategy = fsdp.sharding_strategy
        self.sharded = setting.world_size > 1 or fsdp.mixed_precision or fsdp.cpu_offload
        self.shards = shards(self.strategy, setting.world_size, setting.per_node)
        flash = flash_attention_takes(a.head_width)
        self.varlen = setting.cuda and fsdp.mixed_precision and flash
        self.compiled = setting.cuda and setting.compiled
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
    def runs_prefix(self) -> bool:
        return self.has_prefix and (self.n_frozen > 0 or not self.setting.has_cache)

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
        cached = norm + self.n_frozen * self.block
        frozen = cached if self.setting.has_cache else counts.frozen
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
        batch = (2 * self.t + self.n + self._shared_keys) * _TOKEN
        if self.setting.has_cache:
            batch += self.hidden(self.t if self.n_blocks or self.n_frozen else self.n)
        others["batch"] = batch
        return Moment(name, dict.fromkeys(COMPONENTS, 0) | state | others)

    # Bytes of tensors

    @property
    def _shared_keys(self) -> int:
        """Keys that are put together anew, if there are any; see `job.model.packed_layout.Keys`."""
        return self.n_keys if self.n_keys > self.t else 0

    def rotations(self, tokens: int) -> int:
        """A complex number for each token and pair of channels."""
        return tokens * self.setting.architecture.head_width * _FLOAT

    def hidden(self, tokens: int, copies: int = 1) -> int:
        """[t, d] in the compute dtype."""
        return copies * tokens * self.d * self.c

    def inner(self, tokens: int, copies: int = 1) -> int:
        """[t, f] in the compute dtype."""
        return copies * tokens * self.setting.architecture.ffn_width * self.c

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

    def norm_input(self, tokens: int) -> int:
        """What a norm keeps of its input; torch's for the CPU works on a copy in float32."""
        return tokens * self.d * (self.c if self.setting.cuda else _FLOAT)

    def saved_norm(self, tokens: int) -> int:
        """A norm's input and the root of its mean square in float32, and its output."""
        scaled = 0 if self.setting.cuda else self.norm_input(tokens)  # before its weights
        return self.norm_input(tokens) + tokens * _FLOAT + scaled + self.hidden(tokens)

    def saved_attention(self, queries: int) -> int:
        """Queries, keys, values, the result of attention and its log-sum-exp."""
        repeats = self.setting.repeats_keys if self.varlen else self.setting.cuda
        keys, attended = self.q if repeats else self.k, self._attended(queries)
        saved = 2 * self.c * (attended * self.q + self.n_keys * keys) + _FLOAT * self.h * attended
        if not self.varlen:  # the spans' results, put together
            saved += self.c * self.q * queries
        if self.setting.architecture.qk_norm:
            saved += self._saved_head_norms(queries)
        return saved

    def _attended(self, queries: int) -> int:
        """Queries of attention's kernels: a GPU's that know no packed sequences take all keys'."""
        return self.n_keys if self.setting.cuda and not self.varlen else queries

    def _saved_head_norms(self, queries: int) -> int:
        """As of other norms, and no output: rotations do not need it."""
        width = self.c if self.setting.cuda else 2 * _FLOAT
        heads = queries * self.h + self.t * self.setting.architecture.kv_heads
        return width * (queries * self.q + self.t * self.k) + _FLOAT * heads

    @property
    def _saved_inners(self) -> int:
        """w1 x, silu of it, w3 x and their product, which compiled code multiplies anew."""
        return 3 if self.compiled else 4

    @cached_property
    def saved(self) -> int:
        """What the backward pass of a block needs: both norms, attention, feed forward layer."""
        norms = 2 * self.saved_norm(self.t)
        return norms + self.saved_attention(self.t) + self.inner(self.t, self._saved_inners)

    @cached_property
    def saved_last(self) -> int:
        """That of the last block, which takes only the rows that are read through all of it."""
        norms = self.saved_norm(self.t) + 2 * self.saved_norm(self.n)
        others = self.rotations(self.n) + self.inner(self.n, self._saved_inners)
        return norms + self.saved_attention(self.n) + others

    def kept(self, blocks: int, *, last: bool = False) -> int:
        """Activations of so many trained blocks between their forward and backward passes.

        Args:
            last: whether the trunk's last block is one of them.
        """
        if not blocks:
            return 0
        if self.recomputes:
            saved = blocks * self.hidden(self.t)
        else:
            saved = blocks * self.saved + last * (self.saved_last - self.saved)
        return saved + self.rotations(self.t) - self._not_kept(only_last=last and blocks == 1)

    def _not_kept(self, *, only_last: bool) -> int:
        """Of the first block's input, which needs no gradient and may be kept elsewhere."""
        cached = self.setting.has_cache and not self.n_frozen
        if self.recomputes:
            return self.hidden(self.t) * cached  # the batch has it
        if self.setting.cuda:
            return self.hidden(self.t) * cached
        read = self.n if only_last else 0
        return self.norm_input(self.t + read) * self.has_prefix

    def frozen_block(self, *, last: bool = False) -> int:
        """The most that a block works with while nothing is saved, without its input.

        In the feed forward layer: hidden states, the norm's, and three times [t, f]. In attention:
        see `_mixing`. The last block takes the rows that are read out of its input, too.
        """
        rows = self.n if last else self.t
        read = self.hidden(rows) + self.rotations(rows) if last else 0
        if self.compiled:  # into the place of a factor; attention's result is kept by the caller
            feed_forward = self.hidden(rows, 3) + self.inner(rows, 2)
        else:
            feed_forward = self.hidden(rows, 2) + self.inner(rows, 3)
        return read + max(feed_forward, self._mixing(rows, last=last))

    def _mixing(self, queries: int, *, last: bool) -> int:
        """Queries, keys, values, and either what makes them or what is made of them.

        First the norm's result, and the rotation of queries or keys, in float32; then keys and
        values as sequences share them, and twice the result, on a GPU also queries for all keys.
        """
        normed = self.hidden(self.t) + last * self.hidden(queries)
        results = 2 * self.c * self._shared_keys * self.k
        if self.varlen:
            results += self.c * queries * self.q * (self._shared_keys > 0)
        else:
            attended = self._attended(queries)
            every = self.setting.cuda and (last or self._shared_keys > 0)
            results += attended * (self.c * (2 + every) * self.q + _FLOAT * self.h)
        return self._qkv(queries) + max(normed + self._rotation(queries), results)

    def _qkv(self, queries: int) -> int:
        return self.c * (queries * self.q + 2 * self.t * self.k)

    def _rotation(self, queries: int) -> int:
        """What rotating queries or keys takes beside them."""
        wider = 2 * _FLOAT if self.c < _FLOAT and not self.compiled else 0
        return (self.c + wider) * max(queries * self.q, self.t * self.k)

    @property
    def any_block(self) -> int:
        """The same of the block that takes most."""
        return max(self.frozen_block(), self.frozen_block(last=True))

    # Moments

    def forward(self) -> Iterator[Moment]:
        if self.runs_prefix:
            yield from self._prefix()
        if self.n_blocks:
            yield from self._suffix()
        yield self._value_head()

    def _prefix(self) -> Iterator[Moment]:
        """The frozen blocks: nothing is saved, and one block at a time is gathered."""
        copies = (2 if self.communicates else 1) * self.gathers_frozen
        embedding = copies * self.gathered_embedding
        in_batch = self.setting.has_cache and self.n_frozen <= 1  # the input of the one block
        carried = self.hidden(self.t) * (not in_batch) + self.rotations(self.t)
        if not self.setting.has_cache:
            yield self.moment("embedding", 0, working_set=carried, gathered_weights=embedding)
        if not self.n_frozen:
            return
        gathered = self.gathered(copies and 2 * copies - 1)
        yield self.moment("gather", 0, working_set=carried, gathered_weights=gathered)
        yield self.moment(
            "prefix",
            0,
            working_set=carried + (self.frozen_block() if self.n_blocks else self.any_block),
            gathered_weights=self.gathered(copies),
        )

    def _suffix(self) -> Iterator[Moment]:
        trained, keeps = self.n_blocks, self._kept_gathered
        yield self.moment(
            "gather",
            0,
            activations=self.kept(trained - 1) + self.hidden(self.t),
            gathered_weights=keeps + self.gathered(2 if self.communicates else 0),
        )
        if not self.recomputes:
            yield self._keys()
        yield self.moment(
            "suffix",
            0,
            activations=self.kept(trained, last=True),
            working_set=self._end_of_block(),
            gathered_weights=keeps + self._last_buffer,
        )

    def _keys(self) -> Moment:
        """Keys of all tokens are rotated in the last block, however few rows are read."""
        before, inputs = self.kept(self.n_blocks - 1), self.saved_norm(self.t)
        if not before:
            before, inputs = self.rotations(self.t), inputs - self._not_kept(only_last=True)
        return self.moment(
            "keys",
            0,
            activations=before + inputs + self.saved_norm(self.n) + self.rotations(self.n),
            working_set=self._qkv(self.n) + self._rotation(self.n),
            gathered_weights=self._kept_gathered + self._last_buffer,
        )

    def _end_of_block(self) -> int:
        """What the last trained block works with beyond what is kept."""
        if self.recomputes:
            return self.frozen_block(last=True)
        return self.hidden(self.n, 2)

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
        hidden = self.hidden(self.n) * (self.n_blocks > 0 or self.runs_prefix)
        buffer = self._last_buffer if self.n_blocks or self._gathers_last else 0
        return self.moment(
            "value head",
            0,
            activations=self.kept(self.n_blocks, last=True),
            working_set=hidden + self._value_head_rows + self.histograms,
            gathered_weights=buffer + (self._kept_gathered if self.n_blocks else 0),
        )

    @property
    def _value_head_rows(self) -> int:
        """The norm's result, and its input where that is not float32 already."""
        scaled = 0 if self.setting.cuda else 1  # before the weights
        return self.rows(1 + scaled + (self.c < _FLOAT))

    @property
    def _gathers_last(self) -> bool:
        return self.runs_prefix and self.gathers_frozen

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
            activations=self.kept(self.n_blocks, last=True),
            working_set=self.rows(3 if self.setting.cuda else 6) + self.histograms,
            gathered_weights=self._kept_gathered,
        )

    def _block(self, done: int) -> Moment:
        """On the way back through silu(a) * b, of which product and weights are done with.

        Compiled, one kernel makes the product and the gradients of a and b of these two.
        """
        gradient = self._weight_gradients(self.d * self.setting.architecture.ffn_width)
        tokens = self.t if done else self.n
        return self.moment(
            f"block {done}",
            done,
            activations=self._saved_on_the_way(done) - self.inner(tokens, 1 + self.compiled),
            working_set=self.hidden(tokens) + self.inner(tokens, 3) + gradient + self.outputs,
            gathered_weights=self._gathered_backward(done),
            gradient_buffers=self._reduced_before(done),
        )

    def _saved_on_the_way(self, done: int) -> int:
        """What is saved when a block's backward pass begins."""
        saved = self.kept(self.n_blocks - done, last=not done)
        if not self.recomputes:
            return saved
        input_kept = self.hidden(self.t) * (self.setting.cuda or self.c == _FLOAT)
        return saved + (self.saved if done else self.saved_last) - input_kept

    def _attention(self, done: int) -> Moment:
        is_first = self._ends_at(done)
        return self.moment(
            f"attention {done}",
            done,
            activations=self.kept(self.n_blocks - done - 1) + self.saved_norm(self.t),
            working_set=self.hidden(self.t, 3 if is_first else 4)
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
            working_set=self.outputs + (0 if self._ends_at(done) else self.hidden(self.t)),
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
            working_set=self.hidden(self.t) + gradient,
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
        if not (self._gathers_last or self.n_blocks):
            copies = 0
        stays = self._kept_gathered if self.n_blocks else 0
        head = self.hidden(self.n) + self._value_head_rows + self.histograms
        runs = self.hidden(self.t) + self.rotations(self.t) + self.any_block
        moment = self.moment(
            "evaluate",
            None,
            working_set=max(runs if self.n_blocks or self.runs_prefix else 0, head),
            gathered_weights=stays + self.gathered(copies),
        )
        return Moment(moment.name, moment.components | {"gradients": 0})


def copy_share(architecture: TransformerConfig) -> float:
    """How much of a token's memory the copy takes that a sequence has of a token it shares.

    That is its key and value, beside what a block works with at least (`_Step.frozen_block`); what
    is saved for a backward pass is more. Where attention is CUDA's varlen kernel, tokens and these
    shares of copies within a budget take no more than as many tokens without copies.
    """
    a = architecture
    return 2 * a.kv_heads * a.head_width / (3 * a.dim + 2 * a.ffn_width)


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
