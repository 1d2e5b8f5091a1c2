"""A run's memory account: the micro-batch it chooses, what it predicts, and what it compares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from micro_job import write_job

from job.common.config import load_config
from job.common.errors import InputError, Stopped
from job.common.progress import log_file
from job.common.schema import ArithmeticConfig, CriticConfig, DataConfig
from job.data.arithmetic import ALPHABET
from job.data.packing import Packer, single_units
from job.data.shared_prompts import SharedPrompts
from job.data.token_cache import TokenizedSet, load_split
from job.data.tokenizer import load_tokenizer, write_character_tokenizer
from job.distributed.world import World
from job.memory import fit
from job.memory.fit import CONTEXT_BYTES, MARGIN
from job.memory.footprint import Footprint, Moment, Setting, footprint
from job.memory.recorder import Recorder
from job.run.directory import RunDirectory
from job.training import memory_report as account
from job.training.data import CriticData
from job.training.memory_report import (
    MemoryAccount,
    choose_by_memory,
    heaviest,
    measured_peak,
    within,
)
from job.training.trainer import train

CPU = torch.device("cpu")
BUDGET = 400


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenizedSet:
    """Sequences of very different lengths."""
    folder = tmp_path_factory.mktemp("data")
    write_character_tokenizer(folder, ALPHABET)
    config = DataConfig("embedded", "embedded", cache_dir=str(folder / "cache"))
    config.arithmetic = ArithmeticConfig(train_examples=200, min_steps=1)
    return load_split(config, "train", load_tokenizer(folder))


def packer(
    data: TokenizedSet, sequences: int, budget: int = BUDGET, prompts: SharedPrompts | None = None
) -> Packer:
    units = single_units(sequences)
    more: dict[str, Any] = {"prompt_value": True, "prompts": prompts}
    return Packer(data, units, dim=32, budget=budget, device=CPU, **more)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CriticConfig:
    write_job(tmp_path)
    (tmp_path / "trunk").mkdir()
    params = {"dim": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 32}
    (tmp_path / "trunk/params.json").write_text(json.dumps(params))
    monkeypatch.chdir(tmp_path)
    return load_config(CriticConfig, "critic.yaml", ["training.max_steps=6"])


def test_a_plan_and_its_sizes_are_those_of_the_assembled_batches(data: TokenizedSet) -> None:
    for packed in (packer(data, len(data)), packer(data, len(data), prompts=SharedPrompts(data))):
        for step in range(5):
            sizes = [packed.size(units) for units in packed.plan(step, 40, 0)]
            batches = packed.step(step, 40, 0)
            assert sizes == [(len(b.tokens), len(b.positions), b.layout.n_keys) for b in batches]
            assert len(sizes) > 1


def test_the_heaviest_micro_batch_is_the_largest_of_all_steps(
    config: CriticConfig, data: TokenizedSet
) -> None:
    config.training.batch_size = 7
    train_set, validation = packer(data, len(data)), packer(data, 50)
    found = heaviest(config, CriticData(train_set, validation, 0.5, "none"), World())
    batches = [batch for step in range(6) for batch in train_set.step(step, 7, 0)]
    sizes = {(len(batch.tokens), len(batch.positions)) for batch in batches}
    assert len(sizes) > 1
    assert (found.micro_batch_tokens, found.response_tokens) == max(sizes)
    evaluated = [len(validation.assemble(units).tokens) for units in validation.everything]
    assert found.evaluation_tokens == max(evaluated)
    assert found.accumulates == (len(batches) > 6)
    assert found.keys_per_token == 1


@pytest.mark.parametrize("n", [0, 1])
def test_prompts_that_are_shared_are_counted_once_and_their_keys_for_each(
    config: CriticConfig, data: TokenizedSet, n: int
) -> None:
    config.training.batch_size = 7
    config.training.num_unfrozen_layers = n
    sets = [packer(data, n, prompts=SharedPrompts(data)) for n in (len(data), 50)]
    found = heaviest(config, CriticData(sets[0], sets[1], 0.5, "none"), World())
    batches = [batch for step in range(6) for batch in sets[0].step(step, 7, 0)]
    if n == 0:  # else evaluations, which share more, are nowhere near the peak
        batches += [sets[1].assemble(units) for units in sets[1].everything]
    assert found.keys_per_token == max(b.layout.n_keys / len(b.tokens) for b in batches)
    assert (found.keys_per_token > 1) == (n == 0)


def test_auto_is_a_number_that_fits_and_is_kept(
    config: CriticConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()

    def chosen(capacity: float) -> int:
        monkeypatch.setattr(account, "_capacity", lambda world: int(capacity))
        config.training.micro_batch_tokens = "auto"
        choose_by_memory(config, run, World())
        assert run.status()["micro_batch_tokens"] == config.training.token_budget
        return config.training.token_budget

    most, fewer = (_needed(config, tokens) / (1 - MARGIN) + 1 for tokens in (512, 256))
    assert chosen(most) == 512
    assert chosen(1e9) == 512
    assert chosen(fewer) == 256
    with pytest.raises(InputError, match="micro_batch_tokens: auto"):
        chosen(1e5)
    config.training.micro_batch_tokens = 128
    choose_by_memory(config, run, World())
    assert config.training.micro_batch_tokens == 128


def test_auto_leaves_others_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    gb = 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * gb, 80 * gb))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * gb)
    of_a_gpu = account._capacity(World(device=torch.device("cuda", 0)))
    assert of_a_gpu == 35 * gb + CONTEXT_BYTES  # its own is not another's
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * gb - 1, 80 * gb))
    assert account._capacity(World(device=torch.device("cuda", 0))) == 80 * gb
    monkeypatch.setattr(account, "free_host_bytes", lambda: 12 * gb)
    assert account._capacity(World(size=3, local_size=3)) == 2 * gb


def _needed(config: CriticConfig, tokens: int) -> int:
    architecture = account.read_architecture(config.model.path)
    fsdp = config.distributed.fsdp
    setting = Setting(architecture, 1, fsdp, tokens, evaluation_tokens=tokens, cuda=False)
    return footprint(setting).peak.total


def test_the_measured_peak_is_the_allocators_or_what_the_process_grew_by() -> None:
    process = {"backend": "process", "peak": {"process": 900.0}, "before": {"process": 300.0}}
    assert measured_peak(process) == 600
    gpu: dict[str, Any] = {"peak": {"allocated": 70.0, "reserved": 80.0}, "before": {}}
    assert measured_peak(gpu | {"backend": "nvml"}) == 70
    assert measured_peak(gpu | {"backend": "allocator"}) == 70
    assert measured_peak({"backend": "nvml", "peak": {}, "before": {}}) is None


@pytest.mark.parametrize("sign", [-1, 1])
def test_each_backend_has_its_tolerance(sign: int) -> None:
    gb = 1_000_000_000
    assert within(gb + sign * 29_999_999, gb, on_gpu=True)
    assert not within(gb + sign * 30_000_001, gb, on_gpu=True)
    assert within(gb + sign * 199_999_999, gb, on_gpu=False)
    assert not within(gb + sign * 200_000_001, gb, on_gpu=False)


@pytest.mark.parametrize("parts", [False, True])
def test_a_log_warns_where_prediction_and_measurement_part_and_else_calls_them_equal(
    config: CriticConfig,
    data: TokenizedSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    parts: bool,
) -> None:
    caplog.set_level("INFO", "job")

    def too_high(setting: Setting) -> Footprint:
        found = footprint(setting)
        moment = Moment("peak", found.peak.components | {"batch": 10**9})
        return replace(found, moments=(moment,))

    if parts:
        monkeypatch.setattr(fit, "footprint", too_high)
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    sets = CriticData(packer(data, len(data)), packer(data, 50), 0.5, "none")
    with log_file(tmp_path / "train.log"), Recorder(CPU) as recorder:
        memory = MemoryAccount(config, sets, run, World(), recorder)
        held = torch.ones(20_000_000)  # more than malloc gives out of what was freed
        figures = memory.close()
        del held
    assert (figures["memory/predicted_peak"] > 1e9) is parts
    log = (tmp_path / "train.log").read_text()
    assert ("WARNING" in log and "they part" in log) is parts
    assert "as predicted" not in log  # of a process that is no news
    assert "GB predicted for the critic and its training, at the peak" in log
    assert "outside torch" not in log  # which only a GPU has


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], RunDirectory]:
    """memory.json of an attempt that was stopped before its first step, and the run finished."""
    folder = tmp_path_factory.mktemp("job")
    write_job(folder, ["training.max_steps=4", "evaluation.every_steps=2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = RunDirectory(folder / "runs/critic")
        run.path.mkdir(parents=True)
        run.file("stop").touch()
        with pytest.raises(Stopped):
            train(load_config(CriticConfig, "critic.yaml", []))
        before = json.loads(run.file("memory.json").read_text())
        assert not run.records()
        train(load_config(CriticConfig, "critic.yaml", []))
    return before, run


@pytest.mark.slow
def test_the_prediction_is_there_before_the_first_step(
    attempts: tuple[dict[str, Any], RunDirectory],
) -> None:
    before, run = attempts
    assert before.keys() == {"predicted"}
    assert before["predicted"]["peak_bytes"] == sum(before["predicted"]["peak"].values()) > 0
    after = json.loads(run.file("memory.json").read_text())
    assert after["predicted"] == before["predicted"]


@pytest.mark.slow
def test_a_finished_run_has_measured_its_phases_and_compared(
    attempts: tuple[dict[str, Any], RunDirectory],
) -> None:
    _, run = attempts
    found = json.loads(run.file("memory.json").read_text())
    (rank,) = found["ranks"]
    phases = {"load", "forward", "backward", "optimizer", "save", "evaluate"}
    assert phases <= rank["peaks"].keys()
    last = run.records("telemetry.jsonl")[-1]
    predicted, measured = last["memory/predicted_peak"], last["memory/measured_peak"]
    assert predicted == found["predicted"]["peak_bytes"]
    assert measured == rank["peak"]["process"] - rank["before"]["process"]
    assert last["memory/error"] == pytest.approx(predicted / measured - 1)
