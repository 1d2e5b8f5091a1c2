"""A training step without memory: the real model, sharding and optimizer on tensors of no content.

FakeTensorMode gives every tensor shape, dtype and lifetime but no bytes; a process group that
answers by itself stands for all other ranks; and torch's memory trackers add up what is alive.
So one process steps through a 70B critic on 64 GPUs in seconds.

Compiled kernels it does not know: blocks are those that torch runs operation by operation.
On a machine without CUDA the tensors pretend to lie on the CPU, where torch splits a norm up that
CUDA does in one kernel; `_FusedNorm` stands for that kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType, _FSDPState
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from job.common.schema import TrainingConfig
from job.distributed.fsdp import lay_out
from job.distributed.world import World
from job.memory.footprint import Footprint, Moment, Setting
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.packed_layout import PackedLayout, Reads
from job.model.parameters import count_frozen
from job.model.prefix import Prefix
from job.model.shards import local_shard
from job.training.histogram import Histogram, histogram_loss
from job.training.optimizer import build_optimizer


def simulate(setting: Setting) -> Footprint:
    """The peak and the state after the backward pass of rank 0, as torch's trackers see them.

    Activations and working set cannot be told apart in it: their sum is under `activations`.

    Raises:
        InputError: N is negative or not an integer.
        ValueError: weights in host memory, which the trackers do not see as such.
    """
    if setting.fsdp.cpu_offload:
        raise ValueError("cpu_offload cannot be simulated: all tensors pretend to be on one device")
    with _pretended_ranks(setting.world_size) as world_size:
        critic = _critic(setting, World(size=world_size, local_size=setting.per_node))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        norm = mock.patch.object(F, "rms_norm", _fused_norm) if setting.cuda else nullcontext()
        layout = _layout(setting)
        reads = _reads(setting, layout)
        with norm, mode:
            critic.to_empty(device="cpu")
            return _Simulation(setting, critic, layout, reads).footprint()


@contextmanager
def _pretended_ranks(world_size: int) -> Iterator[int]:
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield world_size
    finally:
        dist.destroy_process_group()


def _critic(setting: Setting, world: World) -> Critic:
    """The critic on the meta device, laid out as a training would."""
    with torch.device("meta"):
        critic = Critic(
            setting.architecture, head_bias=setting.head_bias, head_outputs=setting.head_outputs
        )
    unfreeze_last_blocks(critic, setting.num_unfrozen_layers)
    if setting.has_cache:
        critic.trunk.leave_out(_left_out(setting))
    if setting.fsdp.activation_checkpointing:
        critic.trunk.recompute_trainable_blocks()
    lay_out(critic, setting.fsdp, world)
    return critic


def _left_out(setting: Setting) -> int:
    """How many blocks cached states stand for."""
    n_blocks = setting.architecture.n_trunk_layers
    return count_frozen(setting.num_unfrozen_layers, n_blocks) - setting.between


def _layout(setting: Setting) -> PackedLayout:
    length = setting.sequence_tokens
    whole, rest = divmod(setting.micro_batch_tokens, length)
    layout = PackedLayout([length] * whole + [rest] * bool(rest))
    layout.varlen = setting.cuda
    _ = layout.spans(_dtype(setting))  # masks depend on content, which there is none of later
    return layout


def _dtype(setting: Setting) -> torch.dtype:
    """What blocks compute in."""
    return torch.bfloat16 if setting.fsdp.mixed_precision else torch.float32


def _reads(setting: Setting, layout: PackedLayout) -> Reads:
    """The last n tokens, of whole sequences and one more at most; closed form knows them alone."""
    n, t = setting.read_tokens, setting.micro_batch_tokens
    reads = layout.reads(torch.arange(t - n, t))
    _ = reads.spans(_dtype(setting))
    return reads


class _Simulation:
    """The last micro-batch of a step and the update after it, in a training that is under way."""

    def __init__(
        self, setting: Setting, critic: Critic, layout: PackedLayout, reads: Reads
    ) -> None:
        self._setting, self._critic = setting, critic
        t, n = setting.micro_batch_tokens, setting.read_tokens
        layout.positions = torch.empty(t, dtype=torch.int64)
        layout.boundaries = torch.empty(len(layout.lengths) + 1, dtype=torch.int32)
        self._layout = layout
        self._tokens = torch.empty(t, dtype=torch.int64)
        reads.rows = torch.empty(n, dtype=torch.int64)
        reads.boundaries = torch.empty(len(reads.boundaries), dtype=torch.int32)
        self._reads = reads
        self._inputs = [self._tokens, layout.positions, layout.boundaries, reads.rows]
        self._inputs.append(reads.boundaries)
        self._states: Tensor | None = None
        if setting.has_cache:
            dtype = _dtype(setting)
            is_last = _left_out(setting) == setting.architecture.n_trunk_layers
            rows = n if is_last else t
            self._states = torch.empty(rows, setting.architecture.dim, dtype=dtype)
            self._inputs.append(self._states)
        config = TrainingConfig(num_unfrozen_layers=setting.num_unfrozen_layers)
        self._optimizer = build_optimizer(critic, config)
        self._trainable = [p for p in critic.parameters() if p.requires_grad]

    def footprint(self) -> Footprint:
        self._have_gradients()
        self._update()  # makes the optimizer's state
        if self._setting.accumulates:
            self._have_gradients()
        tracker = self._tracker()
        with tracker:
            self._micro_batch()
            after = _only(tracker.get_tracker_snapshot("current"))
            self._update()
        peak = _only(tracker.get_tracker_snapshot("peak"))
        done = Moment("after backward", self._components(after))
        return Footprint((Moment("peak", self._components(peak)),), done, host=0)

    def _have_gradients(self) -> None:
        for parameter in self._trainable:
            parameter.grad = torch.zeros_like(parameter)

    def _micro_batch(self) -> None:
        known = None
        if self._states is not None:
            known = Prefix(_left_out(self._setting), states=self._states)
        outputs = self._critic(self._tokens, self._layout, self._reads, known)
        if self._setting.head_outputs == 1:
            outputs.square().sum().backward()
            return
        histogram = Histogram(self._setting.head_outputs, 0.75)
        histogram_loss(histogram, outputs, outputs.detach()[:, 0]).sum().backward()

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._trainable, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _tracker(self) -> MemTracker:
        if isinstance(self._critic, FSDPModule):
            tracker = _ShardedTracker(self._critic, self._optimizer)
            tracker.track_inputs(tuple(self._inputs))
            tracker.track_replicated()
            return tracker
        plain = _PlainTracker()
        plain.track_external(self._critic, self._optimizer, *self._inputs)
        return plain

    def _components(self, snapshot: dict[str, int]) -> dict[str, int]:
        """A tracker's categories, with what is known of the parameters taken apart."""
        head = list(self._critic.value_head.parameters())
        held = {"head": 0, "frozen": 0, "masters": 0}
        for parameter in self._critic.parameters():
            kind = "frozen" if not parameter.requires_grad else "masters"
            held["head" if any(parameter is p for p in head) else kind] += local_shard(
                parameter
            ).nbytes
        found = dict.fromkeys(set(_CATEGORIES.values()), 0)
        for category, count in snapshot.items():
            if category != "Total":
                found[_CATEGORIES[str(getattr(category, "value", category))]] += count
        del found["parameters"]
        gradients = held["head"] if found["gradients"] else 0
        found["gradients"] -= gradients
        found["optimizer"] -= 2 * held["head"]
        return found | {
            "frozen_weights": held["frozen"],
            "masters": held["masters"],
            "value_head": 3 * held["head"] + gradients,
        }


_CATEGORIES = {
    "Sharded Param": "parameters",
    "Parameter": "parameters",
    "Sharded Grad": "gradients",
    "Gradient": "gradients",
    "OptState": "optimizer",
    "Optstate": "optimizer",
    "Unsharded Param": "gathered_weights",
    "All Gather": "gathered_weights",
    "Unsharded Grad": "gradient_buffers",
    "Reduce Scatter": "gradient_buffers",
    "Activation": "activations",
    "Temp": "activations",
    "Other": "activations",
    "Buffer": "activations",
    "Inputs": "batch",
}


def _only(snapshot: dict[torch.device, dict[str, int]]) -> dict[str, int]:
    (one,) = snapshot.values()
    return dict(one)


class _ShardedTracker(FSDPMemTracker):
    """Files what FSDP makes while it gathers or reduces under gathering and reducing.

    torch's own files it as activations or temporaries until FSDP is done with it.
    """

    def __init__(self, critic: Critic, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(critic, optimizer)
        self._fsdp_state = _FSDPState.FW  # torch's own begins as if something were gathered

    def _track(self, reftype: Any, t: Tensor) -> None:
        if reftype in (_FSDPRefType.ACT, _FSDPRefType.TEMP):
            if self._fsdp_state in (_FSDPState.PRE_FW, _FSDPState.PRE_BW):
                reftype = _FSDPRefType.ALL_GATHER
            elif self._fsdp_state is _FSDPState.POST_BW:
                reftype = _FSDPRefType.REDUCE_SCATTER
        super()._track(reftype, t)

    def _fsdp_param_group_post_backward(
        self, fsdp_mod: FSDPModule, orig_fsdp_param_group_post_backward: Callable[..., Any]
    ) -> Callable[..., None]:
        reduce = super()._fsdp_param_group_post_backward(
            fsdp_mod, orig_fsdp_param_group_post_backward
        )

        def reduce_and_leave(*args: Any, **kwargs: Any) -> None:
            reduce(*args, **kwargs)
            self._fsdp_state = _FSDPState.BW  # torch's own stays at reducing

        return reduce_and_leave

    def track_replicated(self) -> None:
        """Add the parameters that lie outside FSDP."""
        for parameter in self._root_mod.parameters():
            if not isinstance(parameter, DTensor):
                self._update_and_maybe_create_winfos(parameter, _FSDPRefType.SHARDED_PARAM)


class _PlainTracker(MemTracker):
    """Does without hooks on gradients, which torch's own also wants of frozen parameters."""

    def _track_module_params_and_buffers(
        self, module: torch.nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        for parameter in module.parameters():
            if parameter.requires_grad and parameter not in self._param_to_grad_hook_handles:
                hook = parameter.register_post_accumulate_grad_hook(self._file_gradient)
                self._param_to_grad_hook_handles[parameter] = (hook, hook)
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    def _file_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._update_and_maybe_create_winfos(parameter.grad, _MemRefType.GRAD, update_existing=True)


class _FusedNorm(torch.autograd.Function):
    """What CUDA's kernel keeps and makes: input, weight and 1 / rms of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        needed = zip((x, weight), ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(one) if need else None for one, need in needed)


def _fused_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    return _FusedNorm.apply(x, weight)  # type: ignore[no-untyped-call]  # torch leaves it untyped
