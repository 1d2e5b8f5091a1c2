"""Step -> the packed micro-batches of this rank.

Everything is a function of lengths, seed and step: nothing has to be saved to go on with the
same data. A unit is what must stay together in one micro-batch: a sequence, or a pair of them.
Units of one problem are put together where they may share their prompt, as far as that leaves
micro-batches within their budget and ranks with equal work.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from job.common.schema import Spread
from job.data.shared_prompts import Groups, SharedPrompts
from job.data.state_shards import Stored
from job.data.token_cache import TokenizedSet
from job.data.weights import Weights
from job.model.packed_layout import PackedLayout, Shared, to_device

Indices = NDArray[np.int64]
Costs = NDArray[np.float64]
_SMALLEST_BUNDLE = 4  # of a rank's share of a step


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch: b sequences, t tokens, n positions at which values are read.

    Where a prompt is computed once for several sequences, it is among the tokens once, and its last
    token's position comes for each of them.

    All but tokens and layout is on the host, where it is known without waiting for a GPU.

    Attributes:
        tokens: int64 [t] on the device.
        layout: where the sequences lie.
        positions: int64 [n], in the stream: of each sequence the last token before its response,
            where that is valued and there is one, then the tokens of its response.
        lengths: int64 [b], how many of them each sequence has.
        response_lengths: int64 [b].
        weights: float32 [n], of positions in the loss.
        weight: their sum.
        rewards: float32 [b].
        problems: uint64 [b].
        optimal: float32 [n], or None.
        pairs: int64 [p, 2], (better, worse) as positions in this batch; empty without pairs.
        given: float32 [n], targets at positions, NaN where the reward is the target; None if it is
            everywhere.
        stored: by which keys the states of the b sequences are kept; None where they are not.
    """

    tokens: Tensor
    layout: PackedLayout
    positions: Tensor
    lengths: Tensor
    response_lengths: Tensor
    weights: Tensor
    weight: float
    rewards: Tensor
    problems: NDArray[np.uint64]
    optimal: NDArray[np.float32] | None
    pairs: Tensor
    given: Tensor | None = None
    stored: Stored | None = None

    @property
    def at_prompts(self) -> Tensor:
        """Which positions are the last before a response, bool [n]."""
        with_prompt = self.lengths > self.response_lengths
        found = torch.zeros_like(self.positions, dtype=torch.bool)
        found[(self.lengths.cumsum(0) - self.lengths)[with_prompt]] = True
        return found


def step_units(
    n_units: int, per_step: int, step: int, seed: int, groups: Groups | None = None
) -> Indices:
    """The units of optimizer step `step` (from 0): epochs are seeded permutations, end to end."""
    parts: list[Indices] = []
    start, stop = step * per_step, (step + 1) * per_step
    while start < stop:
        epoch, position = divmod(start, n_units)
        order = _epoch_order(n_units, epoch, seed, groups)
        parts.append(order[position : position + stop - start])
        start += len(parts[-1])
    return np.concatenate(parts)


@functools.lru_cache(maxsize=2)  # the epochs that one step may touch
def _epoch_order(n_units: int, epoch: int, seed: int, groups: Groups | None) -> Indices:
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(n_units)
    return order if groups is None else groups.arrange(order, generator)


def mixed_step(
    units: Indices, sequences: int, step: int, seed: int, groups: Groups | None = None
) -> Indices:
    """The units of optimizer step `step` (from 0) where some are pairs and some are not.

    An epoch's sequences, as its permutation of units has them, are cut after each `sequences`; a
    pair that is cut is a sequence alone on either side.
    """
    parts: list[Indices] = []
    total = np.count_nonzero(units >= 0)
    start, stop = step * sequences, (step + 1) * sequences
    while start < stop:
        epoch, position = divmod(start, total)
        laid = units[_epoch_order(len(units), epoch, seed, groups)]
        chosen = np.flatnonzero(laid >= 0)[position : position + stop - start]
        part = np.full_like(laid, -1)
        part.flat[chosen] = laid.flat[chosen]
        part = part[(part >= 0).any(1)]
        parts.append(np.where(part[:, :1] < 0, part[:, ::-1], part))
        start += len(chosen)
    return np.concatenate(parts)


def sequence_cost(lengths: Indices, dim: int) -> Costs:
    """Relative cost of a block on each sequence: linear layers t, attention t^2 / (6 d)."""
    return lengths + lengths.astype(np.float64) ** 2 / (6 * dim)


def distribute(tokens: Indices, costs: Costs, world: int, budget: int) -> list[list[Indices]]:
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


def _fill_bins(tokens: Indices, costs: Costs, n_bins: int, budget: int) -> list[Indices] | None:
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


class Size(NamedTuple):
    """Of a micro-batch: tokens that are computed, valued positions, and tokens of all sequences."""

    tokens: int
    valued: int
    of_sequences: int


class Packer:
    """Lays steps and evaluations of one data set out in micro-batches for one rank.

    Args:
        units: int64 [units, 1 or 2], the sequences of each unit; two are (better, worse), and
            where -1 stands for the second it is one alone.
        budget: tokens of a micro-batch.
        prompt_value: whether the last token before a response is valued too.
        weights: float64 [sequences], of each position of each sequence; default: 1.
        spread: of targets at positions.
        prompts: those that sequences share; None if each sequence is computed by itself.
        together: sequences of one problem that come one after the other in an epoch, at most.
        copy_share: of the budget that a token takes, what a sequence's copy of a shared one takes.

    Attributes:
        stored: by which keys the states of all sequences are kept; None where they are not.
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
        prompt_value: bool = False,
        weights: Weights | None = None,
        spread: Spread = Spread.none,
        prompts: SharedPrompts | None = None,
        together: int = 1,
        copy_share: float = 0.0,
    ) -> None:
        self.data, self.units, self.budget = data, units, budget
        self.prompt_value, self.weights, self.spread = prompt_value, weights, spread
        self.device, self.rank, self.world = device, rank, world
        self.prompts, self._copy_share, self._dim = prompts, copy_share, dim
        self._lengths = data.lengths
        self._costs = sequence_cost(self._lengths, dim)
        self._is_mixed = bool((units < 0).any())
        self.stored: Stored | None = None
        most = together // units.shape[1]
        self._groups = None
        if prompts is not None and most > 1:
            self._groups = Groups(prompts.problems[units[:, 0]], most)

    def resize(self, budget: int) -> None:
        """Have micro-batches of at most so many tokens from now on."""
        self.budget = budget
        vars(self).pop("everything", None)  # which was laid out for another size

    def step(self, step: int, sequences: int, seed: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` (from 0)."""
        return [self.assemble(units) for units in self.plan(step, sequences, seed)]

    def plan(self, step: int, sequences: int, seed: int) -> list[Indices]:
        """The units of each of these micro-batches."""
        if self._is_mixed:
            return self.split(mixed_step(self.units, sequences, step, seed, self._groups))
        per_step = sequences // self.units.shape[1]
        chosen = step_units(len(self.units), per_step, step, seed, self._groups)
        return self.split(self.units[chosen])

    def size(self, units: Indices) -> Size:
        """That of a micro-batch of the given units."""
        rows = units[units >= 0]
        lengths = self._lengths[rows]
        valued = lengths - first_valued(self.data, rows, self.prompt_value)
        shared = 0 if self.prompts is None else int(self.prompts.shared(rows)[1].sum())
        whole = int(lengths.sum())
        return Size(whole - shared, int(valued.sum()), whole)

    @functools.cached_property
    def everything(self) -> list[Indices]:
        """This rank's micro-batches of an evaluation: over all ranks, each unit once."""
        return self.split(self.units)

    def split(self, units: Indices) -> list[Indices]:
        """This rank's micro-batches of some units: over all ranks, each of them once."""
        tokens, costs = _of_units(self._lengths, units), _of_units(self._costs, units)
        if self.prompts is None or not len(units):
            parts = distribute(tokens, costs, self.world, self.budget)[self.rank]
        else:
            parts = self._split_bundles(units, self.prompts, tokens, costs)
        return [units[part] for part in parts]

    def parts(self, units: Indices, micro_batches: int) -> Iterator[Indices]:
        """Units in their order, in parts of about so many micro-batches of each rank.

        To `split` a part takes time with the square of its size, and so all parts little.
        """
        ends = np.cumsum(_of_units(self._lengths, units))
        most, start, before = micro_batches * self.budget * self.world, 0, 0
        while start < len(units):
            stop = max(start + 1, int(np.searchsorted(ends, before + most, "right")))
            yield units[start:stop]
            start, before = stop, int(ends[stop - 1])

    def _split_bundles(
        self, units: Indices, prompts: SharedPrompts, tokens: Indices, costs: Costs
    ) -> list[Indices]:
        """The same, with units of one problem together where that costs no rank its work."""
        first = units[:, 0]
        shared, others = prompts.counts(first), (units >= 0).sum(1) - 1
        saved = shared - np.ceil(self._copy_share * shared).astype(np.int64)
        saved_cost = sequence_cost(shared, self._dim)
        leading = _Work(tokens - others * saved, costs - others * saved_cost)
        following = _Work(leading.tokens - saved, leading.costs - saved_cost)
        plans = []
        for most in self._bundle_sizes(int(tokens.sum())):
            bundles = bundle(prompts.problems[first], leading.tokens, following.tokens, most)
            work = _of_bundles(bundles, leading, following)
            found = distribute(work.tokens, work.costs, self.world, self.budget)
            plans.append((_span(found, work.costs), bundles, found[self.rank]))
        _, bundles, parts = min(plans, key=lambda plan: plan[0])
        of_part = np.full(bundles.max() + 1, -1)
        for place, part in enumerate(parts):
            of_part[part] = place
        return [np.flatnonzero(of_part[bundles] == place) for place in range(len(parts))]

    def _bundle_sizes(self, tokens: int) -> Iterator[int]:
        """Tokens of a bundle at most: a rank's share of all, or less to share them out better."""
        tried = set()
        for parts in (1, 2, _SMALLEST_BUNDLE):
            most = self.budget if self.world == 1 else tokens // (self.world * parts)
            if (most := min(most, self.budget)) not in tried:
                tried.add(most)
                yield most

    def assemble(self, units: Indices) -> Batch:
        """One packed micro-batch of the given units; without any, tokens that count for nothing.

        A rank without units of its own still takes part in every gathering of weights.
        """
        if not len(units):
            return _filler(self.device)
        batch = assemble(
            self.data,
            units[units >= 0],
            _pairs(units),
            self.device,
            prompt_value=self.prompt_value,
            weights=self.weights,
            spread=self.spread,
            prompts=self.prompts,
        )
        return replace(batch, stored=self.stored_of(units))

    def stored_of(self, units: Indices) -> Stored | None:
        """The keys of the sequences of a micro-batch, in its order."""
        if self.stored is None or not len(units):
            return None
        return self.stored[units[units >= 0]]

    def steps_before_epoch(self, step: int, sequences: int) -> int:
        """How many optimizer steps were of earlier epochs alone than the one `step` begins in."""
        total = int(np.count_nonzero(self.units >= 0))
        if not self._is_mixed:
            sequences -= sequences % self.units.shape[1]
        return step * sequences // total * total // sequences


class _Work(NamedTuple):
    """Of units or bundles: tokens to compute, and what computing them costs."""

    tokens: Indices
    costs: Costs


def bundle(problems: Indices, leading: Indices, following: Indices, most: int) -> Indices:
    """Which bundle each unit belongs to, int64 [units]: units of one problem, in order.

    Args:
        problems: int64 [units].
        leading: tokens of each unit that is the first of its bundle.
        following: tokens of each one that is not, and shares what the first one computes.
        most: tokens of a bundle of several units.
    """
    found = np.empty(len(problems), np.int64)
    open_ones: dict[int, tuple[int, int]] = {}  # by problem: a bundle, and its tokens so far
    n_bundles = 0
    each = zip(problems.tolist(), leading.tolist(), following.tolist(), strict=True)
    for unit, (problem, first, more) in enumerate(each):
        current, tokens = open_ones.get(problem, (0, most))
        if tokens + more > most:
            current, tokens, more = n_bundles, 0, first
            n_bundles += 1
        open_ones[problem] = current, tokens + more
        found[unit] = current
    return found


def _of_bundles(bundles: Indices, leading: _Work, following: _Work) -> _Work:
    _, firsts = np.unique(bundles, return_index=True)
    leads = np.zeros(len(bundles), bool)
    leads[firsts] = True
    tokens = np.where(leads, leading.tokens, following.tokens)
    costs = np.where(leads, leading.costs, following.costs)
    # added up in order, and so alike on each rank
    sums = np.bincount(bundles, tokens), np.bincount(bundles, costs)
    return _Work(sums[0].astype(np.int64), sums[1].astype(np.float64))


def _span(plan: list[list[Indices]], costs: Costs) -> int:
    """What the costliest micro-batches of all ranks, which wait for each other, cost together."""
    rounded = np.rint(costs).astype(np.int64)  # whole numbers add up alike on each rank
    return sum(max(int(rounded[part].sum()) for part in parts) for parts in zip(*plan, strict=True))


def _of_units(values: NDArray[Any], units: Indices) -> NDArray[Any]:
    """The sum of sequences' values [sequences] over each unit."""
    found: NDArray[Any] = np.where(units >= 0, values[units], 0).sum(1)
    return found


def _pairs(units: Indices) -> Indices | None:
    """Where the two of each pair lie among the sequences of these units."""
    if units.shape[1] == 1:
        return None
    sizes = (units >= 0).sum(1)
    first = (np.cumsum(sizes) - sizes)[sizes == 2]
    return np.stack([first, first + 1], 1)


def first_valued(data: TokenizedSet, rows: Indices, prompt_value: bool) -> Indices:
    """The first token of each of these sequences at which a value is read.

    It is the last one before the response, of the prompt or else the begin token; where there is
    none, or it is not to be valued, the response's first.
    """
    return np.maximum(data.response_starts[rows] - prompt_value, 0)


def assemble(
    data: TokenizedSet,
    rows: Indices,
    pairs: Indices | None,
    device: torch.device,
    *,
    prompt_value: bool = False,
    weights: Weights | None = None,
    spread: Spread = Spread.none,
    prompts: SharedPrompts | None = None,
) -> Batch:
    """Lay sequences `rows` of a data set end to end, without what they share with earlier ones."""
    starts = data.offsets[rows]
    lengths = data.offsets[rows + 1] - starts
    leaders, counts = np.arange(len(rows)), np.zeros_like(rows)
    if prompts is not None:
        leaders, counts = prompts.shared(rows)
    skipped = first_valued(data, rows, prompt_value)
    valued = lengths - skipped
    each = np.repeat(np.ones(len(rows)) if weights is None else weights[rows], valued)
    given = None
    if data.targets is not None:
        places = zip(rows, skipped, lengths, strict=True)
        found = [data.targets.spread(row, first, n, spread) for row, first, n in places]
        values, shares = (np.concatenate(part) for part in zip(*found, strict=True))
        given, each = torch.from_numpy(values.astype(np.float32)), each * shares
    tokens = data.tokens[_ranges(starts + counts, lengths - counts)]
    optimal = None if data.optimal is None else data.optimal[_ranges(starts + skipped, valued)]
    shared = Shared(torch.from_numpy(leaders), torch.from_numpy(counts))
    return Batch(
        tokens=to_device(torch.from_numpy(tokens.astype(np.int64)), device),
        layout=PackedLayout((lengths - counts).tolist(), device, shared),
        positions=torch.from_numpy(_positions(lengths, skipped, leaders, counts)),
        lengths=torch.from_numpy(valued),
        response_lengths=torch.from_numpy(lengths - data.response_starts[rows]),
        weights=torch.from_numpy(each.astype(np.float32)),
        weight=float(each.sum()),
        rewards=torch.from_numpy(data.rewards[rows].astype(np.float32)),
        problems=data.problems[rows],
        optimal=optimal,
        pairs=torch.from_numpy(_no_pairs() if pairs is None else pairs),
        given=given,
    )


def _positions(lengths: Indices, skipped: Indices, leaders: Indices, counts: Indices) -> Indices:
    """Where in the stream each sequence's tokens are, from the first that is valued on."""
    own = lengths - counts
    starts = np.cumsum(own) - own
    valued = lengths - skipped
    within = _ranges(skipped, valued)
    there, here = np.repeat(starts[leaders], valued), np.repeat(starts - counts, valued)
    return within + np.where(within < np.repeat(counts, valued), there, here)


def _filler(device: torch.device) -> Batch:
    none = torch.empty(0, dtype=torch.int64)
    n_tokens = 2  # one alone would be a case of its own for torch.compile
    return Batch(
        tokens=torch.zeros(n_tokens, dtype=torch.int64, device=device),
        layout=PackedLayout([n_tokens], device),
        positions=none,
        lengths=none,
        response_lengths=none,
        weights=none.float(),
        weight=0.0,
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
