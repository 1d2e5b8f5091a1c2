"""Value metrics against hand-computed numbers and plain-Python brute force."""

from __future__ import annotations

import copy
import itertools
import pickle
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from job.run.value_metrics import ValueMetrics

COUNTS = {"tokens", "sequences", "pairwise_pairs"}


@dataclass(frozen=True)
class Response:
    """One sequence in plain Python."""

    values: tuple[float, ...]
    targets: tuple[float, ...]
    reward: float
    problem: int
    optimal: tuple[float, ...] | None = None


def response(
    values: Sequence[float],
    reward: float,
    problem: int = 0,
    optimal: Sequence[float] | None = None,
) -> Response:
    """An undiscounted response: every target is the reward."""
    best = None if optimal is None else tuple(optimal)
    return Response(tuple(values), (reward,) * len(values), reward, problem, best)


def count_in(metrics: ValueMetrics, batch: Sequence[Response]) -> None:
    def flat(parts: Iterable[Sequence[float]]) -> np.ndarray:
        return np.array(list(itertools.chain.from_iterable(parts)), np.float64)

    best = [r.optimal for r in batch if r.optimal is not None]
    metrics.add(
        flat(r.values for r in batch),
        flat(r.targets for r in batch),
        np.array([len(r.values) for r in batch], np.int64),
        np.array([r.reward for r in batch], np.float64),
        np.array([r.problem for r in batch], np.int64),
        flat(best) if best else None,
    )


def measured(*batches: Sequence[Response]) -> ValueMetrics:
    metrics = ValueMetrics()
    for batch in batches:
        count_in(metrics, batch)
    return metrics


def computed(*batches: Sequence[Response]) -> dict[str, float]:
    return measured(*batches).compute()


def random_responses(seed: int, count: int = 80, levels: int | None = None) -> list[Response]:
    """Discounted responses; with few `levels`, values and rewards have many ties."""
    rng = np.random.default_rng(seed)

    def numbers(size: int) -> list[float]:
        x = rng.random(size)
        return [float(y) for y in (x if levels is None else np.round(x * levels) / levels)]

    drawn = []
    for _ in range(count):
        length = int(rng.integers(1, 25))
        reward = numbers(1)[0]
        targets = tuple(reward * 0.97**i for i in reversed(range(length)))
        drawn.append(
            Response(
                tuple(1.4 * x - 0.2 for x in numbers(length)),
                targets,
                reward,
                int(rng.integers(-4, 5)),
                tuple(0.9 * x + 0.01 for x in targets),
            )
        )
    return drawn


def brute_fit(values: Sequence[float], targets: Sequence[float]) -> dict[str, float]:
    mse = statistics.fmean((v - t) ** 2 for v, t in zip(values, targets, strict=True))
    constant = statistics.pvariance(targets)
    return {
        "mean_prediction": statistics.fmean(values),
        "std_prediction": statistics.pstdev(values),
        "mse": mse,
        "mse_constant": constant,
        "r2": 1 - mse / constant,
    }


def brute_ece(values: Sequence[float], targets: Sequence[float]) -> float:
    bins: dict[int, list[tuple[float, float]]] = {}
    for v, t in zip(values, targets, strict=True):
        bins.setdefault(min(int(min(max(v, 0.0), 1.0) * 15), 14), []).append((v, t))
    gaps = [abs(sum(v for v, _ in b) - sum(t for _, t in b)) for b in bins.values()]
    return sum(gaps) / len(values)


def brute_share(pairs: Iterable[tuple[float, float]]) -> float:
    """Share of (high, low) pairs in which high has the larger score, ties half."""
    return statistics.fmean(float(h > l_) + 0.5 * (h == l_) for h, l_ in pairs)


def brute_auc(scores: Sequence[float], rewards: Sequence[float]) -> float:
    high = [s for s, r in zip(scores, rewards, strict=True) if r >= 0.5]
    low = [s for s, r in zip(scores, rewards, strict=True) if r < 0.5]
    return brute_share(itertools.product(high, low))


def brute_pairs(data: Sequence[Response]) -> list[tuple[float, float]]:
    return [
        (statistics.fmean(x.values), statistics.fmean(y.values))
        for x, y in itertools.permutations(data, 2)
        if x.problem == y.problem and x.reward > y.reward
    ]


def brute_positions(data: Sequence[Response]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for r in data:
        for i, v in enumerate(r.values):
            found.setdefault(f"position_{10 * i // len(r.values):02}", []).append(v)
    return {name: statistics.fmean(v) for name, v in found.items()}


def brute_tokens(data: Sequence[Response]) -> dict[str, float]:
    values = [v for r in data for v in r.values]
    targets = [t for r in data for t in r.targets]
    optimal = [o for r in data if r.optimal for o in r.optimal]
    fit, best = brute_fit(values, targets), brute_fit(optimal, targets)
    gain = fit["mse_constant"] - best["mse"]
    return {
        **fit,
        **brute_positions(data),
        "tokens": float(len(values)),
        "mean_target": statistics.fmean(targets),
        "std_target": statistics.pstdev(targets),
        "ece": brute_ece(values, targets),
        "mse_optimal": best["mse"],
        "std_optimal": best["std_prediction"],
        "achievable_share": (fit["mse_constant"] - fit["mse"]) / gain,
    }


def brute_responses(data: Sequence[Response]) -> dict[str, float]:
    means = [statistics.fmean(r.values) for r in data]
    rewards, lengths = [r.reward for r in data], [float(len(r.values)) for r in data]
    last, last_target = [r.values[-1] for r in data], [r.targets[-1] for r in data]
    pairs = brute_pairs(data)
    fit = brute_fit(means, [statistics.fmean(r.targets) for r in data])
    return {
        **{f"sequence/{name}": x for name, x in fit.items()},
        "sequences": float(len(data)),
        "last_token_mse": brute_fit(last, last_target)["mse"],
        "last_token_auc": brute_auc(last, rewards),
        "pairwise_accuracy": brute_share(pairs),
        "pairwise_pairs": float(len(pairs)),
        "length_correlation": statistics.correlation(means, lengths),
        "length_reward_correlation": statistics.correlation(rewards, lengths),
        "length_auc": brute_auc([-x for x in lengths], rewards),
    }


def brute_problems(data: Sequence[Response]) -> dict[str, float]:
    """The split of r2 from each token's deviation from its problem's mean."""
    tokens = [(r.problem, v, t) for r in data for v, t in zip(r.values, r.targets, strict=True)]
    of_problem: dict[int, list[tuple[float, float]]] = {}
    for problem, v, t in tokens:
        of_problem.setdefault(problem, []).append((v, t))
    means = {
        p: tuple(map(statistics.fmean, zip(*all_, strict=True))) for p, all_ in of_problem.items()
    }
    centre = statistics.fmean(t for _, _, t in tokens)
    errors = [
        ((means[p][0] - means[p][1]) ** 2, (v - means[p][0] - t + means[p][1]) ** 2)
        for p, v, t in tokens
    ]
    spreads = [((means[p][1] - centre) ** 2, (t - means[p][1]) ** 2) for p, _, t in tokens]
    between, within = (1 - sum(e[k] for e in errors) / sum(s[k] for s in spreads) for k in (0, 1))
    return {"r2_between_problems": between, "r2_within_problems": within}


# --- every metric, independently -------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_metric_equals_brute_force(seed: int) -> None:
    data = random_responses(seed)
    expected = brute_tokens(data) | brute_responses(data) | brute_problems(data)
    assert computed(data) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_ranking_metrics_equal_brute_force_with_many_ties(levels: int) -> None:
    data = [
        response([r.values[0]], r.reward, r.problem)
        for r in random_responses(7, count=120, levels=levels)
    ]
    got, pairs = computed(data), brute_pairs(data)
    assert got["pairwise_pairs"] == len(pairs)
    assert got["pairwise_accuracy"] == pytest.approx(brute_share(pairs), abs=1e-12)
    auc = brute_auc([r.values[0] for r in data], [r.reward for r in data])
    assert got["last_token_auc"] == pytest.approx(auc, abs=1e-12)


def test_hand_example_weighs_tokens_and_responses_as_named() -> None:
    got = computed([response([0.8], 1.0), response([0.1, 0.3, 0.2], 0.0)])
    expected = {
        "tokens": 4,
        "sequences": 2,
        "mean_prediction": 1.4 / 4,
        "mse": (0.04 + 0.01 + 0.09 + 0.04) / 4,
        "mse_constant": 0.1875,
        "r2": 1 - 0.045 / 0.1875,
        "r2_within_problems": 1 - (0.09 + 0.0 + 0.04 + 0.01) / 4 / 0.1875,
        "mean_target": 0.25,
        "std_target": 0.1875**0.5,
        "ece": (0.2 + 0.1 + 0.3 + 0.2) / 4,
        "position_00": 0.45,
        "position_03": 0.3,
        "position_06": 0.2,
        "sequence/mean_prediction": 0.5,
        "sequence/std_prediction": 0.3,
        "sequence/mse": 0.04,
        "sequence/mse_constant": 0.25,
        "sequence/r2": 0.84,
        "last_token_mse": 0.04,
        "last_token_auc": 1,
        "pairwise_accuracy": 1,
        "pairwise_pairs": 1,
        "length_correlation": -1,
        "length_reward_correlation": -1,
        "length_auc": 1,
        "std_prediction": ((0.64 + 0.01 + 0.09 + 0.04) / 4 - 0.35**2) ** 0.5,
    }
    assert got == pytest.approx(expected, abs=1e-12)


def test_pairwise_uses_the_response_mean_and_last_token_auc_the_last_value() -> None:
    got = computed([response([0.9, 0.1], 1.0), response([0.2, 0.3], 0.0)])
    assert got["pairwise_accuracy"] == 1.0
    assert got["last_token_auc"] == 0.0


def test_ties_count_half() -> None:
    got = computed([response([0.4], 1.0), response([0.4], 0.0), response([0.3], 0.0)])
    assert got["pairwise_accuracy"] == 0.75
    assert got["last_token_auc"] == 0.75
    assert got["length_auc"] == 0.5


def test_pairs_need_one_problem_and_different_rewards() -> None:
    first = [response([0.9], 1.0, 1), response([0.1], 0.5, 1), response([0.2], 0.25, 1)]
    second = [response([0.5], 1.0, 2), response([0.6], 1.0, 2)]
    got = computed(first, second)
    assert got["pairwise_pairs"] == 3
    assert got["pairwise_accuracy"] == pytest.approx(2 / 3)


def test_auc_counts_reward_one_half_as_positive() -> None:
    assert computed([response([0.9], 0.5), response([0.1], 0.49)])["last_token_auc"] == 1.0


def test_large_problem_keys_are_told_apart() -> None:
    metrics, top = ValueMetrics(), 2**64 - 1
    x = np.array([0.1, 0.2, 0.3])
    keys = np.array([top, top - 1, top], np.uint64)
    metrics.add(x, x, np.ones(3, np.int64), np.array([0.0, 1.0, 1.0]), keys)
    assert metrics.compute()["pairwise_pairs"] == 1


def test_predictions_outside_the_range_fall_in_the_outer_bins_unclamped() -> None:
    metrics = measured([response([-0.5, 1.5, 1.0], 1.0)])
    curve = metrics.reliability().by_prediction
    assert curve.count.tolist() == [1.0] + [0.0] * 13 + [2.0]
    assert curve.mean_prediction[[0, 14]].tolist() == [-0.5, 1.25]
    assert metrics.compute()["ece"] == pytest.approx((1.5 + 0.5) / 3)


def test_reliability_curves_hold_means_and_leave_gaps_nan() -> None:
    reliability = measured([response([0.02, 0.5], 1.0), response([0.04], 0.0)]).reliability()
    bins, deciles = reliability.by_prediction, reliability.by_position
    assert bins.mean_prediction[[0, 7]] == pytest.approx([0.03, 0.5])
    assert bins.mean_label[[0, 7]] == pytest.approx([0.5, 1.0])
    assert deciles.count.tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert deciles.mean_label[[0, 5]].tolist() == [0.5, 1.0]
    assert np.isnan(bins.mean_prediction).sum() == 13
    assert np.isnan(deciles.mean_prediction).sum() == 8


def test_curves_taken_earlier_do_not_move_with_later_batches() -> None:
    metrics = measured([response([0.5], 1.0)])
    early = metrics.reliability()
    count_in(metrics, [response([0.5], 0.0)])
    assert early.by_position.count[0] == early.by_position.mean_label[0] == 1.0


# --- batches, ranks, order -------------------------------------------------------------------


def in_batches(data: list[Response]) -> ValueMetrics:
    return measured(data[:1], [], data[1:30], data[30:])


def in_ranks(data: list[Response]) -> ValueMetrics:
    total = measured(data[50:])
    total.merge(ValueMetrics())
    total.merge(measured(data[:20], data[20:50]))
    return total


def into_nothing(data: list[Response]) -> ValueMetrics:
    total = ValueMetrics()
    total.merge(measured(data))
    return total


def shuffled(data: list[Response]) -> ValueMetrics:
    return measured([data[i] for i in np.random.default_rng(3).permutation(len(data))])


@pytest.mark.parametrize("split", [in_batches, in_ranks, into_nothing, shuffled])
@pytest.mark.parametrize("levels", [None, 2])
def test_result_depends_on_neither_split_nor_order(
    split: Callable[[list[Response]], ValueMetrics], levels: int | None
) -> None:
    data = random_responses(11, levels=levels)
    whole, parts = measured(data), split(data)
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-12, abs=1e-14)
    for name in ("by_prediction", "by_position"):
        a, b = getattr(whole.reliability(), name), getattr(parts.reliability(), name)
        np.testing.assert_allclose(a.mean_prediction, b.mean_prediction, rtol=1e-12)
        np.testing.assert_array_equal(a.count, b.count)


def test_merge_leaves_the_other_side_and_its_future_alone() -> None:
    first, second = measured(random_responses(1)), measured(random_responses(2))
    before = second.compute()
    first.merge(second)
    after = copy.deepcopy(first).compute()
    count_in(second, random_responses(3))
    assert first.compute() == after
    assert before != second.compute()


def test_metrics_survive_the_pickling_between_ranks() -> None:
    metrics = measured(random_responses(1))
    assert pickle.loads(pickle.dumps(metrics)).compute() == metrics.compute()


def test_equal_responses_tie_wherever_they_lie() -> None:
    rng = np.random.default_rng(5)
    values = rng.random(237).tolist()
    data = []
    for i in range(40):
        filler = response(rng.random(int(rng.integers(1, 9))).tolist(), 0.0, problem=1 + i)
        data += [filler, response(values, float(i % 2))]
    got = computed(data[:31], data[31:])
    assert got["pairwise_pairs"] == 400
    assert got["pairwise_accuracy"] == 0.5


# --- problems and prompts ---------------------------------------------------------------------


def test_what_a_problem_tells_is_apart_from_what_its_solutions_add() -> None:
    """Two problems, solved in 3 of 4 cases and in 1 of 4, and predictors that know one of both."""
    rewards = [(0, 1.0), (0, 1.0), (0, 1.0), (0, 0.0), (1, 1.0), (1, 0.0), (1, 0.0), (1, 0.0)]
    mean = {0: 0.75, 1: 0.25}
    difficulty = computed([response([mean[p]], r, p) for p, r in rewards])
    assert difficulty["r2_between_problems"] == 1.0
    assert difficulty["r2_within_problems"] == 0.0
    solution = computed([response([r - mean[p] + 0.5], r, p) for p, r in rewards])
    assert solution["r2_between_problems"] == 0.0
    assert solution["r2_within_problems"] == 1.0


def test_one_problem_or_one_label_a_problem_leaves_out_its_part_of_r2() -> None:
    one = computed([response([0.2, 0.3], 1.0), response([0.1], 0.0)])
    assert "r2_between_problems" not in one
    errors = (1 / 3) ** 2 + (1 / 3 - 0.1) ** 2 + (2 / 3 - 0.1) ** 2  # less the means, .2 and 2/3
    assert one["r2_within_problems"] == pytest.approx(1 - errors / (2 / 3))
    alike = computed([response([0.2, 0.3], 1 / 3, p) for p in range(2)] + [response([0.9], 0.7, 7)])
    assert "r2_within_problems" not in alike
    assert "r2_between_problems" in alike


def _with_prompts(*parts: slice) -> ValueMetrics:
    """Values .5, .8, .1 and .4 before responses, of problems that were solved, solved, not, not."""
    values, following = np.array([0.5, 0.8, 0.1, 0.4]), np.array([0.6, 0.8, 0.0, 0.4])
    rewards = np.array([1.0, 1.0, 0.0, 0.0])
    best, following_best = np.array([0.5, 0.5, 0.5, 0.5]), np.array([0.6, 0.4, 0.4, 0.4])
    metrics = measured([response([0.5], 1.0)])
    for part in parts:
        metrics.add_prompts(
            *(x[part] for x in (values, following, rewards, rewards)),
            (best[part], following_best[part]),
        )
    return metrics


def test_values_before_responses_by_hand() -> None:
    whole, parts = _with_prompts(slice(0, 4)), _with_prompts(slice(0, 1))
    parts.merge(_with_prompts(slice(1, 4)))
    got = whole.compute()
    assert got["prompt/mse"] == pytest.approx((0.25 + 0.04 + 0.01 + 0.16) / 4)
    assert got["prompt/mse_constant"] == got["prompt/mse_optimal"] == 0.25
    assert got["prompt/r2"] == pytest.approx(1 - 0.115 / 0.25)
    assert got["prompt/auc"] == 1.0
    assert got["prompt/mean_prediction"] == pytest.approx(0.45)
    assert got["prompt/first_step"] == pytest.approx((0.1 - 0.1) / 4)
    assert got["prompt/distance_to_optimal"] == pytest.approx(((0.09 + 0.16 + 0.01) / 4) ** 0.5)
    assert got["prompt/next_distance_to_optimal"] == pytest.approx(((0.16 + 0.16) / 4) ** 0.5)
    together = {k: v for k, v in parts.compute().items() if k.startswith("prompt/")}
    assert together == pytest.approx({k: v for k, v in got.items() if k.startswith("prompt/")})


def test_an_optimum_that_is_not_known_for_some_prompt_is_left_out() -> None:
    metrics, x = _with_prompts(slice(0, 4)), np.zeros(1)
    metrics.add_prompts(x, x, x, x, (np.array([np.nan]), x))
    names = ("prompt/mse_optimal", "prompt/distance_to_optimal", "prompt/next_distance_to_optimal")
    assert not set(names) & metrics.compute().keys()
    assert "prompt/mse" in metrics.compute()


def test_values_before_responses_leave_those_after_their_tokens_alone() -> None:
    apart = {k: v for k, v in _with_prompts(slice(0, 4)).compute().items() if "prompt/" not in k}
    assert apart == computed([response([0.5], 1.0)])


def test_a_checkpoint_s_metrics_from_before_prompts_go_on() -> None:
    metrics = measured(random_responses(1))
    old = copy.copy(vars(metrics))
    del old["_prompts"]
    restored = ValueMetrics.__new__(ValueMetrics)
    restored.__setstate__(old)
    restored.merge(measured(random_responses(2)))
    assert restored.compute() == measured(random_responses(1), random_responses(2)).compute()


def test_prompts_that_are_not_finite_or_too_few_are_refused() -> None:
    x, metrics = np.zeros(2), measured([response([0.5], 1.0)])
    with pytest.raises(ValueError, match="1 of 2 next_value are NaN"):
        metrics.add_prompts(x, np.array([0.0, np.nan]), x, x)
    with pytest.raises(ValueError, match="reward has shape"):
        metrics.add_prompts(x, x, x, np.zeros(3))
    with pytest.raises(ValueError, match="next_optimal has shape"):
        metrics.add_prompts(x, x, x, x, (x, np.zeros(3)))
    assert not [name for name in metrics.compute() if name.startswith("prompt/")]


# --- special predictors ----------------------------------------------------------------------


def test_constant_prediction_has_no_spread_over_a_million_tokens() -> None:
    metrics, n = ValueMetrics(), 250_000
    rewards = np.tile([0.0, 1.0], 125)
    lengths = np.full(250, n // 250)
    for _ in range(4):
        values = np.full(n, 0.37, np.float32)
        problems = np.zeros(250, np.int64)
        metrics.add(values, np.repeat(rewards, lengths), lengths, rewards, problems)
    got = metrics.compute()
    assert 0 <= got["std_prediction"] < 1e-6
    assert 0 <= got["sequence/std_prediction"] < 1e-6
    assert got["mean_prediction"] == pytest.approx(float(np.float32(0.37)), abs=1e-12)


@pytest.mark.parametrize("constant", [0.1, 0.37, 1 / 3])
def test_constant_predictor_ties_everywhere_and_correlates_with_nothing(constant: float) -> None:
    data = [response([constant] * len(r.values), r.reward, r.problem) for r in random_responses(4)]
    got = computed(data[:33], data[33:])
    assert got["pairwise_accuracy"] == 0.5
    assert got["last_token_auc"] == 0.5
    assert got["std_prediction"] == 0.0
    assert "length_correlation" not in got
    assert "length_reward_correlation" in got


def test_best_constant_reaches_mse_constant_and_r2_zero() -> None:
    data = random_responses(6)
    mean = statistics.fmean(t for r in data for t in r.targets)
    got = computed(
        [Response((mean,) * len(r.values), r.targets, r.reward, r.problem) for r in data]
    )
    assert got["mse"] == pytest.approx(got["mse_constant"], rel=1e-12)
    assert got["r2"] == pytest.approx(0, abs=1e-12)


def test_perfect_predictor_is_perfect_in_every_metric() -> None:
    data = [response([r.reward] * len(r.values), r.reward, r.problem) for r in random_responses(8)]
    got = computed(data)
    for name in ("r2", "sequence/r2", "last_token_auc", "pairwise_accuracy"):
        assert got[name] == 1.0, name
    for name in ("mse", "sequence/mse", "last_token_mse"):
        assert got[name] == 0.0, name
    assert got["ece"] == pytest.approx(0, abs=1e-12)
    assert got["length_correlation"] == pytest.approx(got["length_reward_correlation"])


def test_optimal_predictor_reaches_the_achievable_share_one() -> None:
    right, wrong = [0.5, 0.5, 1.0], [0.5, 0.5, 0.0]
    got = computed([response(right, 1.0, 0, right)], [response(wrong, 0.0, 0, wrong)])
    assert got["achievable_share"] == 1.0
    assert got["mse_optimal"] == got["mse"] == pytest.approx(4 * 0.25 / 6)
    assert got["std_optimal"] == pytest.approx((2 * 0.25 / 6) ** 0.5)


def test_half_of_the_way_to_the_optimum_is_half_the_achievable_share() -> None:
    step = 1 - 0.5**0.5  # leaves half the squared error of the last token
    right, wrong = [0.5, 0.5 + step / 2], [0.5, 0.5 - step / 2]
    data = [response(right, 1.0, 0, [0.5, 1.0]), response(wrong, 0.0, 0, [0.5, 0.0])]
    assert computed(data)["achievable_share"] == pytest.approx(0.5)


# --- undefined cases -------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [(), ([],), ([], [])])
def test_without_data_only_counts_are_given(batches: tuple[list[Response], ...]) -> None:
    assert computed(*batches) == dict.fromkeys(COUNTS, 0.0)
    assert measured(*batches).reliability().by_position.count.sum() == 0


def test_one_class_leaves_out_r2_aucs_and_pairs() -> None:
    got = computed(*([response([0.2 * i, 0.3] * i, 0.1)] for i in range(1, 4)))
    missing = {"r2", "sequence/r2", "last_token_auc", "length_auc", "pairwise_accuracy"}
    assert not (missing | {"length_reward_correlation"}) & got.keys()
    assert got["mse_constant"] == 0.0
    assert got["pairwise_pairs"] == 0.0
    assert "length_correlation" in got


def test_equal_lengths_leave_out_length_correlations() -> None:
    got = computed([response([0.1, 0.2], 1.0), response([0.3, 0.9], 0.0)])
    assert not {"length_correlation", "length_reward_correlation"} & got.keys()
    assert got["length_auc"] == 0.5


def test_positions_without_tokens_are_left_out() -> None:
    got = computed([response([0.1, 0.2], 1.0)])
    assert {name for name in got if name.startswith("position")} == {"position_00", "position_05"}


def test_optimal_metrics_need_an_optimum_for_every_token() -> None:
    known = [response([0.5, 0.9], 1.0, 0, [0.5, 1.0])]
    unknown = [response([0.5], 0.0)]
    names = {"mse_optimal", "std_optimal", "achievable_share"}
    assert not names & computed(known, unknown).keys()
    assert not names & computed(unknown).keys()
    assert names - computed(known).keys() == {"achievable_share"}


def test_optimum_no_better_than_a_constant_leaves_out_the_achievable_share() -> None:
    # Rounding alone puts this constant's mse below the variance of the targets.
    constant = [response([0.2], float(i < 4), 0, [0.8]) for i in range(5)]
    assert "achievable_share" not in computed(constant)
    worse = [response([0.2], float(i), 0, [1.0 - i]) for i in range(2)]
    assert "achievable_share" not in computed(worse)


@pytest.mark.parametrize("seed", range(5))
def test_no_metric_is_ever_nan(seed: int) -> None:
    for count in (1, 2, 3):
        assert np.isfinite(list(computed(random_responses(seed, count, levels=1)).values())).all()


# --- refused input ---------------------------------------------------------------------------


def test_values_that_are_not_finite_are_refused_with_their_number() -> None:
    metrics = measured([response([0.5], 1.0)])
    before = metrics.compute()
    with pytest.raises(ValueError, match="3 of 5 values are NaN or infinite"):
        count_in(metrics, [response([np.nan, 0.1, np.inf], 1.0), response([-np.inf, 0.2], 0.0)])
    assert metrics.compute() == before


@pytest.mark.parametrize("name", ["targets", "rewards", "optimal"])
def test_labels_that_are_not_finite_are_refused(name: str) -> None:
    fields = {key: np.zeros(1) for key in ("values", "targets", "rewards", "optimal")}
    fields[name] = np.array([np.nan])
    with pytest.raises(ValueError, match=f"1 of 1 {name}"):
        ValueMetrics().add(**fields, lengths=np.array([1]), problems=np.array([0]))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([1, 1], "values has shape"), ([3, 0], "at least 1"), ([3], "rewards has shape")],
)
def test_lengths_that_do_not_fit_are_refused(lengths: list[int], message: str) -> None:
    x = np.zeros(3)
    with pytest.raises(ValueError, match=message):
        ValueMetrics().add(x, x, np.array(lengths), np.zeros(2), np.zeros(2, np.int64))
