"""Runs that are submitted, resumed and looked after with slurm/submit.py, on a real Slurm."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cluster_job import SUBMIT, ClusterJob, Submitted, submit
from lab import DEFAULT_CONF, Lab
from micro_job import MicroRun
from omegaconf import OmegaConf

pytestmark = pytest.mark.slow

STEPS = 60
SETTINGS = (
    f"training.max_steps={STEPS}",
    "evaluation.every_steps=40",
    "checkpoint.every_steps=25",
)
DELAY = OmegaConf.load(SUBMIT.parents[1] / "configs/cluster/localhost.yaml").signal_delay_seconds
# What cron gives to a command.
CRON = {"HOME": "/root", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh", "LOGNAME": "root"}


@pytest.fixture(scope="module")
def job(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> ClusterJob:
    lab.cancel_all()
    return ClusterJob.prepare(lab, tmp_path_factory.mktemp("submission"), *SETTINGS)


@pytest.fixture(scope="module")
def alone(job: ClusterJob) -> MicroRun:
    """Undisturbed, on this machine without Slurm, one process."""
    return job.micro.finish("alone", world=1)


@pytest.fixture(scope="module")
def four(job: ClusterJob) -> MicroRun:
    return job.micro.finish("four", world=4)


@pytest.fixture(autouse=True)
def _nothing_left(lab: Lab) -> Iterator[None]:
    yield
    lab.cancel_all()


def _facts(lab: Lab, job_id: str) -> dict[str, str]:
    """What the controller knows of a job."""
    words = lab.run("scontrol", "show", "job", "-o", job_id).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def _occupy(lab: Lab, nodes: str) -> None:
    """Have a job take some nodes until it is cancelled."""
    command = ("sbatch", "--parsable", "--exclusive", "-o", "/dev/null", "-w", nodes)
    count = len(nodes.split(","))
    job_id = lab.run(*command, f"-N{count}", "--wrap", "exec sleep 600").strip()
    lab.wait_until(lambda: _facts(lab, job_id)["JobState"] == "RUNNING", f"a job on {nodes}")


def _standing(run: Submitted, state: str) -> dict[str, Any]:
    """Its status, which must tell this state."""
    status = run.status
    assert status["state"] == state, f"{status}\n{run.describe()}"
    return status


# Shapes of jobs


@pytest.mark.all
@pytest.mark.parametrize("gpus", [1, 4])
def test_a_run_on_one_node_gives_the_bits_of_a_local_one(
    job: ClusterJob, request: pytest.FixtureRequest, gpus: int
) -> None:
    expected = request.getfixturevalue({1: "alone", 4: "four"}[gpus])
    run = job.submit("--gpus", str(gpus))
    status = run.wait_for("finished")
    run.results.assert_equals(expected)
    assert (status["state"], status["step"], status["attempts"]) == ("finished", STEPS, 1)
    assert [attempt["world_size"] for attempt in run.results.attempts] == [gpus]


def test_a_run_on_two_nodes_gives_the_bits_of_a_run_on_one(job: ClusterJob, four: MicroRun) -> None:
    run = job.submit("--gpus", "2", "--nodes", "2")
    run.wait_until(lambda: len(run.trainers()) == 4, "four trainers")
    nodes = [environment["SLURMD_NODENAME"] for environment in run.trainers().values()]
    assert sorted(nodes) == sorted([*job.lab.nodes, *job.lab.nodes])
    run.wait_for("finished")
    run.results.assert_equals(four)
    assert [attempt["world_size"] for attempt in run.results.attempts] == [4]


# Sweeps


def test_of_a_sweep_one_run_is_preempted_and_all_finish(job: ClusterJob, alone: MicroRun) -> None:
    layers = (0, 1, 2)
    _occupy(job.lab, job.lab.nodes[1])
    options = ("--unfreeze", *map(str, layers), "--name", "depth")
    sweep = job.submit(*options, partition="low")
    runs = {n: Submitted(job.lab, sweep.path / f"n{n}") for n in layers}
    assert sorted(path.name for path in sweep.path.iterdir()) == ["n0", "n1", "n2", "slurm"]
    array, *_ = {run.job_id.split("_")[0] for run in runs.values()}
    assert [run.job_id for run in runs.values()] == [f"{array}_{k}" for k in range(3)]
    for run in runs.values():
        run.freeze_at(20)
    # one GPU of the node is free, so that two need one run to go
    command = ("sbatch", "-p", "high", "-w", job.lab.nodes[0], "--gpus-per-node=2")
    job.lab.run(*command, "-o", "/dev/null", "--wrap", "exec sleep 1")
    sweep.wait_until(lambda: any(run.count("signal") for run in runs.values()), "the signal to one")
    for run in runs.values():
        run.send(signal.SIGCONT)
        run.wait_for("finished")
    attempts = {n: len(run.attempts) for n, run in runs.items()}
    (preempted,) = [n for n in layers if attempts[n] == 2]
    assert sorted(attempts.values()) == [1, 1, 2]
    undisturbed = alone
    if preempted != 1:
        setting = f"training.num_unfrozen_layers={preempted}"
        undisturbed = job.micro.finish(f"alone-n{preempted}", setting, world=1)
    runs[preempted].results.assert_equals(undisturbed)
    runs[1].results.assert_equals(alone)
    assert runs[preempted].results.attempts[1]["resumed_step"] >= 20
    for n, run in runs.items():
        assert run.results.step == STEPS
        config = OmegaConf.load(run.path / "config.yaml")
        assert config.training.num_unfrozen_layers == n
    done = submit(job.lab, "status", str(sweep.path), "--json", cwd=job.folder)
    assert [one["state"] for one in json.loads(done.stdout)] == ["finished"] * 3


# Where it is submitted from


def test_cron_can_submit_with_a_site_file(job: ClusterJob, alone: MicroRun) -> None:
    if not job.lab.be_the_default():
        pytest.skip(f"{DEFAULT_CONF} is of a Slurm that this machine has")
    site = job.folder / "site.yaml"
    data = {"train": "embedded", "validation": "embedded"}
    trunk = {"path": str(job.folder / "trunk")}
    OmegaConf.save({"model": trunk, "data": data, "cluster": job.profile()}, site)
    gaps = OmegaConf.load(job.folder / "critic.yaml")
    gaps.model.path = gaps.data.train = gaps.data.validation = "???"
    OmegaConf.save(gaps, job.folder / "gaps.yaml")
    asked = ("--gpus", "1", "--config", "gaps.yaml", "--json", "--override", *job.micro.settings)
    named = CRON | {"CRITIC_SITE": str(site)}
    done = submit(job.lab, *asked, cwd=job.folder, environment=named)
    assert done.returncode == 0, done.stderr + done.stdout
    run = Submitted(job.lab, Path(json.loads(done.stdout)["run"]))
    site.unlink()
    done = submit(job.lab, "status", str(run.path), cwd=job.folder, environment=CRON)
    assert done.returncode == 0, done.stderr
    run.wait_for("finished")
    run.results.assert_equals(alone)


def test_a_job_that_holds_gpus_can_submit_another(
    job: ClusterJob, alone: MicroRun, tmp_path: Path
) -> None:
    arguments = shlex.join(job.arguments("--gpus", "1"))
    said = tmp_path / "said.json"
    script = f"""#!/bin/bash
export SLURM_MARK=outer SBATCH_TIMELIMIT=3 SBATCH_JOB_NAME=outer
cd {job.folder}
srun {sys.executable} {SUBMIT} {arguments} > {said}
sleep 600
"""
    file = tmp_path / "outer.sh"
    file.write_text(script)
    outer = ("sbatch", "--parsable", "--gpus-per-node=2", "--time=7", "-c2", "--mem=3G")
    log = tmp_path / "outer.log"
    outer_id = job.lab.run(*outer, "-o", str(log), str(file)).strip()
    job.lab.wait_until(lambda: said.exists() and said.read_text().endswith("}\n"), log.name)
    run = Submitted(job.lab, Path(json.loads(said.read_text())["run"]))
    run.wait_until(run.trainers, "a trainer")
    facts = _facts(job.lab, run.job_id)
    assert (facts["NumNodes"], facts["TimeLimit"], facts["Partition"]) == ("1", "00:30:00", "main")
    assert (facts["NumCPUs"], facts["MinMemoryNode"]) == ("1", "4G")
    assert facts["TresPerNode"] == "gres:gpu:a100:1"
    assert facts["JobName"] == run.path.name
    environment = next(iter(run.trainers().values()))
    assert environment["SLURM_JOB_ID"] == run.job_id != outer_id
    assert "SLURM_MARK" not in environment
    run.wait_for("finished")
    run.results.assert_equals(alone)


# Inside the job


def test_trainers_know_their_place_and_jobs_on_one_node_do_not_meet(job: ClusterJob) -> None:
    _occupy(job.lab, job.lab.nodes[1])
    cpus = 3
    runs = [job.submit("--gpus", "2", cpus_per_gpu=cpus) for _ in range(2)]
    environments: list[list[dict[str, str]]] = []
    for run in runs:
        run.wait_until(lambda: len(run.trainers()) == 2, "two trainers")  # noqa: B023
        found = run.trainers().values()
        environments.append(sorted(found, key=lambda environment: environment["RANK"]))
        ends = datetime.fromisoformat(_facts(job.lab, run.job_id)["EndTime"]).timestamp()
        for rank, environment in enumerate(environments[-1]):
            expected = {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "OMP_NUM_THREADS": str(cpus),
                "CRITIC_DEADLINE": f"{ends - DELAY:.0f}",
                "SLURMD_NODENAME": job.lab.nodes[0],
            }
            assert {name: environment.get(name) for name in expected} == expected
    ports = [{environment["MASTER_PORT"] for environment in both} for both in environments]
    assert [len(both) for both in ports] == [1, 1]
    assert not ports[0] & ports[1]
    gpus = [both[0]["CUDA_VISIBLE_DEVICES"].split(",") for both in environments]
    assert sorted(gpus[0] + gpus[1]) == ["0", "1", "2", "3"]
    for run in runs:
        run.wait_for("finished")
    runs[0].results.assert_equals(runs[1].results)


# Refusals


@pytest.mark.parametrize(
    ("options", "profile", "words"),
    [
        ((), {"partition": "none"}, "invalid partition specified: none"),
        (("--nodes", "3"), {}, "Node count specification invalid"),
        (("--time", "2-0"), {}, "Requested time limit is invalid"),
        ((), {"memory_per_gpu_gb": 99}, "Requested node configuration is not available"),
    ],
    ids=["partition", "nodes", "time", "memory"],
)
def test_what_slurm_refuses_leaves_nothing_behind(
    job: ClusterJob, options: tuple[str, ...], profile: dict[str, Any], words: str
) -> None:
    before = _content(job.folder)
    arguments = job.arguments(*options, "--name", "refused", **profile)
    done = submit(job.lab, *arguments, cwd=job.folder)
    assert done.returncode == 78, done.stderr
    found = [one for one in json.loads(done.stdout)["checks"] if one["state"] == "error"]
    assert [one["name"] for one in found] == ["Slurm"]
    assert words in found[0]["text"]
    done = submit(job.lab, *(word for word in arguments if word != "--json"), cwd=job.folder)
    assert done.returncode == 78
    assert words in " ".join(done.stderr.split())
    assert _content(job.folder) == before
    assert not job.lab.run("squeue", "-h")


def _content(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.name.startswith("profile-")}


def test_without_a_controller_nothing_is_submitted(job: ClusterJob) -> None:
    before = _content(job.folder)
    arguments = job.arguments("--gpus", "1", "--name", "refused")
    job.lab.stop_controller()
    try:
        done = submit(job.lab, *arguments, cwd=job.folder)
    finally:
        job.lab.start_controller()
        for node in job.lab.nodes:  # Slurm refuses everything until it has heard of them
            job.lab.start_node(node)
    assert done.returncode == 69, done.stderr
    assert "Unable to contact slurm controller" in done.stderr
    assert _content(job.folder) == before
    assert not job.lab.run("squeue", "-h")


# After another job


def test_a_run_after_another_waits_for_its_good_end(job: ClusterJob, alone: MicroRun) -> None:
    first = job.submit("--gpus", "1")
    first.freeze_at(5)
    second = job.submit("--gpus", "1", "--after", str(first.path))
    status = _standing(second, "pending")
    assert "Dependency" in status["reason"]
    assert second.job_id != first.job_id
    first.send(signal.SIGCONT)
    first.wait_for("finished")
    second.wait_for("finished")
    second.results.assert_equals(alone)
    ended = next(one["time"] for one in first.events if one["event"] == "finished")
    started = next(one["time"] for one in second.events if one["event"] == "started")
    assert started > ended


def test_a_run_after_one_that_fails_is_cancelled_and_says_why(job: ClusterJob) -> None:
    fails = ("sbatch", "--parsable", "--hold", "-o", "/dev/null", "--wrap", "exit 3")
    other = job.lab.run(*fails).strip()
    run = job.submit("--gpus", "1", "--after", other)
    _standing(run, "pending")
    job.lab.run("scontrol", "release", other)
    job.lab.wait_until(lambda: not run.queue, "an empty queue")
    status = _standing(run, "cancelled")
    assert "--after" in status["reason"]
    assert status["attempts"] == 0


# Resuming


def test_a_cancelled_run_is_resumed_when_asked_to_and_not_while_it_is_queued(
    job: ClusterJob, alone: MicroRun
) -> None:
    run = job.submit("--gpus", "1")
    run.freeze_at(20)
    refused = run.command("--resume")
    assert refused.returncode == 78, refused.stderr
    assert f"its job {run.job_id} is running" in refused.stderr
    first = run.job_id
    assert run.command("cancel").returncode == 0
    run.send(signal.SIGCONT)
    run.wait_for("cancelled")
    _occupy(job.lab, ",".join(job.lab.nodes))
    assert run.command("--resume").returncode == 0
    assert run.job_id != first
    _standing(run, "pending")
    refused = run.command("--resume")
    assert refused.returncode == 78, refused.stderr
    assert f"its job {run.job_id} is pending" in refused.stderr
    job.lab.run("scancel", "--jobname=wrap")
    run.wait_for("finished")
    run.results.assert_equals(alone)
    assert run.results.attempts[1]["resumed_step"] >= 20


def test_a_finished_run_is_resumed_to_become_longer(job: ClusterJob, alone: MicroRun) -> None:
    setting = f"training.max_steps={STEPS + 20}"
    longer = MicroRun(job.folder / "runs" / "longer")
    shutil.copytree(alone.path, longer.path)
    job.micro.finish("longer", setting, world=1)
    run = job.submit("--gpus", "1")
    run.wait_for("finished")
    assert run.command("--resume", "--override", setting).returncode == 0
    run.wait_until(lambda: len(run.attempts) == 2, "a second attempt")
    status = run.wait_for("finished")
    run.results.assert_equals(longer)
    assert (status["step"], status["max_steps"]) == (STEPS + 20, STEPS + 20)
    assert run.results.attempts[1]["resumed_step"] == STEPS


def test_a_stop_file_stops_a_run_until_it_is_resumed(job: ClusterJob, alone: MicroRun) -> None:
    run = job.submit("--gpus", "1")
    run.freeze_at(20)
    (run.path / "stop").touch()
    run.send(signal.SIGCONT)
    status = run.wait_for("stopped")
    assert "stop" in status["reason"]
    assert not run.count("requeued")
    assert len(run.attempts) == 1
    assert 20 <= run.results.step < STEPS
    assert run.results.checkpoints[-1] == run.results.step
    assert run.command("--resume").returncode == 0
    run.wait_for("finished")
    run.results.assert_equals(alone)


# What it says of a run


def test_status_and_logs_follow_a_run_from_the_queue_to_its_end(
    job: ClusterJob, alone: MicroRun
) -> None:
    _occupy(job.lab, ",".join(job.lab.nodes))
    run = job.submit("--gpus", "1")
    job.lab.wait_until(lambda: "None" not in run.queue, "a reason to wait")
    status = _standing(run, "pending")
    reason = run.queue.split()[-1]
    assert reason in ("Resources", "Priority")
    assert f"waits in the queue ({reason})" in status["reason"]
    assert (status["attempts"], status["step"], status["job_id"]) == (0, 0, run.job_id)
    assert run.command("logs").returncode == 78
    log = job.folder / "watched.txt"
    with log.open("w") as stream:
        watching = subprocess.Popen(
            [sys.executable, "-u", str(SUBMIT), "status", str(run.path), "--watch"],
            env=os.environ | job.lab.environment,
            stdout=stream,
            stderr=stream,
        )
    try:
        run.wait_until(lambda: "pending" in log.read_text(), "a look at the queue")
        job.lab.run("scancel", "--jobname=wrap")
        run.freeze_at(20)
        status = _standing(run, "running")
        (environment,) = run.trainers().values()
        assert (status["nodes"], status["attempts"]) == (environment["SLURMD_NODENAME"], 1)
        assert 20 <= status["step"] < STEPS
        assert status["max_steps"] == STEPS
        run.wait_until(lambda: "running" in log.read_text(), "a look at the run")
        run.send(signal.SIGCONT)
        run.wait_for("finished")
        watching.wait(timeout=30)
    finally:
        watching.kill()
        watching.wait()
    assert watching.returncode == 0
    said = log.read_text()
    states = [line.split("  ")[1] for line in said.splitlines()]
    assert sorted(set(states), key=states.index) == ["pending", "running", "finished"]
    assert all(line.startswith(run.path.name) for line in said.splitlines())
    status = _standing(run, "finished")
    assert (status["step"], status["checkpoint"]) == (STEPS, STEPS)
    assert status["loss"] == run.results.records[-1]["train/loss"]
    run.results.assert_equals(alone)
    logs = run.command("logs")
    assert logs.returncode == 0
    assert "finished" in logs.stdout
    assert logs.stdout == (run.attempts[0] / "rank-00000.log").read_text()


def test_status_of_a_job_that_was_cancelled_in_the_queue(job: ClusterJob) -> None:
    _occupy(job.lab, ",".join(job.lab.nodes))
    run = job.submit("--gpus", "1")
    _standing(run, "pending")
    job.lab.run("scancel", run.job_id)
    job.lab.wait_until(lambda: not run.queue, "an empty queue")
    status = _standing(run, "cancelled")
    assert "scancel" in status["reason"]
    done = run.command("status")
    assert done.returncode == 1
    assert "cancelled" in done.stderr


def test_status_of_a_job_that_slurm_has_forgotten(job: ClusterJob) -> None:
    _occupy(job.lab, ",".join(job.lab.nodes))
    run = job.submit("--gpus", "1")
    job.lab.run("scancel", run.job_id)
    jobs = run.path / "slurm" / "jobs"
    jobs.write_text("999\n")  # Slurm forgets in minutes; this id it has never known
    status = _standing(run, "lost")
    assert "--resume" in status["reason"]
    assert run.command("status").returncode == 1
    assert run.command("cancel").returncode == 0
    assert _standing(run, "cancelled")
