"""The micro-batches that `auto` chooses fit GPUs of every size: no allocation fails."""

from __future__ import annotations

from typing import Any

import pytest

from fake_cuda.runtime import FakeCuda, Gpu
from job.memory.fit import outside_allocator

pytestmark = pytest.mark.all

SIZES = {  # bytes as CUDA says them
    24: 25_757_220_864,
    40: 42_406_903_808,
    80: 85_028_700_160,
}
WHOLE = {"sharding_strategy": "REPLICATE_FROZEN"}
CASES: list[tuple[int, dict[str, Any]]] = [
    (24, {"n": 0}),
    (24, {"n": 1, "fsdp": WHOLE}),
    (24, {"n": 4, "world": 4}),
    (40, {"n": 4, "fsdp": WHOLE}),
    (40, {"n": 8, "world": 4}),
    (80, {"n": 4}),
    (80, {"n": 8, "fsdp": {"activation_checkpointing": True}}),
    (80, {"n": 4, "world": 4, "trunk": "8b grouped"}),
]


@pytest.mark.parametrize(("size", "case"), CASES)
def test_what_auto_chooses_fits(cuda: FakeCuda, size: int, case: dict[str, Any]) -> None:
    gpu = Gpu(memory=SIZES[size], outside=outside_allocator(case.get("world", 1)))
    (found,) = cuda.ask("fill_gpu.py", [case], gpu, timeout=400)
    assert found["tokens"] >= 2048
    assert found["retries"] == 0
    assert found["allocated"] < found["reserved"] <= gpu.memory - gpu.outside
