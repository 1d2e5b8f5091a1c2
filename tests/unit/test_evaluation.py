"""Figures of an evaluation against what brute force says on small inputs."""

from __future__ import annotations

import io
import itertools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from job.evaluation import calibration, ranking, steps, subsets
from job.evaluation.bootstrap import ratio, resampled_sums, wilson
from job.evaluation.choosing import choosing, needed
from job.evaluation.length import length_matched, tenth_of
from job.evaluation.solutions import Problem, Solution, problems_of
from job.evaluation.summary import summarise, tables
from job.run.evaluations import _PLOTS, Evaluation, draw_evaluation, evaluation_section
from job.run.figure import look

SCORES = np.array([0.3, 0.9, 0.3, 0.5, 0.9, 0.1, 0.3])
REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
LENGTHS = np.array([5.0, 2.0, 2.0, 7.0, 3.0, 3.0, 9.0])
ANSWERS = ["4", "5", "5", "4", "4", None, "6"]
N = len(SCORES)


def _over_subsets(choose: Callable[[list[int]], float]) -> list[float]:
    """The mean of what a rule makes of each subset of n, for n = 1 to all."""
    return [
        float(np.mean([choose(list(s)) for s in itertools.combinations(range(N), n)]))
        for n in range(1, N + 1)
    ]


def _mean_of_first(scores: np.ndarray, rewards: np.ndarray = REWARDS) -> Callable[..., float]:
    def choose(subset: list[int]) -> float:
        top = max(scores[i] for i in subset)
        return float(np.mean([rewards[i] for i in subset if scores[i] == top]))

    return choose


def _voted(weights: Sequence[float]) -> Callable[..., float]:
    names = [a if a is not None else f"none {i}" for i, a in enumerate(ANSWERS)]
    worth = {n: np.mean([r for r, m in zip(REWARDS, names, strict=True) if m == n]) for n in names}

    def choose(subset: list[int]) -> float:
        votes: Counter[str] = Counter()
        for i in subset:
            votes[names[i]] += weights[i]
        most = max(votes.values())
        return float(np.mean([worth[n] for n, v in votes.items() if math.isclose(v, most)]))

    return choose


def _problem(rewards: Sequence[float], scores: Sequence[float], name: str = "p") -> Problem:
    return Problem(
        name,
        "",
        tuple(Solution(name, np.array([0.5, s]), r) for r, s in zip(rewards, scores, strict=True)),
    )


@pytest.mark.parametrize("scores", [SCORES, REWARDS, -LENGTHS, np.zeros(N), np.arange(N) * 1.0])
def test_best_of_n_is_the_mean_over_all_subsets_ties_drawn_by_lot(scores: np.ndarray) -> None:
    np.testing.assert_allclose(
        subsets.best_of(scores, 64) @ REWARDS, _over_subsets(_mean_of_first(scores)), atol=1e-12
    )


@pytest.mark.parametrize("right", [0, 1, 4, N])
def test_pass_at_n_is_the_share_of_subsets_with_a_right_solution(right: int) -> None:
    rewards = np.arange(N) < right
    expected = _over_subsets(lambda s: float(any(rewards[i] for i in s)))
    np.testing.assert_allclose(subsets.pass_at(rewards, 64), expected, atol=1e-12)


def test_majority_is_the_mean_over_all_subsets_ties_drawn_by_lot() -> None:
    found = subsets.majority(ANSWERS, REWARDS, 64)
    np.testing.assert_allclose(found, _over_subsets(_voted([1.0] * N)), atol=1e-12)


@pytest.mark.parametrize("most", [1, 3])
def test_curves_up_to_fewer_than_all_solutions_are_the_beginnings_of_the_whole(most: int) -> None:
    np.testing.assert_allclose(
        subsets.majority(ANSWERS, REWARDS, most), subsets.majority(ANSWERS, REWARDS, N)[:most]
    )
    np.testing.assert_allclose(subsets.best_of(SCORES, most), subsets.best_of(SCORES, N)[:most])


def test_majority_of_random_answers_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        answers = [str(a) for a in rng.integers(0, 4, N)]
        rewards = rng.random(N).round(1)
        size, worth = subsets._by_answer(answers, rewards)
        first = {a: i for i, a in reversed(list(enumerate(answers)))}
        names = sorted(first, key=lambda a: first[a])

        def choose(s: list[int], a: Any = answers, w: Any = worth, n: Any = names) -> float:
            votes = Counter(a[i] for i in s)
            most = max(votes.values())
            return float(np.mean([w[n.index(x)] for x, v in votes.items() if v == most]))

        found = subsets.majority(answers, rewards, N)
        np.testing.assert_allclose(found, _over_subsets(choose), atol=1e-12)
        assert size.sum() == N


def test_weighted_majority_of_few_solutions_is_the_mean_over_all_subsets() -> None:
    found = subsets.weighted_majority(ANSWERS, SCORES, REWARDS, 64, seed=0)
    np.testing.assert_allclose(found, _over_subsets(_voted(SCORES.tolist())), atol=1e-12)


def test_weighted_majority_of_many_solutions_is_drawn_without_bias() -> None:
    answers = [str(k % 5) for k in range(40)]
    rewards = np.array([float(a == "0") for a in answers])
    alike = [
        subsets.weighted_majority(answers, np.ones(40), rewards, 8, seed) for seed in range(20)
    ]
    exact = subsets.majority(answers, rewards, 8)
    error = np.std(alike, axis=0) / math.sqrt(20)
    assert (np.abs(np.mean(alike, 0) - exact) < 4 * error + 1e-9).all()


def test_a_choice_as_long_as_the_critics_knows_the_other_problems_choices_alone() -> None:
    """Two solutions each, short and long; the critic takes the short, the short, the long one."""
    short, long = np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[0.5, 0.5], [0.0, 1.0]])
    apart = [np.array([1.0, 2.0])] * 3
    found = length_matched([short, short, long], apart)
    np.testing.assert_allclose(found[0], [[0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(found[2], [[0.5, 0.5], [1.0, 0.0]])
    alike = length_matched([short, short, long], [np.ones(2), *apart[1:]])
    np.testing.assert_allclose(alike[0], 0.5)
    np.testing.assert_allclose(length_matched([short], apart[:1])[0], 0.5)
    assert tenth_of(np.array([3.0, 1, 2, 2, 9, 8, 7, 6, 5, 4])).tolist() == [
        3,
        0,
        2,
        2,
        9,
        8,
        7,
        6,
        5,
        4,
    ]


def test_a_choice_as_long_as_the_critics_is_random_where_length_says_nothing() -> None:
    rng = np.random.default_rng(0)
    problems = [
        _problem((rng.random(8) < 0.5).astype(float).tolist(), rng.random(8).tolist(), str(k))
        for k in range(400)
    ]
    drawn = [
        Problem(p.name, "", tuple(
            Solution(s.problem, np.append(np.zeros(rng.integers(1, 9)), s.score), s.reward)
            for s in p.solutions
        ))
        for p in problems
    ]  # fmt: skip
    rules = choosing(drawn, [0.1], lambda s: s)["rules"]
    matched, at_random = rules["length_matched"], rules["random"]["value"][-1]
    assert matched["low"][-1] < at_random < matched["high"][-1]


def test_problems_with_fewer_solutions_than_n_are_left_out_and_counted() -> None:
    problems = [_problem([1, 0, 1], [0.9, 0.8, 0.1]), _problem([0], [0.4], "q")]
    found = choosing(problems, [0.5, 0.2], lambda s: s)
    assert (found["problems"], found["left_out"]) == ([2, 1, 1], [0, 1, 1])
    value = found["rules"]["best_of_n"]["value"]
    # of one: 2/3 and 0; of two of the first: 1 with 0.9, else 0; of three: 1
    assert value == pytest.approx([1 / 3, 2 / 3, 1])
    assert found["lead"]["random"]["value"] == pytest.approx([0, 0, 1 / 3])
    assert found["needed"]["best_of_n"] == [2, 3]
    assert "majority" not in found["rules"]


def test_a_critic_also_chooses_by_the_mean_and_by_the_least_of_a_solutions_values() -> None:
    # the first ends best, the second has the highest mean, the third never falls low
    values = [[0.1, 0.9], [0.3, 0.8], [0.5, 0.5]]
    solutions = (
        Solution("p", np.array(v), r) for v, r in zip(values, (0.0, 0.5, 1.0), strict=True)
    )
    rules = choosing([Problem("p", "", tuple(solutions))], [0.5], lambda s: s)["rules"]
    # of two: (1, 2), (1, 3) and (2, 3)
    assert rules["best_of_n"]["value"] == pytest.approx([0.5, (0 + 0 + 0.5) / 3, 0])
    assert rules["mean_value"]["value"] == pytest.approx([0.5, (0.5 + 0.5 + 0.5) / 3, 0.5])
    assert rules["least_value"]["value"] == pytest.approx([0.5, (0.5 + 1 + 1) / 3, 1])


def test_the_least_number_of_solutions_is_the_first_that_reaches_the_reward() -> None:
    curves = {"rule": np.array([0.5, 0.7, 0.8, 0.95])}
    assert needed(curves, [0.5, 0.3, 0.1, 0.01]) == {"rule": [1, 2, 4, None]}


def test_a_bootstrap_of_a_mean_has_its_standard_error() -> None:
    x = np.random.default_rng(1).normal(size=400)
    found = ratio(x, np.ones(400))
    assert found.value == pytest.approx(x.mean())
    width = 2 * 1.96 * x.std() / math.sqrt(400)
    assert found.high - found.low == pytest.approx(width, rel=0.1)


def test_a_bootstrap_leaves_out_what_counts_for_nothing() -> None:
    over, under = np.array([[1.0, 0], [3, 0]]), np.array([[2.0, 0], [2, 0]])
    found = ratio(over, under)
    assert found.value[0] == 1
    assert np.isnan([found.value[1], found.low[1], found.high[1]]).all()
    assert (found.low[0], found.high[0]) == (0.5, 1.5)


def test_a_bootstrap_of_problems_that_are_all_alike_has_no_interval() -> None:
    found = ratio(np.tile([0, 0.1], (7, 1)), np.ones((7, 2)))
    assert found.value.tolist() == pytest.approx([0, 0.1])
    assert np.isnan([*found.low, *found.high]).all()
    assert found.to_json()["low"] == [None, None]


def test_wilsons_interval_has_the_shares_whose_own_scores_are_not_far() -> None:
    for won, n in ((0.0, 7), (1.0, 7), (0.5, 10), (0.2, 100)):
        for end in wilson(won, n):
            if 0 < end < 1:
                assert abs(won - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), 1e-3)
    assert wilson(0, 7) == pytest.approx((0, 0.3543), abs=1e-4)
    assert wilson(1, 7) == pytest.approx((0.6457, 1), abs=1e-4)


def test_none_right_of_few_of_four_may_still_be_some() -> None:
    found = ranking.best_of_four([_problem([1, 0, 0, 0], [0, 1, 1, 1], f"{k}") for k in range(7)])
    assert found is not None
    part = found["parts"][""]
    assert (part["problems"], part["value"], part["low"]) == (7, 0, 0)
    assert part["high"] == pytest.approx(0.3543, abs=1e-4)


def test_resampled_sums_belong_together_over_calls_and_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = np.random.default_rng(0).random((7, 2))
    whole = resampled_sums(x)
    np.testing.assert_allclose(resampled_sums(x[:, :1])[:, 0], whole[:, 0])
    monkeypatch.setattr("job.evaluation.bootstrap._CHUNK", 21)
    np.testing.assert_allclose(resampled_sums(x), whole)


def test_pair_accuracy_reads_the_value_after_each_tenth() -> None:
    rng = np.random.default_rng(0)
    lengths, rewards = (3, 10, 11, 25), (1.0, 0.0, 1.0, 0.5)
    rows = [Solution("p", rng.random(t).round(1), r) for t, r in zip(lengths, rewards, strict=True)]
    found = ranking.pair_accuracy([Problem("p", "", tuple(rows))])
    expected = []
    for k in range(1, 11):
        at = [s.values[math.ceil(k * len(s.values) / 10) - 1] for s in rows]
        pairs = [(i, j) for i in range(4) for j in range(4) if rewards[i] > rewards[j]]
        expected.append(np.mean([(at[i] > at[j]) + 0.5 * (at[i] == at[j]) for i, j in pairs]))
    assert found["pairs"] == 5
    assert found["accuracy"]["value"] == pytest.approx(expected)


def test_the_one_right_of_four_shares_a_tie_and_parts_weigh_alike() -> None:
    tied = _problem([1, 0, 0, 0], [0.9, 0.9, 0.1, 0.2])
    lost = _problem([0, 0, 1, 0], [0.9, 0.8, 0.1, 0.2], "q")
    won = Problem("r", "other", _problem([0, 1, 0, 0], [0.1, 0.8, 0.1, 0.2]).solutions)
    two_right = _problem([1, 1, 0, 0], [0.9, 0.8, 0.1, 0.2], "s")
    found = ranking.best_of_four([tied, lost, won, two_right])
    assert found is not None
    assert {name: part["value"] for name, part in found["parts"].items()} == {"": 0.25, "other": 1}
    assert found["mean"] == 0.625
    assert ranking.best_of_four([two_right]) is None
    for others in ([0, 0], [0, 0, 0, 0]):
        assert ranking.best_of_four([_problem([1, *others], [0.9, *others])]) is None


def _of_row(line: int, rewards: Sequence[float], scores: Sequence[float]) -> list[Solution]:
    return [replace(one, line=line) for one in _problem(rewards, scores).solutions]


def test_rows_of_one_prompt_are_each_a_set_of_four_and_what_is_none_is_counted() -> None:
    won, lost = _of_row(1, [1, 0, 0, 0], [4, 3, 2, 1]), _of_row(2, [1, 0, 0, 0], [1, 2, 3, 4])
    ties = _of_row(3, [1, 1, 0, 0, 0], [4, 3, 2, 1, 0])
    found = ranking.best_of_four(problems_of([*won, *lost, *ties]))
    assert found is not None
    assert (found["parts"][""]["problems"], found["mean"], found["left_out"]) == (2, 0.5, 1)
    # attempts that have a row each are one problem's
    apart = [replace(one, line=k) for k, one in enumerate(won)]
    found = ranking.best_of_four([_problem([1, 0, 0, 0, 0], [5, 4, 3, 2, 1]), *problems_of(apart)])
    assert found is not None
    assert (found["parts"][""]["problems"], found["mean"], found["left_out"]) == (1, 1, 1)


def test_a_page_and_a_table_say_how_many_are_not_one_right_of_four() -> None:
    rows = [one for k in range(3) for one in _of_row(k, [1, k == 2, 0, 0], [0.4, 0.3, 0.2, 0.1])]
    found = summarise(rows)
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables(found):
        console.print(table)
    said = [line.split() for line in console.export_text().splitlines()]
    assert ["all", "2", "1.000", "0.342-1.000"] in said
    assert ["left", "out", "1"] in said
    page = evaluation_section(Evaluation("name", found))
    assert ">left out, not one right of four</th><td>1</td>" in page


def test_a_page_has_a_picture_of_each_curve() -> None:
    rows = [Solution("p", np.array([0.1, x]), x, part="a") for x in (0.0, 0.25, 1.0)]
    found = summarise(rows)
    pictures = draw_evaluation(found)
    assert list(pictures) == ["best_of_n", "pair_accuracy", "calibration"]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    with look():
        curves, _ = _PLOTS["best_of_n"][1](found["choosing"]).axes[0].get_legend_handles_labels()
    drawn = {curve.get_label(): curve.get_ydata().tolist() for curve in curves}
    assert drawn["critic"] == found["choosing"]["rules"]["best_of_n"]["value"]
    assert drawn["random"] == found["choosing"]["rules"]["random"]["value"]
    assert evaluation_section(Evaluation("name", found)).count("data:image/png") == 3


def _stepped(step_values: Sequence[float], label: int | None, part: str = "") -> Solution:
    return Solution(
        f"p{step_values}", np.array([0.8, *step_values]), float(label == -1), part=part,
        step_values=tuple(step_values), first_error=label,
    )  # fmt: skip


def test_the_first_error_is_the_first_fall_that_reaches_the_threshold() -> None:
    scores = [steps.drops(_stepped([0.9, 0.2, 0.1], 1)), steps.drops(_stepped([0.7, 0.6], -1))]
    np.testing.assert_allclose(scores[0], [-0.1, 0.7, 0.1])
    found = steps.predict(scores, np.array([-1.0, 0.05, 0.5, 0.8]))
    assert found.tolist() == [[0, 1, 1, -1], [0, 0, -1, -1]]
    known = Solution("p", np.array([0.8]), 1.0, prompt_value=0.5, step_values=(0.4,))
    np.testing.assert_allclose(steps.drops(known), [0.1])


def test_first_error_figures_are_those_of_processbench() -> None:
    """Accuracies of both classes and their harmonic mean, counted by hand."""
    predicted, labels = np.array([2, 0, 1, -1, -1, 3, -1]), np.array([2, 1, 1, 3, -1, -1, -1])
    found = steps.figures_of(steps.counted(predicted, labels).sum(0))
    error, correct = 2 / 4, 2 / 3
    assert found["accuracy_error"] == found["recall"] == error
    assert found["accuracy_correct"] == pytest.approx(correct)
    assert found["f1"] == pytest.approx(2 * error * correct / (error + correct))
    assert found["precision"] == 2 / 4


def test_the_threshold_is_the_best_of_all_and_is_chosen_on_one_part() -> None:
    rng = np.random.default_rng(0)
    rows = [
        _stepped(rng.random(4).round(2).tolist(), int(rng.integers(-1, 4)), "ab"[k % 2])
        for k in range(60)
    ]
    own = [row for row in rows if row.part == "a"]
    scores, labels = [steps.shortfalls(r) for r in own], np.array([r.first_error for r in own])
    cut = steps.threshold(scores, labels)

    def f1(at: float) -> float:
        found = [next((i for i, x in enumerate(s) if x >= at), -1) for s in scores]
        wrong = [f == y for f, y in zip(found, labels, strict=True) if y >= 0]
        right = [f == y for f, y in zip(found, labels, strict=True) if y < 0]
        a, b = np.mean(wrong), np.mean(right)
        return float(2 * a * b / (a + b)) if a + b else 0.0

    best = max(f1(at) for at in np.linspace(-0.1, 1.1, 2000))
    assert f1(cut) == pytest.approx(best)
    found = steps.first_errors(rows, "a")
    assert found is not None
    assert found["level"]["threshold"] == cut
    assert found["level"]["parts"]["a"]["f1"]["value"] == pytest.approx(best)
    other = steps.first_errors(rows, "b")
    assert other is not None
    assert other["level"]["parts"]["a"]["f1"]["value"] < best
    means = [found["level"]["parts"][p]["f1"]["value"] for p in "ab"]
    assert found["level"]["mean_f1"] == pytest.approx(np.mean(means))


@pytest.mark.parametrize("labels", [(-1, 0, 1, 2, 3, 7), (-1,), (0, 2)])
def test_the_threshold_is_the_best_of_thousands(labels: tuple[int, ...]) -> None:
    """Every one is tried here with every solution."""
    rng = np.random.default_rng(0)
    given = rng.choice(labels, 1500)
    # the first error falls most, by little more than other steps
    scores = [rng.random(4) + 0.1 * (np.arange(4) == label) for label in given]
    reached = np.unique(np.concatenate([np.maximum.accumulate(own) for own in scores]))
    cuts = np.append((reached[1:] + reached[:-1]) / 2, [reached[0], reached[-1] + 1])
    assert len(cuts) > 2000
    sums = sum(
        steps.counted(steps.predict([own], cuts), np.array([[label]]))[0]
        for own, label in zip(scores, given, strict=True)
    )
    best = np.nanmax(steps._f1_or_less(steps.figures_of(np.asarray(sums))))
    cut = np.array([steps.threshold(scores, given)])
    counts = steps.counted(steps.predict(scores, cut), given[:, None]).sum(0)
    assert steps._f1_or_less(steps.figures_of(counts))[0] == best
    np.testing.assert_array_equal(
        steps._counts_at(cuts, [np.maximum.accumulate(own) for own in scores], given), sums
    )


def test_first_errors_are_drawn_by_problems() -> None:
    """Of two problems, one has its errors found and one has not: draws of them have all or none."""
    found = [
        replace(_stepped([0.9, 0.2], 1 if right else 0), problem=name)
        for name, right in (("p", True), ("q", False))
        for _ in range(4)
    ]
    correct = [replace(_stepped([0.9, 0.9], -1), problem=name) for name in "pq"]
    result = steps.first_errors([*found, *correct], None)
    assert result is not None
    error = result["drop"]["parts"][""]["accuracy_error"]
    assert (error["value"], error["low"], error["high"]) == (0.5, 0, 1)
    one = [replace(row, problem="p") for row in (*found, *correct)]
    result = steps.first_errors(one, None)
    assert result is not None
    error = result["drop"]["parts"][""]["accuracy_error"]
    assert (error["value"], error["low"], error["high"]) == (0.5, None, None)


def test_a_temperature_undoes_overconfidence() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=8000)
    rewards = (rng.random(8000) < 1 / (1 + np.exp(-logits))).astype(float)
    sharp = 1 / (1 + np.exp(-3 * logits))
    rows = [
        Solution(str(i), np.array([v]), r)
        for i, (v, r) in enumerate(zip(sharp, rewards, strict=True))
    ]
    found = calibration.calibration(rows, logits=False)
    assert found is not None
    assert found["temperature"] == pytest.approx(3, rel=0.1)
    assert found["after"]["ece"] < 0.25 * found["before"]["ece"]
    assert found["after"]["log_loss"] < found["before"]["log_loss"]
    assert calibration.calibration(rows[:1], logits=False) is None


def test_each_half_has_the_temperature_of_the_other() -> None:
    """One half is too sure of itself, the other not sure enough: crossed, both become worse."""
    rng = np.random.default_rng(0)
    names = [str(k) for k in range(400)]
    half = np.array([zlib.crc32(name.encode()) % 2 == 1 for name in names])
    logits = rng.normal(size=400)
    rewards = (rng.random(400) < 1 / (1 + np.exp(-logits))).astype(float)
    given = logits * np.where(half, 2.0, 0.5)
    sharp = 1 / (1 + np.exp(-given))
    rows = [
        Solution(name, np.array([v]), r) for name, v, r in zip(names, sharp, rewards, strict=True)
    ]
    found = calibration.calibration(rows, logits=False)
    assert found is not None
    other = [calibration.temperature(given[~half], rewards[~half]),
             calibration.temperature(given[half], rewards[half])]  # fmt: skip
    crossed = calibration._log_loss(given / np.where(half, *other), rewards)
    assert found["after"]["log_loss"] == pytest.approx(crossed)
    assert crossed > found["before"]["log_loss"]


@pytest.mark.parametrize(
    ("scores", "logits", "chosen"),
    [
        ([9.0, 2.0, 2.0], False, "b"),  # 1 against 2
        ([0.9, 0.2, 0.2], False, "a"),
        ([0.9, 0.2, 0.2], True, "b"),  # 0.71 against 1.10
        ([9.0, 2.0, 2.0], True, "b"),
        ([5.0, -5.0, -5.0], True, "a"),
    ],
)
def test_votes_are_weighted_by_chances(scores: list[float], logits: bool, chosen: str) -> None:
    rows = [
        Solution("p", np.array([score]), float(answer == chosen), answer=answer)
        for score, answer in zip(scores, "abb", strict=True)
    ]
    rules = summarise(rows, logits=logits)["choosing"]["rules"]
    assert rules["weighted_majority"]["value"][2] == 1


def test_calibration_errors_by_hand() -> None:
    found = calibration.errors(np.array([0.1, 0.1, 0.9, 1.0]), np.array([0.0, 1.0, 1.0, 1.0]))
    assert found["ece"] == pytest.approx((abs(0.2 - 1) + abs(0.9 - 1) + 0) / 4)
    assert found["brier"] == pytest.approx((0.01 + 0.81 + 0.01 + 0) / 4)
    expected = -(math.log(0.9) + math.log(0.1) + math.log(0.9) + math.log(1 - 1e-4)) / 4
    assert found["log_loss"] == pytest.approx(expected)
    assert sum(found["bins"]["count"]) == 4


def test_ranking_critics_have_chances_by_their_sigmoid() -> None:
    assert calibration.chances(np.array([0.0]), logits=True).tolist() == [0.5]
    assert calibration.chances(np.array([-1.0, 2.0]), logits=False).tolist() == [0, 1]


def test_a_summary_fits_80_columns_and_counts_what_it_is_made_of() -> None:
    rng = np.random.default_rng(0)
    rows = [
        Solution(str(k // 64), rng.random(6), float(k % 3 == 0), answer=str(k % 5), part="gsm8k",
                 step_values=(0.5, 0.1), first_error=k % 3 - 1)
        for k in range(128)
    ]  # fmt: skip
    rows.append(Solution("unlabelled", rng.random(3), math.nan))
    found = summarise(rows)
    assert (found["solutions"], found["labelled"], found["problems"]) == (129, 128, 2)
    assert found["solutions_per_problem"] == [64, 64]
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables(found):
        console.print(table)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    assert any("weighted vote" in line for line in lines)


def test_problems_of_one_name_in_two_parts_are_two() -> None:
    rows = [Solution("1", np.array([0.5]), 1.0, part=part) for part in ("a", "b", "a")]
    assert [len(p.solutions) for p in problems_of(rows)] == [2, 1]
