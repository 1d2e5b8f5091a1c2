"""A training from its inputs to its report, as one attempt at its run."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from job.common.files import named, put_in_place
from job.common.places import disk
from job.common.schema import CriticConfig
from job.distributed.world import World
from job.model.architecture_file import read_architecture
from job.model.critic import Critic, parameter_report
from job.model.fingerprint import fingerprint
from job.model.safetensors_file import save_tensors
from job.run.alarm import ConstantPredictorAlarm
from job.run.checkpoint_store import read_facts
from job.run.directory import RunDirectory
from job.run.metrics_log import Tracker
from job.run.report_page import write_report
from job.run.trained import find_weights, load_weights
from job.training.attempt import Attempt, claimed_attempt
from job.training.cache_opening import opened_cache
from job.training.checkpoint import Checkpoints
from job.training.compilation import choose_compilation
from job.training.data import CriticData, load_critic_data
from job.training.gpu import check_gpu
from job.training.learner import Learner
from job.training.loop import Training, try_to_save
from job.training.machine import describe
from job.training.memory_report import MemoryAccount, check_memory, choose_by_memory
from job.training.objective import Objective
from job.training.out_of_memory import out_of_memory_judged
from job.training.prefix_cache import PrefixCache
from job.training.preparation import load_critic, set_up_torch
from job.training.state import TrainingState

_log = logging.getLogger("job.train")


def train(config: CriticConfig, *, resume: bool = True, verify: bool = False) -> None:
    """Run one training to its end, in its run directory, as one of the job's processes.

    Args:
        verify: look at all of cached data and trunk, not only at samples.

    Raises:
        InputError: something in the input is wrong, or the run exists and `resume` is false.
        Stopped: asked to stop; the state is saved.
        Superseded: another copy of this run has begun later.
    """
    set_up_torch(config)
    with claimed_attempt(config, resume=resume, verify=verify) as attempt:
        if attempt is not None:
            _train(attempt)


def _train(attempt: Attempt) -> None:
    config, run, world = attempt.config, attempt.run, attempt.world
    check_gpu(config.distributed.fsdp, read_architecture(config.model.path), world.device)
    choose_compilation(config, world)
    check_memory(config, world)
    data = world.main_first(lambda: load_critic_data(config, run, world, verify=attempt.verify))
    identity = world.main_decides(lambda: _identity(config, data, attempt.verify))
    checkpoints = Checkpoints(run, attempt.fence, config.checkpoint, identity, world)
    with out_of_memory_judged(config, world, lambda: _has_saved(checkpoints)):
        _train_from_checkpoint(attempt, data, checkpoints, identity)


def _has_saved(checkpoints: Checkpoints) -> bool:
    checkpoints.wait()  # for a save that is under way: it may be the one
    return checkpoints.has_saved


def _train_from_checkpoint(
    attempt: Attempt, data: CriticData, checkpoints: Checkpoints, identity: dict[str, Any]
) -> None:
    """Load the critic, go on from the newest checkpoint, if there is one, and train to the end."""
    config, run, world, recorder = attempt.config, attempt.run, attempt.world, attempt.recorder
    checkpoint = world.main_decides(checkpoints.newest_good)
    opened = opened_cache(config, data, identity["base"], run, world, attempt.fence.number)
    with opened as cache:
        left_out = 0
        if cache is not None:
            step = 0 if checkpoint is None else read_facts(checkpoint)["step"]
            left_out = cache.leave_out(data, step, config.training.batch_size)
        choose_by_memory(config, run, world, left_out)
        data.resize(config.training.token_budget)
        memory = MemoryAccount(config, data, run, world, recorder, left_out)
        with recorder.phase("load"), attempt.agreement.watchdog.watching():
            critic = load_critic(config, data, world, attempt.agreement.check, left_out)
        learner = _learner(attempt, critic, cache)
        if checkpoint is not None:
            state = checkpoints.restore(checkpoint, learner)
        else:
            state = _first_state(config, learner, identity)
        with recorder.phase("load"):
            checkpoints.reserve(learner)
        _go_on_from(state, attempt, checkpoints)
        _report_parameters(critic, run, world)
        with Tracker(run) as tracker, run.recorded(), world.failures_reported():
            began = time.monotonic()
            Training(attempt, learner, data, state, tracker, checkpoints).run()
            tracker.telemetry(config.training.max_steps, memory.close())
            _save_trained(critic, run)
            seconds = time.monotonic() - began
            try_to_save(lambda: run.finish(seconds=seconds), OSError)
            if config.report.enabled and run.writes:
                _write_report(run)
            elif run.writes:
                _log.info("finished: %s", run.path)


def _learner(attempt: Attempt, critic: Critic, cache: PrefixCache | None) -> Learner:
    objective, training = Objective(attempt.config.objective), attempt.config.training
    return Learner(critic, objective, training, attempt.world, attempt.recorder.phase, cache)


def _identity(config: CriticConfig, data: CriticData, verify: bool) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    return {
        "num_unfrozen_layers": config.training.num_unfrozen_layers,
        "architecture": asdict(read_architecture(config.model.path)),
        "base": fingerprint(config.model.path, config.data.cache_dir, verify=verify),
        "tokenizer": data.tokenizer,
        "train_data": data.train.data.key,
        "validation_data": data.validation.data.key,
    }


def _first_state(config: CriticConfig, learner: Learner, identity: dict[str, Any]) -> TrainingState:
    if config.model.init_from is not None:
        source, critic, world = Path(config.model.init_from), learner.critic, learner.world
        objective = config.objective
        folder = world.main_decides(lambda: find_weights(source, critic, identity, objective))
        load_weights(critic, folder, world)
    patience = config.evaluation.alarm_evaluations
    return TrainingState(ConstantPredictorAlarm(patience, config.training.warmup_steps))


def _go_on_from(state: TrainingState, attempt: Attempt, checkpoints: Checkpoints) -> None:
    """Let everything that was written after `state` be as if it had never been."""
    run, world = attempt.run, attempt.world
    if run.writes:
        if not state.step and run.records():
            _log.warning("no checkpoint to go on from: starting over")
        run.store_config()
        attempt.fence.record(world.size, state.step)
        attempt.fence.describe(describe(world.device))
        checkpoints.remove_leftovers()
        run.keep_lines(state.recorded_step)
    changes = {} if state.step else {"alarm": None}
    run.set_status(step=state.step, **changes)
    if world.is_main and state.step:
        _log.info("going on from step %d", state.step)


def _report_parameters(critic: Critic, run: RunDirectory, world: World) -> None:
    report = parameter_report(critic)
    if world.is_main:
        _log.info("parameters\n%s", report)
    run.write_json("parameters.json", report.to_dict())


def _save_trained(critic: Critic, run: RunDirectory) -> None:
    """Leave the trained parameters in one file, for whoever does not read checkpoints."""
    writes = run.writes
    trained = critic.trained_tensors(keep=writes)
    if writes:
        size = sum(tensor.nbytes for tensor in trained.values())
        try:
            try_to_save(lambda: _write_trained(trained, run), OSError)
        except OSError as error:  # the last checkpoint has all of it
            text = "finished without critic.safetensors, %.3f GB: %s (%s)"
            _log.warning(text, size / 1e9, error, disk(run.path))


def _write_trained(trained: dict[str, Tensor], run: RunDirectory) -> None:
    scratch, file = run.file(".critic.safetensors"), run.file("critic.safetensors")
    try:
        with named(file, scratch):
            save_tensors(trained, scratch)
            put_in_place(scratch, file)
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def _write_report(run: RunDirectory) -> None:
    try:
        _log.info("finished: %s", write_report([run.path]))
    except Exception as error:  # whatever is wrong with a page, the training is done
        _log.warning("finished, without a report: %s", error)
