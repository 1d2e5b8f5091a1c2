"""The real labelled solutions go through the shipped configurations; skipped without the data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from job.common.config import load_config
from job.common.schema import CriticConfig
from job.run.directory import RunDirectory
from job.training.trainer import train

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("GSM8K_DIR", ROOT.parent / "shared" / "data" / "gsm8k")).resolve()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no labelled GSM8K solutions in {DATA}"),
]


def test_the_gsm8k_configurations_train_on_the_real_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GSM8K_DIR", str(DATA))
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((ROOT / "configs/pretrain/gsm8k.yaml").read_text())
    recipe["architecture"] |= {"dim": 32, "n_layers": 3, "n_heads": 2}
    recipe["training"] |= {"max_steps": 2, "batch_size": 8, "warmup_steps": 1}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    overrides = [
        "model.recipe=recipe.yaml",
        "training.max_steps=4",
        "training.num_unfrozen_layers=1",
        "evaluation.every_steps=4",
        "mlflow.enabled=false",
    ]
    caplog.set_level("INFO", "job")
    train(load_config(CriticConfig, ROOT / "configs/critic/critic_gsm8k.yaml", overrides))
    assert "3600 training and 600 validation sequences, mean reward 0.378 and 0.350" in caplog.text
    assert "are in both training and validation data" not in caplog.text
    last = RunDirectory("runs/gsm8k/n1").records()[-1]
    assert last["validation/value/sequences"] == 600
    assert last["validation/value/length_auc"] == pytest.approx(0.605, abs=0.01)
