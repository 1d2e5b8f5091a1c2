"""Ranks that share the frozen blocks' states, and are killed while they write and read them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from launch import MicroJob, running
from micro_job import MicroRun

from job.training.cache_folders import folders

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SOAK_KILLS", "3"))
STEPS = 30 + 8 * KILLS
SETTINGS = (
    f"training.max_steps={STEPS}",
    "data.arithmetic.train_examples=150",  # epochs of 18.75 steps
    "checkpoint.every_steps=3",
    "distributed.fsdp.sharding_strategy=FULL_SHARD",
    "training.prefix_cache=all",
    "training.min_lr_ratio=1.0",  # so that a longer run begins as a shorter one
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> MicroJob:
    return MicroJob.prepare(tmp_path_factory.mktemp("cached"), *SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(job: MicroJob) -> MicroRun:
    return job.finish("undisturbed", _states("undisturbed"))


def _states(name: str) -> str:
    return f"training.prefix_cache_dir={name}-states"


def _shares(run: MicroRun) -> list[float]:
    lines = (run.path / "telemetry.jsonl").read_text().splitlines()
    return [
        row["prefix_read_share"] for row in map(json.loads, lines) if "prefix_read_share" in row
    ]


def _assert_alike(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """One step's figures agree; the AUC but for three of its pairs, which rounding may swap."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        bar = 0.002 if name.endswith("last_token_auc") else 1e-4
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=bar), (theirs["step"], name)


def test_ranks_read_what_others_have_written(job: MicroJob, undisturbed: MicroRun) -> None:
    plain = job.finish("plain", "training.prefix_cache=none")
    assert _shares(undisturbed)[-1] == 1.0
    for ours, theirs in zip(undisturbed.records, plain.records, strict=True):
        _assert_alike(ours, theirs)


def test_ranks_that_train_fewer_blocks_begin_with_the_states_of_more(job: MicroJob) -> None:
    few = ("training.max_steps=28", _states("sweep"))  # of which an epoch has 18.75
    head_only = (*few, "training.num_unfrozen_layers=0")
    job.finish("more", *few)
    fewer = job.finish("fewer", *head_only)
    plain = job.finish("alone", *head_only, "training.prefix_cache=none")
    assert json.loads((fewer.path / "prefix_cache.json").read_text())["earlier"] == 1
    first, *_, last = _shares(fewer)
    assert first == 0.5  # one of two blocks
    assert last > 0.8  # but for what was seen in the step that two epochs share
    for ours, theirs in zip(fewer.records, plain.records, strict=True):
        _assert_alike(ours, theirs)


def test_kills_while_states_are_written_and_read_leave_no_trace(
    job: MicroJob, undisturbed: MicroRun
) -> None:
    draw, run, name = random.Random(3), job.run("killed"), "killed"
    states = Path(job.folder / "killed-states")
    for number in range(1, KILLS + 1):
        after = run.step + draw.randint(3, 9)
        what = f"kill {number}, from step {after} on"
        with job.start(name, _states(name)) as ranks:
            ranks.wait_until(lambda: run.step >= after, what)  # noqa: B023
            time.sleep(draw.uniform(0, 0.05))
            victims = draw.choice([[0], [1], [0, 1]])
            ranks.signal(signal.SIGKILL, victims)
            ranks.wait(60)
        assert run.lines == undisturbed.lines[: len(run.lines)], what
    job.finish(name, _states(name)).assert_equals(undisturbed)
    assert len(run.attempts) == KILLS + 1
    left = [path for path in states.glob("*/*") if path.suffix not in (".states", ".index")]
    assert not left
    assert len(list(states.glob("*/*.states"))) == len(list(states.glob("*/*.index")))


def test_damage_that_one_rank_finds_ends_all_of_them_and_the_next_attempt_computes(
    job: MicroJob, undisturbed: MicroRun
) -> None:
    name = "damaged"
    job.finish(name, _states(name), "training.max_steps=20")
    for path in (job.folder / "damaged-states").glob("*/*.states"):
        content = bytearray(path.read_bytes())
        content[7] ^= 32
        path.write_bytes(content)
    for _ in range(12):  # shards; each attempt sets aside what its ranks have come upon
        with job.start(name, _states(name)) as ranks:
            codes = ranks.wait()
            assert codes[0] == codes[1] or 1 in codes, ranks.log()
        if codes == [0, 0]:
            break
        assert "the next attempt computes what could be set aside" in ranks.log()
    assert codes == [0, 0]
    for ours, theirs in zip(job.run(name).records, undisturbed.records, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)


_BUILD = """
import errno, os, sys
from job import cache
from job.data.state_shards import Writer
put, rank = Writer.put, int(os.environ["RANK"])

def committed(writer, *given):
    put(writer, *given)
    writer.commit()

def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

Writer.put = committed
{change}
cache.run_and_leave(cache.main)
"""


def _build(job: MicroJob, name: str, change: str = "") -> tuple[list[int], str]:
    """Build on two ranks, which commit each micro-batch; their exit codes, and what they said."""
    settings = (*job.settings, "training.micro_batch_tokens=128", "run.name=none")
    settings += ("training.prefix_cache=all", _states(name))
    command = ["-c", _BUILD.format(change=change), "build", "--config", "critic.yaml"]
    with running([*command, "--override", *settings], 2, job.folder) as ranks:
        return ranks.wait(60), ranks.log()


def test_ranks_that_see_other_states_build_the_same(job: MicroJob) -> None:
    assert _build(job, "disk1")[0] == [0, 0]
    part, whole = job.folder / "disk0-states", job.folder / "disk1-states"
    shutil.copytree(whole, part)
    indexes = sorted(part.glob("*/*.index"))
    for index in indexes[::2]:
        index.unlink()
    (before,), (all_,) = folders(part), folders(whole)
    codes, log = _build(
        job, "disk", "sys.argv[-1] = f'training.prefix_cache_dir=disk{rank}-states'"
    )
    assert codes == [0, 0], log
    (here,), (there,) = folders(part), folders(whole)
    gained = here.sequences - before.sequences, there.sequences - all_.sequences
    assert sum(gained) == all_.sequences - before.sequences  # each rank writes what it computes
    assert min(gained) > 0


def test_where_one_rank_can_write_no_more_all_end(job: MicroJob) -> None:
    codes, log = _build(job, "full", "os.pwrite = full if rank == 1 else os.pwrite")
    assert codes == [74, 74], log
    assert "No space left on device; what was written before is kept" in log
    assert "Traceback" not in log
    assert len(list((job.folder / "full-states").glob("*/*.index"))) == 1  # the other's first one
