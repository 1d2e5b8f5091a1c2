"""A command line becomes configurations, run directories with names of their own, and resources."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_slurm import options, profile, submission, submitted, write_inputs

from job.common.config import load_config
from job.common.errors import InputError
from job.common.nested import differences, to_dict
from job.common.schema import CriticConfig
from slurm.cluster import load_profile
from slurm.plan import Plan, describe, inputs, make_plan, write_config
from slurm.record import Record
from slurm.submission import store

STAMP = r"\d{8}-\d{6}"
Planner = Callable[..., Plan]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def given(here: Path) -> list[str]:
    return write_inputs(here)


@pytest.fixture
def plan(given: list[str]) -> Planner:
    """make_plan with a trunk and data, and these options besides."""

    def planned(*overrides: str, **others: Any) -> Plan:
        return make_plan(options(override=[*given, *overrides], **others))

    return planned


# Names and folders


def test_a_run_is_named_after_its_configuration_and_the_time(here: Path, plan: Planner) -> None:
    (run,) = plan().runs
    assert re.fullmatch(rf"critic-1gpu-n4-{STAMP}", run.folder.name)
    assert run.folder.parent == here / "runs"
    assert (run.config.run.name, run.config.run.dir) == (run.folder.name, str(run.folder))


def test_a_name_of_ones_own_gets_the_time_too(here: Path, plan: Planner) -> None:
    one = plan(name="mine")
    assert re.fullmatch(rf"mine-{STAMP}", one.submission.name)
    assert one.folder == one.runs[0].folder == here / "runs" / one.submission.name
    assert one.submission.folder == str(one.folder / "slurm")


def test_of_runs_planned_in_the_same_second_none_shares_a_folder(plan: Planner) -> None:
    first = plan(name="mine").folder
    first.mkdir(parents=True)
    second = plan(name="mine").folder
    assert not second.exists()
    assert re.fullmatch(rf"mine-{STAMP}(-2)?", second.name)


def test_a_folder_that_is_taken_is_not_used(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.plan.time.strftime", lambda _: "T")
    names = []
    for _ in range(3):
        one = plan(name="mine")
        one.folder.mkdir(parents=True)
        names.append((one.folder.name, one.runs[0].config.run.name))
    assert names == [("mine-T", "mine-T"), ("mine-T-2", "mine-T-2"), ("mine-T-3", "mine-T-3")]


def test_a_folder_named_by_hand_is_taken_as_it_is(here: Path, plan: Planner) -> None:
    one = plan("run.dir=runs/mine")
    assert one.folder == here / "runs" / "mine"
    assert one.runs[0].config.run.dir == str(here / "runs" / "mine")


def test_a_folder_may_have_any_name(
    here: Path, plan: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = here / "a: [b] #c"
    odd.mkdir()
    monkeypatch.chdir(odd)
    one = plan(name="x: y")
    assert one.folder.parent == odd / "runs"
    assert one.runs[0].config.run.dir == str(one.folder)
    assert re.fullmatch(rf"x: y-{STAMP}", one.runs[0].config.run.name)


@pytest.mark.parametrize("name", ["50%", "%j", "a\\b"])
def test_a_folder_that_slurm_takes_for_a_pattern_is_refused(name: str, plan: Planner) -> None:
    sign = "%" if "%" in name else "\\"
    with pytest.raises(
        InputError, match=f"^run.dir: .*{re.escape(name)}.*: Slurm reads {re.escape(sign)} "
    ):
        plan(name=name)


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "/tmp/x", "."])
def test_a_name_that_is_a_path_is_refused(name: str, plan: Planner) -> None:
    with pytest.raises(InputError, match=rf"^--name {re.escape(name)}: a name, not a path"):
        plan(name=name)


def test_a_folder_that_is_no_text_is_refused(here: Path, plan: Planner) -> None:
    with pytest.raises(InputError, match=r"^run.dir: '.*\\udcff.*': not UTF-8"):
        plan(name="a\udcff")


def test_what_the_profile_leaves_open_may_come_from_sbatchs_variables(
    plan: Planner, here: Path, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "mine.yaml").write_text(
        "gpu: {memory_gb: 85, per_node: 4}\npartition: mine\naccount: null\n"
    )
    for name in ("PARTITION", "ACCOUNT", "QOS", "TIMELIMIT"):
        monkeypatch.setenv(f"SBATCH_{name}", "theirs")
    monkeypatch.setenv("SBATCH_CONSTRAINT", "")
    found = plan(cluster="mine.yaml").submission.profile
    keys = ("partition", "account", "qos", "constraint", "time")
    assert [found[key] for key in keys] == ["mine", "theirs", "theirs", None, "24:00:00"]
    _submitted(here, given, profile=found)
    monkeypatch.setenv("SBATCH_QOS", "another")
    assert make_plan(options(resume="runs/mine")).submission.profile == found


def test_nothing_is_written(here: Path, plan: Planner) -> None:
    before = set(here.rglob("*"))
    plan(unfreeze=[0, 1])
    assert set(here.rglob("*")) == before


# Sweeps


def test_a_sweep_has_a_folder_with_one_for_each_run(here: Path, plan: Planner) -> None:
    sweep = plan(unfreeze=[0, 2, 4], name="depth")
    assert re.fullmatch(rf"depth-{STAMP}", sweep.folder.name)
    assert sweep.folder.parent == here / "runs"
    assert [run.folder for run in sweep.runs] == [sweep.folder / f"n{n}" for n in (0, 2, 4)]
    assert [run.config.training.num_unfrozen_layers for run in sweep.runs] == [0, 2, 4]
    names = [run.config.run.name for run in sweep.runs]
    assert names == [f"{sweep.folder.name}-n{n}" for n in (0, 2, 4)]
    assert [run.config.run.dir for run in sweep.runs] == [str(run.folder) for run in sweep.runs]
    assert sweep.submission.folder == str(sweep.folder / "slurm")


def test_a_sweep_without_a_name_is_called_so(plan: Planner) -> None:
    assert re.fullmatch(rf"sweep-{STAMP}", plan(unfreeze=[0, 1]).submission.name)


def test_a_single_value_is_no_sweep(plan: Planner) -> None:
    one = plan(unfreeze=[2])
    assert one.folder == one.runs[0].folder
    assert re.fullmatch(rf"critic-1gpu-n2-{STAMP}", one.folder.name)
    assert one.runs[0].config.training.num_unfrozen_layers == 2


# Configuration and resources


@pytest.mark.parametrize(
    ("asked", "batch_size", "size"),
    [
        ({}, 16, 1),
        ({"gpus": 1, "nodes": 1}, 16, 1),
        ({"gpus": 4}, 64, 4),
        ({"gpus": 2}, 64, 2),
        ({"gpus": 1, "nodes": 2}, 64, 2),
        ({"gpus": 4, "nodes": 2}, 64, 8),
    ],
)
def test_the_standard_configuration_follows_the_number_of_gpus(
    plan: Planner, asked: dict[str, int], batch_size: int, size: int
) -> None:
    one = plan(**asked)
    assert one.runs[0].config.training.batch_size == batch_size
    assert one.world_size == size
    assert one.gpu_hours == 24 * size


def test_a_configuration_of_ones_own_is_used_on_any_number_of_gpus(
    here: Path, plan: Planner
) -> None:
    text = "{run: {name: own, dir: out/own}, training: {batch_size: 7}}"
    (here / "own.yaml").write_text(text)
    one = plan(config="own.yaml", gpus=4)
    assert one.runs[0].config.training.batch_size == 7
    assert re.fullmatch(rf"own-{STAMP}", one.folder.name)
    assert one.folder.parent == here / "out"


def test_the_profile_is_the_clusters_with_the_time_asked_for(plan: Planner) -> None:
    one = plan(cluster="localhost", time="0:10:00")
    assert one.submission.profile == asdict(load_profile("localhost")) | {"time": "0:10:00"}
    assert one.submission.cluster == "localhost"
    assert one.submission.time_seconds == 600
    assert plan().submission.cluster == "a100-80gb"


@pytest.mark.parametrize(
    ("asked", "image"), [(None, "site.sif"), ("mine.sif", "mine.sif"), ("none", None)]
)
def test_the_image_is_the_profiles_unless_another_or_none_is_asked_for(
    here: Path, plan: Planner, asked: str | None, image: str | None
) -> None:
    text = "{gpu: {memory_gb: 85, per_node: 4}, image: site.sif}"
    (here / "site.yaml").write_text(text)
    found = plan(cluster="site.yaml", image=asked).submission.image
    assert found == (None if image is None else str(here / image))


def test_without_an_image_there_is_none(plan: Planner) -> None:
    assert plan().submission.image is None


def test_a_dependency_is_a_job_or_the_run_that_has_it(
    here: Path, plan: Planner, given: list[str]
) -> None:
    submitted(here / "first", given, job_id="41_2")
    assert plan(after="12").submission.after == "12"
    assert plan(after="12_3").submission.after == "12_3"
    assert plan(after="first").submission.after == "41_2"
    submitted(here / "unknown", given, job_id=None)
    with pytest.raises(InputError, match="--after unknown: no job is known for this run"):
        plan(after="unknown")
    with pytest.raises(InputError, match=r"no run that submit.py has submitted"):
        plan(after="nowhere")


# What a container sees


def test_binds_hold_every_folder_that_the_configuration_names(
    tmp_path_factory: pytest.TempPathFactory, plan: Planner, here: Path
) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "tokenizer.json").touch()
    (other / "first").mkdir()
    one = plan(f"tokenizer.path={other}/tokenizer.json", f"model.init_from={other}/first")
    assert one.submission.binds == sorted([str(here), str(other)])


def test_no_bind_is_inside_another_or_what_the_profile_binds(
    tmp_path_factory: pytest.TempPathFactory, plan: Planner, here: Path
) -> None:
    other = tmp_path_factory.mktemp("other")
    gpu = f"gpu: {{memory_gb: 85, per_node: 4}}\nbinds: [/site, '{other}']\n"
    (here / "site.yaml").write_text(gpu)
    inside = (f"data.cache_dir={other}/deep/cache", f"run.dir={other}/runs/mine")
    assert plan(*inside, cluster="site.yaml").submission.binds == ["/site", str(other), str(here)]


def test_folders_of_a_like_name_are_not_taken_for_one_another(plan: Planner, here: Path) -> None:
    like = here.with_name(f"{here.name}-2")
    binds = plan(f"data.cache_dir={like}/cache").submission.binds
    assert binds == sorted([str(here), str(like)])


def test_what_a_configuration_names(here: Path, plan: Planner) -> None:
    config = plan().runs[0].config
    names = {"model.path": "trunk", "data.train": "train.jsonl", "data.validation": "val.jsonl"}
    assert inputs(config) == [(key, here / name) for key, name in names.items()]


def test_data_of_several_files_is_seen_file_by_file(
    tmp_path_factory: pytest.TempPathFactory, here: Path, plan: Planner
) -> None:
    blobs, shards = (tmp_path_factory.mktemp(name) for name in ("blobs", "shards"))
    for k in range(3):
        (blobs / f"{k}.jsonl").write_text("{}\n")
        (shards / f"train-{k}.jsonl").symlink_to(blobs / f"{k}.jsonl")
    one = plan(f"data.train=['{shards}/train-[01]*', train.jsonl]", "data.validation=0.1")
    config = one.runs[0].config
    assert config.data.train == [f"{shards}/train-[01]*", f"{here}/train.jsonl"]
    assert config.data.validation == 0.1
    named = [path for key, path in inputs(config) if key.startswith("data.")]
    assert named == [shards / "train-0.jsonl", shards / "train-1.jsonl", here / "train.jsonl"]
    assert one.submission.binds == sorted(map(str, (here, blobs, shards)))
    folder = plan(f"data.train={shards}", "data.validation=nothing-*.jsonl").runs[0].config
    assert [key for key, _ in inputs(folder)[1:]] == ["data.train"] * 3 + ["data.validation"]


def test_embedded_data_and_a_trunk_to_be_made_are_no_inputs(here: Path, plan: Planner) -> None:
    embedded = ("data.train=embedded", "data.validation=embedded", "model.recipe=pretrain.yaml")
    config = plan(*embedded).runs[0].config
    assert inputs(config) == [("model.recipe", here / "pretrain.yaml")]


# Errors


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"unfreeze": [1, 2, 1]}, "--unfreeze 1 2 1: one run for each value"),
        ({"unfreeze": [-1]}, "training.num_unfrozen_layers: -1 is below 0"),
        ({"unfreeze": [1, -1]}, "training.num_unfrozen_layers: -1 is below 0"),
        ({"gpus": 0}, "--gpus and --nodes: at least one"),
        ({"nodes": 0}, "--gpus and --nodes: at least one"),
        ({"gpus": -4}, "--gpus and --nodes: at least one"),
        ({"time": "soon"}, "--time soon: write hours:minutes:seconds"),
        ({"time": "1:2:3:4"}, "--time 1:2:3:4: write hours:minutes:seconds"),
        ({"time": "2"}, r"--time 2: Slurm's warning comes 120 s before the end"),
        ({"time": "0"}, "so that no time is left to train"),
        ({"cluster": "nowhere"}, "--cluster nowhere: no file .*; there are a100-40gb"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: cannot read the configuration"),
        ({"resume": "nowhere"}, "nowhere: no run that submit.py has submitted"),
    ],
)
def test_what_cannot_be_is_said(plan: Planner, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(**asked)


def test_a_time_just_above_the_warning_is_taken(plan: Planner) -> None:
    assert plan(time="2:01").submission.time_seconds == 121


def test_an_unknown_key_names_those_that_are_near(plan: Planner) -> None:
    with pytest.raises(InputError, match=r"training.batchsize: unknown key \(nearest: batch_size"):
        plan("training.batchsize=3")


@pytest.mark.parametrize("inside", ["run", "run/checkpoints/more", "run/../run/again", "link/a"])
@pytest.mark.parametrize("mark", ["attempts", "slurm/submission.json"])
def test_a_run_inside_of_another_one_is_refused(
    here: Path, plan: Planner, inside: str, mark: str
) -> None:
    (here / "run" / mark).mkdir(parents=True)
    if mark != "attempts":
        (here / "run" / mark).rmdir()
        (here / "run" / mark).touch()
    (here / "run/config.yaml").touch()
    (here / "link").symlink_to("run")
    if inside == "run":
        assert plan("run.dir=run").folder == here / "run"  # is itself
        return
    with pytest.raises(
        InputError, match=f"run.dir: .* lies inside another run, {here}/run; choose"
    ):
        plan(f"run.dir={inside}")
    with pytest.raises(InputError, match="lies inside another run"):
        plan(f"run.dir={inside}/${{run.name}}")


def test_a_sweep_has_no_folder_named_by_hand(plan: Planner) -> None:
    with pytest.raises(InputError, match="a sweep's runs need one each; use --name"):
        plan("run.dir=mine", unfreeze=[0, 1])


# Resuming


def _submitted(here: Path, given: list[str], **changes: Any) -> Record:
    record = submitted(here / "runs" / "mine", given)
    store(submission(record.run, **changes), record)
    return record


def test_a_run_is_resumed_with_what_it_was_submitted_with(here: Path, given: list[str]) -> None:
    own = profile(time="2:00:00", binds=["/site"])
    before = {"gpus": 2, "nodes": 3, "image": "/critic.sif", "profile": own, "cwd": "/work"}
    record = _submitted(here, given, **before)
    resumed = make_plan(options(resume="runs/mine"))
    assert resumed.resumes
    assert resumed.folder == record.run
    found = asdict(resumed.submission)
    assert {key: found[key] for key in before} == before
    assert resumed.submission.folder == str(record.folder)
    assert resumed.submission.binds == ["/site", str(here)]
    stored = to_dict(load_config(CriticConfig, record.config))
    whole = {str(here / path) for path in ("train.jsonl", "val.jsonl", "runs/cache")}
    assert set(differences(stored, to_dict(resumed.runs[0].config))) <= {
        f"data.{key}: {Path(path).relative_to(here)} -> {path}"
        for path in whole
        for key in ("train", "validation", "cache_dir")
    }


def test_other_resources_may_be_asked_for(here: Path, given: list[str]) -> None:
    _submitted(here, given, gpus=2, nodes=3)
    asked = {"gpus": 4, "nodes": 1, "cluster": "localhost", "time": "0:20:00", "after": "5"}
    found = make_plan(options(resume="runs/mine", **asked)).submission
    assert (found.gpus, found.nodes, found.cluster, found.after) == (4, 1, "localhost", "5")
    assert found.profile == asdict(load_profile("localhost")) | {"time": "0:20:00"}


@pytest.mark.parametrize(
    ("before", "of_profile", "after"),
    [("/mine.sif", "/site.sif", "/mine.sif"), ("/site.sif", "/site.sif", None), (None, "/s", None)],
)
def test_another_cluster_takes_no_image_from_a_run(
    here: Path, given: list[str], before: str | None, of_profile: str, after: str | None
) -> None:
    _submitted(here, given, image=before, profile=profile(image=of_profile))
    resumed = make_plan(options(resume="runs/mine", cluster="localhost")).submission
    assert resumed.image == after


def test_what_may_change_between_attempts_may_be_overridden(here: Path, given: list[str]) -> None:
    _submitted(here, given)
    resumed = make_plan(options(resume="runs/mine", override=["training.max_steps=9"]))
    assert resumed.runs[0].config.training.max_steps == 9
    assert not resumed.submission.verify
    assert make_plan(options(resume="runs/mine", verify=True)).submission.verify


@pytest.mark.parametrize("option", [{"config": "a.yaml"}, {"name": "a"}, {"unfreeze": [0]}])
def test_a_resumed_run_keeps_its_configuration(
    here: Path, given: list[str], option: dict[str, Any]
) -> None:
    _submitted(here, given)
    with pytest.raises(InputError, match=f"own configuration, not --{next(iter(option))}"):
        make_plan(options(resume="runs/mine", **option))


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"gpus": 1, "more": 2}'])
def test_a_damaged_submission_is_said(here: Path, given: list[str], content: str) -> None:
    _submitted(here, given).submission.write_text(content)
    with pytest.raises(InputError, match=r"submission.json: cannot be read; submit the run anew"):
        make_plan(options(resume="runs/mine"))


def test_a_resumed_run_asks_for_possible_resources(here: Path, given: list[str]) -> None:
    _submitted(here, given)
    with pytest.raises(InputError, match="at least one"):
        make_plan(options(resume="runs/mine", gpus=0))


# What is written and shown


def test_the_configuration_that_is_written_is_the_same_when_read(plan: Planner) -> None:
    (run,) = plan().runs
    write_config(run)
    file = Record(run.folder).config
    assert load_config(CriticConfig, file) == run.config
    assert yaml.safe_load(file.read_text())["distributed"]["fsdp"]["cpu_offload"] is False


def test_a_sweep_in_figures(plan: Planner) -> None:
    sweep = plan(unfreeze=[0, 4], gpus=2, nodes=2, time="1:30:00")
    assert describe(sweep) == {
        "run": str(sweep.folder),
        "runs": [str(run.folder) for run in sweep.runs],
        "site": None,
        "cluster": "a100-80gb",
        "nodes": 2,
        "gpus_per_node": 2,
        "time": "1:30:00",
        "gpu_hours": 12.0,
        "image": None,
        "unfrozen_layers": [0, 4],
    }
