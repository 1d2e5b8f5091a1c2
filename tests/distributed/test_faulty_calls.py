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
# Each of these is dealt with in a way of its own.
_NAMED = (
    ("mkdir runs/r/attempts/0001 1", "ENOSPC disk", Exit.IO_FAILED),  # full when it starts
    (
        "open runs/r/checkpoints/.step-00000008.attempt-0001/facts.json 1",
        "EDQUOT disk",
        Exit.IO_FAILED,
    ),
    ("write runs/r/metrics.jsonl 3", "ESTALE descriptor", Exit.FINISHED),
    ("fsync runs/r/metrics.jsonl 1", "EIO once", Exit.FINISHED),
    ("open runs/r/.tmp* 1", "ENOSPC once", Exit.FINISHED),  # critic.safetensors
    ("rename runs/r/.status.json.attempt-0001.* 8", "EIO once", Exit.FINISHED),  # "finished"
)
_PARTS = 60
_SAMPLE = 4
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


def _outcome(case: Case, folder: Path, undisturbed: MicroRun) -> tuple[int, str | None]:
    """The exit code of a case, and what has gone wrong beyond that; None if nothing has."""
    folder.mkdir()
    place = Place(shutil.copytree(case.begins, folder / "case"), folder / "terminal")
    try:
        code = place.train(folder / "calls", case.call, case.fault)
        if case.call not in faulty_calls.logged(folder / "calls"):
            return code, "the call was not made"
        return code, _loss(place, code, undisturbed)
    finally:
        shutil.rmtree(folder)


def _loss(place: Place, code: int, undisturbed: MicroRun) -> str | None:
    """What is lost after an attempt, and after another one if that has not come to the end."""
    if code != Exit.FINISHED:
        if code not in (Exit.IO_FAILED, Exit.BAD_INPUT):
            return f"exit code {code}: {place.said[-2000:]}"
        if not any(path in place.said for path in ("runs/r", "trunk", "cache")):
            return "no path is named"
        if (again := place.train(place.terminal.with_name("again"))) != Exit.FINISHED:
            return f"exit code {again} in the next attempt: {place.said[-2000:]}"
    return _difference(place.run, undisturbed, place.said)


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


def _assert_nothing_lost(cases: Sequence[Case], folder: Path, undisturbed: MicroRun) -> None:
    for number, case in enumerate(cases):
        code, loss = _outcome(case, folder / f"{number}", undisturbed)
        assert loss is None, f"{case} (exit code {code}): {loss}"


def test_some_calls_fail_and_nothing_is_lost(faultless: Faultless, tmp_path: Path) -> None:
    cases = random.Random(_SEED).sample(faultless.cases, _SAMPLE)
    _assert_nothing_lost(cases, tmp_path, faultless.run)


@pytest.mark.parametrize(("call", "fault", "code"), _NAMED)
def test_a_failed_call_ends_a_training_only_where_nothing_else_is_left(
    call: str, fault: str, code: int, faultless: Faultless, tmp_path: Path
) -> None:
    wanted = [c for c in faultless.cases if (str(c.call), str(c.fault)) == (call, fault)]
    assert [_outcome(case, tmp_path / "it", faultless.run) for case in wanted] == [(code, None)]


@pytest.mark.all
@pytest.mark.parametrize("part", range(_PARTS))
def test_every_call_fails_once_in_every_way_and_nothing_is_lost(
    part: int, faultless: Faultless, tmp_path: Path
) -> None:
    _assert_nothing_lost(faultless.cases[part::_PARTS], tmp_path, faultless.run)
