"""Damaged checkpoints and files of a run cost no more than they held, and nothing of others."""

from __future__ import annotations

import shutil

import pytest
from disturbed_runs import (
    DAMAGES,
    assert_equal,
    assert_same,
    checkpoint_of,
    content_of,
    copy_run,
    crash_before,
    cut,
    flip,
    log_of,
    run_training,
    saved_steps,
    weights_of,
)

from job.run.directory import RunDirectory
from job.run.manifest import MANIFEST, Manifest

pytestmark = pytest.mark.usefixtures("training_folder")

FILES = [".metadata", "__0_0.distcp", "rank-00000.state", "facts.json", "config.yaml", MANIFEST]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(
    whole: RunDirectory, halted: RunDirectory, name: str, damage: str
) -> None:
    run = copy_run(halted, f"{damage}-{name.strip('._')}")
    DAMAGES[damage](checkpoint_of(run, 6) / name)
    run_training(run.path.name)
    log = log_of(run)
    assert f"damaged checkpoint: {checkpoint_of(run, 6) / name}" in log
    assert "set aside as runs/" in log
    assert "going on from step 4" in log
    assert run.file("checkpoints/damaged-step-00000006").is_dir()
    assert saved_steps(run) == [2, 4, 6, 8]
    Manifest.read(checkpoint_of(run, 6)).verify(checkpoint_of(run, 6))
    assert_same(run, whole)


@pytest.mark.slow
def test_with_every_checkpoint_damaged_a_run_starts_over(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = copy_run(halted, "all-damaged")
    flip(checkpoint_of(run, 2) / "__0_0.distcp")
    (checkpoint_of(run, 4) / MANIFEST).unlink()
    cut(checkpoint_of(run, 6) / "facts.json", lambda n: 0)
    run_training("all-damaged")
    assert log_of(run).count("damaged checkpoint") == 3
    assert "going on from" not in log_of(run)
    assert len(list(run.file("checkpoints").glob("damaged-step-*"))) == 3
    assert_same(run, whole)


@pytest.mark.slow
def test_one_step_can_be_set_aside_again_and_again(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = copy_run(halted, "again")
    for _ in range(3):
        flip(checkpoint_of(run, 6) / "__0_0.distcp")
        crash_before(8, "again")
    run_training("again")
    aside = sorted(path.name for path in run.file("checkpoints").glob("damaged-*"))
    assert aside == [f"damaged-step-00000006{suffix}" for suffix in ("", ".2", ".3")]
    assert_same(run, whole)


@pytest.mark.slow
def test_what_a_killed_attempt_was_writing_is_not_used_and_is_removed(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = copy_run(halted, "leftovers")
    checkpoints = run.file("checkpoints")
    checkpoint_of(run, 6).rename(checkpoints / ".step-00000006.attempt-0001")
    shutil.copytree(checkpoint_of(run, 4), checkpoints / ".removed-step-00000001")
    run_training("leftovers")
    assert "going on from step 4" in log_of(run)
    assert list(checkpoints.glob(".*")) == []
    assert_same(run, whole)


THEIRS = (  # what people keep beside checkpoints
    "step-00000006.bak",
    "step-00000006.bad",
    "step-00000004 keep",
    "step-000000006",
    "step-6",
    "step-99999999x",
    "Step-00000008",
    ".step-00000004.mine",
    ".snapshot",
    ".removed-notes",
    "damaged-step-00000006.mine",
)


@pytest.mark.slow
def test_only_what_is_named_as_ours_is_used_counted_or_removed(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = copy_run(halted, "copies")
    checkpoints = run.file("checkpoints")
    for name in THEIRS:
        shutil.copytree(checkpoint_of(run, 6), checkpoints / name)
    checkpoint_of(run, 6).rename(checkpoints / "step-00000007.bad")  # is to be left out
    kept = {name: content_of(checkpoints / name) for name in (*THEIRS, "step-00000007.bad")}
    few = ("checkpoint.keep_every=4", "checkpoint.keep_last=1")
    run_training("copies", *few, "checkpoint.keep_best=validation/value/mse")
    assert "going on from step 4" in log_of(run)
    assert run.status()["checkpoint_error"] is None
    assert {name: content_of(checkpoints / name) for name in kept} == kept
    assert saved_steps(run) == [4, 8]
    assert_same(run, whole)


@pytest.mark.slow
def test_a_torn_last_line_of_the_metrics_does_not_matter(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = copy_run(halted, "torn")
    with run.file("metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "train/lo')
    run_training("torn")
    assert_same(run, whole)


TORN = {
    "empty": b"",
    "zeros": bytes(64),
    "cut": b'{"step": 7, "resumed_st',
    "no UTF-8": b"\xff\xfe{}\n",
    "another kind": b'"text"\n',
    "deep": b"[" * 100_000,
}


STATE_FILES = ("config.yaml", "status.json", "bad_steps.json", "attempts/0001/attempt.json")


@pytest.mark.slow
@pytest.mark.parametrize("content", TORN.values(), ids=TORN)
def test_a_run_whose_small_files_are_all_damaged_goes_on_from_its_checkpoint(
    whole: RunDirectory, halted: RunDirectory, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    run = copy_run(halted, f"damaged-{len(content)}-{content[:1].hex()}")
    for name in (*STATE_FILES, "parameters.json", "memory.json", "reliability.json"):
        run.file(name).write_bytes(content)
    for name in ("metrics.jsonl", "telemetry.jsonl"):
        with run.file(name).open("ab") as stream:
            stream.write(content + b"\n" + content)
    run_training(run.path.name)
    said = [r.getMessage() for r in caplog.records if "taken as absent" in r.getMessage()]
    for name in STATE_FILES:
        if name != "attempts/0001/attempt.json":  # of the one before nobody asks
            assert sum(text.startswith(f"{run.file(name)}: ") for text in said) == 1
    assert "going on from step 6" in log_of(run)
    assert run.config() == whole.config() | {"run": run.config()["run"]}
    assert_same(run, whole)


@pytest.mark.slow
def test_damage_in_the_metrics_that_stay_costs_these_lines_alone(
    whole: RunDirectory, halted: RunDirectory
) -> None:
    run = copy_run(halted, "damaged-line")
    lines = run.file("metrics.jsonl").read_bytes().splitlines(True)
    lines[2] = bytes(len(lines[2]) - 1) + b"\n"
    run.file("metrics.jsonl").write_bytes(b"".join(lines))
    run_training("damaged-line")
    expected = whole.records()
    assert run.records() == expected[:2] + expected[3:]
    assert_equal(weights_of(run), weights_of(whole))
    assert "lacks 1 of 6 steps" in log_of(run)


@pytest.mark.slow
def test_a_run_that_lost_everything_but_its_name_starts_over(whole: RunDirectory) -> None:
    run = crash_before(2, "lost-all")  # without a checkpoint
    for name in ("config.yaml", "status.json", "metrics.jsonl"):
        run.file(name).write_bytes(bytes(300))
    run_training("lost-all")
    assert_same(run, whole)
