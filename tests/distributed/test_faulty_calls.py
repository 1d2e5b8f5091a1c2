"""One call by which a training changes files fails, whichever it is: nothing is lost.

The training ends as if nothing had been, or names the path and comes back to the same bits.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import faulty_calls
import pytest
from faulty_calls import Call, Fault
from forks import PYTHONPATH, THREADS, fork
from micro_job import CHANGES, MicroRun, write_job

from job.common.errors import Exit

pytestmark = pytest.mark.slow

# Without the pauses before the end is saved again.
_TRAIN = """
import job.train
import job.training.loop
job.training.loop.LAST_SAVE_PAUSES = (0, 0, 0)
job.train.run_and_leave(job.train.main)
"""
_SETTINGS = (
    "run.name=r",
    "training.max_steps=8",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=1",
    "evaluation.every_steps=4",
    "logging.every_steps=4",
)
_FAULTS = (
    Fault("ENOSPC", "disk"),
    Fault("ENOSPC"),
    Fault("EDQUOT", "disk"),
    Fault("ESTALE", "descriptor"),
    Fault("EIO"),
    Fault("ENOSYS"),
    Fault("SHORT"),
)
_PARTS = 60
_SAMPLE = 8
_SEED = 20240915


@dataclass(frozen=True)
class Place:
    """A folder with one run, and the calls of its first attempt."""

    folder: Path
    terminal: Path

    @property
    def run(self) -> MicroRun:
        return MicroRun(self.folder / "runs/r")

    @property
    def said(self) -> str:
        return self.terminal.read_text(errors="replace")

    def train(self, log: Path, call: Call | None = None, fault: Fault | None = None) -> int:
        """The exit code of an attempt in which a call may fail."""
        own = {"OMP_NUM_THREADS": THREADS, "PYTHONPATH": PYTHONPATH}
        environment = os.environ | own | faulty_calls.order(self.folder, log, call, fault)
        words = ["-c", _TRAIN, "--config", "critic.yaml", "--override", *_SETTINGS]
        library, to = faulty_calls.library(), self.terminal
        return fork(words, self.folder, environment, to, to, library).wait(120)


@dataclass(frozen=True)
class Case:
    """A call that fails, in a training that finds trunk and tokens or has to make them."""

    begins: Path
    call: Call
    fault: Fault

    def __str__(self) -> str:
        return f"{self.begins.name}: {self.call}: {self.fault}"


@dataclass(frozen=True)
class Faultless:
    """What an undisturbed training leaves, and all cases of one that is not."""

    run: MicroRun
    cases: list[Case]


@pytest.fixture(scope="module")
def faultless(tmp_path_factory: pytest.TempPathFactory) -> Faultless:
    if faulty_calls.library() is None:
        pytest.skip("no C compiler (cc)")
    folder = tmp_path_factory.mktemp("faultless")
    bare, made = folder / "bare", folder / "made"
    bare.mkdir()
    write_job(bare, CHANGES, ["architecture.n_layers=3"])
    first = _undisturbed(bare, folder / "first")
    made.mkdir()
    for name in ("critic.yaml", "pretrain.yaml", "trunk", "cache"):
        source = folder / "first" / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, made / name)
    second = _undisturbed(made, folder / "second")
    making = [call for call in first if call.path.split("/")[0] in ("trunk", "cache")]
    calls = [(bare, call) for call in making] + [(made, call) for call in second]
    cases = [Case(begins, call, fault) for begins, call in calls for fault in _FAULTS]
    return Faultless(MicroRun(folder / "second/runs/r"), list(filter(_is_possible, cases)))


def _is_possible(case: Case) -> bool:
    return case.fault.kind != "SHORT" or case.call.name in ("write", "sendfile", "copy_file_range")


def _undisturbed(begins: Path, folder: Path) -> list[Call]:
    place = Place(shutil.copytree(begins, folder), folder.with_suffix(".log"))
    log = folder.with_suffix(".calls")
    assert place.train(log) == Exit.FINISHED, place.said
    return faulty_calls.logged(log)


def _problem(case: Case, folder: Path, undisturbed: MicroRun) -> str | None:
    """What a case that is not as it must be has done; None if it is."""
    place = Place(shutil.copytree(case.begins, folder / "case"), folder / "log")
    try:
        code = place.train(folder / "calls", case.call, case.fault)
        if case.call not in faulty_calls.logged(folder / "calls"):
            return "the call was not made"
        if code != Exit.FINISHED:
            if code not in (Exit.IO_FAILED, Exit.BAD_INPUT):
                return f"exit code {code}"
            if not any(path in place.said for path in ("runs/r", "trunk", "cache")):
                return "no path is named"
            if (code := place.train(folder / "again")) != Exit.FINISHED:
                return f"exit code {code} in the next attempt"
        return _difference(place.run, undisturbed, place.said)
    finally:
        if os.environ.get("SHOW_FAULTS"):
            print(case, place.said, sep="\n")
        shutil.rmtree(folder)


def _difference(run: MicroRun, undisturbed: MicroRun, said: str) -> str | None:
    if run.lines != undisturbed.lines:
        return f"metrics.jsonl: {[r['step'] for r in run.records]}"
    if run.checkpoints[-1:] != undisturbed.checkpoints[-1:]:
        return f"checkpoints {run.checkpoints}"
    if run.tensors() != undisturbed.tensors():
        return "other parameters in the last checkpoint"
    if run.status.get("state") != "finished":
        return f"status {run.status.get('state')}"
    if not (run.path / "critic.safetensors").exists():
        warned = "finished without critic.safetensors" in said
        return None if warned else "no critic.safetensors, and no word of it"
    return None if run.weights == undisturbed.weights else "other critic.safetensors"


def _problems(cases: Sequence[Case], folder: Path, undisturbed: MicroRun) -> list[str]:
    found = []
    for number, case in enumerate(cases):
        own = folder / f"{number}"
        own.mkdir()
        if problem := _problem(case, own, undisturbed):
            found.append(f"{case}: {problem}")
    return found


def test_some_calls_fail_and_nothing_is_lost(faultless: Faultless, tmp_path: Path) -> None:
    cases = random.Random(_SEED).sample(faultless.cases, _SAMPLE)
    assert _problems(cases, tmp_path, faultless.run) == []


@pytest.mark.all
@pytest.mark.parametrize("part", range(_PARTS))
def test_every_call_fails_once_in_every_way_and_nothing_is_lost(
    part: int, faultless: Faultless, tmp_path: Path
) -> None:
    assert _problems(faultless.cases[part::_PARTS], tmp_path, faultless.run) == []
