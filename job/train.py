"""Train a critic, or go on with a training that was interrupted.

    python -m job.train --config configs/critic/critic_local.yaml
    python -m job.train --config configs/critic/critic_local.yaml \\
        --override training.num_unfrozen_layers=0 run.name=probe

The same command goes on from the last checkpoint in run.dir. SIGTERM, SIGUSR1 and SIGUSR2, or a
file named `stop` in run.dir, make it save and end with exit code 75.
"""

from __future__ import annotations

if __name__ == "__main__":  # a signal during the imports must not kill the process
    from job.durability.preemption import install_handlers

    install_handlers()

import functools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from job.config import EMBEDDED, CriticConfig, Loss, command_line, load_config, to_dict
from job.data.examples import check_readable
from job.data.packing import Indices, Packer, balanced_pairs, single_units
from job.data.token_cache import TokenizedSet, count_shared_problems, load_split
from job.data.tokenizer import load_tokenizer
from job.durability.checkpoint import Checkpoints, load_weights
from job.durability.fence import Fence
from job.durability.run_directory import RunDirectory
from job.learning.learner import Learner
from job.learning.objective import Objective
from job.learning.sharding import shard
from job.learning.training_state import TrainingState
from job.learning.world import World, joined_world
from job.loop import Training
from job.model.critic import Critic, parameter_report, unfreeze_last_blocks
from job.model.fingerprint import fingerprint
from job.model.weights import load_trunk, read_architecture
from job.outcome import InputError, run_command
from job.pretrain import ensure_trunk
from job.report import write_report
from job.telemetry.alarm import ConstantPredictorAlarm
from job.telemetry.progress import log_file, set_up_logging
from job.telemetry.tracking import Tracker

_log = logging.getLogger("job.train")


def train(config: CriticConfig, *, resume: bool = True) -> None:
    """Run one training to its end, in its run directory, as one of the job's processes.

    Raises:
        InputError: something in the input is wrong, or the run exists and `resume` is false.
        Stopped: asked to stop; the state is saved.
        Superseded: another copy of this run has begun later.
    """
    set_up_torch(config)
    with joined_world(config.distributed) as world:
        run = RunDirectory(config.run.dir, is_main=world.is_main)
        number = world.main_decides(lambda: _claim(config, run, resume))
        if number is None:
            return
        with _attempt(config, run, number, world):
            _train(config, run, world)


def _claim(config: CriticConfig, run: RunDirectory, resume: bool) -> int | None:
    """This attempt's number; None if the run is finished."""
    if not resume and run.file("config.yaml").exists():
        raise InputError(f"{run.path}: there is a run already, and --resume is `never`")
    run.claim(to_dict(config))
    if run.is_finished(config.training.max_steps):
        _log.info("%s is finished already: %s", run.path, run.file("report.html"))
        return None
    return Fence.take(run.path).number


@contextmanager
def _attempt(config: CriticConfig, run: RunDirectory, number: int, world: World) -> Iterator[None]:
    """Keep logs and status of one attempt for the length of the body."""
    run.fence = Fence(run.file("attempts"), number)
    if world.lifeline is not None:
        world.lifeline.on_failure = lambda error: run.set_status(state="failed", error=error)
    log = run.file("train.log")
    if not world.is_main:
        log = run.fence.folder / f"rank-{world.rank:05}.log"
    facts = {"attempt": number, "max_steps": config.training.max_steps, "checkpoint_error": None}
    with log_file(log), run.recorded(**facts):
        _log.info("attempt %d of %s, %d process(es)", number, run.path, world.size)
        yield


def _train(config: CriticConfig, run: RunDirectory, world: World) -> None:
    data = world.main_first(lambda: load_data(config, run, world))
    critic = load_critic(config, data, world)
    learner = Learner(critic, Objective(config.objective), config.training, world)
    identity = world.main_decides(lambda: _identity(config, critic, data))
    assert run.fence is not None
    checkpoints = Checkpoints(run, run.fence, config.checkpoint, identity, world)
    state = checkpoints.restore(learner)
    if state is None:
        state = _first_state(config, learner, identity)
    _go_on_from(state, run, checkpoints, world)
    report = parameter_report(critic)
    if world.is_main:
        _log.info("parameters\n%s", report)
    run.write_json("parameters.json", report.to_dict())
    with Tracker(run) as tracker:
        began = time.monotonic()
        training = Training(
            config, learner, data.train, data.validation, state, tracker, run, checkpoints
        )
        training.run()
        trained = critic.trained_tensors()
        if run.writes:
            save_file(trained, run.file("critic.safetensors"))
        run.set_status(state="finished", seconds=time.monotonic() - began)
        if run.writes:
            _write_report(run)


def _identity(config: CriticConfig, critic: Critic, data: CriticData) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    return {
        "num_unfrozen_layers": config.training.num_unfrozen_layers,
        "architecture": asdict(critic.trunk.config),
        "base": fingerprint(config.model.path, config.data.cache_dir),
        "train_data": data.train.data.folder.name,
        "validation_data": data.validation.data.folder.name,
    }


def _first_state(config: CriticConfig, learner: Learner, identity: dict[str, Any]) -> TrainingState:
    if config.model.init_from is not None:
        load_weights(learner.critic, Path(config.model.init_from), identity)
    patience = config.evaluation.alarm_evaluations
    return TrainingState(ConstantPredictorAlarm(patience, config.training.warmup_steps))


def _go_on_from(
    state: TrainingState, run: RunDirectory, checkpoints: Checkpoints, world: World
) -> None:
    """Let everything that was written after `state` be as if it had never been."""
    if run.writes:
        assert run.fence is not None
        run.fence.record(world.size, state.step)
        checkpoints.remove_leftovers()
        run.keep_lines(state.recorded_step)
    changes = {} if state.step else {"alarm": None}
    run.set_status(step=state.step, **changes)
    if world.is_main and state.step:
        _log.info("going on from step %d", state.step)


def _write_report(run: RunDirectory) -> None:
    try:
        _log.info("finished: %s", write_report([run.path]))
    except Exception as error:  # whatever is wrong with a page, the training is done
        _log.warning("finished, without a report: %s", error)


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


def main() -> None:
    parser = command_line(__doc__ or "")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="go on where run.dir stands (the default), or refuse a run that exists",
    )
    parser.add_argument(
        "--init-from",
        metavar="PATH",
        help="begin with the weights of a run or checkpoint",
    )
    options = parser.parse_args()
    set_up_logging()
    config = load_config(CriticConfig, options.config, options.override)
    if options.init_from is not None:
        config.model.init_from = options.init_from
    train(config, resume=options.resume == "auto")


if __name__ == "__main__":
    run_command(main)
