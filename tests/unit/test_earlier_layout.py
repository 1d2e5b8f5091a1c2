"""Files that were written before the modules had their rooms (commit 94a3acc) still mean the same.

tests/fixtures/first_layout.tar.xz holds a micro trunk, three runs on it (one finished at step 20,
two as a kill at step 13 leaves them, on one rank and on two), a delta, an export and the token
cache, as that commit left them.
"""

from __future__ import annotations

import json
import logging
import tarfile
from pathlib import Path

import pytest
import torch
from micro_job import train_run
from safetensors.torch import load_file

from job.common.config import completed, kept_from_before, set_key
from job.common.errors import InputError
from job.common.schema import CriticConfig, PrefixCacheMode
from job.export.formats import export
from job.run.directory import RunDirectory
from job.run.report_page import write_report
from job.run.trained import TrainedCritic

ARCHIVE = Path(__file__).parents[1] / "fixtures/first_layout.tar.xz"
# Another CPU rounds otherwise, and ten steps carry that on.
LOSS = {"rel": 1e-3}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _go_on(name: str, *overrides: str) -> RunDirectory:
    return train_run(f"run.name={name}", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stopped", "two_ranks"])
def test_a_run_goes_on_from_its_checkpoint_as_one_that_was_never_interrupted(
    name: str, folder: Path
) -> None:
    run = _go_on(name)
    assert json.loads((run.path / "attempts/0002/attempt.json").read_text())["resumed_step"] == 10
    losses = [record["train/loss"] for record in run.records()]
    undisturbed = [record["train/loss"] for record in RunDirectory("runs/finished").records()]
    assert losses == pytest.approx(undisturbed, **LOSS)
    assert run.status()["state"] == "finished"
    assert not run.file("prefix_cache.json").exists()  # there was none when it began


def test_a_finished_run_is_left_as_it_is(folder: Path) -> None:
    before = (folder / "runs/finished/metrics.jsonl").read_bytes()
    run = _go_on("finished")
    assert (run.path / "metrics.jsonl").read_bytes() == before
    assert not (run.path / "attempts/0002").exists()


@pytest.mark.slow
def test_a_run_without_values_before_responses_goes_on_without_them(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):  # the second time it is stored that there are none
        run = _go_on("finished", "training.max_steps=22")
        assert run.stored_config()["objective"]["prompt_value"] is False
    assert not [key for key in run.records()[-1] if "/prompt/" in key]
    assert caplog.text.count("objective.prompt_value: false, as this run began") == 2


def test_its_configuration_means_what_it_meant(folder: Path) -> None:
    stored = RunDirectory("runs/finished").config()
    assert stored["report"] == {"enabled": True}  # there was no such key: a page was drawn
    assert stored["training"]["num_unfrozen_layers"] == 1


def test_other_values_of_its_keys_are_differences(folder: Path) -> None:
    other = ["training.learning_rate=0.002", "training.max_steps=30"]
    with pytest.raises(InputError, match=r"training\.learning_rate: 0\.001 -> 0\.002"):
        _go_on("finished", *other)


def test_a_choice_is_set_by_the_name_that_is_stored() -> None:
    config = CriticConfig()
    set_key(config, "training.prefix_cache", "none")
    assert config.training.prefix_cache is PrefixCacheMode.none
    set_key(config, "training.compile", "auto")
    assert config.training.compile == "auto"


def test_a_key_whose_default_changed_things_is_completed_with_what_was_done_before() -> None:
    from dataclasses import dataclass, field

    @dataclass
    class Section:
        old: int = 3
        new: bool = field(default=True, metadata={"before": False})

    @dataclass
    class Whole:
        section: Section = field(default_factory=Section)

    assert completed({"section": {"old": 5}}, Whole) == {"section": {"old": 5, "new": False}}
    stored = completed({}, Whole)
    assert kept_from_before(stored, Whole()) == {"section.new": False}
    assert kept_from_before(completed({"section": {"new": True}}, Whole), Whole()) == {}
    asked = Whole(Section(new=False))
    assert kept_from_before(stored, asked) == {}
    set_key(asked, "section.new", True)
    assert asked == Whole()
    assert completed({}, Whole) == {"section": {"old": 3, "new": False}}
    assert completed({"section": {"new": True, "gone": 1}}, Whole) == {
        "section": {"old": 3, "new": True, "gone": 1}
    }


@pytest.mark.parametrize("source", ["runs/finished", "delta"])
def test_its_critics_are_exported_with_the_same_weights(source: str, folder: Path) -> None:
    export(TrainedCritic.find(Path(source)), "token-classification", Path("again"))
    then, now = load_file("hf/model.safetensors"), load_file("again/model.safetensors")
    assert then.keys() == now.keys()
    assert all(torch.equal(then[name], now[name]) for name in then)
    then, now = (json.loads(Path(f"{name}/config.json").read_text()) for name in ("hf", "again"))
    assert {key: now[key] for key in then} == then
    assert now.keys() - then.keys() == {"problem_type", "rope_parameters"}


@pytest.mark.slow
def test_its_weights_begin_a_new_run(folder: Path) -> None:
    run = _go_on("new", "model.init_from=delta", "training.max_steps=1")
    assert run.records()[0]["train/loss"] < 0.25


@pytest.mark.slow
def test_its_runs_are_reported(folder: Path) -> None:
    page = write_report([Path("runs/finished"), Path("runs/stopped")])
    assert "step 20 of 20" in page.read_text()
