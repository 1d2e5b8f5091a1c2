"""The frozen blocks' states kept on disk: the same training, without computing them again."""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro_job import MicroRun, train_run, write_job
from safetensors.torch import load_file
from torch import Tensor

from job import cache as job_cache
from job.common.config import load_config
from job.common.errors import InputError, StorageError
from job.common.schema import CriticConfig
from job.data.state_shards import EVALUATION
from job.distributed.world import World
from job.memory.fit import MARGIN, fit
from job.memory.footprint import Setting
from job.memory.settings import setting_of
from job.model.architecture_file import read_architecture
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.prefix import Prefix
from job.run.directory import RunDirectory
from job.training import cache_opening, memory_report, prefix_cache, trainer
from job.training.cache_building import build
from job.training.cache_choice import DiskRates, Work, training_share, work_left
from job.training.cache_folders import folders, prune
from job.training.cache_opening import Opening
from job.training.data import CriticData
from job.training.prefix_cache import PrefixCache

STEPS, PER_EPOCH = 45, 17.3  # of batches of ten, of 173 sequences
SETTINGS = (
    f"training.max_steps={STEPS}",
    "data.arithmetic.train_examples=173",
    "training.micro_batch_tokens=256",
    "training.min_lr_ratio=1.0",  # so that a longer run begins as a shorter one
    "checkpoint.every_steps=5",
)
ALL = "training.prefix_cache=all"
pytestmark = pytest.mark.slow
VARIANT = pytest.mark.all


class Job:
    """Trains runs by name in one folder, each with a cache of its own unless it is given one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, mode: str, *settings: str, cache: str = "") -> RunDirectory:
        there = f"training.prefix_cache_dir={self.folder / (cache or 'states-' + name)}"
        given = (f"run.name={name}", f"training.prefix_cache={mode}", there, *settings)
        return RunDirectory(self.folder / train_run(*given).path)

    @functools.cache  # noqa: B019 - as long as the tests
    def once(self, name: str, mode: str, *settings: str) -> RunDirectory:
        """A run that no test changes."""
        return self(name, mode, *settings)

    def shards(self, cache: str) -> list[Path]:
        return sorted(self.folder.glob(f"{cache}/*/*.states"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_job(folder, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> Job:
    return Job(folder)


@pytest.fixture
def job(shared: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The shared job, inside its folder."""
    monkeypatch.chdir(shared.folder)
    return shared


def _lines(run: RunDirectory) -> list[bytes]:
    return MicroRun(run.path).lines


def _learned(run: RunDirectory) -> list[tuple[float, float]]:
    return [(row["train/loss"], row["train/grad_norm"]) for row in MicroRun(run.path).records]


def _weights(run: RunDirectory) -> dict[str, Tensor]:
    return load_file(run.file("critic.safetensors"))


def _difference(a: RunDirectory, b: RunDirectory) -> float:
    """The largest difference of a trained weight."""
    theirs = _weights(b)
    return max(float((t - theirs[name]).abs().max()) for name, t in _weights(a).items())


def _read_shares(run: RunDirectory) -> list[float]:
    rows = [json.loads(line) for line in run.file("telemetry.jsonl").read_text().splitlines()]
    return [row["prefix_read_share"] for row in rows if "prefix_read_share" in row]


def _evaluated(run: RunDirectory) -> list[float]:
    name = "validation/value/mse"
    return [row[name] for row in MicroRun(run.path).records if name in row]


def _record(run: RunDirectory) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(run.file("prefix_cache.json").read_text())
    return record


def test_evaluations_that_are_read_have_the_same_bits(job: Job) -> None:
    plain, read = job.once("plain", "none"), job("evaluations", "validation")
    assert _lines(read) == _lines(plain)
    assert len(job.shards("states-evaluations")) == 1
    assert not plain.file("prefix_cache.json").exists()


@pytest.mark.parametrize("n", [0, 1, pytest.param(2, marks=VARIANT)])
def test_training_that_reads_agrees_to_rounding(job: Job, n: int) -> None:
    blocks = () if n == 1 else (f"training.num_unfrozen_layers={n}",)
    plain = job.once(f"plain{n}" if blocks else "plain", "none", *blocks)
    read = job.once(f"read{n}", "all", *blocks)
    assert _difference(plain, read) < 1e-4  # of weights near 1, after 45 steps of 1e-3
    assert np.allclose(_evaluated(read), _evaluated(plain), rtol=1e-4)
    first, *_, last = _read_shares(read)
    assert (first, last) == (0.0, 1.0)
    assert _lines(read)[:17] == _lines(plain)[:17]  # the first epoch computes


@pytest.mark.parametrize("n", [0, 1])
def test_solutions_that_share_their_prompt_are_kept_whole(job: Job, n: int) -> None:
    given = ("data.group_by_problem=true", f"training.num_unfrozen_layers={n}")
    plain, read = job(f"plain-shared{n}", "none", *given), job(f"shared{n}", "all", *given)
    assert _lines(read)[:17] == _lines(plain)[:17]
    assert _read_shares(read)[-1] == 1.0
    assert _difference(plain, read) < 1e-4
    apart = job(
        f"apart{n}", "all", "data.group_by_problem=false", given[1], cache=f"states-shared{n}"
    )
    assert set(_read_shares(apart)) == {1.0}


@VARIANT
def test_bf16_states_are_kept_as_they_are(job: Job) -> None:
    mixed = "distributed.fsdp.mixed_precision=true"
    exact, plain = job.once("plain", "none"), job("mixed", "none", mixed)
    read = job("mixed-read", "all", mixed)
    assert _lines(read)[:17] == _lines(plain)[:17]
    rounding = abs(np.array(_evaluated(plain)) - _evaluated(exact)).max()
    assert abs(np.array(_evaluated(plain)) - _evaluated(read)).max() <= 2 * rounding


def test_another_run_reads_everything_and_loads_no_frozen_block(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = job.once("read1", "all")
    before = job.shards("states-read1")
    settings: list[Setting] = []

    def never(prefix: Prefix, computed: Tensor) -> Tensor:
        raise AssertionError("states were computed")

    def noted(setting: Setting, known: Any = memory_report.prediction) -> Any:
        settings.append(setting)
        return known(setting)

    monkeypatch.setattr(Prefix, "settle", never)
    monkeypatch.setattr(memory_report, "prediction", noted)
    caplog.set_level(logging.INFO, "job.train")
    second = job("second", "all", "training.seed=1", cache="states-read1")
    assert set(_read_shares(second)) == {1.0}
    assert job.shards("states-read1") == before
    assert settings[-1].prefix_cached
    assert "all states before block 2 are there" in caplog.text
    held = [json.loads(run.file("parameters.json").read_text()) for run in (first, second)]
    for name in ("model_total_params", "model_trainable_params"):
        assert held[0][name] == held[1][name]
    bytes_ = [{c["name"]: c["weight_bytes"] for c in one["components"]} for one in held]
    assert bytes_[1]["embeddings"] == 0 < bytes_[0]["embeddings"]
    assert bytes_[1]["trunk_blocks"] == bytes_[0]["trunk_blocks"] / 3  # one of three blocks


def test_the_micro_batch_is_chosen_by_what_is_loaded(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job.once("read1", "all")
    config = load_config(CriticConfig, "critic.yaml", ("training.micro_batch_tokens=auto",))
    architecture = read_architecture("trunk")

    def chosen(capacity: int, *, cached: bool) -> Setting:
        return setting_of(config, architecture, cuda=False, capacity=capacity, prefix_cached=cached)

    # as it is looked for: what accumulates follows from it
    whole_step = replace(chosen(10**12, cached=True), accumulates=True)
    capacity = int(fit(whole_step, 0).needed / (1 - MARGIN)) + 1
    read, computed = (chosen(capacity, cached=c).evaluation_tokens for c in (True, False))
    assert read > computed
    monkeypatch.setattr(memory_report, "_capacity", lambda world: capacity)
    given = ("training.micro_batch_tokens=auto", "training.max_steps=2")
    assert job("roomy", "all", *given, cache="states-read1").status()["micro_batch_tokens"] == read
    assert job("empty", "all", *given).status()["micro_batch_tokens"] == computed
    assert "built first" not in caplog.text
    two_a_step = ("training.micro_batch_tokens=640", "training.batch_size=11")
    job("tight", "all", *two_a_step, given[1])
    assert "built first (python -m job.cache build): " in caplog.text


def test_what_fits_in_no_way_is_refused_before_the_data_are_read(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_report, "_capacity", lambda world: 10_000)
    monkeypatch.setattr(trainer, "load_critic_data", None)
    with pytest.raises(InputError, match="micro_batch_tokens: auto"):
        job("nowhere", "all", "training.micro_batch_tokens=auto")


@pytest.mark.parametrize("n", [0, pytest.param(1, marks=VARIANT)])
def test_fewer_unfrozen_blocks_begin_with_the_states_before_those_of_more(
    job: Job, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = f"training.num_unfrozen_layers={n}"
    job.once("read2", "all", "training.num_unfrozen_layers=2")
    before = job.shards("states-read2")
    plain = job.once("plain0", "none", blocks) if n == 0 else job.once("plain", "none")
    computed: set[int] = set()

    def noted(self: PrefixCache, *given: Any, keep: Any = PrefixCache.keep) -> None:
        *_, prefix, step = given
        if prefix.computed:
            assert prefix.earlier.block == 1
            computed.add(step)
        keep(self, *given)

    monkeypatch.setattr(PrefixCache, "keep", noted)
    run = job(f"few{n}", "all", blocks, cache="states-read2")
    assert (_record(run)["earlier"], _record(run)["block"]) == (1, 3 - n)
    assert _read_shares(run)[0] == pytest.approx(1 / (3 - n))
    assert _read_shares(run)[-1] == 1.0
    assert _difference(run, plain) < 1e-4
    # what the blocks between gave once is read from then on; of step 17, which two epochs share,
    # from the third one on
    assert {EVALUATION, *range(18)} <= computed
    assert max(computed) < 35
    assert len(computed) < 30
    own = [path for path in job.shards("states-read2") if path not in before]
    assert [path.name.partition("-")[0] for path in own] == [_record(run)["name"]] * len(own) != []
    assert job.shards("states-read2") == sorted([*before, *own])
    again = job(f"few{n}-again", "all", blocks, cache="states-read2")
    assert _record(again)["earlier"] is None
    assert _difference(run, again) < 1e-4


def test_a_resumed_run_that_begins_with_earlier_states_has_the_bits_of_one_at_once(
    job: Job,
) -> None:
    job.once("read2", "all", "training.num_unfrozen_layers=2")
    for name in ("at-once", "in-parts"):
        _copy_states("states-read2", name, block=1)
    whole = job("at-once", "all", cache="at-once")
    job("in-parts", "all", "training.max_steps=12", cache="in-parts")
    parts = job("in-parts", "all", cache="in-parts")
    assert _record(parts)["earlier"] == 1
    assert _difference(whole, parts) == 0
    assert _learned(parts) == _learned(whole)


def test_earlier_states_that_are_gone_are_computed_again(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    job.once("read2", "all", "training.num_unfrozen_layers=2")
    _copy_states("states-read2", "going", block=1)
    (folder,) = Path("going").iterdir()
    os.utime(folder, (0, 0))
    begun = job("forsaken", "all", "training.max_steps=6", cache="going")
    assert folder.stat().st_mtime > 0  # it is used
    for name in _record(begun)["earlier_given"][1:]:
        (index,) = Path("going").glob(f"*/{name}.index")
        index.unlink()
    run = job("forsaken", "all", cache="going")
    assert "states before block 1 that this run began with are gone" in caplog.text
    assert _read_shares(run)[-1] == 1.0
    assert _difference(run, job.once("plain", "none")) < 1e-4


@VARIANT
def test_what_did_not_fit_when_a_run_began_is_not_kept_from_the_middle_on(job: Job) -> None:
    job.once("read2", "all", "training.num_unfrozen_layers=2")
    _copy_states("states-read2", "tight", block=1)
    before = job.shards("tight")
    size = sum(path.stat().st_size for path in before)
    none_more = f"training.prefix_cache_gb={size / 1e9:.10f}"
    job("crammed", "all", "training.max_steps=12", none_more, cache="tight")
    run = job("crammed", "all", cache="tight")
    assert (_record(run)["validation"], _record(run)["training"]) == (False, False)
    assert job.shards("tight") == before
    assert set(_read_shares(run)) == {0.5}
    job("kept", "validation", "training.max_steps=12", cache="turned")
    assert _record(job("kept", "all", cache="turned"))["training"] is True


def _copy_states(cache: str, to: str, block: int) -> None:
    """Those before one block, without what other runs have kept before other ones."""
    (one,) = (one for one in folders(Path(cache)) if one.facts["block"] == block)
    shutil.copytree(one.path, Path(to) / one.path.name)


@VARIANT
def test_stages_begin_at_the_boundary_of_the_one_that_trains_most(job: Job) -> None:
    stages = "training.stages=[{num_unfrozen_layers: 0, steps: 20}, "
    stages += "{num_unfrozen_layers: 2, steps: 25}]"
    given = (stages, "training.num_unfrozen_layers=2")
    plain, read = job("plain-stages", "none", *given), job("stages", "all", *given)
    assert _record(read)["block"] == 1
    assert _difference(plain, read) < 1e-4


@VARIANT
def test_pairs_are_read_too(job: Job) -> None:
    mixed = "objective.terms={monte_carlo: 1.0, pairwise: 0.5}"
    plain, read = job("plain-pairs", "none", mixed), job("pairs", "all", mixed)
    assert _read_shares(read)[-1] == 1.0
    assert _difference(plain, read) < 1e-4


# in an epoch's last step, in the middle of one, in that of the next
@pytest.mark.parametrize("stopped", [18, *(pytest.param(k, marks=VARIANT) for k in (12, 31))])
def test_a_resumed_run_has_the_bits_of_one_at_once(job: Job, stopped: int) -> None:
    whole, name = job.once("read1", "all"), f"parts{stopped}"
    job(name, "all", f"training.max_steps={stopped}")
    parts = job(name, "all")
    assert _difference(whole, parts) == 0
    assert _learned(parts) == _learned(whole)
    own = _record(parts)["name"]
    assert {path.name.partition("-")[0] for path in job.shards(f"states-{name}")} == {own}


def test_a_record_of_another_trunk_counts_as_absent(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    file = job("strange", "validation", "training.max_steps=1").file("prefix_cache.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"block": 7}))
    run = job("strange", "validation", "training.max_steps=2")
    assert _record(run)["block"] == 2
    assert "prefix_cache.json: not readable, and taken as absent: block" in caplog.text


@VARIANT
def test_texts_of_both_sets_are_kept_for_each(job: Job) -> None:
    tokens = (random.Random(0).choices("0123456789", k=6) for _ in range(173))
    rows = [
        json.dumps({"prompt": "".join(t[:3]) + "?", "response": "".join(t[3:]), "reward": i % 2})
        for i, t in enumerate(tokens)
    ]
    for name, some in (("all.jsonl", rows), ("some.jsonl", rows[:60])):
        (job.folder / name).write_text("\n".join(some))
    given = ("data.train=all.jsonl", "data.validation=some.jsonl")
    whole = job("overlap", "all", *given)
    assert _read_shares(whole)[-1] == 1.0
    job("overlap-parts", "all", *given, "training.max_steps=12")
    parts = job("overlap-parts", "all", *given)
    assert _difference(whole, parts) == 0
    assert _learned(parts) == _learned(whole)


@VARIANT
def test_what_another_run_writes_meanwhile_is_not_seen(job: Job) -> None:
    whole = job.once("read1", "all")
    job("mine", "all", "training.max_steps=10", cache="two")
    job("other", "all", "training.seed=5", "training.micro_batch_tokens=512", cache="two")
    assert _difference(whole, job("mine", "all", cache="two")) == 0


@VARIANT
def test_a_run_without_its_own_states_computes_them_again(job: Job) -> None:
    job("bare", "all", "training.max_steps=20")
    for path in job.shards("states-bare"):
        path.unlink()
    run = job("bare", "all")
    assert _read_shares(run)[-1] > 0.8  # but for those that were seen in steps 18 to 20
    assert _difference(run, job.once("plain", "none")) < 1e-4


@pytest.mark.parametrize(
    ("there", "steps"), [("part", 10), pytest.param("whole", 20, marks=VARIANT)]
)
def test_a_flipped_bit_is_never_used(
    job: Job, there: str, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache = f"flipped-{there}"
    job(f"first-{there}", "all", f"training.max_steps={steps}", cache=cache)
    for path in job.shards(cache):
        content = bytearray(path.read_bytes())
        content[len(content) // 2 // 4096 * 4096 + 5] ^= 1
        path.write_bytes(content)
    name = f"second-{there}"
    if there == "whole":  # by the index all is there, and so frozen blocks are not loaded
        with pytest.raises(StorageError, match="the next attempt computes what could be set aside"):
            job(name, "all", cache=cache)
    second = job(name, "all", cache=cache)
    assert "states are not as they were written" in caplog.text
    assert _difference(job.once("plain", "none"), second) < 1e-4


@VARIANT
def test_another_trunk_and_other_texts_have_states_of_their_own(job: Job) -> None:
    other = (job.folder / "pretrain.yaml").read_text().replace("max_steps: 5", "max_steps: 6")
    (job.folder / "other.yaml").write_text(other)
    job.once("read1", "all")
    shutil.copytree("states-read1", "foreign")  # other tests ask for what is in that one
    trunk = ("model.path=other", "model.recipe=other.yaml")
    few = "training.max_steps=10"
    assert set(_read_shares(job("trunk", "all", few, *trunk, cache="foreign"))) == {0.0}
    texts = job("texts", "all", few, "data.arithmetic.seed=3", cache="foreign")
    assert _read_shares(texts)[0] < 0.5


def test_a_cache_that_does_not_fit_is_refused(job: Job) -> None:
    words = r"prefix_cache=all: the states of the training data take 0\.\d+ GB in .* room for 0\.0"
    with pytest.raises(InputError, match=words):
        job("large", "all", "training.prefix_cache_gb=0.0005")
    assert not job.shards("states-large")


def test_a_cache_whose_folder_takes_nothing_is_refused_before_it_trains(job: Job) -> None:
    Path("a-file").write_text("")
    Path("a-file-too").write_text("")
    for mode in ("validation", "all"):
        with pytest.raises(InputError, match=r"training\.prefix_cache_dir: cannot write .*a-file/"):
            job("no-folder", mode, cache="a-file")
    there = f"training.prefix_cache_dir={job.folder / 'a-file'}"
    config = load_config(CriticConfig, "critic.yaml", ("run.name=none", ALL, there))
    with pytest.raises(InputError, match=r"training\.prefix_cache_dir: cannot write .*a-file/"):
        build(config)
    run = job("no-folder-auto", "auto", "training.max_steps=3", cache="a-file-too")
    assert run.status()["state"] == "finished"


def _bytes(job: Job, cache: str) -> int:
    return sum(path.stat().st_size for path in job.shards(cache))


def _gigabytes(job: Job, beside: float) -> str:
    """Room for all states of a run, or for so many bytes more."""
    return f"training.prefix_cache_gb={(_bytes(job, 'states-read1') + beside) / 1e9:.10f}"


def test_sets_that_fit_one_by_one_and_not_together_are_not_both_kept(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    job.once("read1", "all")
    caplog.set_level(logging.INFO, "job.train")
    few = "training.max_steps=20"  # of which an epoch has 17.3
    job("both", "all", _gigabytes(job, 0.5), few)
    assert _bytes(job, "states-both") == _bytes(job, "states-read1")
    assert "not written any more" not in caplog.text
    with pytest.raises(InputError, match="the states of the training data take"):
        job("together", "all", _gigabytes(job, -0.5), few)
    run = job("one", "auto", _gigabytes(job, -0.5), "training.max_steps=2")
    assert _record(run)["training"] is False
    assert "the states of the training data take" in caplog.text
    assert "the states of the validation data take" not in caplog.text


def test_a_run_whose_room_others_have_taken_meanwhile_goes_on(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    job("crowded", "all", "training.max_steps=5")
    caplog.set_level(logging.INFO, "job.train")
    run = job("crowded", "all", "training.prefix_cache_gb=0.00001", "training.max_steps=12")
    assert MicroRun(run.path).step == 12
    assert "prefix cache: not kept: the states of the training data take" in caplog.text


@pytest.mark.parametrize("one_disk", [True, False])
def test_checkpoints_keep_their_room_on_a_disk_that_they_share(
    job: Job, monkeypatch: pytest.MonkeyPatch, one_disk: bool
) -> None:
    config = load_config(CriticConfig, "critic.yaml", ("checkpoint.keep_last=4",))
    monkeypatch.setattr(cache_opening, "on_one_disk", lambda *_: one_disk)
    monkeypatch.setattr(cache_opening, "free_bytes", lambda _: 10**6)
    opening = Opening(config, CriticData(*[None] * 2, 0.5, ""), "", World())  # type: ignore[arg-type]
    trainable = _trainable(config)
    reserve = (5 * 12 + 4) * trainable if one_disk else 0
    assert opening.reserve() == reserve
    assert opening.room() == min(8 * 10**5, 10**6 - reserve)


def _trainable(config: CriticConfig) -> int:
    critic = Critic(read_architecture(config.model.path))
    unfreeze_last_blocks(critic, config.training.num_unfrozen_layers)
    return sum(p.numel() for p in critic.parameters() if p.requires_grad)


def test_auto_does_without_a_cache_that_does_not_fit(job: Job) -> None:
    run = job("small", "auto", "training.prefix_cache_gb=0.00001", "training.max_steps=5")
    assert (_record(run)["validation"], _record(run)["training"]) == (False, False)


def test_auto_keeps_nothing_that_takes_no_time(job: Job) -> None:
    quick = job("quick", "auto", "training.max_steps=12")
    assert (_record(quick)["validation"], _record(quick)["training"]) == (False, None)
    assert not job.shards("states-quick")


def test_auto_keeps_what_the_first_minutes_say(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefix_cache, "CHOSEN_AFTER", 0.0)
    monkeypatch.setattr(prefix_cache, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(Work, "saved", lambda *_: 1.0)
    caplog.set_level(logging.INFO, "job.train")
    run = job("auto", "auto")
    assert (_record(run)["validation"], _record(run)["training"]) == (True, True)
    assert "prefix cache: states of evaluations are kept: " in caplog.text
    assert "prefix cache: states of training data are kept: " in caplog.text
    assert _read_shares(run)[-1] > 0.5
    assert _difference(run, job.once("plain", "none")) < 1e-4


def test_states_that_are_known_replace_computed_ones() -> None:
    known, computed = torch.ones(3, 2), torch.zeros(3, 2)
    prefix = Prefix(1, known=(known, torch.tensor([True, False, True])))
    assert prefix.settle(computed).tolist() == [[1, 1], [0, 0], [1, 1]]
    assert prefix.computed
    assert Prefix(1).settle(computed) is computed


# What auto weighs


def test_frozen_blocks_take_a_third_of_what_trained_ones_do() -> None:
    assert training_share(28, 4) == pytest.approx(56 / 80)
    assert training_share(32, 0) == 1.0
    assert training_share(0, 4) == 0.0


@pytest.mark.parametrize(
    ("step", "last", "writes", "reads"),
    [(10, 100, 20, 70), (10, 25, 15, 0), (10, 10, 0, 0)],
)
def test_states_are_written_for_one_epoch_and_read_from_then_on(
    step: int, last: int, writes: int, reads: int
) -> None:
    work = work_left(step=step, last=last, epoch=20, seconds=1.0, prefix_share=0.5, step_bytes=1.0)
    assert (work.writes, work.reads) == (writes, reads)


@pytest.mark.parametrize(
    ("read", "write", "saved"),
    [
        (1e9, 1e9, 100 * 0.7),  # the disk is never waited for
        (1e6, 1e9, 100 * 0.5),  # a step's states take half a second
        (0.5e6, 1e9, 0.0),
        (1e9, 0.25e6, 100 * 0.7 - 20 * 1.0),  # and two to write
        (0.25e6, 1e9, -100.0),
    ],
)
def test_saved_seconds_are_what_reading_spares_less_what_the_disk_costs(
    read: float, write: float, saved: float
) -> None:
    work = Work(1.0, 0.7, 0.5e6, writes=20, reads=100)
    disk = DiskRates(write=write, read=read)
    assert work.saved(disk) == pytest.approx(saved)
    assert f"{saved:+,.0f} s saved" in work.told(disk)


def test_a_disk_is_measured(tmp_path: Path) -> None:
    one, four = (DiskRates.measured(tmp_path / "new", n) for n in (1, 4))
    assert 1e6 < one.write < 1e12
    assert 1e6 < four.read < 1e12
    assert not list((tmp_path / "new").iterdir())


# The command


@pytest.mark.parametrize("n", [0, pytest.param(1, marks=VARIANT)])
def test_a_cache_that_was_built_is_all_that_a_training_reads(
    job: Job, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (f"training.num_unfrozen_layers={n}", f"training.prefix_cache_dir=built{n}")
    config = load_config(CriticConfig, "critic.yaml", ("run.name=none", ALL, *given))
    folder = build(config)
    assert folder.parent == Path(f"built{n}")
    before = job.shards(f"built{n}")
    build(config)  # all is there
    assert job.shards(f"built{n}") == before
    assert not Path("runs/none").exists()
    run = job(f"trained{n}", "all", given[0], cache=f"built{n}")
    assert set(_read_shares(run)) == {1.0}
    plain = job.once("plain0", "none", given[0]) if n == 0 else job.once("plain", "none")
    assert _difference(run, plain) < 1e-4


def test_caches_are_listed_and_the_longest_unused_removed(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "training.max_steps=4"
    for n in (1, 2):
        job(f"listed{n}", "all", few, f"training.num_unfrozen_layers={n}", cache="listed")
    root = job.folder / "listed"
    newest, oldest = folders(root)
    assert (newest.facts["block"], oldest.facts["block"]) == (1, 2)
    assert newest.sequences == oldest.sequences == 40 + 30
    leftover = newest.path / ".0a1b2c3d4e5f-0000-00000-000000.states"
    leftover.write_bytes(b"x")
    os.utime(leftover, (0, 0))
    for words in (["status", "--dir", str(root)], ["prune", "--dir", str(root), "--keep-gb", "1"]):
        monkeypatch.setattr(sys, "argv", ["job.cache", *words])
        job_cache.main()
    assert "block 2" in capsys.readouterr().out
    assert not leftover.exists()
    assert len(folders(root)) == 2
    assert prune(root, newest.bytes) == oldest.bytes
    assert [one.path for one in folders(root)] == [newest.path]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build"], "build needs --config FILE"),
        (
            ["build", "--config", "critic.yaml", "--dir", "x"],
            "not --dir x, but --override .*_dir=x",
        ),
        (["status", "--dir", "nowhere"], "nowhere: there is no cache here"),
        (["prune", "--dir", "."], "prune needs --keep-gb GB"),
        (["status", "--dir", ".", "--keep-gb", "1"], "--keep-gb: it is about prune, not status"),
    ],
)
def test_what_the_command_lacks_is_said(
    job: Job, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["job.cache", *words])
    with pytest.raises(InputError, match=message):
        job_cache.main()


def test_what_is_built_is_what_such_a_training_reads(job: Job) -> None:
    there = ("run.name=none", f"training.prefix_cache_dir={job.folder / 'built-part'}")
    for mode, sequences in (("validation", 30), ("all", 30 + 173)):
        given = (*there, f"training.prefix_cache={mode}")
        build(load_config(CriticConfig, "critic.yaml", given))
        assert folders(job.folder / "built-part")[0].sequences == sequences
    with pytest.raises(InputError, match="prefix_cache=none: such a training reads no"):
        build(load_config(CriticConfig, "critic.yaml", (*there, "training.prefix_cache=none")))


def test_nothing_is_built_where_no_block_is_frozen(job: Job) -> None:
    given = ("run.name=none", ALL, "training.num_unfrozen_layers=3")
    with pytest.raises(InputError, match="no block stays frozen"):
        build(load_config(CriticConfig, "critic.yaml", given))
