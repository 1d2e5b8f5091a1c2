"""What a step asks of a GPU: where it waits for it, and how many kernels a block takes.

golden.json has both for the newest torch; whoever changes them on purpose writes it anew:

    FAKE_CUDA_GOLDEN=write python -m pytest tests/fake_cuda/test_launches.py
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fake_cuda.runtime import FakeCuda, Gpu

pytestmark = pytest.mark.all

GOLDEN = Path(__file__).with_name("golden.json")
MICRO_BATCHES = 2
WHOLE = {"sharding_strategy": "REPLICATE_FROZEN"}


def _case(layers: int, n: int, **changes: Any) -> dict[str, Any]:
    small = {"trunk": "small", "tokens": 2048, "micro_batches": MICRO_BATCHES, "fsdp": WHOLE}
    return small | {"layers": layers, "n": n} | changes


# One with a block more of each kind tells what a block takes.
PLAIN = [_case(6, 2), _case(7, 2), _case(7, 3)]
SHARDED = [_case(6, 2, world=2, fsdp={"sharding_strategy": "FULL_SHARD"})]
SHARING = [case | {"solutions": 4} for case in PLAIN]
GATHERED = [case | {"fsdp": {"sharding_strategy": "FULL_SHARD"}} for case in PLAIN]
GROUPED = [case | {"trunk": "small grouped"} for case in PLAIN]
REPEATED = [case | {"repeats_keys": True} for case in GROUPED]
COMPILED = [case | {"compiled": True} for case in PLAIN]


@pytest.fixture(scope="module")
def steps(cuda: FakeCuda) -> list[dict[str, Any]]:
    found = cuda.ask("trace_step.py", [*PLAIN, *SHARDED, *SHARING], Gpu(), timeout=600)
    assert isinstance(found, list)
    return found


@pytest.fixture(scope="module")
def variants(cuda: FakeCuda) -> list[dict[str, Any]]:
    found = cuda.ask("trace_step.py", [*GATHERED, *GROUPED, *REPEATED], Gpu(), timeout=600)
    assert isinstance(found, list)
    return found


@pytest.fixture(scope="module")
def compiled(cuda: FakeCuda) -> list[dict[str, Any]]:
    found = cuda.ask("trace_step.py", COMPILED, Gpu(), timeout=800)
    assert isinstance(found, list)
    return found


def _check(name: str, found: Any) -> None:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("FAKE_CUDA_GOLDEN") == "write":
        golden[name] = found
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    assert found == golden[name]


def _waits(step: dict[str, Any]) -> dict[str, int]:
    return dict(Counter(f"{phase or 'after the update'}: {at}" for phase, at in step["waits"]))


def _per_block(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Launches of a micro-batch for each block; a trained one's with its share of the update."""
    plain, one_more_frozen, one_more_trained = (step["launches"] for step in steps[:3])
    frozen = (one_more_frozen - plain) / MICRO_BATCHES
    return {
        "frozen": frozen,
        "trained": frozen + (one_more_trained - one_more_frozen) / MICRO_BATCHES,
    }


@pytest.mark.parametrize("index", range(len(PLAIN) + len(SHARDED) + len(SHARING)))
def test_nothing_waits_for_the_gpu_between_micro_batches(
    steps: list[dict[str, Any]], index: int
) -> None:
    waits = [place for phase, place in steps[index]["waits"] if phase in ("forward", "backward")]
    assert waits == []


def test_where_a_step_waits_for_the_gpu(steps: list[dict[str, Any]]) -> None:
    _check("waits of a step", _waits(steps[0]))


def test_sharding_adds_no_waits(steps: list[dict[str, Any]]) -> None:
    assert _waits(steps[len(PLAIN)]) == _waits(steps[0])


def test_shared_prompts_add_no_waits(steps: list[dict[str, Any]]) -> None:
    assert _waits(steps[-1]) == _waits(steps[0])


def test_launches_of_a_block(steps: list[dict[str, Any]]) -> None:
    _check("launches of a block", _per_block(steps))


def test_launches_of_a_block_with_shared_prompts(steps: list[dict[str, Any]]) -> None:
    _check("launches of a block with shared prompts", _per_block(steps[-len(SHARING) :]))


def test_launches_of_a_block_whose_weights_are_gathered_on_one_gpu(
    steps: list[dict[str, Any]], variants: list[dict[str, Any]]
) -> None:
    found = _per_block(variants[:3])
    _check("launches of a block, gathered", found)
    assert found["frozen"] > _per_block(steps)["frozen"]  # copies


def test_launches_of_a_block_with_grouped_heads(variants: list[dict[str, Any]]) -> None:
    grouped, repeated = _per_block(variants[3:6]), _per_block(variants[6:])
    _check("launches of a block with grouped heads", {"grouped": grouped, "repeated": repeated})
    assert all(grouped[kind] < repeated[kind] for kind in grouped)


def test_launches_of_a_compiled_block(
    steps: list[dict[str, Any]], compiled: list[dict[str, Any]]
) -> None:
    found = _per_block(compiled)
    _check("launches of a compiled block", found)
    plain = _per_block(steps)
    assert all(found[kind] < plain[kind] for kind in found)


def test_the_last_block_takes_no_shape_of_its_own(compiled: list[dict[str, Any]]) -> None:
    """Compiled code serves all blocks: one more adds kernels, but none of a new name."""
    assert compiled[1]["kernels"].keys() == compiled[0]["kernels"].keys()
