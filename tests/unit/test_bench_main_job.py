"""The benchmark of the main job runs the main job, and sums up what it finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from job.common.config import load_config
from job.common.nested import differences, to_dict
from job.common.schema import CriticConfig, PretrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def main_job(bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(ROOT)
    return bench("main_job")


def overrides(command: list[str]) -> list[str]:
    return command[command.index("--override") + 1 :]


def test_with_seed_0_only_places_differ_from_make_run(main_job: ModuleType) -> None:
    trunk, critic = map(overrides, main_job.commands(Path("cell"), 0))
    kinds = ((PretrainConfig, main_job.TRUNK, trunk), (CriticConfig, main_job.CRITIC, critic))
    changed = set()
    for kind, file, settings in kinds:
        usual, here = (to_dict(load_config(kind, file, s)) for s in ([], settings))
        changed |= {line.split(":")[0] for line in differences(usual, here)}
    assert changed == {"out", "model.path", "model.recipe", "run.dir", "mlflow.enabled"}


def test_a_seed_is_that_of_data_trunk_and_critic(main_job: ModuleType) -> None:
    trunk, critic = map(overrides, main_job.commands(Path("cell"), 4))
    made = load_config(PretrainConfig, main_job.TRUNK, trunk)
    trained = load_config(CriticConfig, main_job.CRITIC, critic)
    assert (made.training.seed, trained.training.seed) == (5, 4)
    assert (made.data.arithmetic.seed, trained.data.arithmetic.seed) == (4, 4)


def test_libraries_are_told_of_the_instructions(main_job: ModuleType) -> None:
    assert main_job.environment("sse4", 1) == {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "OMP_NUM_THREADS": "1",
    }


def test_the_summary_names_the_worst(main_job: ModuleType) -> None:
    figures = ((0.91, 0.13, 9.0), (0.97, 0.12, 5.0), (0.95, 0.125, 7.0))
    cells = [{"share": a, "mse": b, "seconds": c} for a, b, c in figures]
    found = main_job.summary(cells)
    assert found["share"] == {"worst": 0.91, "median": 0.95, "best": 0.97}
    assert (found["cells"], found["of"]) == (3, 16)
    assert (found["mse"]["worst"], found["seconds"]["median"]) == (0.13, 7.0)


def test_kept_cells_are_those_on_disk(
    main_job: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_job, "FOLDER", tmp_path)
    assert main_job.kept() == []
    (tmp_path / "avx2-2-0").mkdir()
    (tmp_path / "sse4-2-0").mkdir()  # begun, not finished
    (tmp_path / "avx2-2-0/cell.json").write_text('{"share": 0.95}')
    assert main_job.kept() == [{"share": 0.95}]
