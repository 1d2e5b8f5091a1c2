"""What comes before the first step: inputs that are there, a critic in its shards, torch set up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from job.common.errors import InputError
from job.common.schema import CriticConfig
from job.distributed.fsdp import shard
from job.distributed.world import World
from job.model.architecture_file import read_architecture
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.stored_head import StoredHead, head_names, read_head
from job.model.weights import check_trunk, load_trunk
from job.training.allocator import check_workspace, set_up_allocator
from job.training.data import CriticData, check_sources
from job.training.objective import Objective
from job.training.pretraining import ensure_trunk

_log = logging.getLogger("job.train")


def prepare_inputs(config: CriticConfig, *, verify: bool = False) -> None:
    """See that data and trunk are there, or make the trunk, if it is to be made here."""
    check_sources(config)
    if config.model.recipe is not None:
        ensure_trunk(Path(config.model.path), config.model.recipe, verify=verify)
    check_trunk(config.model.path, config.data.max_length)
    if config.model.keep_head:
        _kept_head(config)
    elif beside := head_names(config.model.path):
        names = ", ".join(beside)
        _log.info("%s: not read, for model.keep_head is false: %s", config.model.path, names)


def load_critic(
    config: CriticConfig,
    data: CriticData,
    world: World,
    at_boundary: Callable[[], object],
    left_out: int = 0,
) -> Critic:
    """The critic in shards, the last N blocks trainable, its trunk loaded and head initialised.

    `at_boundary` is called after each tensor, and may raise to end it. Without embeddings and the
    first `left_out` blocks, if there are to be any.
    """
    with torch.device("meta"):
        critic = Critic(
            read_architecture(config.model.path),
            head_bias=config.training.value_head.bias,
            head_outputs=config.objective.head_outputs,
        )
    unfreeze_last_blocks(critic, config.training.num_unfrozen_layers)
    if left_out:
        critic.trunk.leave_out(left_out)
    if config.distributed.fsdp.activation_checkpointing:
        critic.trunk.recompute_trainable_blocks()
    if config.training.compile is True:  # auto is decided by then
        critic.trunk.compile_blocks()
    shard(critic, config.distributed.fsdp, world)
    load_trunk(critic.trunk, config.model.path, at_boundary)
    _begin_head(critic, config, data.mean_reward)
    return critic


def _begin_head(critic: Critic, config: CriticConfig, mean_reward: float) -> None:
    if config.model.keep_head:
        head = _kept_head(config)
        critic.set_head(head.weight, torch.zeros(1) if head.bias is None else head.bias)
        return
    bias: float | Sequence[float] | None = config.training.value_head.bias_init
    if bias is None:
        bias = Objective(config.objective).initial_bias(mean_reward)
    critic.initialise_head(bias, config.training.seed)


def _kept_head(config: CriticConfig) -> StoredHead:
    """The head in the trunk's folder.

    Raises:
        InputError: none of one label is there, or it has a bias and the critic's is to have none.
    """
    head = read_head(config.model.path, read_architecture(config.model.path).dim)
    if head.bias is not None and head.bias.item() and not config.training.value_head.bias:
        raise InputError(
            f"{config.model.path}: model.keep_head: its head has the bias {head.bias.item():g}, "
            "and training.value_head.bias is false"
        )
    return head


def set_up_torch(config: CriticConfig) -> None:
    """Threads, memory and determinism of this process; before CUDA is used.

    Raises:
        InputError: the environment does not let a GPU give the same bits, which it is to do.
    """
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    set_up_allocator()
    if config.training.deterministic and torch.cuda.is_available():
        check_workspace()
    torch.use_deterministic_algorithms(config.training.deterministic)
    # nothing here reads memory that nothing has written, and filling it is a tenth of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
