"""What is wrong with a job is found before it is queued, by what is known where it is submitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_slurm import ROW, SEVEN_B, STARTS, FakeSlurm, options, partition, profile, write_inputs

from job.common import places
from slurm import checks
from slurm.checks import Check, check
from slurm.plan import Plan, make_plan

pytestmark = pytest.mark.slow

Planner = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """A plan to train a trunk of seven billion parameters, with these entries of a profile."""
    monkeypatch.chdir(tmp_path)
    given = write_inputs(tmp_path, SEVEN_B)

    def planned(*overrides: str, entries: dict[str, Any] | None = None, **others: Any) -> Plan:
        plan = make_plan(options(override=[*given, *overrides], **others))
        changed = profile(time=plan.submission.profile["time"]) | (entries or {})
        return replace(plan, submission=replace(plan.submission, profile=changed))

    return planned


def _named(plan: Plan, name: str) -> Check:
    """The one finding of this name."""
    (found,) = [one for one in check(plan) if one.name == name]
    return found


def _free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: SimpleNamespace(free=size))


# Variables


def test_a_line_names_each_variable_that_is_set_aside(
    plan: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"SBATCH_TIMELIMIT": "1", "SRUN_CPUS_PER_TASK": "2", "SLURM_NTASKS": "3"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SBATCH_QOS", "long")
    monkeypatch.setenv("SBATCH_PARTITION", "theirs")
    entries = {"qos": "long", "partition": "mine"}
    found = [one for one in check(plan(entries=entries)) if one.name == "variables"]
    assert [(one.state, one.text) for one in found] == [
        ("warning", "SBATCH_PARTITION=theirs is set aside: profile and options hold"),
        ("ok", "qos long, as SBATCH_QOS=long has it"),
        ("warning", "SBATCH_TIMELIMIT=1 is set aside: profile and options hold"),
        ("warning", "SLURM_NTASKS=3 is set aside: profile and options hold"),
        ("warning", "SRUN_CPUS_PER_TASK=2 is set aside: profile and options hold"),
    ]


def test_inside_a_job_its_own_variables_are_not_told(
    plan: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    assert not [one for one in check(plan()) if one.name == "variables"]


# Files


def test_files_that_are_there_are_named_by_their_keys(plan: Planner) -> None:
    found = _named(plan(), "files")
    assert found == Check("files", "ok", "model.path, data.train, data.validation")


def test_missing_files_are_named_by_key_and_path(plan: Planner, tmp_path: Path) -> None:
    one = plan("data.train=nowhere.jsonl", image="critic.sif")
    texts = [found.text for found in check(one) if found.name == "files"]
    assert texts == [
        f"data.train: {tmp_path}/nowhere.jsonl: cannot read the data: No such file or directory",
        f"image: cannot read {tmp_path}/critic.sif",
    ]
    assert {found.state for found in check(one) if found.name == "files"} == {"error"}


@pytest.mark.parametrize(
    ("name", "why"),
    [("data.csv", "unknown kind of data file; known: .jsonl, "), ("none.jsonl", "file is empty")],
)
def test_data_that_no_training_would_read_is_an_error(
    plan: Planner, tmp_path: Path, name: str, why: str
) -> None:
    (tmp_path / name).touch()
    found = _named(plan(f"data.validation={name}"), "files")
    assert found.state == "error"
    assert found.text.startswith(f"data.validation: {tmp_path}/{name}: ")
    assert why in found.text


@pytest.mark.parametrize(
    ("content", "skip", "why"),
    [
        (
            '{"question": "1+1=", "response": "2", "reward": 1}\n',
            False,
            "field 'prompt' is missing",
        ),
        ('{"question": "1+1=", "response": "2", "reward": 1}\n', True, "field 'prompt' is missing"),
        (
            ROW + "{}\n",
            False,
            ":2: field 'prompt' is missing; the row has none; 1 of the first 2 row",
        ),
        (ROW + "{}\n", True, None),
        (ROW * 50 + "{}\n", False, None),
        ("\n\n", False, "there is no row in it"),
        ("prompt,response\n", False, "broken JSON"),
        ("[" + ROW + "]", False, None),
    ],
)
def test_the_first_rows_are_looked_at(
    plan: Planner, tmp_path: Path, content: str, skip: bool, why: str | None
) -> None:
    (tmp_path / "train.jsonl").write_text(content)
    found = _named(plan(*["data.bad_rows=skip"] * skip), "files")
    assert found.state == ("ok" if why is None else "error")
    if why is not None:
        assert found.text.startswith(f"data.train: {tmp_path}/train.jsonl:")
        assert why in found.text


def test_rows_are_looked_at_under_their_fields_names(plan: Planner, tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text('{"q": "1+1=", "response": "2", "ok": true}\n')
    assert _named(plan("data.fields={prompt: q, reward: ok}"), "files").state == "ok"


def test_embedded_data_need_no_file(plan: Planner, tmp_path: Path) -> None:
    one = plan("data.train=embedded", "data.validation=embedded")
    assert _named(one, "files").text == "model.path"


def test_folders_that_nodes_do_not_share_are_a_warning(
    plan: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_LOCAL", (str(tmp_path / "trunk"), "/elsewhere"))
    found = _named(plan(), "shared files")
    assert found.state == "warning"
    assert found.text.startswith(f"model.path: under {tmp_path}/trunk or /elsewhere, which compute")
    monkeypatch.setattr(checks, "_LOCAL", (str(tmp_path),))
    assert "run.dir, the working folder: under" in _named(plan(), "shared files").text
    monkeypatch.setattr(checks, "_LOCAL", ("/elsewhere",))
    assert "shared files" not in {one.name for one in check(plan())}


def test_the_machines_own_folders_are_known() -> None:
    assert {"/tmp", "/var/tmp", "/dev/shm"} <= set(checks._LOCAL)


# Memory


@pytest.mark.parametrize(
    ("strategy", "asked", "needed", "outside"),
    [
        ("auto", {"gpus": 1}, "30.2 GB at the peak (head)", "0.6"),
        # a quarter of what is trained, and NCCL's buffers
        ("auto", {"gpus": 4}, "22.0 GB at the peak (block 0)", "1.6"),
        ("auto", {"gpus": 4, "nodes": 2}, "20.3 GB at the peak (block 0)", "1.6"),
        ("FULL_SHARD", {"gpus": 4}, "13.8 GB at the peak (block 0)", "1.6"),  # and of the rest
    ],
)
def test_four_blocks_of_a_seven_b_trunk(
    plan: Planner, strategy: str, asked: dict[str, int], needed: str, outside: str
) -> None:
    chosen = f"distributed.fsdp.sharding_strategy={strategy}"
    found = _named(plan(chosen, **asked), "memory N=4")
    assert found.state == "ok"
    assert found.text == (
        "809,541,633 of 6,000,197,633 parameters trained; "
        f"{needed}, {outside} GB of it outside torch's allocator, of a "
        "GPU's 85.0 GB"
    )


@pytest.mark.parametrize(
    ("n", "memory_gb", "gpus", "state"),
    [
        (29, 85.0, 1, "error"),
        (29, 85.0, 4, "ok"),
        (29, 63.0, 4, "warning"),
        (4, 30.1, 1, "error"),
        (4, 30.4, 1, "warning"),
        (4, 31.6, 1, "warning"),
        (4, 31.9, 1, "ok"),  # 95 % of it
    ],
)
def test_whether_a_step_fits(
    plan: Planner, n: int, memory_gb: float, gpus: int, state: str
) -> None:
    gpu = {"memory_gb": memory_gb, "per_node": 4, "type": None}
    found = _named(plan(unfreeze=[n], gpus=gpus, entries={"gpu": gpu}), f"memory N={n}")
    assert found.state == state
    assert found.text.endswith(": little is left for fragmentation") == (state == "warning")
    advice = "unfreeze fewer blocks, lower training.micro_batch_tokens, or take more GPUs"
    assert (advice in found.text) == (state == "error")


def test_the_micro_batch_may_be_chosen(plan: Planner) -> None:
    automatic = "training.micro_batch_tokens=auto"
    assert _named(plan(automatic), "memory N=4").state == "ok"
    gpu = {"memory_gb": 24.0, "per_node": 4, "type": None}
    found = _named(plan(automatic, entries={"gpu": gpu}), "memory N=4")
    assert found.state == "error"
    assert found.text.startswith("training.micro_batch_tokens: auto: N=4 takes 27.3 GB")


@pytest.mark.parametrize("tokens", ["8192", "auto"])
def test_states_that_are_built_first_let_a_training_fit_that_relies_on_them(
    plan: Planner, tokens: str
) -> None:
    def found(*overrides: str, memory_gb: float = 24.0, n: int = 4) -> Check:
        gpu = {"memory_gb": memory_gb, "per_node": 4, "type": None}
        given = (f"training.micro_batch_tokens={tokens}", *overrides)
        return _named(plan(*given, unfreeze=[n], entries={"gpu": gpu}), f"memory N={n}")

    built = "with the states of its frozen blocks built first (python -m job.cache build): "
    by_default = found()
    assert by_default.state == "error"
    assert built in by_default.text
    assert by_default.text.endswith(" GB; submit it then with training.prefix_cache=all")
    relying = found("training.prefix_cache=all")
    assert relying.state == "warning"
    assert relying.text.endswith(" GB, as training.prefix_cache=all relies on")
    needed = float(relying.text.partition(built)[2].partition(" GB")[0])
    assert 16 < needed < 0.95 * 24.0
    refused = {
        "not read": found("training.prefix_cache=none"),
        "too small to build": found("training.prefix_cache=all", memory_gb=12.0, n=0),
        "too small to train": found("training.prefix_cache=all", memory_gb=14.0),
        "nothing frozen": found("training.prefix_cache=all", n=29),
    }
    for why, one in refused.items():
        assert one.state == "error", why
        assert "built first" not in one.text, why


def test_of_pretended_gpus_nothing_is_known(plan: Planner) -> None:
    gpu = {"memory_gb": 0.0, "per_node": 4, "type": None}
    found = _named(plan(entries={"gpu": gpu}), "memory N=4")
    assert found == Check("memory N=4", "not checked", "the profile's GPUs are pretended")


def test_shards_inside_of_a_node_are_larger(plan: Planner) -> None:
    one = plan("distributed.fsdp.sharding_strategy=HYBRID_SHARD", gpus=4, nodes=2)
    assert "; 13.8 GB at the peak" in _named(one, "memory N=4").text


def test_offloaded_state_takes_no_memory_of_a_gpu(plan: Planner) -> None:
    one = plan("distributed.fsdp.cpu_offload=true", unfreeze=[29])
    assert _named(one, "memory N=29").state == "ok"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        (json.dumps({"dim": 8}), "no value for n_heads, n_layers|cannot read the weights"),
        (None, "neither params.json nor config.json"),
    ],
)
def test_an_architecture_that_cannot_be_read_is_an_error(
    plan: Planner, tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "trunk" / "params.json"
    file.unlink() if content is None else file.write_text(content)
    found = [one for one in check(plan()) if one.name == "model"]
    assert [one.state for one in found] == ["error"]
    assert str(file.parent) in found[0].text
    assert any(part in found[0].text for part in message.split("|"))


def test_of_a_trunk_that_is_still_to_be_made_nothing_is_known(
    plan: Planner, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").touch()
    recipe = (f"model.recipe={tmp_path}/recipe.yaml", "model.path=later")
    found = _named(plan(*recipe), "memory N=4")
    assert found.state == "not checked"
    assert found.text == f"the trunk is still to be made, by {tmp_path}/recipe.yaml"


# Disk


def test_checkpoints_need_a_place(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = 9_714_499_596 // 3  # critic.safetensors: the weights without AdamW's moments
    kept = 4 * 9_714_499_596 + trained  # two, the one being written, the best
    _free(monkeypatch, kept)
    found = _named(plan(), "disk N=4")
    assert found.state == "error"
    assert "42 GB free" in found.text
    assert found.text.endswith("4 checkpoints to come of 9.7 GB, critic.safetensors of 3.2 GB")
    _free(monkeypatch, kept + 1)
    assert _named(plan(), "disk N=4").state == "ok"
    assert _named(plan("checkpoint.keep_last=3"), "disk N=4").state == "error"
    without_best = _named(plan("checkpoint.keep_best=null"), "disk N=4")
    assert "3 checkpoints to come of 9.7 GB" in without_best.text


def test_tokens_that_are_kept_need_a_place(
    plan: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_text(ROW.ljust(700))
    (tmp_path / "val.jsonl").write_text(ROW.ljust(300))
    _free(monkeypatch, 2000)
    assert _named(plan(), "disk for caches").state != "ok"
    _free(monkeypatch, 2001)
    assert _named(plan(), "disk for caches").state == "ok"


# Interruptions


def test_a_short_step_and_save_fit_into_the_warning(plan: Planner) -> None:
    assert "interruptions" not in {one.name for one in check(plan())}


def test_a_warning_that_is_too_short_for_a_save_is_said(plan: Planner) -> None:
    found = _named(plan(entries={"signal_delay_seconds": 14}), "interruptions")
    assert found.state == "warning"
    # 32,768 tokens x (2 x 6.0e9 + 4 x 0.81e9) operations at 1e14 a second
    assert "a step (~5 s, at most, by its operations) and a save (~10 s at 1 GB/s)" in found.text
    assert "signal_delay_seconds, 14" in found.text
    assert found.text.endswith("at the time limit up to 200 steps are done again")


def test_when_a_run_is_resumed_its_steps_are_known(plan: Planner) -> None:
    one = plan(entries={"signal_delay_seconds": 50})
    folder = one.runs[0].folder
    folder.mkdir(parents=True)
    (folder / "telemetry.jsonl").write_text('{"step": 5, "seconds_per_step": 41.0}\n')
    assert "interruptions" not in {found.name for found in check(one)}
    text = _named(replace(one, resumes=True), "interruptions").text
    assert "a step (~41 s, measured)" in text


@pytest.mark.parametrize(("grace", "state"), [(0, "warning"), (14, "warning"), (16, "ok")])
def test_the_grace_time_of_the_partition_is_compared(
    plan: Planner, slurm: FakeSlurm, grace: int, state: str
) -> None:
    slurm.says("scontrol", partition("low", grace=grace, mode="REQUEUE") + "\n")
    found = _named(plan(entries={"partition": "low"}), "interruptions")
    assert found.state == state
    assert "partition low" in found.text
    assert f"{grace} s" in found.text
    assert "scontrol show partition -o low" in slurm.calls


def test_a_partition_that_does_not_preempt_needs_no_grace(plan: Planner, slurm: FakeSlurm) -> None:
    slurm.says("scontrol", partition("main", default=True) + "\n")
    assert "interruptions" not in {one.name for one in check(plan())}
    assert slurm.calls == ["scontrol show partition -o"]


# Resources


def test_resources_are_added_up(plan: Planner) -> None:
    text = _named(plan(gpus=4, nodes=2, time="1:30:00"), "resources").text
    assert text == "2 node(s) of 4 GPU(s) for 1:30:00: 12.0 GPU-hours at most"
    sweep = _named(plan(unfreeze=[0, 1, 2]), "resources").text
    assert sweep == "3 runs, each 1 node(s) of 1 GPU(s) for 24:00:00: 72.0 GPU-hours at most"


def test_a_node_has_only_so_many_gpus(plan: Planner) -> None:
    found = _named(plan(gpus=8), "resources")
    assert found == Check("resources", "error", "--gpus 8: a node has 4; take more --nodes")


def test_a_time_that_is_hardly_more_than_the_warning_is_said(plan: Planner) -> None:
    found = [one for one in check(plan(time="2:59")) if one.name == "resources"]
    assert [one.state for one in found] == ["ok", "warning"]
    assert "little or no time is left to train" in found[1].text
    assert len([one for one in check(plan(time="3:00")) if one.name == "resources"]) == 1


# Slurm


def test_without_slurm_it_is_not_asked(plan: Planner) -> None:
    found = _named(plan(), "Slurm")
    text = "sbatch is not installed here: run this on a login node of the cluster"
    assert found == Check("Slurm", "not checked", text)


def test_slurm_is_asked_about_the_very_script(plan: Planner, slurm: FakeSlurm) -> None:
    slurm.runs("sbatch", f'/bin/cat "$2" > {slurm.folder}/script; echo "{STARTS}" >&2')
    found = _named(plan(name="mine"), "Slurm")
    assert (found.state, found.text) == ("ok", STARTS.removeprefix("sbatch: "))
    assert "#SBATCH --job-name=mine-" in (slurm.folder / "script").read_text()


def test_what_slurm_refuses_is_an_error(plan: Planner, slurm: FakeSlurm) -> None:
    refusal = "allocation failure: Requested node configuration is not available"
    slurm.says("sbatch", stderr=f"{refusal}\n", code=1)
    assert _named(plan(), "Slurm") == Check("Slurm", "error", refusal)


# Sweeps


def test_what_all_runs_of_a_sweep_share_is_said_once(plan: Planner) -> None:
    names = [one.name for one in check(plan(unfreeze=[0, 2]))]
    for name in ("files", "resources", "Slurm"):
        assert names.count(name) == 1
    assert [name for name in names if name.startswith("memory")] == ["memory N=0", "memory N=2"]
    assert [name for name in names if name.startswith("disk N")] == ["disk N=0", "disk N=2"]


def test_a_partition_is_asked_for_once(plan: Planner, slurm: FakeSlurm) -> None:
    slurm.says("scontrol", partition("low", grace=30, mode="REQUEUE") + "\n")
    list(check(plan(unfreeze=[0, 2, 4], entries={"partition": "low"})))
    assert slurm.calls == ["scontrol show partition -o low"]
