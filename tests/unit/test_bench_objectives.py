"""The benchmark of objectives trains what it names, and sums up what it finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from job.common.config import load_config
from job.common.nested import differences, to_dict
from job.common.schema import CriticConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def objectives(bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GSM8K_DIR", "gsm8k")
    return bench("objectives")


@pytest.mark.parametrize("data", ["embedded", "gsm8k"])
@pytest.mark.parametrize("steps", [None, 30])
def test_each_run_differs_from_its_configuration_in_its_objective_alone(
    objectives: ModuleType, data: str, steps: int | None
) -> None:
    file = ROOT / objectives.CONFIGS[data]
    usual = to_dict(load_config(CriticConfig, file))
    places = {"run.name", "run.dir", "mlflow.enabled", "report.enabled", "training.seed"}
    length = set() if steps is None else {"training.max_steps", "training.warmup_steps"}
    seen = []
    for name in objectives.OBJECTIVES:
        config = load_config(CriticConfig, file, objectives.overrides(data, name, 1, steps))
        changed = {line.split(":")[0] for line in differences(usual, to_dict(config))}
        rest = changed - places - length
        assert {key.split(".")[0] for key in rest} <= {"objective", "training", "data"}, name
        assert (rest == set()) == (name == "token"), name
        seen.append(tuple(sorted(rest)) + tuple(map(str, objectives.OBJECTIVES[name])))
    assert len(set(seen)) == len(objectives.OBJECTIVES)


def test_the_head_first_has_a_tenth_of_the_steps(objectives: ModuleType) -> None:
    given = objectives.overrides("embedded", "head first", 0, 30)
    config = load_config(CriticConfig, objectives.CONFIGS["embedded"], given)
    stages = [(one.num_unfrozen_layers, one.steps) for one in config.training.stages]
    assert stages == [(0, 3), (2, 27)]


def test_runs_of_an_objective_are_summed_up_over_seeds(objectives: ModuleType) -> None:
    none = dict.fromkeys(objectives.FIGURES)
    cells = [
        {"data": "gsm8k", "objective": "bce", "seed": seed, "seconds": 9} | none | {"mse": mse}
        for seed, mse in ((0, 0.3), (1, 0.1))
    ]
    (row,) = objectives.summary(cells)
    assert row["seeds"] == 2
    assert row["mse"] == {"mean": pytest.approx(0.2), "range": [0.1, 0.3]}
    assert row["seconds"] == {"mean": 9, "range": [9, 9]}
    assert "r2" not in row


def test_gsm8k_is_left_out_aloud_where_it_is_not_known(
    objectives: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert objectives.is_there("gsm8k")
    monkeypatch.delenv("GSM8K_DIR")
    assert not objectives.is_there("gsm8k")
    assert "gsm8k: LEFT OUT" in capsys.readouterr().err
    assert objectives.is_there("embedded")
