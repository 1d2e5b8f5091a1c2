"""What a configuration means for memory, and the micro-batch that `auto` stands for. Torch-free.

SHAPES are those of well-known trunks, by the names people call them by, for predictions without
files.
"""

from __future__ import annotations

from dataclasses import replace

from job.common.errors import InputError
from job.common.schema import AUTO, CriticConfig, PrefixCacheMode, ShardingStrategy
from job.memory.fit import Fit, fit, largest_micro_batch, largest_unfrozen
from job.memory.footprint import Setting
from job.model.architecture import TransformerConfig

SHAPES = {  # Llama 2's
    "7b": TransformerConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32000),
    "13b": TransformerConfig(dim=5120, n_layers=40, n_heads=40, vocab_size=32000),
    "70b": TransformerConfig(
        dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, vocab_size=32000, ffn_hidden=28672
    ),
}

_USUAL_TOKENS = 8192  # of a micro-batch; larger ones gain less than whole frozen weights do
_MOST_TOKENS = 65_536  # beyond, larger micro-batches gain nothing


def setting_of(
    config: CriticConfig,
    architecture: TransformerConfig,
    *,
    world_size: int = 1,
    per_node: int = 1,
    capacity: int = 0,
    cuda: bool = True,
    repeats_keys: bool = False,
    segments_grow: bool = True,
    prefix_cached: bool = False,
    between: int = 0,
) -> Setting:
    """The most that a training with this configuration can ask for, whatever its data.

    Args:
        capacity: bytes of a GPU, of which `auto` makes the most, for `training.micro_batch_tokens`
            and for `distributed.fsdp.sharding_strategy`; 0 if not known.
        repeats_keys, segments_grow, prefix_cached, between: as in `Setting`.

    Raises:
        InputError: the micro-batch is to be chosen, and not even the smallest one fits.
    """
    longest = _longest_unit(config)
    step_tokens = config.training.batch_size * config.data.max_length
    setting = Setting(
        architecture=architecture,
        num_unfrozen_layers=config.training.num_unfrozen_layers,
        fsdp=config.distributed.fsdp,
        micro_batch_tokens=longest,
        world_size=world_size,
        per_node=per_node,
        cuda=cuda,
        repeats_keys=repeats_keys,
        segments_grow=segments_grow,
        prefix_cached=prefix_cached,
        between=between,
        compiled=cuda and config.training.compile is not False,
        head_bias=config.training.value_head.bias,
        head_outputs=config.objective.head_outputs,
    )
    chooses, share = config.training.micro_batch_tokens == AUTO, -(-step_tokens // world_size)
    usual = min(share, _USUAL_TOKENS) if chooses else config.training.token_budget
    setting = _placed(setting, capacity, max(longest, usual))
    tokens = _largest(config, setting, capacity, share) if chooses else usual
    return replace(
        setting,
        micro_batch_tokens=min(tokens, step_tokens),
        accumulates=_micro_batches(step_tokens, longest, tokens) > world_size,
        evaluation_tokens=tokens,
    )


def _placed(setting: Setting, capacity: int, tokens: int) -> Setting:
    """The setting with the strategy that `auto` stands for: with frozen weights whole on each GPU
    nothing waits for them, if micro-batches of so many tokens fit beside them.
    """
    fsdp = setting.fsdp
    if fsdp.sharding_strategy is not ShardingStrategy.auto:
        return setting
    whole = replace(fsdp, sharding_strategy=ShardingStrategy.REPLICATE_FROZEN)
    tried = replace(setting, fsdp=whole, micro_batch_tokens=tokens, evaluation_tokens=tokens)
    if setting.cuda and not fsdp.cpu_offload and fit(tried, capacity).fits:
        return replace(setting, fsdp=whole, may_shard=True)
    return replace(setting, fsdp=replace(fsdp, sharding_strategy=ShardingStrategy.FULL_SHARD))


def _largest(config: CriticConfig, setting: Setting, capacity: int, of_a_step: int) -> int:
    longest = setting.micro_batch_tokens
    most = min(_MOST_TOKENS, max(longest, of_a_step))
    found = largest_micro_batch(setting, capacity, most, longest)
    if found is None:
        raise InputError(_nothing_fits(config, fit(setting, capacity), setting))
    return found


def _micro_batches(step_tokens: int, longest: int, budget: int) -> int:
    """The most that a step is packed into: each takes at least so many of the longest units."""
    units = -(-step_tokens // longest)
    return -(-units // (budget // longest))


def _longest_unit(config: CriticConfig) -> int:
    """Tokens of what must stay together."""
    return config.data.max_length * (2 if config.objective.all_terms.pairwise else 1)


def forward_budget(config: CriticConfig) -> int:
    """Tokens of a micro-batch without gradients; a moderate number where training is to choose."""
    if config.training.micro_batch_tokens == AUTO:
        return max(_USUAL_TOKENS, config.data.max_length)
    return config.training.token_budget


def ways_to_lower(config: CriticConfig) -> str:
    """What would make a training take less memory, as far as it is not done already."""
    training, blocks = config.training, config.training.num_unfrozen_layers
    ways = []
    if training.micro_batch_tokens == AUTO:
        pass  # memory ran out before one was chosen
    elif training.token_budget > _longest_unit(config):
        ways.append(f"lower training.micro_batch_tokens ({training.token_budget})")
    else:
        ways.append(f"lower data.max_length ({config.data.max_length})")
    if blocks and not config.distributed.fsdp.activation_checkpointing:
        ways.append("set distributed.fsdp.activation_checkpointing")
    if blocks:
        ways.append(f"unfreeze fewer blocks than {blocks} (training.num_unfrozen_layers)")
    return ", ".join([*ways, "or take more GPUs"]) if ways else "take more GPUs"


def _nothing_fits(config: CriticConfig, smallest: Fit, setting: Setting) -> str:
    n, capacity = setting.num_unfrozen_layers, smallest.capacity
    largest = largest_unfrozen(setting, capacity)
    fitting = "no N fits" if largest is None else f"N={largest} fits"
    return (
        f"training.micro_batch_tokens: auto: N={n} takes {smallest.needed / 1e9:.1f} GB of a GPU's "
        f"{capacity / 1e9:.1f} GB even with {setting.micro_batch_tokens} tokens; {fitting}. "
        "Unfreeze fewer blocks, take more GPUs, or set distributed.fsdp.activation_checkpointing"
        + once_built(config, setting, capacity)
    )


def once_built(config: CriticConfig, setting: Setting, capacity: int) -> str:
    """What a training that does not fit a GPU would take if all its states were there before.

    Nothing where it would not fit either, they cannot be built there, or they would not be read.
    """
    if setting.prefix_cached or config.training.prefix_cache is PrefixCacheMode.none:
        return ""
    cached = fit(replace(setting, prefix_cached=True), capacity)
    if not cached.fits or not can_build(config, setting, capacity):
        return ""
    return (
        "; with the states of its frozen blocks built first (python -m job.cache build): "
        f"{cached.needed / 1e9:.1f} GB"
    )


def can_build(config: CriticConfig, setting: Setting, capacity: int) -> bool:
    """Whether a GPU takes what computes the frozen blocks' states before a training."""
    has_frozen = setting.num_unfrozen_layers < setting.architecture.n_trunk_layers
    return has_frozen and fit(_building(config, setting), capacity).fits


def _building(config: CriticConfig, setting: Setting) -> Setting:
    """What is at most on a GPU where states are built: all blocks, whole, and nothing trained."""
    tokens = forward_budget(config)
    return replace(
        setting,
        num_unfrozen_layers=0,
        prefix_cached=False,
        fsdp=replace(setting.fsdp, sharding_strategy=ShardingStrategy.NO_SHARD, cpu_offload=False),
        micro_batch_tokens=tokens,
        evaluation_tokens=tokens,
        world_size=1,
        per_node=1,
        compiled=False,
    )
