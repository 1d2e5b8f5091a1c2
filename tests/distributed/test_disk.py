"""Two ranks on a file system that fills up, becomes read-only or refuses one of them.

Run as a script this file is a training in which rank 0 does something to the file system between
two steps; as a test it starts such trainings and looks at what they leave.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launch import MicroJob, running
from micro_job import MicroRun

from job.common.errors import Exit
from job.run.manifest import Manifest

pytestmark = pytest.mark.slow

STEPS = 60
BEGIN = 12  # the step before which the trouble begins
SETTINGS = (f"training.max_steps={STEPS}", "checkpoint.every_steps=5", "checkpoint.keep_last=99")
MIB = 1 << 20
PACE_SECONDS = 0.03  # of a step in trouble, so that saves fail while training goes on
GIVE_UP_SECONDS = 20  # when the trouble ends even if nothing has noticed it


# In the ranks


class Trouble:
    """What rank 0 does between two steps, and what it sees of status.json meanwhile."""

    def __init__(self, kind: str, run: Path) -> None:
        self.kind, self.run = kind, run
        self.seen: dict[str, Any] = {"from": None, "to": None, "errors": []}
        self._began = 0.0
        self._failures = 0

    def between_steps(self, step: int) -> None:
        if step < BEGIN or self.seen["to"] is not None:
            return
        time.sleep(PACE_SECONDS)
        if self.seen["from"] is None:
            self.seen["from"] = step if self._begin() else None
            self._began = time.monotonic()
            return
        self._look()
        over = time.monotonic() - self._began > GIVE_UP_SECONDS
        waited = step > self.seen["from"] + 10
        if (waited and (self._failures >= 3 or self.kind == "facts")) or over:
            self._end()
            self.seen["to"] = step
            Path("seen.json").write_text(json.dumps(self.seen))

    def failed(self) -> None:
        self._failures += 1

    def _look(self) -> None:
        if self.kind == "renamed":
            return
        error = json.loads((self.run / "status.json").read_text())["checkpoint_error"]
        if error is not None and error not in self.seen["errors"]:
            self.seen["errors"].append(error)

    def _begin(self) -> bool:
        if any(self.run.glob("checkpoints/.step-*")):  # whose removal would give space back
            return False
        match self.kind:
            case "nearly-full":
                _fill(self.run / "filler", leave=100 << 10)
            case "full":
                _fill(self.run / "filler", leave=0)
            case "facts":
                oldest = min(self.run.glob("checkpoints/step-*"), default=None)
                if oldest is not None:
                    (oldest / "facts.json").write_bytes(b"")
                return oldest is not None
            case "renamed":
                self.run.rename(_away(self.run))
            case "read-only":
                return _remount(self.run / "checkpoints", "ro")
        return True

    def _end(self) -> None:
        if self.kind == "renamed":
            return  # for good
        if self.kind == "read-only":
            assert _remount(self.run / "checkpoints", "rw")
        else:
            (self.run / "filler").unlink(missing_ok=True)


def _away(run: Path) -> Path:
    return run.with_name(f"{run.name}-away")


def _fill(file: Path, leave: int) -> None:
    """Take all space of a file system but `leave` bytes."""
    with file.open("wb", buffering=0) as stream:
        for size in (64 << 10, 4 << 10, 512):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue
        stream.truncate(stream.tell() - leave)


def _remount(folder: Path, mode: str) -> bool:
    """False where something is being written there, which the kernel waits for."""
    return subprocess.run(["mount", "-o", f"remount,{mode}", folder], check=False).returncode == 0


def _main() -> None:
    """Take part in a training with the trouble that the environment names."""
    import job.train
    from job.training import checkpoint, loop
    from job.training.learner import Learner

    kind, rank = os.environ["TROUBLE"], int(os.environ["RANK"])
    trouble = Trouble(kind, Path(os.environ["RUN"]))
    step, report = Learner.step, checkpoint.Checkpoints._report

    def paced(self: Learner, number: int, *arguments: Any) -> Any:
        if rank == 0 and kind in ("nearly-full", "full", "read-only", "facts", "renamed"):
            trouble.between_steps(number + 1)
        return step(self, number, *arguments)

    def noticed(self: checkpoint.Checkpoints) -> None:
        pending = self._saving is not None and self._saving.done()
        report(self)
        if pending and self._failed:
            trouble.failed()

    Learner.step = paced  # type: ignore[method-assign]
    checkpoint.Checkpoints._report = noticed  # type: ignore[method-assign]
    if kind == "one-rank" and rank == 1:
        _refuse_own_files(checkpoint)
    if kind in ("for-good", "renamed"):
        loop.LAST_SAVE_PAUSES = (0, 0)  # type: ignore[assignment]
    job.train.run_and_leave(job.train.main)


def _refuse_own_files(checkpoint: Any) -> None:
    """Let this rank's disk refuse its state once, and its tensors once."""
    write, save = checkpoint._write_durably, checkpoint._writer
    refused: set[str] = set()

    def write_durably(file: Path, content: bytes) -> None:
        if "state" not in refused and "step-00000010" in file.parent.name:
            refused.add("state")
            raise OSError(28, "No space left on device", str(file))
        write(file, content)

    def writer(scratch: Path) -> Any:
        whole = save(scratch)
        if "tensors" not in refused and int(scratch.name[6:14]) >= 20:
            refused.add("tensors")

            def write_data(*_: Any) -> None:
                raise OSError(5, "Input/output error", str(scratch))

            whole.write_data = write_data
        return whole

    checkpoint._write_durably, checkpoint._writer = write_durably, writer


# In the tests


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> MicroJob:
    return MicroJob.prepare(tmp_path_factory.mktemp("disk"), *SETTINGS)


def _train(
    job: MicroJob, name: str, trouble: str, *settings: str, code: int = 0
) -> tuple[MicroRun, str]:
    """A run of two ranks and what they wrote to stderr."""
    command = [__file__, "--config", "critic.yaml", "--override", f"run.name={name}", *settings]
    environment = {"TROUBLE": trouble, "RUN": f"runs/{name}"}
    (job.folder / "seen.json").unlink(missing_ok=True)
    with running([*command, *job.settings], 2, job.folder, environment=environment) as ranks:
        assert ranks.wait(60) == [code] * 2, ranks.log()
        log = "".join(file.read_text(errors="replace") for file in ranks.logs)
    return job.run(name), log


@pytest.fixture(scope="module")
def undisturbed(job: MicroJob) -> MicroRun:
    return _train(job, "undisturbed", "none")[0]


@pytest.fixture
def mounted() -> Iterator[Callable[[Path, int], None]]:
    """Mounts a tmpfs of some bytes on a folder; skips where that is not permitted."""
    folders: list[Path] = []

    def mount(folder: Path, size: int) -> None:
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        folders.append(folder)

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _seen(job: MicroJob) -> dict[str, Any]:
    seen: dict[str, Any] = json.loads((job.folder / "seen.json").read_text())
    return seen


def _good_checkpoints(run: MicroRun) -> list[int]:
    """The committed steps, every one of which must be intact."""
    for folder in run.path.glob("checkpoints/step-*"):
        Manifest.read(folder).verify(folder)
    return run.checkpoints


def _ended_well(run: MicroRun, undisturbed: MicroRun) -> None:
    run.assert_equals(undisturbed)
    assert run.status["checkpoint_error"] is None
    assert run.status["checkpoint"] == _good_checkpoints(run)[-1] == STEPS


def _nothing_was_saved_between(run: MicroRun, seen: dict[str, Any]) -> None:
    """Checkpoints are of before the trouble and of after it; training went on meanwhile."""
    first, last = seen["from"], seen["to"]
    assert first + 10 < last < STEPS
    # what was copied shortly before the end may have been written after it
    assert not [step for step in run.checkpoints if first <= step < last - 8]
    assert any(step < first for step in run.checkpoints)


Mount = Callable[[Path, int], None]


def test_a_disk_that_fills_up_during_a_save_costs_nothing(
    job: MicroJob, undisturbed: MicroRun, mounted: Mount
) -> None:
    mounted(job.run("nearly-full").path, 16 * MIB)
    run, log = _train(job, "nearly-full", "nearly-full")
    seen = _seen(job)
    # in status.json, while it was so; torch may name what it could not write by a position only
    assert "saving a checkpoint failed: rank 0: " in seen["errors"][0]
    assert log.count("training goes on, the last good one is step") >= 3
    assert seen["errors"][0] in (run.path / "train.log").read_text()
    _nothing_was_saved_between(run, seen)
    _ended_well(run, undisturbed)


def test_a_disk_without_one_free_byte_costs_nothing(
    job: MicroJob, undisturbed: MicroRun, mounted: Mount
) -> None:
    mounted(job.run("full").path, 16 * MIB)
    run, log = _train(job, "full", "full")
    assert "metrics.jsonl: No space left on device; lines are kept in memory" in log
    assert log.count("training goes on, the last good one is step") >= 3
    _nothing_was_saved_between(run, _seen(job))
    _ended_well(run, undisturbed)


def test_checkpoints_on_a_file_system_that_is_read_only_for_a_while_cost_nothing(
    job: MicroJob, undisturbed: MicroRun, mounted: Mount
) -> None:
    mounted(job.run("read-only").path / "checkpoints", 16 * MIB)
    run, _ = _train(job, "read-only", "read-only")
    seen = _seen(job)
    assert "Read-only file system" in seen["errors"][0]
    assert "Read-only file system" in (run.path / "train.log").read_text()
    _nothing_was_saved_between(run, seen)
    _ended_well(run, undisturbed)


def test_a_disk_that_stays_full_ends_the_run_with_its_last_good_checkpoint(
    job: MicroJob, undisturbed: MicroRun, mounted: Mount
) -> None:
    # enough for six checkpoints, not for all, and for what is smaller than one
    mounted(job.run("for-good").path, 2 * MIB + MIB // 8)
    run, log = _train(job, "for-good", "for-good", code=Exit.IO_FAILED)
    assert f"step {STEPS} could not be saved" in log
    assert log.count("trying again in 0 s") == 2 * 2  # on both ranks
    good = _good_checkpoints(run)
    assert good
    assert good[-1] < STEPS
    assert run.hidden == []
    assert run.status["state"] == "failed"
    assert run.status["checkpoint"] == good[-1]
    assert run.lines == undisturbed.lines


def test_a_run_whose_folder_is_renamed_says_so_and_goes_on_when_it_is_back(
    job: MicroJob, undisturbed: MicroRun
) -> None:
    run, log = _train(job, "renamed", "renamed", code=Exit.IO_FAILED)
    assert f"step {STEPS} could not be saved in runs/renamed/checkpoints" in log
    assert "No such file or directory: 'runs/renamed/" in log
    assert not run.path.exists()  # nothing is begun under the old name
    _away(run.path).rename(run.path)
    assert run.checkpoints
    run, _ = _train(job, "renamed", "none")
    _ended_well(run, undisturbed)


def test_one_rank_that_cannot_write_costs_only_the_checkpoint_of_the_moment(
    job: MicroJob, undisturbed: MicroRun
) -> None:
    run, _ = _train(job, "one-rank", "one-rank")
    log = (run.path / "train.log").read_text()
    assert "saving a checkpoint failed: rank 1: [Errno 28] No space left on device" in log
    assert "saving a checkpoint failed: rank 1: [Errno 5] Input/output error" in log
    assert log.count("saving a checkpoint failed") == 2
    assert 10 not in run.checkpoints
    _ended_well(run, undisturbed)


def test_an_older_checkpoint_that_is_damaged_leaves_no_rank_waiting(
    job: MicroJob, undisturbed: MicroRun
) -> None:
    best = "checkpoint.keep_best=validation/value/mse"
    run, log = _train(job, "facts", "facts", best)
    assert "saving a checkpoint failed" not in log
    run.assert_equals(undisturbed)


if __name__ == "__main__":
    _main()
