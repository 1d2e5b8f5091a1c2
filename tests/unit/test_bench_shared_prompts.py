"""The benchmark of shared prompts: both sides learn the same from the same sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from job.model.architecture import TransformerConfig


@pytest.mark.slow
def test_both_sides_take_the_same_steps_and_one_computes_fewer_tokens(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = bench("shared_prompts")
    tiny = TransformerConfig(dim=32, n_layers=3, n_heads=4, vocab_size=64, multiple_of=8)
    monkeypatch.setattr(script, "ARCHITECTURE", tiny)
    monkeypatch.setattr(script, "PROBLEMS", 8)
    assert [script.sequences(k) for k in (1, 4, 16)] == [16, 16, 64]
    data = script.write_solutions(tmp_path / "set", 4, 0)
    found = script.measure(data, 2, 4, 1, 0)
    assert 1.1 < found["fewer_tokens"] < 1.6  # by which rounds were quiet
    for one in found["rounds"]:
        assert one["plain"]["loss"] == pytest.approx(one["shared"]["loss"], rel=1e-4)
        assert one["plain"]["tokens"] == one["plain"]["computed"] == one["shared"]["tokens"]
    assert "4, 2" in script.show([found])
