"""The GPU benchmark from its first section to its last, under torch's CUDA wheel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fake_cuda.runtime import FakeCuda

pytestmark = pytest.mark.all

GPU = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.mark.parametrize("version", ["2.13.0", "2.11.0"])
def test_every_section_runs(tmp_path: Path, version: str) -> None:
    out = tmp_path / "gpu.json"
    options = ["--shape", "micro", "--budget", "6000", "--out", str(out)]
    done = FakeCuda.of(version).run([str(GPU), *options], timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["versions"]["torch"].startswith(version)
    found = {name: one["found"] for name, one in record["sections"].items()}
    assert found["machine"]["gpu"] == "Fake A100"
    assert found["main job"]["status"] == "finished"
    training = found["training, N=4"]
    assert training["recorder"]["backend"] == "allocator"
    assert training["saving"]["bytes"] > 0
