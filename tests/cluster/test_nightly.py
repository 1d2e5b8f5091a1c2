"""Nights on a real Slurm: from cron, with entries that fail each in its own way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab import DEFAULT_CONF, Lab
from nights import STEPS, Site

pytestmark = pytest.mark.slow

CRON_D = Path("/etc/cron.d")


@pytest.fixture
def site(lab: Lab, tmp_path: Path) -> Site:
    return Site.prepare(lab, tmp_path)


@pytest.fixture(autouse=True)
def _nothing_left(lab: Lab) -> Iterator[None]:
    lab.cancel_all()
    yield
    lab.cancel_all()


@contextmanager
def _cron(name: str, line: str) -> Iterator[None]:
    """A cron daemon that runs a line each minute, as root."""
    if shutil.which("cron") is None:
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600", "install", "-y"]
        subprocess.run([*apt, "--no-install-recommends", "cron"], check=True)
    schedule, command = line.split(" ", 5)[:5], line.split(" ", 5)[5]
    file = CRON_D / name
    file.write_text(f"* * * * * root {command}\n")
    assert len(schedule) == 5
    daemon = subprocess.Popen(["cron", "-f"])
    try:
        yield
    finally:
        file.unlink()
        daemon.terminate()
        daemon.wait()


def _verdicts(record: dict[str, Any], entry: str) -> set[str]:
    return {one["verdict"] for one in record["findings"] if one["entry"] == entry}


def test_cron_submits_a_night_that_judges_itself(site: Site) -> None:
    if not site.job.lab.be_the_default():
        pytest.skip(f"{DEFAULT_CONF} is of a Slurm that this machine has")
    matrix = site.matrix(
        plain={"unfreeze": [1]},
        resumed={"unfreeze": [1], "stop_at": 10, "same_as": "plain"},
        preflight={"kind": "preflight"},
    )
    told = site.run("--install-line", *site.options(matrix))
    crontab = next(line for line in told.stdout.splitlines() if line.startswith("17 2 * * *"))
    with _cron(f"nightly-{os.getpid()}", crontab):
        submitted = lambda: site.nights and (site.nights[0] / "plan.json").exists()  # noqa: E731
        log = site.folder / "nights/cron.log"
        site.job.lab.wait_until(submitted, f"a night by cron: {log}", 150)
    record = site.wait_for_record()
    assert [one.name for one in site.nights] == ["night-000001"]
    results = record["results"]
    assert {name for name, one in results.items() if one["complete"]} == set(results), record
    plain, resumed = results["plain"]["figures"], results["resumed"]["figures"]
    assert plain["loss"] == resumed["loss"]
    assert plain["parameters"] == resumed["parameters"]
    assert len(plain["loss"]) == STEPS
    assert plain["speed"] > 0
    assert resumed["signal_to_saved_seconds"] > 0
    assert _verdicts(record, "plain") == {"no baseline yet"}
    assert _verdicts(record, "preflight") == {"passed"}
    report = site.run("report", "--folder", str(site.folder / "nights"))
    assert report.returncode == 4
    assert "no baseline yet" in report.stdout.splitlines()[0]


@pytest.mark.all
@pytest.mark.timeout(1800)
def test_one_entry_is_preempted_one_crashes_and_one_never_starts(site: Site) -> None:
    lab = site.job.lab
    first, second = lab.nodes
    lab.run("sbatch", "--exclusive", "-o/dev/null", "-w", second, "--wrap", "exec sleep 900")
    matrix = site.matrix(
        hours=0.25,  # ten minutes more than their time limit
        steps=200,
        preempted={"unfreeze": [1]},
        crashing={"unfreeze": [0], "override": ["checkpoint.every_steps=1000"]},  # no progress
        never={"unfreeze": [1], "gpus": 4, "nodes": 2},
    )
    done = site.run(*site.options(matrix, partition="low", max_attempts=1))
    assert done.returncode == 0, done.stderr
    preempted, crashing = site.entry("preempted"), site.entry("crashing")
    preempted.freeze_when(lambda: preempted.results.step >= 20, "step 20", 240)
    crashing.wait_for_step(5, 240)
    crashing.send(9)
    failed = crashing.path / "slurm/status.json"
    crashing.wait_until(lambda: json.loads(failed.read_text())["state"] == "failed", "a crash")
    site.job.lab.run(
        "sbatch", "-p", "high", "--exclusive", "-w", first, "-o/dev/null", "--wrap", "true"
    )
    preempted.wait_until(lambda: preempted.count("signal"), "the signal of preemption")
    preempted.send(18)
    again = site.run(*site.options(matrix))
    assert (again.returncode, again.stdout) == (0, "")
    assert "still goes on" in again.stderr
    record = site.wait_for_record(900)
    results = record["results"]
    assert results["preempted"]["complete"], record
    assert len(preempted.attempts) == 2
    assert "SIGKILL" in results["crashing"]["reason"]
    assert results["never"]["reason"] == "it never started"
    for entry in ("crashing", "never"):
        assert _verdicts(record, entry) == {"incomplete"}
    report = site.run("report", "--folder", str(site.folder / "nights"))
    assert report.returncode == 3
    next_night = site.run(*site.options(site.matrix(plain={"unfreeze": [1]})))
    assert next_night.returncode == 0, next_night.stderr


@pytest.mark.all
def test_a_full_queue_disturbs_nothing(site: Site) -> None:
    lab = site.job.lab
    conf = lab.folder / "etc/slurm.conf"
    before = conf.read_text()
    conf.write_text(f"{before}MaxJobCount=3\n")
    try:
        lab.stop_controller()
        lab.start_controller()
        entries = {f"n{k}": {"unfreeze": [k % 3]} for k in range(6)}
        began = time.monotonic()
        done = site.run(*site.options(site.matrix(**entries)))
        assert done.returncode == 75, done.stderr
        assert "the queue is full" in done.stderr
        assert time.monotonic() - began < 250
        assert not site.nights
        assert not lab.run("squeue", "-h").strip()
    finally:
        conf.write_text(before)
        lab.stop_controller()
        lab.start_controller()


@pytest.mark.all
def test_a_controller_that_is_away_disturbs_nothing(site: Site) -> None:
    lab = site.job.lab
    lab.stop_controller()
    try:
        done = site.run(*site.options(site.matrix(plain={"unfreeze": [1]})))
        assert done.returncode == 69, done.stderr
        assert not site.nights
    finally:
        lab.start_controller()
