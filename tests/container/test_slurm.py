"""A job of a real Slurm whose trainers run in the SIF, under a supervisor outside."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from built import Built
from cluster_job import ClusterJob, submit
from lab import Lab
from nights import Site
from tools import Tools

pytestmark = pytest.mark.slow

SETTINGS = (
    "training.max_steps=600",
    "evaluation.every_steps=100000",
    "checkpoint.every_steps=100000",
)


@pytest.fixture
def job(lab: Lab, tools: Tools, tmp_path: Path) -> Iterator[ClusterJob]:
    del tools  # what submit.py finds on the PATH
    yield ClusterJob.prepare(lab, tmp_path, *SETTINGS)
    lab.cancel_all()


def _environment(lab: Lab, tools: Tools) -> dict[str, str]:
    """A login node's, with Apptainer."""
    return os.environ | tools.environment | lab.environment


def test_a_preempted_job_in_the_sif_comes_back_and_ends_with_the_bits_of_one_outside(
    job: ClusterJob, lab: Lab, tools: Tools, sif: Path
) -> None:
    outside = job.micro.finish("outside", world=2)
    run = job.submit(
        *("--gpus", "2", "--image", str(sif)),
        environment=_environment(lab, tools),
        partition="low",
        preflight=True,
    )
    run.wait_for_step(20, 240)
    assert all(name.startswith("/opt/venv/bin/python") for name in _programs(run.trainers()))
    job.preempt()
    run.wait_until(lambda: run.count("started") == 2, "another start")
    run.wait_for("finished", 240)
    run.results.assert_equals(outside)
    assert run.count("requeued") == 1
    log = (run.attempts[0] / "rank-00000.log").read_text()
    assert "ok  network: 1 pair(s) of ranks" in log  # preflight came first
    assert log.index("ok  network") < log.index("attempt 1 of")


def _programs(pids: dict[int, dict[str, str]]) -> list[str]:
    return [Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0] for pid in pids]


def test_a_wrong_input_in_the_sif_is_the_jobs_end(
    job: ClusterJob, lab: Lab, tools: Tools, sif: Path
) -> None:
    row = {"prompt": "1+1=", "response": "2", "reward": 1}
    rows = [*[row] * 20, row | {"reward": 7}]  # a submission looks at twenty
    for name in ("train.jsonl", "validation.jsonl"):
        (job.folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    data = ("data.train=train.jsonl", "data.validation=validation.jsonl")
    environment = _environment(lab, tools)
    run = job.submit("--gpus", "1", "--image", str(sif), environment=environment, settings=data)
    status = run.wait_for("failed", 240)
    assert "exit code 78" in status["reason"]
    assert "train.jsonl" in status["reason"]


def test_the_commit_of_the_image_is_held_against_the_checkouts(
    job: ClusterJob, lab: Lab, tools: Tools, packed: Built
) -> None:
    arguments = job.arguments("--gpus", "1", "--image", str(packed.sif), "--dry-run")
    done = submit(lab, *arguments, cwd=job.folder, environment=_environment(lab, tools))
    (found,) = [one for one in json.loads(done.stdout)["checks"] if one["name"] == "image"]
    assert found["state"] in ("ok", "warning"), found
    assert packed.facts["commit"][:12] in found["text"] or found["state"] == "ok"


@pytest.mark.all
def test_a_night_runs_and_is_judged_in_the_sif(
    lab: Lab, tools: Tools, sif: Path, tmp_path: Path
) -> None:
    site = Site.prepare(lab, tmp_path)
    matrix = site.matrix(plain={"unfreeze": [1]}, preflight={"kind": "preflight"})
    options = [*site.options(matrix), "--image", str(sif)]
    done = site.run(*options, environment=_environment(lab, tools))
    assert done.returncode == 0, done.stderr
    record = site.wait_for_record(400)
    plain, preflight = record["results"]["plain"], record["results"]["preflight"]
    assert plain["complete"], site.logs()
    assert preflight["complete"], site.logs()
    assert plain["key"]["image"] not in ("none", "")
    assert {one["verdict"] for one in record["findings"]} == {"no baseline yet", "passed"}
