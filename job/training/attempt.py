"""One attempt at a training, from the claim on its run directory to the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from job.common.errors import InputError, NoProgress, Stopped, Superseded
from job.common.nested import to_dict
from job.common.progress import log_file, only_warnings
from job.common.schema import CriticConfig
from job.common.signals import STOP_FILE
from job.distributed.world import World, joined_world
from job.memory.recorder import Recorder
from job.model.architecture_file import read_architecture
from job.model.critic import Critic, parameter_report
from job.model.fingerprint import fingerprint
from job.run.alarm import ConstantPredictorAlarm
from job.run.checkpoint_store import check_metric
from job.run.directory import RunDirectory
from job.run.fence import Fence
from job.run.metrics_log import Tracker
from job.run.report_page import write_report
from job.run.trained import find_weights, load_weights
from job.training.agreement import Boundary
from job.training.checkpoint import Checkpoints
from job.training.data import CriticData, load_critic_data
from job.training.learner import Learner
from job.training.loop import Training
from job.training.memory_report import MemoryAccount, choose_micro_batch
from job.training.objective import Objective
from job.training.preparation import load_critic, prepare_inputs, set_up_torch
from job.training.state import TrainingState

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
    check_metric(config.checkpoint.keep_best)
    if not resume and run.file("config.yaml").exists():
        raise InputError(f"{run.path}: there is a run already, and --resume is `never`")
    run.claim(to_dict(config))
    if run.is_finished(config.training.max_steps):
        _log.info("%s is finished already: %s", run.path, run.file("report.html"))
        return None
    try:
        return Fence.take(run.path).number
    except OSError as error:
        raise InputError(f"run.dir: cannot write {run.path}: {error.strerror}") from None


@contextmanager
def _attempt(config: CriticConfig, run: RunDirectory, number: int, world: World) -> Iterator[None]:
    """Keep logs and status of one attempt for the length of the body."""
    run.fence = Fence(run.file("attempts"), number)
    if world.lifeline is not None:
        world.lifeline.on_failure = lambda error: run.set_status(state="failed", error=error)
    log = run.file("train.log")
    if not world.is_main:
        only_warnings()
        log = run.fence.folder / f"rank-{world.rank:05}.log"
    facts: dict[str, Any] = {"attempt": number, "max_steps": config.training.max_steps}
    facts |= {"checkpoint_error": None, "stop_file": False}
    with log_file(log), _told(world), run.recorded(**facts):
        _log.info("attempt %d of %s, %d process(es)", number, run.path, world.size)
        try:
            yield
        except Stopped:
            if run.writes:  # the request is fulfilled: the next attempt goes on
                run.set_status(stop_file=run.file(STOP_FILE).exists())
                run.file(STOP_FILE).unlink(missing_ok=True)
            raise


@contextmanager
def _told(world: World) -> Iterator[None]:
    """Tell the others of an error, and log it, while the log's file is open."""
    try:
        yield
    except BaseException as error:
        world.tell(error)
        if not isinstance(error, Stopped | Superseded):
            _log.error("%s: %s", type(error).__name__, str(error).partition("\n")[0])
        raise


def _train(config: CriticConfig, run: RunDirectory, world: World) -> None:
    assert run.fence is not None

    def hangs(error: NoProgress) -> None:
        run.set_status(state="failed", error=str(error))
        world.tell(error)

    boundary = Boundary(world, run.fence, run.path, config.distributed.timeout_seconds, hangs)
    world.main_first(lambda: prepare_inputs(config))
    with Recorder(world.device) as recorder:
        _train_recorded(config, run, world, boundary, recorder)


def _train_recorded(
    config: CriticConfig, run: RunDirectory, world: World, boundary: Boundary, recorder: Recorder
) -> None:
    assert run.fence is not None
    choose_micro_batch(config, run, world)
    data = world.main_first(lambda: load_critic_data(config, run, world))
    identity = world.main_decides(lambda: _identity(config, data))
    checkpoints = Checkpoints(run, run.fence, config.checkpoint, identity, world)
    checkpoint = world.main_decides(checkpoints.newest_good)
    memory = MemoryAccount(config, data, run, world, recorder)
    with recorder.phase("load"):
        critic = load_critic(config, data, world, boundary.agree)
    learner = _learner(config, critic, world, recorder)
    if checkpoint is not None:
        state = checkpoints.restore(checkpoint, learner)
    else:
        state = _first_state(config, learner, identity)
    _go_on_from(state, run, checkpoints, world)
    _report_parameters(learner.critic, run, world)
    with Tracker(run) as tracker, run.recorded():
        began = time.monotonic()
        Training(config, learner, data, state, tracker, run, checkpoints, boundary, recorder).run()
        tracker.telemetry(config.training.max_steps, memory.close())
        _save_trained(learner.critic, run)
        run.set_status(state="finished", seconds=time.monotonic() - began)
        if config.report.enabled and run.writes:
            _write_report(run)


def _learner(config: CriticConfig, critic: Critic, world: World, recorder: Recorder) -> Learner:
    objective = Objective(config.objective)
    return Learner(critic, objective, config.training, world, recorder.phase)


def _identity(config: CriticConfig, data: CriticData) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    return {
        "num_unfrozen_layers": config.training.num_unfrozen_layers,
        "architecture": asdict(read_architecture(config.model.path)),
        "base": fingerprint(config.model.path, config.data.cache_dir),
        "tokenizer": data.tokenizer,
        "train_data": data.train.data.folder.name,
        "validation_data": data.validation.data.folder.name,
    }


def _first_state(config: CriticConfig, learner: Learner, identity: dict[str, Any]) -> TrainingState:
    if config.model.init_from is not None:
        source, critic, world = Path(config.model.init_from), learner.critic, learner.world
        folder = world.main_decides(lambda: find_weights(source, critic, identity))
        load_weights(critic, folder, world)
    patience = config.evaluation.alarm_evaluations
    return TrainingState(ConstantPredictorAlarm(patience, config.training.warmup_steps))


def _go_on_from(
    state: TrainingState, run: RunDirectory, checkpoints: Checkpoints, world: World
) -> None:
    """Let everything that was written after `state` be as if it had never been."""
    if run.writes:
        assert run.fence is not None
        if not state.step and run.records():
            _log.warning("no checkpoint to go on from: starting over")
        run.fence.record(world.size, state.step)
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
        scratch = run.file(".critic.safetensors")
        save_file(trained, scratch)
        scratch.replace(run.file("critic.safetensors"))


def _write_report(run: RunDirectory) -> None:
    try:
        _log.info("finished: %s", write_report([run.path]))
    except Exception as error:  # whatever is wrong with a page, the training is done
        _log.warning("finished, without a report: %s", error)
