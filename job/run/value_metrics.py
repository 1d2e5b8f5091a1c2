"""Quality of a critic's predictions, from sums that add over batches and ranks.

Notation: b sequences of a batch, n response tokens of all of them together, sequence after
sequence. Predictions, targets and rewards are in reward units, [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from job.common.schema import RIGHT

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]
_Doubles = npt.NDArray[np.float64]
_Records = npt.NDArray[np.void]
_Metrics = dict[str, float | None]

_BINS = 15
_DECILES = 10
_ROUNDING = 1e-12  # of a variance, beside the whole
_PROMPT = np.dtype(
    [
        (name, np.float64)
        for name in ("value", "target", "next_value", "optimal", "next_optimal", "reward")
    ]
)
_RECORD = np.dtype(
    [
        ("value", np.float64),
        ("target", np.float64),
        ("last_value", np.float64),
        ("last_target", np.float64),
        ("reward", np.float64),
        ("length", np.float64),
        ("problem", np.uint64),
    ]
)


@dataclass(frozen=True)
class Curve:
    """Token-weighted means over k groups of tokens; a group without tokens has NaN means.

    Attributes:
        mean_prediction: [k], reward units.
        mean_label: [k], mean target, reward units.
        count: [k], tokens.
    """

    mean_prediction: npt.NDArray[np.float64]
    mean_label: npt.NDArray[np.float64]
    count: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reliability:
    """Curves for plots.

    Attributes:
        by_prediction: k = 15 equal bins of the prediction, clamped into [0, 1].
        by_position: k = 10 deciles of the response; token i of m falls in floor(10 i / m).
    """

    by_prediction: Curve
    by_position: Curve


class ValueMetrics:
    """Accumulates predictions over batches and ranks; every metric comes from global sums.

    The result is the same up to rounding however the sequences are ordered, split into batches
    and merged.
    """

    def __init__(self) -> None:
        self._tokens = _Fit()
        self._optimal = _Fit()
        self._by_prediction = np.zeros((3, _BINS))
        self._by_position = np.zeros((3, _DECILES))
        self._records: list[_Records] = []
        self._prompts: list[_Records] = []
        self._targets = _Fit()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Checkpoints of 0.1.0 hold metrics without prompts."""
        self.__dict__ = vars(ValueMetrics()) | state

    def add(
        self,
        values: FloatArray,
        targets: FloatArray,
        lengths: IntArray,
        rewards: FloatArray,
        problems: IntArray,
        optimal: FloatArray | None = None,
    ) -> None:
        """Count one batch in; b may be 0.

        Args:
            values: [n] predicted values.
            targets: [n] value targets.
            lengths: [b] response tokens per sequence, at least 1 each; their sum is n.
            rewards: [b] rewards.
            problems: [b] problem keys, 64 bits; sequences with equal key answer the same problem.
            optimal: [n] optimal values, where the data's origin makes them known.

        Raises:
            ValueError: shapes disagree, a length is below 1, or a number is not finite. Nothing
                of the batch is counted then.
        """
        per_token = {"values": values, "targets": targets}
        if optimal is not None:
            per_token["optimal"] = optimal
        _check_batch(per_token, lengths, {"rewards": rewards, "problems": problems})
        doubles = {name: np.asarray(array, np.float64) for name, array in per_token.items()}
        self._add_tokens(**doubles, lengths=lengths)
        self._records.append(
            _records(doubles["values"], doubles["targets"], lengths, rewards, problems)
        )

    def add_prompts(
        self,
        values: FloatArray,
        next_values: FloatArray,
        targets: FloatArray,
        rewards: FloatArray,
        optimal: tuple[FloatArray, FloatArray] | None = None,
    ) -> None:
        """Count the values before responses in, of m sequences that have one.

        Args:
            values: [m] predicted values after the last token before a response.
            next_values: [m] those after the response's first token.
            targets: [m] value targets of `values`.
            rewards: [m] rewards.
            optimal: twice [m], the optimal values of both; NaN where they are not known.

        Raises:
            ValueError: shapes disagree, or a number is not finite. Nothing is counted then.
        """
        known = {"value": values, "next_value": next_values, "target": targets, "reward": rewards}
        best = {} if optimal is None else {"optimal": optimal[0], "next_optimal": optimal[1]}
        for name, array in (known | best).items():
            _check_shape(name, array, values.shape)
        for name, array in known.items():
            _check_finite(name, array)
        prompts = np.full(values.size, np.nan, _PROMPT)
        for name, array in (known | best).items():
            prompts[name] = array
        self._prompts.append(prompts)

    def add_targets(self, values: FloatArray, targets: FloatArray) -> None:
        """Count values [m] in at positions for which rows have targets [m] of their own."""
        self._targets += _Fit.of(np.asarray(values, np.float64), np.asarray(targets, np.float64))

    def _add_tokens(
        self,
        values: _Doubles,
        targets: _Doubles,
        lengths: IntArray,
        optimal: _Doubles | None = None,
    ) -> None:
        self._tokens += _Fit.of(values, targets)
        if optimal is not None:
            self._optimal += _Fit.of(optimal, targets)
        bins = np.minimum(np.clip(values, 0, 1) * _BINS, _BINS - 1).astype(np.int64)
        self._by_prediction += _group_sums(bins, _BINS, values, targets)
        self._by_position += _group_sums(_deciles(lengths), _DECILES, values, targets)

    def merge(self, other: ValueMetrics) -> None:
        """Count in everything that `other` has counted; `other` stays as it is."""
        self._tokens += other._tokens
        self._optimal += other._optimal
        self._by_prediction += other._by_prediction
        self._by_position += other._by_position
        self._records += other._records
        self._prompts += other._prompts
        self._targets += other._targets

    def compute(self) -> dict[str, float]:
        """Every metric that is defined; an undefined one is left out, none is NaN.

        Undefined are: everything but the counts (tokens, sequences, pairwise_pairs) without
        data; r2 without variance of the targets; a correlation without variance of either side;
        an AUC without both classes; pairwise_accuracy without a pair; position_0k without a
        token there; the metrics on optimal values unless every token came with one;
        achievable_share unless the optimum varies and beats the best constant.

        Weights: tokens weigh the same, except under "sequence/", where responses do and a
        response's value and target are the means over its tokens. Variances are population
        variances.

        Formulas: r2 is the explained variance, 1 - mse / mse_constant; mse_constant is the mse
        of the best constant, so the variance of the targets. ece is the expected calibration
        error over 15 equal bins (Naeini et al. 2015, doi:10.1609/aaai.v29i1.9602). last_token_auc
        and length_auc are Mann and Whitney's U over its maximum (1947,
        doi:10.1214/aoms/1177730491), positive from reward 0.5 on, ties counting half, for the
        last value and for minus the length. pairwise_accuracy is the share of a problem's pairs
        of different reward whose higher reward has the higher response value, ties counting
        half: the accuracy of Bradley and Terry's model (1952, doi:10.2307/2334029) on them.
        achievable_share is (mse_constant - mse) / (mse_constant - mse_optimal).

        r2_between_problems and r2_within_problems split r2: of the means of each problem's tokens
        (how difficult it is), and of what is left without them (what a solution adds). Errors and
        variances of both parts add up to mse and mse_constant.

        Under "targets/" stands how values meet the targets that rows have at positions, each
        weighing the same.

        Under "prompt/" stand the values before responses, each sequence weighing the same: auc is
        that of the reward, first_step the mean change to the value after the first token (0 for
        values that are right and undiscounted), and the distances to optimal values, there and
        after the first token, are roots of mean squares.
        """
        records = np.concatenate([np.empty(0, _RECORD), *self._records])
        metrics: _Metrics = {
            "tokens": float(self._tokens.prediction.count),
            "sequences": float(records.size),
            **_pairwise_metrics(records),
        }
        if records.size:
            metrics |= self._token_metrics() | self._optimal_metrics()
            metrics |= _response_metrics(records) | _length_metrics(records)
            metrics |= _problem_metrics(records, self._tokens)
            metrics |= self._target_metrics()
            metrics |= _prompt_metrics(np.concatenate([np.empty(0, _PROMPT), *self._prompts]))
        return {name: value for name, value in metrics.items() if value is not None}

    def reliability(self) -> Reliability:
        """Calibration and position curves over all tokens counted so far."""
        return Reliability(_curve(self._by_prediction), _curve(self._by_position))

    def _token_metrics(self) -> _Metrics:
        count, predictions, labels = self._by_prediction
        positions = self.reliability().by_position.mean_prediction.tolist()
        return {
            **self._tokens.metrics(),
            "mean_target": self._tokens.target.mean,
            "std_target": math.sqrt(self._tokens.target.variance),
            "ece": float(np.abs(predictions - labels).sum() / count.sum()),
            **{f"position_{k:02}": None if math.isnan(x) else x for k, x in enumerate(positions)},
        }

    def _target_metrics(self) -> _Metrics:
        fit = self._targets
        if not fit.target.count:
            return {}
        found = {"count": float(fit.target.count)} | fit.metrics()
        return {f"targets/{name}": value for name, value in found.items()}

    def _optimal_metrics(self) -> _Metrics:
        tokens, optimal = self._tokens, self._optimal
        if optimal.prediction.count < tokens.prediction.count:
            return {}
        # A constant optimum beats the best constant by nothing but rounding.
        gain = tokens.target.variance - optimal.mse if optimal.prediction.variance else 0.0
        return {
            "mse_optimal": optimal.mse,
            "std_optimal": math.sqrt(optimal.prediction.variance),
            "achievable_share": _ratio(tokens.target.variance - tokens.mse, gain),
        }


def metric_names() -> list[str]:
    """The names of all metrics, as data that defines each of them gives them."""
    metrics, n = ValueMetrics(), _DECILES
    values = np.linspace(0, 1, 3 * n)
    metrics.add(
        values,
        np.repeat([0.0, 1.0], [n, 2 * n]),
        np.array([n, 2 * n]),
        np.array([0.0, 1.0]),
        np.zeros(2, np.uint64),
        values / 2 + 0.25,
    )
    two = np.array([0.25, 0.75])
    metrics.add_prompts(two, two, np.array([0.0, 1.0]), np.array([0.0, 1.0]), (two, two))
    metrics.add_targets(two, np.array([0.0, 1.0]))
    return [*metrics.compute()]


@dataclass(frozen=True)
class _Moments:
    """Count, mean and sum of squared deviations from the mean.

    They add by the formulas of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances" (1979, Stanford STAN-CS-79-773), which lose nothing
    to cancellation where the spread is small beside the mean. Equal numbers have variance 0
    exactly, however they are split.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, x: _Doubles) -> _Moments:
        if not x.size:
            return cls()
        shifted = x - x[0]  # exactly 0 for equal numbers, where x - mean(x) need not be
        offset = shifted.mean()
        return cls(x.size, float(x[0] + offset), float(np.square(shifted - offset).sum()))

    def __add__(self, other: _Moments) -> _Moments:
        count = self.count + other.count
        share = other.count / max(count, 1)
        delta = other.mean - self.mean
        return _Moments(
            count,
            self.mean + delta * share,
            self.squares + other.squares + delta**2 * self.count * share,
        )

    @property
    def variance(self) -> float:
        return self.squares / self.count


@dataclass(frozen=True)
class _Fit:
    """How well predictions match their targets."""

    prediction: _Moments = _Moments()
    target: _Moments = _Moments()
    squared_error: float = 0.0

    @classmethod
    def of(cls, predictions: _Doubles, targets: _Doubles) -> _Fit:
        error = float(np.square(predictions - targets).sum())
        return cls(_Moments.of(predictions), _Moments.of(targets), error)

    def __add__(self, other: _Fit) -> _Fit:
        return _Fit(
            self.prediction + other.prediction,
            self.target + other.target,
            self.squared_error + other.squared_error,
        )

    @property
    def mse(self) -> float:
        return self.squared_error / self.prediction.count

    def metrics(self) -> _Metrics:
        constant = self.target.variance
        return {
            "mean_prediction": self.prediction.mean,
            "std_prediction": math.sqrt(self.prediction.variance),
            "mse": self.mse,
            "mse_constant": constant,
            "r2": _ratio(constant - self.mse, constant),
        }


def _check_batch(
    per_token: dict[str, FloatArray],
    lengths: IntArray,
    per_sequence: dict[str, npt.NDArray[Any]],
) -> None:
    if lengths.size and lengths.min() < 1:
        raise ValueError(f"lengths must be at least 1, not {lengths.min()}")
    shapes = {name: (int(lengths.sum()),) for name in per_token}
    shapes |= dict.fromkeys(per_sequence, lengths.shape)
    for name, array in (per_token | per_sequence).items():
        _check_shape(name, array, shapes[name])
        _check_finite(name, array)


def _check_shape(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, not {shape}")


def _check_finite(name: str, array: npt.NDArray[Any]) -> None:
    if bad := np.count_nonzero(~np.isfinite(array)):
        raise ValueError(f"{bad} of {array.size} {name} are NaN or infinite")


def _records(
    values: _Doubles,
    targets: _Doubles,
    lengths: IntArray,
    rewards: FloatArray,
    problems: IntArray,
) -> _Records:
    """What the per-response metrics need of each sequence, [b]."""
    last = np.cumsum(lengths) - 1
    records = np.empty(lengths.size, _RECORD)
    records["value"] = _response_means(values, lengths)
    records["target"] = _response_means(targets, lengths)
    records["last_value"] = values[last]
    records["last_target"] = targets[last]
    records["reward"] = rewards
    records["length"] = lengths
    records["problem"] = problems.astype(np.uint64)
    return records


def _response_means(x: _Doubles, lengths: IntArray) -> _Doubles:
    """Mean of x, [n], over each response, [b]."""
    starts = np.cumsum(lengths) - lengths
    # Shifted by its first number, a constant response keeps it exactly: ties stay ties.
    first = x[starts]
    sums: _Doubles = np.add.reduceat(x - np.repeat(first, lengths), starts)
    means: _Doubles = first + sums / lengths
    return means


def _deciles(lengths: IntArray) -> npt.NDArray[np.int64]:
    """Decile of each token in its response, [n]."""
    starts = np.cumsum(lengths) - lengths
    index = np.arange(lengths.sum(), dtype=np.int64) - np.repeat(starts, lengths)
    return index * _DECILES // np.repeat(lengths, lengths)


def _group_sums(
    group: npt.NDArray[np.int64], groups: int, values: _Doubles, targets: _Doubles
) -> _Doubles:
    """Count, sum of values and sum of targets of each group of tokens, [3, groups]."""
    weights = (np.ones_like(values), values, targets)
    return np.stack([np.bincount(group, weight, groups) for weight in weights])


def _curve(sums: _Doubles) -> Curve:
    count, predictions, labels = sums
    divisor = np.where(count > 0, count, np.nan)
    return Curve(predictions / divisor, labels / divisor, count.copy())


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


def _response_metrics(records: _Records) -> _Metrics:
    fit = _Fit.of(records["value"], records["target"])
    last = _Fit.of(records["last_value"], records["last_target"])
    return {
        **{f"sequence/{name}": value for name, value in fit.metrics().items()},
        "last_token_mse": last.mse,
        "last_token_auc": _auc(records["last_value"], records["reward"] >= RIGHT),
    }


def _problem_metrics(records: _Records, tokens: _Fit) -> _Metrics:
    """r2 of the means of problems, and of what is left without them."""
    problem = _ranks(records["problem"])
    weight = np.bincount(problem, records["length"])
    value, target = (
        np.bincount(problem, records["length"] * records[name]) / weight
        for name in ("value", "target")
    )
    error = float(weight @ np.square(value - target) / weight.sum())
    spread = float(weight @ np.square(target - tokens.target.mean) / weight.sum())
    least = _ROUNDING * tokens.target.variance
    within = tokens.target.variance - spread
    return {
        "r2_between_problems": 1 - error / spread if spread > least else None,
        "r2_within_problems": 1 - (tokens.mse - error) / within if within > least else None,
    }


def _prompt_metrics(prompts: _Records) -> _Metrics:
    if not prompts.size:
        return {}
    fit = _Fit.of(prompts["value"], prompts["target"])
    metrics = fit.metrics() | {
        "auc": _auc(prompts["value"], prompts["reward"] >= RIGHT),
        "first_step": float((prompts["next_value"] - prompts["value"]).mean()),
    }
    if not np.isnan(prompts["optimal"]).any():
        metrics |= {
            "mse_optimal": _Fit.of(prompts["optimal"], prompts["target"]).mse,
            "distance_to_optimal": _distance(prompts["value"], prompts["optimal"]),
            "next_distance_to_optimal": _distance(prompts["next_value"], prompts["next_optimal"]),
        }
    return {f"prompt/{name}": value for name, value in metrics.items()}


def _distance(x: _Doubles, y: _Doubles) -> float:
    """Root of the mean square of the difference."""
    return math.sqrt(float(np.square(x - y).mean()))


def _length_metrics(records: _Records) -> _Metrics:
    length, reward = records["length"], records["reward"]
    return {
        "length_correlation": _pearson(records["value"], length),
        "length_reward_correlation": _pearson(reward, length),
        "length_auc": _auc(-length, reward >= RIGHT),
    }


def _pairwise_metrics(records: _Records) -> _Metrics:
    """Pairs of one problem with different reward.

    Two different reward levels agree in their binary digits down to the first that differs. So
    one two-class count per digit, inside groups of equal problem and equal higher digits, meets
    every pair exactly once.
    """
    score, level, problem = (_ranks(records[name]) for name in ("value", "reward", "problem"))
    won, pairs = 0.0, 0.0
    for digit in range(int(level.max(initial=0)).bit_length()):
        group = _ranks(problem * (level.max() + 1) + (level >> (digit + 1)))
        digit_won, digit_pairs = _won_pairs(score, (level >> digit) % 2 == 1, group)
        won, pairs = won + digit_won, pairs + digit_pairs
    return {"pairwise_accuracy": _ratio(won, pairs), "pairwise_pairs": pairs}


def _pearson(x: _Doubles, y: _Doubles) -> float | None:
    mx, my = _Moments.of(x), _Moments.of(y)
    covariance = float(((x - mx.mean) * (y - my.mean)).sum())
    return _ratio(covariance, math.sqrt(mx.squares * my.squares))


def _auc(score: _Doubles, positive: npt.NDArray[np.bool_]) -> float | None:
    one_group = np.zeros(score.size, np.int64)
    return _ratio(*_won_pairs(_ranks(score), positive, one_group))


def _ranks(x: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Dense ranks from 0: equal numbers share one."""
    return np.unique(x, return_inverse=True)[1].astype(np.int64)


def _won_pairs(
    score: npt.NDArray[np.int64], high: npt.NDArray[np.bool_], group: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """Pairs of a high and a low element of one group: U of Mann and Whitney, and their number.

    Args:
        score, group: [m] dense ranks.
        high: [m] which class the element belongs to.

    Returns:
        Pairs in which the high element has the higher score, ties counting half; all pairs.
    """
    width = score.max() + 1
    ties, tie = np.unique(group * width + score, return_inverse=True)
    highs = np.bincount(tie[high], minlength=ties.size)
    lows = np.bincount(tie[~high], minlength=ties.size)
    _, first, owner = np.unique(ties // width, return_index=True, return_inverse=True)
    below = np.cumsum(lows) - lows
    won = highs * (below - below[first][owner] + lows / 2)
    return float(won.sum()), float((highs * np.bincount(owner, lows)[owner]).sum())
