"""The constant-predictor alarm: a critic that has learned nothing looks like a low loss."""

from __future__ import annotations

from collections.abc import Mapping

R2_LIMIT = 0.02
STD_SHARE = 1 / 3  # of the labels' standard deviation


def is_constant(metrics: Mapping[str, float]) -> bool:
    """Whether an evaluation's predictions are hardly better and hardly wider than a constant."""
    narrow = metrics["std_prediction"] < STD_SHARE * metrics["std_target"]
    return metrics["r2"] <= R2_LIMIT and narrow


class ConstantPredictorAlarm:
    """Sounds once, when `patience` evaluations in a row after warm-up look constant."""

    def __init__(self, patience: int, warmup_steps: int) -> None:
        self.patience, self.warmup_steps = patience, warmup_steps
        self._in_a_row = 0
        self._sounded = False

    def check(self, step: int, metrics: Mapping[str, float], n: int) -> str | None:
        """The alarm's text at the evaluation that sets it off, else None.

        `n` is the number of unfrozen blocks; `metrics` are an evaluation's r2, std_prediction and
        std_target: without variance in the labels nothing can be said.
        """
        if step <= self.warmup_steps or "r2" not in metrics or self._sounded:
            return None
        self._in_a_row = self._in_a_row + 1 if is_constant(metrics) else 0
        if self._in_a_row < self.patience:
            return None
        self._sounded = True
        return _alarm_text(step, metrics, n)


def _alarm_text(step: int, metrics: Mapping[str, float], n: int) -> str:
    advice = (
        "a frozen trunk is a linear probe: set training.num_unfrozen_layers to 2 or 4"
        if n == 0
        else "raise or lower training.learning_rate (by 3x), train longer, or unfreeze more blocks"
    )
    return (
        f"CONSTANT PREDICTOR at step {step}: std of predictions {metrics['std_prediction']:.3f} "
        f"against {metrics['std_target']:.3f} of the labels, R2 {metrics['r2']:.3f}. Try: {advice}."
    )
