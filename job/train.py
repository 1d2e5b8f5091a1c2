"""Train a critic.

    python -m job.train --config configs/critic/critic_local.yaml
    python -m job.train --config configs/critic/critic_local.yaml \\
        --override training.num_unfrozen_layers=0 run.name=probe
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from job.config import EMBEDDED, CriticConfig, Loss, command_line, load_config, to_dict
from job.data.examples import check_readable
from job.data.packing import Indices, Packer, balanced_pairs, single_units
from job.data.token_cache import TokenizedSet, count_shared_problems, load_split
from job.data.tokenizer import load_tokenizer
from job.durability.run_directory import RunDirectory
from job.learning.learner import Learner
from job.learning.objective import Objective
from job.learning.sharding import shard
from job.learning.world import World, joined_world
from job.model.critic import Critic, parameter_report, unfreeze_last_blocks
from job.model.weights import load_trunk, read_architecture
from job.outcome import InputError, run_command
from job.pretrain import ensure_trunk
from job.report import write_report
from job.telemetry.alarm import ConstantPredictorAlarm
from job.telemetry.progress import log_file, progress, set_up_logging
from job.telemetry.tracking import Tracker, Window
from job.telemetry.value_metrics import ValueMetrics

_log = logging.getLogger("job.train")


def train(config: CriticConfig) -> None:
    """Run one training from start to end, in its run directory, as one of the job's processes."""
    set_up_torch(config)
    with joined_world() as world:
        run = RunDirectory(config.run.dir, writes=world.is_main)
        world.main_first(lambda: run.claim(to_dict(config)))
        if run.status().get("state") == "finished":
            _log.info("%s is finished already: %s", run.path, run.file("report.html"))
            return
        begun = run.recorded(step=0, max_steps=config.training.max_steps, alarm=None)
        with log_file(run.file(_log_name(world))), begun:
            _train(config, run, world)


def _log_name(world: World) -> str:
    return "train.log" if world.is_main else f"train.rank{world.rank}.log"


def _train(config: CriticConfig, run: RunDirectory, world: World) -> None:
    data = world.main_first(lambda: load_data(config, run, world))
    critic = load_critic(config, data, world)
    learner = Learner(critic, Objective(config.objective), config.training, world)
    run.start_over()
    report = parameter_report(critic)
    if world.is_main:
        _log.info("parameters\n%s", report)
    run.write_json("parameters.json", report.to_dict())
    started = time.monotonic()
    with Tracker(run) as tracker, run.recorded():
        fit(config, learner, data, tracker, run)
        trained = critic.trained_tensors()
        if run.writes:
            save_file(trained, run.file("critic.safetensors"))
        run.set_status(state="finished", seconds=time.monotonic() - started)
        if run.writes:
            _write_report(run)


def _write_report(run: RunDirectory) -> None:
    try:
        _log.info("finished: %s", write_report([run.path]))
    except Exception as error:  # whatever is wrong with a page, the training is done
        _log.warning("finished, without a report: %s", error)


def fit(
    config: CriticConfig, learner: Learner, data: CriticData, tracker: Tracker, run: RunDirectory
) -> None:
    """The training loop: steps 1 to max_steps."""
    training, last = config.training, config.training.max_steps
    alarm = ConstantPredictorAlarm(config.evaluation.alarm_evaluations, training.warmup_steps)
    window, note = Window(), ""
    with progress("training", last) as advance:
        for step in range(1, last + 1):
            began = time.monotonic()
            batches = data.train.step(step - 1, training.batch_size, training.seed)
            result = learner.step(step - 1, batches, window.metrics)
            window.add(batches, time.monotonic() - began)
            metrics = {
                "train/loss": result.loss,
                "train/grad_norm": result.grad_norm,
                "train/learning_rate": result.learning_rate,
            }
            if step % config.logging.every_steps == 0 or step == last:
                figures = learner.merged(window.metrics).compute()
                metrics |= _prefixed("value/", figures)
                speed = window.telemetry(learner.world)
                tracker.telemetry(step, speed)
                run.set_status(step=step)
                note = _note(figures, speed)
                window = Window()
            if step % config.evaluation.every_steps == 0 or step == last:
                metrics |= evaluate(learner, data.validation, step, alarm, run)
            tracker.metrics(step, metrics)
            advance(step, f"loss {result.loss:.4f}{note}")


def _note(figures: Mapping[str, float], speed: Mapping[str, float]) -> str:
    r2 = f"{figures['r2']:.3f}" if "r2" in figures else "-"
    return f"  R2 {r2}  {speed['tokens_per_second']:,.0f} tokens/s"


def evaluate(
    learner: Learner, packer: Packer, step: int, alarm: ConstantPredictorAlarm, run: RunDirectory
) -> dict[str, float]:
    """Evaluate, store the curves, and sound the alarm where it is due."""
    with progress("evaluating") as advance:
        evaluated = learner.evaluate(packer, advance)
    figures = evaluated.compute()
    run.write_json("reliability.json", _curves(evaluated))
    _log.info("step %d  %s", step, _summary(figures))
    if learner.objective.ranks_only:
        return _prefixed("validation/value/", figures)
    text = alarm.check(step, figures, learner.config.num_unfrozen_layers)
    if text is not None:
        _log.warning("%s", text)
        run.set_status(alarm=text)
    return _prefixed("validation/value/", figures)


@dataclass(frozen=True)
class CriticData:
    """Training and validation sets, ready to be packed."""

    train: Packer
    validation: Packer
    mean_reward: float


def load_data(config: CriticConfig, run: RunDirectory, world: World) -> CriticData:
    """Tokenise (or find) both sets and check them against each other and the model.

    Raises:
        InputError: bad rows, unreadable files, or tokens that the model does not have.
    """
    for path in (config.data.train, config.data.validation):
        if path != EMBEDDED:
            check_readable(path)
    if config.model.recipe is not None:
        ensure_trunk(Path(config.model.path), config.model.recipe)
    architecture = read_architecture(config.model.path)
    tokenizer = load_tokenizer(config.tokenizer.path or config.model.path)
    sets = {}
    for split in ("train", "validation"):
        found = sets[split] = load_split(config.data, split, tokenizer)
        _keep_bad_rows(found, run, split)
        if found.tokens.max() >= architecture.vocab_size:
            raise InputError(
                f"tokenizer.path: token {found.tokens.max()} does not exist in the model "
                f"(vocabulary of {architecture.vocab_size}); tokenizer and model do not match"
            )
    train, validation = sets["train"], sets["validation"]
    if shared := count_shared_problems(train, validation):
        _log.warning("%d problem(s) are in both training and validation data", shared)
    _log.info(
        "%d training and %d validation sequences, mean reward %.3f and %.3f",
        *(len(train), len(validation), train.rewards.mean(), validation.rewards.mean()),
    )
    kept = single_units(min(len(validation), config.evaluation.max_sequences or len(validation)))
    pack = functools.partial(
        Packer,
        dim=architecture.dim,
        budget=config.training.micro_batch_tokens,
        device=world.device,
        rank=world.rank,
        world=world.size,
    )
    return CriticData(
        pack(train, _training_units(config, train)),
        pack(validation, kept),
        float(train.rewards.mean()),
    )


def _training_units(config: CriticConfig, train: TokenizedSet) -> Indices:
    if config.objective.loss is not Loss.pairwise:
        return single_units(len(train))
    pairs = balanced_pairs(train.rewards, train.problems, train.response_lengths)
    if not len(pairs):
        raise InputError(
            f"{config.data.train}: no two solutions of one problem with different rewards; "
            "the pairwise loss needs some (is problem_id right?)"
        )
    _log.info("%d length-balanced pairs", len(pairs))
    return pairs


def _keep_bad_rows(found: TokenizedSet, run: RunDirectory, split: str) -> None:
    if found.n_skipped:
        listed = run.file(f"bad_rows.{split}.jsonl")
        shutil.copyfile(found.folder / "bad_rows.jsonl", listed)
        _log.warning("%s data: %d row(s) left out, listed in %s", split, found.n_skipped, listed)


def load_critic(config: CriticConfig, data: CriticData, world: World) -> Critic:
    """The critic in shards, the last N blocks trainable, its trunk loaded and head initialised."""
    with torch.device("meta"):
        critic = Critic(read_architecture(config.model.path))
    unfreeze_last_blocks(critic, config.training.num_unfrozen_layers)
    if config.distributed.fsdp.activation_checkpointing:
        critic.trunk.recompute_trainable_blocks()
    shard(critic, config.distributed.fsdp, world)
    load_trunk(critic.trunk, config.model.path)
    bias = config.training.value_head.bias_init
    if bias is None:
        bias = Objective(config.objective).initial_bias(data.mean_reward)
    critic.initialise_head(bias, config.training.seed)
    return critic


def set_up_torch(config: CriticConfig) -> None:
    """Threads and determinism of this process."""
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


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


def main() -> None:
    options = command_line(__doc__ or "").parse_args()
    set_up_logging()
    train(load_config(CriticConfig, options.config, options.override))


if __name__ == "__main__":
    run_command(main)
