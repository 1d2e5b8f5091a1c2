"""The embedded data: each chain is checked against its own text, solved again from scratch."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest

from job.data.arithmetic import ALPHABET, Chain, chains, is_held_out

SETTINGS: dict[str, Any] = {
    "min_steps": 2,
    "max_steps": 4,
    "error_probability": 0.15,
    "attempts": 4,
    "seed": 0,
}
MANY = 40_000


def draw(count: int, **changes: Any) -> list[Chain]:
    return list(chains(count, **(SETTINGS | changes)))


@pytest.fixture(scope="module")
def many() -> list[Chain]:
    return draw(MANY)


@dataclass
class Step:
    """One step as it is written: `7+5=2;`."""

    left: int
    operation: str
    result: int

    @property
    def slip(self) -> int:
        sign = 1 if self.operation[0] == "+" else -1
        return (self.result - self.left - sign * int(self.operation[1])) % 10


def written_steps(chain: Chain) -> list[Step]:
    """The steps of a response, which must be steps and `A` with a digit, and nothing else."""
    assert re.fullmatch(r"(\d[+-]\d=\d;)+A\d", chain.response)
    found = re.findall(r"(\d)([+-]\d)=(\d);", chain.response)
    return [Step(int(left), operation, int(result)) for left, operation, result in found]


def slips(chain: Chain) -> list[int]:
    return [step.slip for step in written_steps(chain)]


# --- one chain -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_steps_are_the_prompts_operations_each_on_the_result_before(
    many: list[Chain],
) -> None:
    for chain in many[:5000]:
        assert re.fullmatch(r"\d([+-]\d)+\?", chain.prompt)
        steps = written_steps(chain)
        assert [step.operation for step in steps] == re.findall(r"[+-]\d", chain.prompt)
        results = [int(chain.prompt[0]), *(step.result for step in steps)]
        assert [step.left for step in steps] == results[:-1]
        assert int(chain.response[-1]) == results[-1]


def test_the_reward_is_one_exactly_if_no_step_is_wrong(many: list[Chain]) -> None:
    for chain in many[:5000]:
        assert chain.reward == (0.0 if any(slips(chain)) else 1.0)


def test_errors_that_cancel_out_still_cost_the_reward() -> None:
    cancelled = [c for c in draw(5000, error_probability=0.6) if sum(slips(c)) == 10]
    assert cancelled
    assert not any(chain.reward for chain in cancelled)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.15, 0.25, 0.99])
def test_the_optimal_value_follows_from_the_results_read_so_far(p: float) -> None:
    for chain in draw(2000, min_steps=1, max_steps=5, error_probability=p):
        assert len(chain.optimal) == len(chain.response)
        wrong = slips(chain)
        for i, value in enumerate(chain.optimal):
            # A result is known once the digit behind its `=` has been read.
            known = len(re.findall(r"=\d", chain.response[: i + 1]))
            expected = 0.0 if any(wrong[:known]) else (1 - p) ** (len(wrong) - known)
            assert value == pytest.approx(expected, rel=1e-12, abs=0.0)


def test_the_optimal_value_ends_at_the_reward(many: list[Chain]) -> None:
    assert all(chain.optimal[-1] == chain.reward for chain in many)


def test_the_alphabet_holds_every_character_that_occurs(many: list[Chain]) -> None:
    seen = set("".join(chain.prompt + chain.response for chain in many))
    assert seen == set(ALPHABET)
    assert len(ALPHABET) == len(set(ALPHABET))


def test_no_errors_without_error_probability() -> None:
    for chain in draw(500, error_probability=0.0):
        assert not any(slips(chain))
        assert chain.reward == 1.0
        assert set(chain.optimal) == {1.0}


# --- many chains -----------------------------------------------------------------------------


def test_steps_go_wrong_as_often_as_asked_and_by_each_slip_alike(many: list[Chain]) -> None:
    found = Counter(slip for chain in many for slip in slips(chain))
    n, p = found.total(), SETTINGS["error_probability"]
    assert abs(1 - found[0] / n - p) < 4 * math.sqrt(p * (1 - p) / n)
    for slip in range(1, 10):
        assert abs(found[slip] / n - p / 9) < 4 * math.sqrt(p / 9 / n)


def test_the_mean_reward_is_that_of_the_theory(many: list[Chain]) -> None:
    by_steps: dict[int, list[float]] = defaultdict(list)
    for chain in many:
        by_steps[len(slips(chain))].append(chain.reward)
    assert set(by_steps) == {2, 3, 4}
    for steps, rewards in by_steps.items():
        expected = 0.85**steps
        error = math.sqrt(expected * (1 - expected) / len(rewards))
        assert abs(np.mean(rewards) - expected) < 4 * error


def test_numbers_of_steps_digits_and_signs_are_uniform(many: list[Chain]) -> None:
    prompts = [chain.prompt for chain in many[:: SETTINGS["attempts"]]]
    characters = Counter("".join(prompts))
    for counts in (
        [characters[c] for c in "0123456789"],
        [characters[c] for c in "+-"],
        list(Counter(map(len, prompts)).values()),
    ):
        share = 1 / len(counts)
        spread = math.sqrt(share * (1 - share) * sum(counts))
        assert max(abs(c - share * sum(counts)) for c in counts) < 4.5 * spread


def test_solutions_that_the_optimum_values_at_v_are_right_with_frequency_v(
    many: list[Chain],
) -> None:
    rewards: dict[float, list[float]] = defaultdict(list)
    for chain in many:
        for value in set(chain.optimal):
            rewards[value].append(chain.reward)
    assert len(rewards) == 6  # 0, 1 and one value for each number of steps to come
    for value, seen in rewards.items():
        error = math.sqrt(value * (1 - value) / len(seen))
        assert abs(np.mean(seen) - value) <= 4 * error + 1e-12


def test_the_mean_optimal_value_does_not_drift_along_the_response(many: list[Chain]) -> None:
    for steps in (2, 3, 4):
        values = np.array([c.optimal for c in many if len(c.response) == 6 * steps + 2])
        drift = values - values[:, :1]
        error = drift.std(0) / math.sqrt(len(values))
        assert (np.abs(drift.mean(0)) <= 4 * error + 1e-12).all()


# --- order and seeds -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("attempts", [1, 3, 4])
def test_a_chain_depends_on_settings_and_its_place_alone(attempts: int) -> None:
    total = 2 * 1024 * attempts + 700  # beyond two chunks of the generator
    everything = draw(total, attempts=attempts)
    assert len(everything) == total
    for count in (0, 1, 2, 5, 1023, 1024, 1024 * attempts, 1024 * attempts + 1, total - 1):
        assert draw(count, attempts=attempts) == everything[:count]


def test_two_generators_do_not_disturb_each_other() -> None:
    pair = zip(chains(50, **SETTINGS), chains(50, **SETTINGS), strict=True)
    assert all(a == b for a, b in pair)


@pytest.mark.parametrize("attempts", [1, 2, 4, 7])
def test_attempts_in_a_row_share_the_prompt_and_differ_in_the_solution(attempts: int) -> None:
    drawn = draw(1400, attempts=attempts, min_steps=4, error_probability=0.5)
    prompts = [list(group) for _, group in itertools.groupby(c.prompt for c in drawn)]
    # Neighbouring problems may be equal by chance, seldom: 5 terms have 160,000 forms.
    assert abs(len(prompts) - 1400 / attempts) <= 1
    assert all(len(group) % attempts == 0 for group in prompts)
    assert len({(c.prompt, c.response) for c in drawn}) > 0.8 * len(drawn)


def test_attempts_go_wrong_independently(many: list[Chain]) -> None:
    first = np.array([slips(chain)[0] != 0 for chain in many]).reshape(-1, SETTINGS["attempts"])
    correlation = np.corrcoef(first.T)
    off_diagonal = correlation[~np.eye(len(correlation), dtype=bool)]
    assert np.abs(off_diagonal).max() < 4.5 / math.sqrt(len(first))


def test_chunks_of_the_generator_do_not_repeat_each_other() -> None:
    drawn = draw(4 * 1024, attempts=1, min_steps=4)
    texts = [(c.prompt, c.response) for c in drawn]
    assert sum(a == b for a, b in zip(texts, texts[1024:], strict=False)) < 5


def test_another_seed_gives_other_chains() -> None:
    assert draw(100, seed=1) != draw(100, seed=0)


@pytest.mark.slow
def test_held_out_problems_are_a_tenth_and_never_drawn_for_training() -> None:
    training = {c.prompt for c in draw(20_000, attempts=1, min_steps=1, max_steps=2)}
    validation = {
        c.prompt for c in draw(2_000, attempts=1, min_steps=1, max_steps=2, held_out=True)
    }
    assert not training & validation
    assert all(is_held_out(prompt) for prompt in validation)
    d = "0123456789"
    everything = [f"{a}{s}{b}{u}{c}?" for a, s, b, u, c in product(d, "+-", d, "+-", d)]
    assert 0.08 < np.mean([is_held_out(prompt) for prompt in everything]) < 0.12
