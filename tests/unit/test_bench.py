"""The throughput benchmark's own logic: all sides compute the same, and the record says whence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def throughput(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("throughput")


@pytest.fixture(scope="module")
def contestants(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("contestants")


@pytest.fixture
def data(throughput: ModuleType, tmp_path: Path) -> Any:
    return throughput.write_examples(
        tmp_path, throughput.SHAPES["micro"].vocab_size, 0, solutions=4
    )


def _case(throughput: ModuleType, n: int = 2, sequences: int = 8) -> Any:
    return throughput.Case("micro", "cpu", n, 4, sequences, 0)


def test_solutions_of_a_problem_share_their_prompt_and_differ_after_it(data: Any) -> None:
    assert len(np.unique(data.problems)) == len(data) // 4
    for first in range(0, 40, 4):
        start = data.response_starts[first]
        texts = [
            data.tokens[data.offsets[row] : data.offsets[row + 1]]
            for row in range(first, first + 4)
        ]
        assert all(np.array_equal(text[:start], texts[0][:start]) for text in texts)
        assert len({text[start:].tobytes() for text in texts}) == 4
    assert data.tokens.min() == 1  # 0 stands for padding
    assert data.rewards[:4].tolist() == [1, 0, 1, 0]  # pairs


def test_pairwise_loss_by_hand(throughput: ModuleType, data: Any) -> None:
    critic = throughput.make_critic(throughput.SHAPES["micro"], 0)
    rows = [0, 1, 6, 7]
    with torch.no_grad():
        outputs, batch = throughput._outputs(critic, data, rows)
    parts = np.split(outputs.numpy(), np.cumsum(batch.lengths.numpy())[:-1])
    for by_means, scores in ((True, [p.mean() for p in parts]), (False, [p[-1] for p in parts])):
        better, worse = np.array(scores[0::2]), np.array(scores[1::2])
        expected = np.log1p(np.exp(worse - better)).mean()
        found = throughput.expected_pair_loss(critic, data, rows, by_means=by_means)
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_the_product_takes_turns_in_a_process_of_its_own(
    throughput: ModuleType, tmp_path: Path
) -> None:
    shares = {throughput.PAIRS: 1.1, "packed, group_by_problem": 1.3}  # two, four compute it once
    found = throughput.compare(_case(throughput, sequences=16), list(shares), 1, tmp_path)
    assert len(found["rounds"]) == 1
    for name, share in shares.items():
        figures = found["contestants"][name]
        assert figures["first_loss_error"] < 1e-4
        assert figures["real_share"] > share
        assert name in throughput.show(found)


def test_the_product_before_is_that_of_its_checkout(
    contestants: ModuleType, throughput: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = tmp_path / "bench/peers"
    peers.mkdir(parents=True)
    (tmp_path / "job.py").touch()  # whose code it imports
    says = 'import job, json; input(); print(json.dumps({"trainable": job.__file__}), flush=True)'
    (peers / "product.py").write_text(says)
    monkeypatch.setattr(contestants, "KINDS", dict(contestants.KINDS))
    contestants.add_before(tmp_path)
    settings = throughput.settings(_case(throughput), tmp_path, "before")
    with contestants.Contestant(contestants.KINDS[contestants.BEFORE], settings) as before:
        assert before.ready == {"trainable": str(tmp_path / "job.py")}


@pytest.mark.all
@pytest.mark.timeout(1800)
def test_peers_begin_with_the_same_loss_and_train_the_same(
    throughput: ModuleType, tmp_path: Path
) -> None:
    for n in (0, 2):
        (tmp_path / str(n)).mkdir()
        found = throughput.compare(
            _case(throughput, n), list(throughput.KINDS), 1, tmp_path / str(n)
        )
        errors = {k: v["first_loss_error"] for k, v in found["contestants"].items()}
        assert all(error < 1e-4 for name, error in errors.items() if name != throughput.FLOOR)


def test_a_contestant_with_other_weights_is_refused(throughput: ModuleType, data: Any) -> None:
    same, other = (throughput.make_critic(throughput.SHAPES["micro"], seed) for seed in (0, 1))
    loss = throughput.expected_loss(same, data, [3, 0])
    first = throughput.Round({"Trainer": _step(1.0, [3, 0], 1, loss)}, 0.0)
    assert throughput.check_first_losses(first, same, data, 1e-4)["Trainer"] == 0
    with pytest.raises(AssertionError, match="Trainer: loss"):
        throughput.check_first_losses(first, other, data, 1e-4)


def test_what_is_trained_must_be_the_product_s_but_for_what_is_named(
    throughput: ModuleType,
) -> None:
    case, adamw = _case(throughput), [[1e-4, 0.9, 0.95, 1e-8, 0.01], [1e-4, 0.9, 0.95, 1e-8, 0.0]]
    trained = throughput._trained(case)

    def check(name: str, count: int, groups: list[list[float]] = adamw) -> None:
        throughput.check_what_is_trained({name: {"trainable": count, "adamw": groups}}, case)

    check("Trainer", trained)
    check("TRL", trained - 1)
    check("LLaMA-Factory", trained - case.architecture.dim)
    with pytest.raises(AssertionError, match="LLaMA-Factory trains"):
        check("LLaMA-Factory", trained)  # as with the norms of all layers, or another one
    with pytest.raises(AssertionError, match="AdamW"):
        check("Trainer", trained, [[1e-4, 0.9, 0.999, 1e-8, 0.01]])


def _step(seconds: float, rows: list[int], computed: int, loss: float | None = 0.5) -> Any:
    return sys.modules["contestants"].Step(seconds, rows, computed, loss, 300.0)


def test_summary_is_medians_quartiles_and_ratios(throughput: ModuleType) -> None:
    lengths = np.array([60, 40])

    def taken(packed: float, trainer: float, floor: float) -> Any:
        seconds = {"packed": packed, "Trainer": trainer, "floor": floor}
        computed = {"packed": 100, "Trainer": 160, "floor": 100}
        steps = {name: _step(seconds[name], [0, 1], computed[name]) for name in seconds}
        return throughput.Round(steps, 0.0)

    figures = throughput.summarise([taken(1, 4, 1), taken(2, 4, 1), taken(4, 4, 1)], lengths)
    assert figures["packed"]["tokens_per_second"] == 50
    assert figures["packed"]["quartiles"] == [37.5, 75]
    assert figures["packed"]["tokens_per_second_over_all"] == pytest.approx(300 / 7)
    assert figures["packed"]["share_of_floor"] == 0.5
    assert figures["Trainer"]["packed_is_faster_by"] == 2
    assert figures["Trainer"]["real_share"] == 0.625


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
    monkeypatch.setattr(throughput, "take_turns", lambda contestants, first: next(rounds))
    assert [r.other_load for r in throughput.measure({}, 2)] == counted


def test_each_contestant_is_once_the_first_of_a_round(
    throughput: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class One:
        pid = os.getpid()

        def __init__(self, name: str) -> None:
            self._name = name

        def step(self) -> SimpleNamespace:
            order.append(self._name)
            return SimpleNamespace(seconds=0.0)

    monkeypatch.setattr(throughput, "say", lambda text: None)
    contestants = {name: One(name) for name in "abc"}
    rounds = [throughput.take_turns(contestants, first=i) for i in range(4)]
    assert "".join(order) == "abcbcacababc"
    assert all([*one.steps] == ["a", "b", "c"] for one in rounds)


def test_what_a_contestant_uses_is_no_other_s_load(bench: Callable[[str], ModuleType]) -> None:
    ticks = bench("common")._ticks
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while (used := ticks(busy.pid)) < 5:
            pass
        assert used <= ticks(busy.pid)
    finally:
        busy.kill()
        busy.wait()
    assert ticks(os.getpid()) > 0


def test_a_contestant_that_ends_says_why(
    throughput: ModuleType, contestants: ModuleType, tmp_path: Path
) -> None:
    settings = throughput.settings(_case(throughput), tmp_path, "broken")
    kind = contestants.Kind("no_such_module")
    with (
        contestants.Contestant(kind, settings) as broken,
        pytest.raises(RuntimeError, match="No module named"),
    ):
        broken.step()


def test_each_peer_s_requirements_are_exact(contestants: ModuleType) -> None:
    wanted = {kind.environment for kind in contestants.KINDS.values()} - {None}
    assert wanted == {"transformers", "trl", "llamafactory"}
    for name in wanted:
        files = contestants._requirements(name)
        lines = [line for file in files for line in file.read_text().splitlines()]
        assert f"{name}==" in " ".join(lines)
        assert "torch==2.13.0" in lines
        assert all("==" in line for line in lines if not line.startswith("#"))


def test_an_environment_is_made_once_and_anew_for_other_requirements(
    contestants: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, made = tmp_path / "bench", []
    (bench / "peers").mkdir(parents=True)
    wanted = bench / "peers/some.txt"
    monkeypatch.setattr(contestants, "BENCH", bench)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pythons = []
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda command, **_: made.append(command))
        for text in ("a==1", "a==1", "a==2"):
            wanted.write_text(text)
            pythons.append(contestants.environment("some"))
    assert pythons[0] == pythons[1] != pythons[2]
    assert len(made) == 2
    assert all(python.exists() for python in pythons)
    done = subprocess.check_output([pythons[0], "-c", "import sys; print(sys.prefix)"], text=True)
    assert Path(done.strip()) == pythons[0].parents[1]


def test_record_says_where_it_is_from(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench/throughput.py", "--steps", "1"])
    file = tmp_path / "results" / "record.json"
    bench("common").write_record(file, {"figure": 1.5}, seed=7, packages=["transformers"])
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
