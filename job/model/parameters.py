"""How many parameters a critic has and trains, and the bytes they take. Free of torch.

Unfreezing N of the trunk's blocks (N counts on the trunk's own, without multi-token heads):

    0                  the value head alone, a linear probe
    1 .. all blocks    the last N blocks, the final norm and the head
    more               full training: embeddings too
"""

from __future__ import annotations

from dataclasses import dataclass

from job.common.errors import InputError
from job.common.schema import CriticConfig
from job.model.architecture import TransformerConfig

# Bytes per parameter, as job.distributed.fsdp and AdamW keep them.
MASTER_BYTES = 4  # trainable weights are float32, whatever the compute dtype
GRADIENT_BYTES = 4  # reduced in float32
OPTIMIZER_BYTES = 8  # AdamW's two moments in float32


@dataclass(frozen=True)
class Selection:
    """What N makes trainable besides the value head."""

    blocks: int  # the last so many
    norm: bool
    embeddings: bool


def select_trainable(num_unfrozen_layers: int, n_blocks: int) -> Selection:
    """What `training.num_unfrozen_layers` means for a trunk of `n_blocks` (see the module).

    Raises:
        InputError: it is negative or not an integer.
    """
    n = num_unfrozen_layers
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise InputError(
            f"training.num_unfrozen_layers: {n!r} must be 0 (head only) or a positive integer"
        )
    return Selection(blocks=min(n, n_blocks), norm=n > 0, embeddings=n > n_blocks)


def count_frozen(num_unfrozen_layers: int, n_blocks: int) -> int:
    """How many blocks stay frozen: the first so many."""
    return n_blocks - select_trainable(num_unfrozen_layers, n_blocks).blocks


@dataclass(frozen=True)
class Count:
    """Parameters of one component."""

    total: int
    trainable: int

    @property
    def gradient_bytes(self) -> int:
        return self.trainable * GRADIENT_BYTES

    @property
    def optimizer_bytes(self) -> int:
        return self.trainable * OPTIMIZER_BYTES


COMPONENTS = ("value_head", "norm", "trunk_blocks", "embeddings")


@dataclass(frozen=True)
class ParameterCounts:
    """A critic's parameters by component."""

    value_head: Count
    norm: Count
    trunk_blocks: Count
    embeddings: Count

    @property
    def components(self) -> dict[str, Count]:
        return {name: getattr(self, name) for name in COMPONENTS}

    @property
    def total(self) -> int:
        return sum(c.total for c in self.components.values())

    @property
    def trainable(self) -> int:
        return sum(c.trainable for c in self.components.values())

    @property
    def frozen(self) -> int:
        return self.total - self.trainable


def count_parameters(
    architecture: TransformerConfig,
    num_unfrozen_layers: int,
    *,
    head_bias: bool = True,
    head_outputs: int = 1,
) -> ParameterCounts:
    """The parameters of `critic.Critic` with N blocks unfrozen, in closed form.

    Raises:
        InputError: N is negative or not an integer.
    """
    d, n_blocks = architecture.dim, architecture.n_trunk_layers
    chosen = select_trainable(num_unfrozen_layers, n_blocks)
    head, block = head_outputs * (d + head_bias), block_parameters(architecture)
    embeddings = architecture.vocab_size * d
    return ParameterCounts(
        value_head=Count(head, head),
        norm=Count(d, d * chosen.norm),
        trunk_blocks=Count(n_blocks * block, chosen.blocks * block),
        embeddings=Count(embeddings, embeddings * chosen.embeddings),
    )


def block_parameters(a: TransformerConfig) -> int:
    """One block's: attention, its optional biases and norms, SwiGLU, and the norms before both."""
    queries, keys = a.n_heads * a.head_width, a.kv_heads * a.head_width
    attention = a.dim * (2 * queries + 2 * keys)  # wq and wo; wk and wv
    biases = (queries + 2 * keys) * a.qkv_bias
    head_norms = 2 * a.head_width * a.qk_norm
    return attention + biases + head_norms + 3 * a.dim * a.ffn_width + 2 * a.dim


def bytes_text(count: float) -> str:
    """A size for people, in the unit that fits it."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def count_configured(config: CriticConfig, architecture: TransformerConfig) -> ParameterCounts:
    """`count_parameters` of the critic of a configuration; with stages, in the one of most."""
    training = config.training
    return count_parameters(
        architecture,
        training.num_unfrozen_layers,
        head_bias=training.value_head.bias,
        head_outputs=config.objective.head_outputs,
    )


def checkpoint_bytes(counts: ParameterCounts) -> int:
    """Bytes of a checkpoint: trained weights and AdamW's moments, 12 a trainable parameter.

    Names and shapes come on top: bench/results/checkpoint.json measured 1.0015 times this for
    N=4, and 19 KB more than this for N=0.
    """
    return counts.trainable * (MASTER_BYTES + OPTIMIZER_BYTES)


def run_bytes(counts: ParameterCounts, checkpoints: int) -> int:
    """Bytes of a run's directory: its checkpoints, and the critic.safetensors of its end."""
    return checkpoints * checkpoint_bytes(counts) + MASTER_BYTES * counts.trainable
