"""Whether a training fits a GPU, and what would: the largest N, the largest micro-batch.

In numbers, and as tables and sentences for people. Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from job.common.schema import ShardingStrategy
from job.memory.footprint import COMPONENTS, Footprint, Setting, footprint, gigabytes

if TYPE_CHECKING:
    from rich.table import Table

# What prediction and measurement may differ by:
GPU_TOLERANCE = 0.03  # of the allocated peak
CPU_TOLERANCE = 0.10  # of what a process without a GPU grows by

# What a process takes outside torch's allocator. Not measured by us yet (bench/gpu.py will):
# a context with torch's kernels, 0.3 GB before the first large kernel (pytorch/pytorch issue
# 107667) and more with cuBLAS and attention; NCCL's communicators and buffers on one node with
# NVLink, where 8 H100 showed 1.06 GB together with the context (NVIDIA/nccl issue 1685).
CONTEXT_BYTES = 600_000_000
NCCL_BYTES = 1_000_000_000
# cuBLAS's, which torch's allocator gives once: as CUBLAS_WORKSPACE_CONFIG=:4096:8 asks for.
WORKSPACE_BYTES = 8 * 4096 * 1024
# What the allocator reserves beyond what it has given out, as a share of that: what torch's own
# came to on a pretended GPU, over micro-batches of varying size. By whether segments grow; on one
# GPU, and on several.
_GAPS = {True: (0.035, 0.06), False: (0.17, 0.55)}
MARGIN = 0.05  # of the GPU, for what is not in the closed form
_STEP = 256  # tokens that a chosen micro-batch is a multiple of
_LARGEST_TRIED = 262_144  # tokens of a micro-batch


@dataclass(frozen=True)
class Fit:
    """A footprint beside what a GPU has. Bytes.

    Attributes:
        reserved: what torch's allocator takes of the GPU at the peak.
        outside: what is taken outside it.
    """

    footprint: Footprint
    reserved: int
    outside: int
    capacity: int

    @property
    def needed(self) -> int:
        return self.reserved + self.outside

    @property
    def fits(self) -> bool:
        """Whether it fits, and the margin stays free."""
        return self.needed <= self.capacity * (1 - MARGIN)

    @property
    def is_tight(self) -> bool:
        """Whether it fits, but only within the margin."""
        return not self.fits and self.needed <= self.capacity


def reserved_bytes(setting: Setting, peak: int) -> int:
    """What torch's allocator takes of a GPU to have given out so many bytes at the peak."""
    if not setting.cuda:
        return peak
    alone, with_others = _GAPS[setting.segments_grow]
    gaps = with_others if setting.world_size > 1 else alone
    return round((peak + WORKSPACE_BYTES) * (1 + gaps))


def outside_bytes(setting: Setting) -> int:
    """What a rank takes of its GPU outside torch's allocator; nothing on a CPU."""
    return outside_allocator(setting.world_size) if setting.cuda else 0


def outside_allocator(world_size: int) -> int:
    """The CUDA context, and what communication needs."""
    return CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)


def fit(setting: Setting, capacity: int) -> Fit:
    predicted = footprint(setting)
    reserved = reserved_bytes(setting, predicted.peak.total)
    return Fit(predicted, reserved, outside_bytes(setting), capacity)


def prediction(setting: Setting) -> dict[str, Any]:
    """A setting's footprint for memory.json; sizes in bytes."""
    predicted = footprint(setting)
    peak = predicted.peak.components | {"workspaces": WORKSPACE_BYTES if setting.cuda else 0}
    return {
        "num_unfrozen_layers": setting.num_unfrozen_layers,
        "micro_batch_tokens": setting.micro_batch_tokens,
        "response_tokens": setting.response_tokens,
        "world_size": setting.world_size,
        "peak_moment": predicted.peak.name,
        "peak_bytes": sum(peak.values()),
        "peak": peak,
        "after_backward": predicted.after_backward.components,
        "host_bytes": predicted.host,
        "reserved_bytes": reserved_bytes(setting, predicted.peak.total),
        "outside_bytes": outside_bytes(setting),
    }


def largest_unfrozen(setting: Setting, capacity: int) -> int | None:
    """The largest N up to all blocks that fits with the margin; None if there is none.

    Each is tried: with REPLICATE_FROZEN and a small micro-batch a larger N may take less.
    """
    blocks = setting.architecture.n_trunk_layers
    tried = (replace(setting, num_unfrozen_layers=n) for n in range(blocks, -1, -1))
    return next((one.num_unfrozen_layers for one in tried if _fits_somehow(one, capacity)), None)


def _fits_somehow(setting: Setting, capacity: int) -> bool:
    """Whether it fits, perhaps with its frozen weights sharded, where that would be chosen then."""
    return any(fit(one, capacity).fits for one in _as_placed(setting))


def _as_placed(setting: Setting) -> list[Setting]:
    if not setting.may_shard:
        return [setting]
    fsdp = replace(setting.fsdp, sharding_strategy=ShardingStrategy.FULL_SHARD)
    return [setting, replace(setting, fsdp=fsdp)]


def largest_micro_batch(setting: Setting, capacity: int, most: int, least: int) -> int | None:
    """The largest micro-batch that fits with the margin: at most `most` tokens, at least `least`.

    A multiple of 256 tokens, unless it is `most` or `least` itself; None if `least` does not fit.
    """

    def tokens(k: int) -> int:
        return min(most, max(least, k * _STEP))

    def fitted(k: int) -> Fit:
        t = tokens(k)
        return fit(replace(setting, micro_batch_tokens=t, evaluation_tokens=t), capacity)

    found = _largest(fitted, least // _STEP, -(-most // _STEP))
    return None if found is None else tokens(found)


def _largest(fitted: Callable[[int], Fit], low: int, high: int) -> int | None:
    """The largest argument from low to high that fits, of a footprint that grows with it."""
    if not fitted(low).fits:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fitted(middle).fits else (low, middle - 1)
    return low


def component_table(title: str, columns: Mapping[str, Mapping[str, int]]) -> Table:
    """GB by component, one column for each moment or source; components without bytes left out."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("GB per GPU")
    for name in columns:
        table.add_column(name, justify="right")
    rows = [name for name in COMPONENTS if any(c.get(name) for c in columns.values())]
    for name in rows:
        cells = [gigabytes(c.get(name, 0)) for c in columns.values()]
        table.add_row(name.replace("_", " "), *cells, end_section=name == rows[-1])
    table.add_row("together", *(gigabytes(sum(c.values())) for c in columns.values()))
    return table


def footprint_columns(predicted: Footprint) -> dict[str, dict[str, int]]:
    """The peak and what is left after the backward pass, for `component_table`."""
    peak, after = predicted.peak, predicted.after_backward
    return {f"peak ({peak.name})": peak.components, after.name: after.components}


def verdicts(setting: Setting, capacities: Sequence[int]) -> list[str]:
    """For each size of GPU, whether the setting fits it, and the most that would."""
    return [verdict(setting, capacity) for capacity in capacities]


def verdict(setting: Setting, capacity: int) -> str:
    found = fit(setting, capacity)
    least = min(_STEP, setting.micro_batch_tokens)
    n = largest_unfrozen(setting, capacity)
    found_tokens = (
        largest_micro_batch(one, capacity, _LARGEST_TRIED, least) for one in _as_placed(setting)
    )
    tokens = max(filter(None, found_tokens), default=None)
    most = ["no N fits" if n is None else f"largest N {n}"]
    if tokens is not None:
        most.append(f"largest micro-batch {tokens:,} tokens")
    return (
        f"{capacity / 1e9:.1f} GB: {_word(found)}, {found.needed / 1e9:.1f} GB with "
        f"{found.outside / 1e9:.1f} GB outside the allocator; {', '.join(most)}"
    )


def _word(found: Fit) -> str:
    if found.fits:
        return "fits"
    return "tight" if found.is_tight else "does not fit"


def as_dict(setting: Setting, capacities: Sequence[int]) -> dict[str, Any]:
    """The prediction and the verdicts for scripts."""
    return prediction(setting) | {
        "fits": {f"{c / 1e9:g}": fit(setting, c).fits for c in capacities},
        "largest_unfrozen": {f"{c / 1e9:g}": largest_unfrozen(setting, c) for c in capacities},
    }
