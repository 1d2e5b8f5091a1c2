"""The constant-predictor alarm sounds once, late enough, and only when it should."""

from __future__ import annotations

from job.run.alarm import ConstantPredictorAlarm

CONSTANT = {"r2": 0.01, "std_prediction": 0.08, "std_target": 0.48}
LEARNED = {"r2": 0.3, "std_prediction": 0.25, "std_target": 0.48}
WRONG_BUT_SPREAD = {"r2": -0.4, "std_prediction": 0.3, "std_target": 0.48}


def _sound(evaluations: list[dict[str, float]], patience: int = 3, n: int = 0) -> list[str | None]:
    alarm = ConstantPredictorAlarm(patience, warmup_steps=10)
    return [alarm.check(20 + i, figures, n) for i, figures in enumerate(evaluations)]


def test_it_sounds_once_after_enough_constant_evaluations_in_a_row() -> None:
    heard = _sound([CONSTANT] * 6)
    assert [text is not None for text in heard] == [False, False, True, False, False, False]


def test_one_good_evaluation_starts_the_count_again() -> None:
    heard = _sound([CONSTANT, CONSTANT, LEARNED, CONSTANT, CONSTANT])
    assert heard == [None] * 5


def test_it_is_silent_during_warm_up() -> None:
    alarm = ConstantPredictorAlarm(1, warmup_steps=10)
    assert alarm.check(10, CONSTANT, 0) is None
    assert alarm.check(11, CONSTANT, 0) is not None


def test_a_bad_predictor_that_is_not_constant_does_not_set_it_off() -> None:
    assert _sound([WRONG_BUT_SPREAD] * 5) == [None] * 5


def test_labels_without_variance_say_nothing() -> None:
    assert _sound([{"std_prediction": 0.0, "std_target": 0.0}] * 5) == [None] * 5


def test_it_says_what_was_seen_and_what_to_try() -> None:
    frozen = _sound([CONSTANT], patience=1)[0]
    unfrozen = _sound([CONSTANT], patience=1, n=2)[0]
    assert frozen is not None
    assert unfrozen is not None
    assert "std of predictions 0.080 against 0.480" in frozen
    assert "training.num_unfrozen_layers" in frozen
    assert "training.learning_rate" in unfrozen
