"""The micro-batches and strategies that `auto` chooses fit GPUs of every size.

No allocation fails; with segments that grow none is even tried twice.
"""

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
AUTO = {"sharding_strategy": "auto"}
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
PLACED: list[tuple[int, dict[str, Any], str]] = [  # with what strategy `auto` is
    (24, {"n": 0, "compiled": True}, "REPLICATE_FROZEN"),
    (24, {"n": 6, "world": 4, "compiled": True}, "FULL_SHARD"),
    (40, {"n": 4, "compiled": True}, "REPLICATE_FROZEN"),
    (40, {"n": 8, "world": 4}, "REPLICATE_FROZEN"),
    (40, {"n": 16, "world": 4, "compiled": True}, "FULL_SHARD"),
    (80, {"n": 4, "world": 4, "compiled": True}, "REPLICATE_FROZEN"),
]
FIXED = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
OF_FIXED_SEGMENTS: list[tuple[int, dict[str, Any]]] = [(40, {"n": 4}), (80, {"n": 4, "world": 4})]


def _filled(cuda: FakeCuda, size: int, case: dict[str, Any], **more: Any) -> dict[str, Any]:
    gpu = Gpu(memory=SIZES[size], outside=outside_allocator(case.get("world", 1)))
    (found,) = cuda.ask("fill_gpu.py", [case], gpu, timeout=400, **more)
    assert found["tokens"] >= 2048
    assert found["allocated"] < found["reserved"] <= gpu.memory - gpu.outside
    return dict(found)


@pytest.mark.parametrize(("size", "case"), CASES)
def test_what_auto_chooses_fits(cuda: FakeCuda, size: int, case: dict[str, Any]) -> None:
    assert _filled(cuda, size, case)["retries"] == 0


@pytest.mark.parametrize(("size", "case", "strategy"), PLACED)
def test_frozen_weights_are_whole_where_they_fit(
    cuda: FakeCuda, size: int, case: dict[str, Any], strategy: str
) -> None:
    found = _filled(cuda, size, case | {"fsdp": AUTO})
    assert (found["strategy"], found["retries"]) == (strategy, 0)


@pytest.mark.parametrize(("size", "case"), OF_FIXED_SEGMENTS)
def test_what_auto_chooses_fits_where_segments_do_not_grow(
    cuda: FakeCuda, size: int, case: dict[str, Any]
) -> None:
    """There the allocator may have to give up what it keeps once, and ask anew."""
    assert _filled(cuda, size, case, env=FIXED)["retries"] <= 2
