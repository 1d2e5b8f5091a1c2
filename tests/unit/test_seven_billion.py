"""The shipped configurations at true 7B shape: a whole step on tensors without content."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.common.config import load_config
from job.common.schema import CriticConfig
from job.memory.footprint import footprint
from job.memory.settings import SHAPES, setting_of
from job.training.simulation import simulate

CONFIGS = Path(__file__).parents[2] / "configs" / "critic"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gpus", "peak"), [("1gpu", 1, 30.65), ("4gpu", 4, 12.65)])
def test_a_shipped_configuration_takes_a_step_of_a_7b_trunk_as_predicted(
    name: str, gpus: int, peak: float
) -> None:
    missing = [f"{key}=unused" for key in ("model.path", "data.train", "data.validation")]
    given = [*missing, "training.compile=false"]  # of compiled kernels there is no simulation
    config = load_config(CriticConfig, CONFIGS / f"critic_{name}.yaml", given)
    setting = setting_of(config, SHAPES["7b"], world_size=gpus, per_node=gpus)
    stepped = simulate(setting)
    assert stepped.peak.total == pytest.approx(footprint(setting).peak.total, rel=0.02)
    assert stepped.peak.total / 1e9 == pytest.approx(peak, abs=0.05)
    assert stepped.after_backward.components["gradients"] * gpus == pytest.approx(
        809_537_536 * 4, rel=1e-3
    )
