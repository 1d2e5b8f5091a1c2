"""One attempt at a run, as one of its ranks sees it: who takes part, and what it may write."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from job.common.config import set_key
from job.common.errors import (
    InputError,
    NoProgress,
    Stopped,
    Superseded,
    file_error,
    first_line,
    listing,
)
from job.common.nested import differences, to_dict
from job.common.progress import keep_in_files, log_file, only_warnings
from job.common.schema import CriticConfig
from job.common.signals import STOP_FILE
from job.distributed.world import World, joined_world
from job.memory.recorder import Recorder
from job.run.checkpoint_store import check_metric
from job.run.directory import RunDirectory
from job.run.fence import Fence
from job.training.agreement import Agreement
from job.training.preparation import prepare_inputs

_log = logging.getLogger("job.train")


@dataclass(frozen=True)
class Attempt:
    """What every part of a training shares, on one rank.

    Attributes:
        verify: look at all of what was made before, not only at samples.
    """

    config: CriticConfig
    run: RunDirectory
    fence: Fence
    world: World
    agreement: Agreement
    recorder: Recorder
    verify: bool = False


@contextmanager
def claimed_attempt(
    config: CriticConfig, *, resume: bool, verify: bool = False
) -> Iterator[Attempt | None]:
    """The next attempt at a run, inputs, logs and status in place; None if the run is finished.

    Raises:
        InputError: the run cannot be written, is another one, or exists and `resume` is false; or
            something in the input is wrong.
    """
    with joined_world(config.distributed, watched=True) as world:
        run = RunDirectory(config.run.dir, is_main=world.is_main)
        for key, value in world.main_decides(lambda: run.kept_from_before(config)).items():
            set_key(config, key, value)
            if world.is_main:
                _log.info("%s: %s, as this run began", key, str(value).lower())
        number = world.main_decides(lambda: _claim(config, run, resume))
        if number is None:
            yield None
            return
        run.fence = fence = Fence(run.file("attempts"), number)
        with _recorded(config, run, fence, world):
            agreement = _agreement(config, run, fence, world)
            world.main_first(lambda: prepare_inputs(config, verify=verify))
            with Recorder(world.device) as recorder:  # a trunk that is made first is no part of it
                yield Attempt(config, run, fence, world, agreement, recorder, verify)


def _claim(config: CriticConfig, run: RunDirectory, resume: bool) -> int | None:
    """This attempt's number; None if the run is finished.

    Raises:
        Superseded: a newer attempt has begun since this one was given its number.
    """
    check_metric(config.checkpoint.keep_best)
    if not resume and run.file("config.yaml").exists():
        raise InputError(f"{run.path}: there is a run already, and --resume is `never`")
    given = Fence.given(run.path)  # before anything is written
    asked = to_dict(config)
    run.claim(asked)
    if run.is_finished(config.training.max_steps):
        page = run.file("report.html")
        _log.info("%s is finished already%s", run.path, f": {page}" if page.exists() else "")
        if ignored := differences(run.config(), asked):
            text = "it stays as it was trained; what is asked for otherwise changes nothing%s"
            _log.warning(text, listing(ignored))
        return None
    try:
        return (given or Fence.take(run.path)).number
    except OSError as error:
        raise file_error(error, f"run.dir: cannot write {run.path}: {error.strerror}") from None


@contextmanager
def _recorded(
    config: CriticConfig, run: RunDirectory, fence: Fence, world: World
) -> Iterator[None]:
    """Keep logs and status of one attempt for the length of the body."""
    if world.lifeline is not None:
        world.lifeline.on_failure = lambda error: run.set_status(state="failed", error=error)
    log = run.file("train.log")
    if not world.is_main:
        only_warnings()
        log = fence.folder / f"rank-{world.rank:05}.log"
    facts: dict[str, Any] = {"attempt": fence.number, "max_steps": config.training.max_steps}
    facts |= {"checkpoint_error": None, "stop_file": False}
    with log_file(log), run.recorded(**facts), _failures_logged(), world.failures_reported():
        _log.info("attempt %d of %s, %d process(es)", fence.number, run.path, world.size)
        try:
            yield
        except Stopped:
            if run.writes:  # the request is fulfilled: the next attempt goes on
                run.set_status(stop_file=run.file(STOP_FILE).exists())
                run.file(STOP_FILE).unlink(missing_ok=True)
            raise


@contextmanager
def _failures_logged() -> Iterator[None]:
    """Log an error while the log's file is open."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Stopped | Superseded):
            keep_in_files(first_line(error, named=True))  # on stderr the command ends with it
        raise


def _agreement(config: CriticConfig, run: RunDirectory, fence: Fence, world: World) -> Agreement:
    def hangs(error: NoProgress) -> None:
        world.report_failure(error)
        run.set_status(state="failed", error=str(error))

    return Agreement(world, fence, run.path, config.distributed.timeout_seconds, hangs)
