"""Whether torch.compile makes the kernels of a training's blocks."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
from pathlib import Path

from job.common.errors import InputError
from job.common.schema import AUTO, CriticConfig
from job.distributed.world import World

_log = logging.getLogger("job.train")


def choose_compilation(config: CriticConfig, world: World) -> None:
    """Replace `training.compile: auto` by true on a GPU where compilation can work, else by false.

    Raises:
        InputError: on every rank, if it is to be and cannot work.
    """
    given = config.training.compile
    cuda = world.device.type == "cuda"
    lacking = {what for found in world.gather(missing(cuda=cuda)) for what in found}
    names = " and ".join(sorted(lacking))
    if given is True and lacking:
        raise InputError(f"training.compile: true, and there is no {names}; set it to false")
    config.training.compile = not lacking and cuda if given == AUTO else bool(given)
    if world.is_main and (cuda or config.training.compile):
        why = f": there is no {names}" if lacking and given == AUTO else ""
        _log.info("training.compile: %s%s", str(config.training.compile).lower(), why)


def missing(*, cuda: bool) -> list[str]:
    """What compiled kernels need on this machine and do not find: Triton's, or C++ on a CPU."""
    variable, names = ("CC", ("gcc", "clang")) if cuda else ("CXX", ("g++", "clang++"))
    compilers = [os.environ[variable]] if os.environ.get(variable) else names
    found = {
        f"{' or '.join(compilers)}": any(shutil.which(name) for name in compilers),
        "Python.h": Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "triton": not cuda or importlib.util.find_spec("triton") is not None,
    }
    return [name for name, is_there in found.items() if not is_there]
