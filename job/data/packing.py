"""Step -> the packed micro-batches of this rank.

Everything is a function of lengths, seed and step: nothing has to be saved to go on with the
same data. A unit is what must stay together in one micro-batch: a sequence, or a pair of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from job.data.token_cache import TokenizedSet
from job.model.transformer import PackedLayout, to_device

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch: b sequences, t tokens, n response tokens.

    All but tokens and layout is on the host, where it is known without waiting for a GPU.

    Attributes:
        tokens: int64 [t] on the device.
        layout: where the sequences lie.
        responses: int64 [n], positions of the response tokens in the stream.
        response_lengths: int64 [b].
        rewards: float32 [b].
        problems: uint64 [b].
        optimal: float32 [n], or None.
        pairs: int64 [p, 2], (better, worse) as positions in this batch; empty without pairs.
    """

    tokens: Tensor
    layout: PackedLayout
    responses: Tensor
    response_lengths: Tensor
    rewards: Tensor
    problems: NDArray[np.uint64]
    optimal: NDArray[np.float32] | None
    pairs: Tensor


def step_units(n_units: int, per_step: int, step: int, seed: int) -> Indices:
    """The units of optimizer step `step` (from 0): epochs are seeded permutations, end to end."""
    parts: list[Indices] = []
    start, stop = step * per_step, (step + 1) * per_step
    while start < stop:
        epoch, position = divmod(start, n_units)
        order = _epoch_order(n_units, epoch, seed)
        parts.append(order[position : position + stop - start])
        start += len(parts[-1])
    return np.concatenate(parts)


@functools.lru_cache(maxsize=2)  # the epochs that one step may touch
def _epoch_order(n_units: int, epoch: int, seed: int) -> Indices:
    return np.random.default_rng([seed, epoch]).permutation(n_units)


def sequence_cost(lengths: Indices, dim: int) -> NDArray[np.float64]:
    """Relative cost of a block on each sequence: linear layers t, attention t^2 / (6 d)."""
    return lengths + lengths.astype(np.float64) ** 2 / (6 * dim)


def distribute(
    tokens: Indices, costs: NDArray[np.float64], world: int, budget: int
) -> list[list[Indices]]:
    """Units to micro-batches: [rank][micro-batch] -> unit positions, equally many on each rank.

    As few micro-batches as fit the budget this way: costliest units first, each to the
    cheapest micro-batch with room (LPT, Graham 1969). A micro-batch may be empty.
    """
    per_rank = max(1, -(-int(tokens.sum()) // (world * budget)))
    while (bins := _fill_bins(tokens, costs, world * per_rank, budget)) is None:
        per_rank = max(per_rank + 1, per_rank * 21 // 20)
    load = [costs[b].sum() for b in bins]
    order = np.argsort(load, kind="stable")[::-1]
    return [[bins[i] for i in order[rank::world]] for rank in range(world)]


def _fill_bins(
    tokens: Indices, costs: NDArray[np.float64], n_bins: int, budget: int
) -> list[Indices] | None:
    """Unit positions per bin, or None where they do not fit."""
    if tokens.max(initial=0) > budget:
        raise ValueError(f"a unit of {tokens.max()} tokens exceeds the budget of {budget}")
    room = np.full(n_bins, budget)
    load = np.zeros(n_bins)
    placed = np.empty(len(tokens), np.int64)
    for unit in np.argsort(-costs, kind="stable"):
        choice = int(np.argmin(np.where(room >= tokens[unit], load, np.inf)))
        if room[choice] < tokens[unit]:
            return None
        placed[unit] = choice
        room[choice] -= tokens[unit]
        load[choice] += costs[unit]
    return [np.flatnonzero(placed == b) for b in range(n_bins)]


class Packer:
    """Lays steps and evaluations of one data set out in micro-batches for one rank.

    Args:
        units: int64 [units, 1 or 2], the sequences of each unit; two are (better, worse).
        budget: tokens of a micro-batch.
    """

    def __init__(
        self,
        data: TokenizedSet,
        units: Indices,
        *,
        dim: int,
        budget: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.data, self.units, self.budget = data, units, budget
        self.device, self.rank, self.world = device, rank, world
        self._tokens = data.lengths[units].sum(1)
        self._costs = sequence_cost(data.lengths, dim)[units].sum(1)

    def step(self, step: int, sequences: int, seed: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` (from 0)."""
        return [self.assemble(units) for units in self.plan(step, sequences, seed)]

    def plan(self, step: int, sequences: int, seed: int) -> list[Indices]:
        """The units of each of these micro-batches."""
        per_step = sequences // self.units.shape[1]
        return self.split(step_units(len(self.units), per_step, step, seed))

    def size(self, units: Indices) -> tuple[int, int]:
        """All tokens and response tokens of a micro-batch of the given units."""
        members = self.units[units].ravel()
        responses = self.data.lengths[members] - self.data.response_starts[members]
        return int(self._tokens[units].sum()), int(responses.sum())

    @functools.cached_property
    def everything(self) -> list[Indices]:
        """This rank's micro-batches of an evaluation: over all ranks, each unit once."""
        return self.split(np.arange(len(self.units)))

    def split(self, chosen: Indices) -> list[Indices]:
        """This rank's micro-batches of some units: over all ranks, each of them once."""
        parts = distribute(self._tokens[chosen], self._costs[chosen], self.world, self.budget)
        return [chosen[part] for part in parts[self.rank]]

    def assemble(self, units: Indices) -> Batch:
        """One packed micro-batch of the given units; without any, tokens that count for nothing.

        A rank without units of its own still takes part in every gathering of weights.
        """
        if not len(units):
            return _filler(self.device)
        members = self.units[units]
        rows = members.ravel()
        pairs = np.arange(members.size).reshape(members.shape) if members.shape[1] == 2 else None
        return assemble(self.data, rows, pairs, self.device)


def assemble(
    data: TokenizedSet, rows: Indices, pairs: Indices | None, device: torch.device
) -> Batch:
    """Lay sequences `rows` of a data set end to end."""
    starts = data.offsets[rows]
    lengths = data.offsets[rows + 1] - starts
    where = _ranges(starts, lengths)
    skipped = data.response_starts[rows]
    in_stream = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    responses = _ranges(in_stream + skipped, lengths - skipped)
    return Batch(
        tokens=to_device(torch.from_numpy(data.tokens[where].astype(np.int64)), device),
        layout=PackedLayout(lengths.tolist(), device),
        responses=torch.from_numpy(responses),
        response_lengths=torch.from_numpy(lengths - skipped),
        rewards=torch.from_numpy(data.rewards[rows].astype(np.float32)),
        problems=data.problems[rows],
        optimal=None if data.optimal is None else data.optimal[where[responses]],
        pairs=torch.from_numpy(_no_pairs() if pairs is None else pairs),
    )


def _filler(device: torch.device) -> Batch:
    none = torch.empty(0, dtype=torch.int64)
    n_tokens = 2  # one alone would be a case of its own for torch.compile
    return Batch(
        tokens=torch.zeros(n_tokens, dtype=torch.int64, device=device),
        layout=PackedLayout([n_tokens], device),
        responses=none,
        response_lengths=none,
        rewards=none.float(),
        problems=np.empty(0, np.uint64),
        optimal=None,
        pairs=none.reshape(0, 2),
    )


def _ranges(starts: Indices, lengths: Indices) -> Indices:
    """arange(s, s + l) for each start and length, end to end."""
    ends = np.cumsum(lengths)
    within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    return np.repeat(starts, lengths) + within


def _no_pairs() -> Indices:
    return np.empty((0, 2), np.int64)


def single_units(n: int) -> Indices:
    """Each sequence is a unit of its own: int64 [n, 1]."""
    return np.arange(n)[:, None]
