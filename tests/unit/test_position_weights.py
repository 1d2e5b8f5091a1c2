"""What weighs alike in the loss: by hand, and the same however a step is cut up."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch

from job.common.errors import InputError
from job.common.schema import ArithmeticConfig, DataConfig, ObjectiveConfig, Weighting
from job.data.arithmetic import ALPHABET
from job.data.packing import Batch, Packer, single_units
from job.data.token_cache import TokenizedSet, load_split
from job.data.tokenizer import load_tokenizer, write_character_tokenizer
from job.data.weights import Weights, position_weights
from job.training.objective import Counts, Objective

# Two problems: one solved right in 4 positions and wrong in 2, the other wrong in 1, 1 and 8.
POSITIONS = np.array([4, 2, 1, 1, 8])
REWARDS = np.array([1.0, 0.0, 0.2, 0.0, 0.0])
PROBLEMS = np.array([7, 7, 9, 9, 9], np.uint64)


def weights(weighting: Weighting, balance_labels: bool = False) -> list[float]:
    found = position_weights(
        weighting, balance_labels, positions=POSITIONS, rewards=REWARDS, problems=PROBLEMS
    )
    return [float(weight) for weight in found]


def test_weights_by_hand() -> None:
    assert weights(Weighting.token) == [1, 1, 1, 1, 1]
    assert weights(Weighting.sequence) == [1 / 4, 1 / 2, 1, 1, 1 / 8]
    thirds = [1 / 3, 1 / 3, 1 / 24]
    assert weights(Weighting.problem) == pytest.approx([1 / 8, 1 / 4, *thirds])


def test_balanced_labels_by_hand() -> None:
    """4 positions are right and 12 wrong: both come to 8."""
    assert weights(Weighting.token, True) == pytest.approx([2, *4 * [2 / 3]])
    # 1 of 5 sequences is right: both come to 2.5
    assert weights(Weighting.sequence, True) == pytest.approx(
        [2.5 / 4, *(2.5 / 4 * w for w in (1 / 2, 1, 1, 1 / 8))]
    )
    # half of the first problem is right, of a weight of 2: both come to 1
    balanced = np.array(weights(Weighting.problem, True))
    assert balanced[0] * 4 == pytest.approx(1)
    assert balanced[1:] @ POSITIONS[1:] == pytest.approx(1)


@pytest.mark.parametrize(("reward", "kind"), [(0.5, "right"), (0.49, "wrong")])
def test_one_label_alone_cannot_be_balanced(reward: float, kind: str) -> None:
    with pytest.raises(InputError, match=rf"objective.balance_labels: all 3 solutions are {kind}"):
        position_weights(
            Weighting.token,
            True,
            positions=POSITIONS[:3],
            rewards=np.full(3, reward),
            problems=PROBLEMS[:3],
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenizedSet:
    folder = tmp_path_factory.mktemp("data")
    write_character_tokenizer(folder, ALPHABET)
    config = DataConfig("embedded", "embedded", cache_dir=str(folder / "cache"))
    config.arithmetic = ArithmeticConfig(train_examples=60, attempts=3, error_probability=0.3)
    return load_split(config, "train", load_tokenizer(folder))


def outputs(batch: Batch) -> torch.Tensor:
    """A number for each position that hangs on its sequence alone."""
    within = batch.layout.positions[batch.positions]
    return torch.sin(batch.tokens[batch.positions].double() + within).float()


def mean_error(data: TokenizedSet, row: int) -> float:
    """The mean of the squared errors at the positions of a sequence."""
    stop = int(data.offsets[row + 1] - data.offsets[row])
    places = range(int(data.response_starts[row]) - 1, stop)
    found = [np.sin(float(data.tokens[data.offsets[row] + at]) + at) for at in places]
    return statistics.fmean((x - float(data.rewards[row])) ** 2 for x in found)


def step_loss(data: TokenizedSet, each: Weights, world: int, budget: int) -> float:
    """The loss of one step over the whole set."""
    objective, batches = Objective(ObjectiveConfig()), []
    for rank in range(world):
        packer = Packer(
            data,
            single_units(len(data)),
            dim=64,
            budget=budget,
            device=torch.device("cpu"),
            rank=rank,
            world=world,
            prompt_value=True,
            weights=each,
        )
        batches += packer.step(0, len(data), seed=1)
    whole = Counts.of([objective.counts(batch) for batch in batches])
    return sum(objective.loss(outputs(batch), batch, 0, whole).item() for batch in batches)


@pytest.mark.parametrize("balance_labels", [False, True])
@pytest.mark.parametrize("weighting", Weighting)
def test_the_loss_of_a_step_is_the_same_on_any_ranks_and_in_any_micro_batches(
    data: TokenizedSet, weighting: Weighting, balance_labels: bool
) -> None:
    positions, rows = data.response_lengths + 1, range(len(data))
    each = position_weights(
        weighting,
        balance_labels,
        positions=positions,
        rewards=data.rewards,
        problems=data.problems,
    )
    errors, sums = [mean_error(data, row) for row in rows], each * positions
    expected = float(sums @ errors / sums.sum())
    if weighting is Weighting.sequence and not balance_labels:
        assert expected == pytest.approx(statistics.fmean(errors))
    if weighting is Weighting.problem and not balance_labels:
        of_problem = [statistics.fmean(errors[i : i + 3]) for i in rows if i % 3 == 0]
        assert expected == pytest.approx(statistics.fmean(of_problem))
    for world, budget in ((1, 10_000), (1, 100), (4, 60), (2, 300)):
        assert step_loss(data, each, world, budget) == pytest.approx(expected, rel=1e-5)
