"""The GPU benchmark asks for few packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
_BLOCKED = "rich mlflow matplotlib pyarrow tokenizers transformers sentencepiece"
_IMPORT = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_BLOCKED.split()}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {str(BENCH)!r})
import gpu
"""


@pytest.mark.slow
def test_the_benchmark_needs_none_of_the_large_packages() -> None:
    subprocess.run([sys.executable, "-c", _IMPORT], check=True, timeout=120)


@pytest.mark.slow
def test_a_micro_benchmark_runs_to_its_record_and_page(tmp_path: Path) -> None:
    out = tmp_path / "gpu-micro.json"
    given = ["--shape", "micro", "--tokens", "512", "--out", str(out), "--scratch", str(tmp_path)]
    subprocess.run([sys.executable, str(BENCH / "gpu.py"), *given], check=True)
    record = json.loads(out.read_text())
    assert (record["shape"], record["micro_batch_tokens"]) == ("micro", 512)
    names = ["N=0", "N=4", "N=8", "N=4, recomputed"]
    assert [one["case"] for one in record["cases"]] == names
    for one in record["cases"]:
        assert one["stages"].keys() == {"before", "loaded", "backward", "update", "peak"}
        assert one["tokens_per_second"] > 0
        assert len(one["seconds_per_step"]) == 6
    saved = [one for one in record["cases"] if "checkpoint_bytes" in one]
    assert [one["case"] for one in saved] == ["N=4"]
    # float32 masters and two moments of four blocks: 12 bytes a parameter
    trained = saved[0]["predicted"]["after_backward"]["masters"] / 4
    assert saved[0]["checkpoint_bytes"] == pytest.approx(12 * trained, rel=0.1)
    page = out.with_suffix(".md").read_text()
    assert all(f"| {name} |" in page for name in names)
