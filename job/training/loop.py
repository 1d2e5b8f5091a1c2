"""The training loop: steps, evaluations, checkpoints, and what happens when steps go wrong."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping

import numpy as np

from job.common.errors import InputError, Stopped, Superseded
from job.common.progress import progress
from job.run.metrics_log import Tracker, Window
from job.run.value_metrics import ValueMetrics
from job.training.attempt import Attempt
from job.training.checkpoint import Checkpoints, SaveError
from job.training.data import CriticData
from job.training.learner import ADVICE, Learner, StepResult
from job.training.machine import product_rate
from job.training.state import TrainingState

LAST_SAVE_PAUSES = (1, 10, 60)  # seconds between attempts to save the end of a training
_log = logging.getLogger("job.train")


class Training:
    """The loop of one attempt: from `state` to the last step."""

    def __init__(
        self,
        attempt: Attempt,
        learner: Learner,
        data: CriticData,
        state: TrainingState,
        tracker: Tracker,
        checkpoints: Checkpoints,
    ) -> None:
        self.config, self.learner, self.data, self.state = attempt.config, learner, data, state
        self.tracker, self.checkpoints = tracker, checkpoints
        self.agreement, self.recorder = attempt.agreement, attempt.recorder
        self._run, self._world = attempt.run, attempt.world
        self._evaluated: dict[str, float] = {}  # the evaluation of the current step
        self._note = ""
        # that saving has held up training, and evaluating, since the last log line
        self._save_seconds = self._evaluation_seconds = 0.0
        self._passed_over: list[int] = self._world.main_decides(self._run.bad_steps)
        checkpoints.logs_written = tracker.flush
        if learner.cache is not None:
            checkpoints.states_written = learner.cache.commit

    def run(self) -> None:
        """Train to the last step and save it.

        Raises:
            Stopped: asked to stop; the last complete step is saved.
            SaveError: the last state cannot be saved.
            InputError: too many steps in a row were not finite.
        """
        try:
            last = self.config.training.max_steps
            with self.agreement.watchdog.watching(), progress("training", last) as advance:
                if self.state.unfinished is not None:
                    self._finish_step()
                while self.state.step < last:
                    self._step()
                    advance(self.state.step, self._note)
        except Stopped:
            self._save_now()
            raise
        except Superseded:
            self.checkpoints.wait()  # it takes back what it has begun to write
            raise
        self._save_the_end()

    def _step(self) -> None:
        state, training = self.state, self.config.training
        step = state.step + 1
        result = _PASSED_OVER if step in self._passed_over else self._learn_from(step - 1)
        state.step = step
        if not self._may_go_on(result):
            self._go_back(result)
            return
        metrics = _step_metrics(result, state)
        last = training.max_steps
        if step % self.config.logging.every_steps == 0 or step == last:
            metrics |= self._window_metrics()
        # part of the state until its evaluation is made: who is stopped in it goes on with it
        state.unfinished = metrics
        self._finish_step()

    def _learn_from(self, step: int) -> StepResult:
        """Optimizer step `step` (from 0), in the window of the next log line."""
        window, training, began = self.state.window, self.config.training, time.monotonic()
        if self.learner.cache is not None:
            packer, size = self.data.train, training.batch_size
            self.learner.cache.enter(step, packer, size, training.seed)
        batches = self.data.train.step(step, training.batch_size, training.seed)
        result = self.learner.step(step, batches, window.metrics, self.agreement.all_reduce)
        window.add(batches, time.monotonic() - began)
        return result

    def _finish_step(self) -> None:
        """Evaluate where it is due, write the step's metrics, save where it is due."""
        state, metrics = self.state, self.state.unfinished
        assert metrics is not None
        due = state.step % self.config.evaluation.every_steps == 0
        self._evaluated = {}
        if (due or state.step == self.config.training.max_steps) and not state.bad_steps:
            self._evaluated = self._evaluate()
        self.tracker.metrics(state.step, metrics | self._evaluated)
        state.unfinished = None
        began = time.monotonic()
        with self.recorder.phase("save"):
            self.checkpoints.save_if_due(self.learner, state, self._evaluated)
        self._save_seconds += time.monotonic() - began

    def _window_metrics(self) -> dict[str, float]:
        """Metrics since the last log line; a new window begins."""
        state = self.state
        figures = self.learner.merged(state.window.metrics).compute()
        speed = state.window.telemetry(self._world)
        if self.config.logging.product_rate:
            speed["product_rate"] = product_rate(self._world.device)
        speed["save_seconds"], self._save_seconds = self._save_seconds, 0.0
        if self._evaluation_seconds:
            speed["evaluation_seconds"], self._evaluation_seconds = self._evaluation_seconds, 0.0
        speed |= self._cache_telemetry(speed)
        memory = {"memory_bytes": self.recorder.peak_bytes(), **self.recorder.telemetry()}
        self.tracker.telemetry(state.step, speed | memory)
        self._run.set_status(step=state.step)
        state.window = Window()
        self._note = _note(figures, speed)
        return _prefixed("value/", figures)

    def _cache_telemetry(self, speed: Mapping[str, float]) -> dict[str, float]:
        """Which share of states was read; whether any are to be kept is chosen by the speed."""
        cache, training = self.learner.cache, self.config.training
        if cache is None:
            return {}
        cache.choose_training(
            self.data.train,
            training.batch_size,
            step=self.state.step,
            last=training.max_steps,
            seconds=speed.get("seconds_per_step", 0.0),
        )
        share = cache.share()
        return {} if math.isnan(share) else {"prefix_read_share": share}

    def _choose_evaluations(self, seconds: float) -> None:
        if self.learner.cache is not None:
            every = self.config.evaluation.every_steps
            last = self.config.training.max_steps
            left = -(-last // every) - -(-self.state.step // every)
            self.learner.cache.choose_evaluations(seconds, left)

    def _evaluate(self) -> dict[str, float]:
        """Evaluate, store the curves, and sound the alarm where it is due."""
        began = time.monotonic()
        with self.recorder.phase("evaluate"), progress("evaluating") as advance:

            def at_boundary(done: int, note: str) -> None:
                self.agreement.check()
                advance(done, note)

            evaluated = self.learner.evaluate(self.data.validation, at_boundary)
        self._evaluation_seconds += (seconds := time.monotonic() - began)
        self._choose_evaluations(seconds)
        figures = evaluated.compute()
        self._run.write_json("reliability.json", _curves(evaluated))
        if self._world.is_main:
            _log.info("step %d  %s", self.state.step, _summary(figures))
        if not self.learner.objective.ranks_only:
            self._sound_alarm(figures)
        return _prefixed("validation/value/", figures)

    def _sound_alarm(self, figures: Mapping[str, float]) -> None:
        training = self.config.training
        stage = training.stage_at(self.state.step - 1)
        n = training.all_stages[stage].num_unfrozen_layers
        if n == 0 and n < max(later.num_unfrozen_layers for later in training.all_stages[stage:]):
            return  # a head alone that waits for its blocks
        text = self.state.alarm.check(self.state.step, figures, n)
        if text is not None:
            _log.warning("%s", text)
            self._run.set_status(alarm=text)

    def _save_the_end(self) -> None:
        try_to_save(self._save_now, SaveError)

    def _save_now(self) -> None:
        with self.recorder.phase("save"):
            self.checkpoints.save_now(self.learner, self.state, self._evaluated)

    # Steps that are not finite

    def _may_go_on(self, result: StepResult) -> bool:
        """Count bad steps; False when there were too many in a row."""
        if result.is_finite:
            self.state.bad_steps = 0
            return True
        self.state.skipped_steps += 1
        self.state.skipped_at += (self.state.step,)
        if result is not _PASSED_OVER:
            self.state.bad_steps += 1
            if self._world.is_main:
                _log.warning("step %d is skipped: %s", self.state.step, _describe(result))
        if self.state.bad_steps >= self.config.training.max_bad_steps:
            return False
        if self.state.bad_steps and self.state.step == self.config.training.max_steps:
            if not self.learner.weights_are_finite():  # no later step would tell
                return False
            self.state.bad_steps = 0
        return True

    def _go_back(self, result: StepResult) -> None:
        """Restore the last checkpoint, once, and pass over the steps that were bad since.

        Weights that were damaged in memory are whole again; data that was bad is left out.
        """
        bad = self.state.bad_steps
        self.checkpoints.wait()
        again = bool(self._passed_over) or not self.checkpoints.newest
        folder = None if again else self._world.main_decides(self.checkpoints.newest_good)
        if folder is None:
            before = "also after going back to a checkpoint; " if self._passed_over else ""
            raise InputError(
                f"step {self.state.step}: {_describe(result)}, in {bad} step(s) in a row; {before}"
                f"the weights were left as before them. {ADVICE}"
            ).everywhere()
        self._passed_over = list(range(self.state.step - bad + 1, self.state.step + 1))
        self._run.write_json("bad_steps.json", self._passed_over)
        self.agreement.watchdog.beat()
        restored = self.state = self.checkpoints.restore(folder, self.learner)
        self.tracker.rewind(restored.recorded_step)
        if self.learner.cache is not None:
            self.learner.cache.rewind()
        _log.error("%d bad steps in a row: went back to step %d", bad, restored.step)
        if restored.unfinished is not None:
            self._finish_step()


def try_to_save(save: Callable[[], None], kind: type[Exception]) -> None:
    """Save the end of a training, again after some pauses where that fails with `kind`."""
    for pause in LAST_SAVE_PAUSES:
        try:
            save()
            return
        except kind as error:
            _log.error("%s; trying again in %d s", error, pause)
            time.sleep(pause)
    save()


_PASSED_OVER = StepResult(math.nan, math.nan, math.nan)


def _step_metrics(result: StepResult, state: TrainingState) -> dict[str, float]:
    metrics = {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": result.learning_rate,
    }
    if not result.is_finite:
        metrics["train/skipped_steps"] = float(state.skipped_steps)
    return metrics


def _describe(result: StepResult) -> str:
    return f"loss {result.loss}, gradient norm {result.grad_norm}"


def _note(figures: Mapping[str, float], speed: Mapping[str, float]) -> str:
    r2 = f"{figures['r2']:.3f}" if "r2" in figures else "-"
    return f"R2 {r2}  {speed.get('tokens_per_second', 0):,.0f} tokens/s"


def _prefixed(prefix: str, figures: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in figures.items()}


def _summary(figures: Mapping[str, float]) -> str:
    shown = ("mse", "mse_constant", "mse_optimal", "r2", "std_prediction", "achievable_share")
    return "  ".join(f"{name} {figures[name]:.4f}" for name in shown if name in figures)


def _curves(metrics: ValueMetrics) -> dict[str, list[float | None]]:
    """Calibration and value by position as JSON, with null where nothing was seen."""
    curves = metrics.reliability()
    columns = {
        "bin_mean_prediction": curves.by_prediction.mean_prediction,
        "bin_mean_label": curves.by_prediction.mean_label,
        "bin_count": curves.by_prediction.count,
        "position_mean_prediction": curves.by_position.mean_prediction,
        "position_mean_label": curves.by_position.mean_label,
    }
    return {
        name: [float(v) if np.isfinite(v) else None for v in column]
        for name, column in columns.items()
    }
