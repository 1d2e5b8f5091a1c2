"""The throughput benchmark's own logic: both sides compute the same, and the record says whence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from job.model.architecture import TransformerConfig

TINY = TransformerConfig(
    dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=8, rope_theta=500.0
)


@pytest.fixture(scope="module")
def throughput(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("throughput")


@pytest.fixture
def data(throughput: ModuleType, tmp_path: Path) -> object:
    return throughput.write_examples(tmp_path, TINY.vocab_size, 0)


@pytest.mark.slow
def test_converted_weights_give_the_same_values(throughput: ModuleType, data: object) -> None:
    critic = throughput.make_critic(TINY, 0)
    rows = np.array([3, 0, 7])
    batch = throughput.make_packer(data, TINY).assemble(rows[:, None])
    padded = throughput.pad(data, rows)
    with torch.no_grad():
        ours = critic(batch.tokens, batch.layout, batch.positions)
        theirs = throughput.LlamaCritic(critic)(padded.tokens, padded.mask)[padded.responses]
    assert ours.std() > 1e-3  # constant values would agree for no reason
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_contestants_freeze_the_same_and_stay_together(
    throughput: ModuleType, data: object
) -> None:
    packed, padded = (
        throughput.CONTESTANTS[name](throughput.make_critic(TINY, 0), data, 0)
        for name in ("packed", "padded")
    )
    trained = [sum(p.numel() for p in c) for c in (packed.learner.trainable, padded.trainable)]
    assert trained[0] == trained[1]
    for step in range(2):
        assert packed.step(step) == pytest.approx(padded.step(step), rel=1e-4)


@pytest.mark.slow
def test_a_contestant_with_other_weights_is_refused(throughput: ModuleType, data: object) -> None:
    contestants = {"padded": throughput.PaddedSorted(throughput.make_critic(TINY, 0), data, 0)}
    first = throughput.take_turns(contestants, 0)
    same, other = (throughput.make_critic(TINY, seed) for seed in (0, 1))
    assert throughput.check_first_losses(first, contestants, same)["padded"] < 1e-4
    with pytest.raises(AssertionError, match="padded: loss"):
        throughput.check_first_losses(first, contestants, other)


def test_each_contestant_sees_every_sequence_once_an_epoch(
    throughput: ModuleType, data: object
) -> None:
    for order in (throughput.shuffled, throughput.sorted_by_length):
        rows = order(data, 0)
        seen = np.concatenate([rows(step) for step in range(throughput.BATCHES)])
        np.testing.assert_array_equal(np.sort(seen), np.arange(len(seen)))


def test_summary_is_medians_and_their_ratios(throughput: ModuleType) -> None:
    def taken(packed: float, padded: float, floor: float) -> object:
        seconds = {"packed": packed, "padded": padded, "floor": floor}
        computed = {"packed": 100, "padded": 160, "floor": 100}
        samples = {n: throughput.Sample(seconds[n], 100, computed[n], 0.5) for n in seconds}
        return throughput.Round(samples, 0.0)

    figures = throughput.summarise([taken(1, 4, 1), taken(2, 4, 1), taken(9, 4, 1)])
    assert figures["packed"]["tokens_per_second"] == 50
    assert figures["packed"]["share_of_floor"] == 0.5
    assert figures["padded"]["packed_is_faster_by"] == 2
    assert figures["padded"]["real_share"] == 0.625


@pytest.mark.parametrize(
    ("loads", "counted"),
    [
        ([0.0, 0.5, 0.01, 0.0], [0.0, 0.01]),  # two quiet rounds are enough
        ([0.4, 0.2, 0.5, 0.3, 0.6, 0.9, 0.7, 0.8], [0.2, 0.3]),  # none is: the quietest
    ],
)
def test_quiet_rounds_count(
    throughput: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    loads: list[float],
    counted: list[float],
) -> None:
    rounds = iter([throughput.Round({}, load) for load in loads])
    monkeypatch.setattr(throughput, "take_turns", lambda contestants, step: next(rounds))
    assert [r.other_load for r in throughput.measure({}, 2)] == counted


def test_record_says_where_it_is_from(
    throughput: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench/throughput.py", "--steps", "1"])
    file = tmp_path / "results" / "record.json"
    throughput.write_record(file, {"figure": 1.5}, seed=7, packages=["transformers"])
    record = json.loads(file.read_text())
    assert record["command"] == "python bench/throughput.py --steps 1"
    assert record["seed"] == 7
    assert record["figure"] == 1.5
    assert record["versions"].keys() == {"python", "torch", "transformers"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"].keys() == {"cpu", "cores", "memory_gb", "system", "torch_threads"}
    assert {"commit", "uncommitted_changes"} <= record.keys()


def test_table_lines_its_columns_up(bench: Callable[[str], ModuleType]) -> None:
    assert (
        bench("common").table(["", "n"], [["a", "10"], ["bb", "5"]])
        == "     n\n--  --\na   10\nbb   5"
    )
