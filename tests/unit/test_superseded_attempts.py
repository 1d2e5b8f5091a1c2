"""An attempt that a newer one has superseded leaves no trace."""

from __future__ import annotations

import pytest
from disturbed_runs import (
    after_saves,
    assert_same,
    at_steps,
    checkpoint_of,
    content_of,
    copy_run,
    crash_before,
    log_of,
    run_training,
    saved_steps,
)

from job.common.errors import Superseded, exit_code
from job.run.directory import RunDirectory
from job.run.fence import Fence
from job.run.manifest import Manifest

pytestmark = pytest.mark.usefixtures("training_folder")


@pytest.mark.slow
def test_a_checkpoint_that_a_superseded_attempt_committed_too_late_is_ignored(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = copy_run(halted, "late")
    late = checkpoint_of(run, 6).rename("late-checkpoint")
    crash_before(6, "late")  # goes on from 4
    late.rename(checkpoint_of(run, 6))  # of attempt 1, committed only now
    assert Manifest.read(checkpoint_of(run, 6)).attempt == 1
    run_training("late")
    assert log_of(run).count("going on from step 4") == 2
    assert "going on from step 6" not in log_of(run)
    assert Manifest.read(checkpoint_of(run, 6)).attempt == 3  # it took the late one's place
    assert_same(run, whole)


@pytest.mark.slow
def test_a_checkpoint_committed_before_the_newer_attempt_went_on_is_used(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = copy_run(halted, "in-time")
    Fence.take(run.path)  # an attempt that died before it recorded anything
    crash_before(7, "in-time")
    run_training("in-time")
    assert log_of(run).count("going on from step 6") == 2
    assert_same(run, whole)


@pytest.mark.slow
def test_an_attempt_that_is_superseded_leaves_and_changes_nothing(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/superseded")
    before: dict[str, bytes] = {}

    def supersede() -> None:
        Fence.take(run.path)
        before.update(content_of(run.path))

    with monkeypatch.context() as patch:
        at_steps(patch, {5: supersede})
        with pytest.raises(Superseded) as caught:
            run_training("superseded")
    assert exit_code(caught.value) == 73
    after = content_of(run.path)
    lines = after.pop("metrics.jsonl").removeprefix(before.pop("metrics.jsonl"))
    assert lines.count(b"\n") <= 1  # of the step that was being made; the newer one drops it
    assert after.pop("train.log", b"").startswith(before.pop("train.log", b""))
    assert after == before
    run_training("superseded")
    assert_same(run, whole)


@pytest.mark.slow
def test_an_attempt_superseded_while_it_saves_commits_nothing(
    whole: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("runs/overtaken")

    def overtake() -> None:
        if len(saved_steps(run)) == 2:
            Fence.take(run.path)

    with monkeypatch.context() as patch:
        after_saves(patch, overtake)
        with pytest.raises(Superseded):
            run_training("overtaken")
    assert saved_steps(run) == [2, 4]
    run_training("overtaken")
    assert_same(run, whole)
