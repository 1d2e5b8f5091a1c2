"""Gradients, weights, stored tensors and collectives of sharded critics, against one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gradients_worker
import numpy as np
import pytest
import torch
from gradients_worker import Case, Result
from launch import run_ranks

from job.data.arithmetic import ALPHABET
from job.data.tokenizer import write_character_tokenizer
from job.model.architecture import TransformerConfig
from job.model.transformer import Transformer
from job.model.weights import save_transformer

pytestmark = pytest.mark.slow

TOLERANCE = 1e-6  # float32 sums in another order; up to 4e-7 is seen, in single parameters
DEPTHS = (0, 2, 4, 5)  # of 4 blocks: the head, half of them, all, embeddings too
STRATEGIES = {
    1: ("FULL_SHARD",),
    2: ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "REPLICATE_FROZEN"),
    4: ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD", "REPLICATE_FROZEN"),
}

# micro-batches of 64 tokens: several of them on each rank
ACCUMULATED = {
    world: [Case("gradients", n, s, budget=64) for s in names for n in DEPTHS]
    for world, names in STRATEGIES.items()
}
ACCUMULATED[2].append(Case("gradients", 2, budget=64, bins=21))
AT_ONCE = {w: [Case("gradients", 2, s) for s in STRATEGIES[w]] for w in (2, 4)}
SHARED = [Case("gradients", 2, budget=64, share=True)]
WITH_EMPTY_RANK = {
    2: [Case("gradients", n, s, sequences=1) for s in STRATEGIES[2] for n in DEPTHS],
    4: [Case("gradients", n, s, sequences=3) for s in STRATEGIES[4] for n in (0, 5)],
}
RECOMPUTED = [Case("gradients", n, budget=64, recompute=True) for n in DEPTHS]
MIXED = [Case("gradients", n, budget=64, mixed=True) for n in DEPTHS]
STEPS = {
    2: [
        Case("steps", n, s, budget=128, steps=30)
        for s in ("FULL_SHARD", "NO_SHARD")
        for n in (0, 2)
    ]
    + [Case("steps", 2, budget=128, steps=30, stages="0:10 2:12 1:8")],
    4: [Case("steps", 2, "HYBRID_SHARD", budget=128, steps=30)],
}
SAVED = {
    (layers, n): Case("saved", n, layers=layers)
    for layers, n in [(4, 0), (16, 0), (4, 2), (16, 2), (16, 3)]
}
RECOMPUTED_SAVED = Case("saved", 2, recompute=True)
SHARDS = {w: [Case("shards", 2, s) for s in STRATEGIES[w]] for w in (2, 4)}
MIXED_SHARDS = [Case("shards", 2, s, mixed=True) for s in STRATEGIES[2]]
EVALUATED = {
    w: [Case("evaluated", 2, s, budget=128, mixed=True) for s in STRATEGIES[w]] for w in (1, 2)
}

# Of 5 blocks, per micro-batch: all-gathers in forward, in backward, and reduce-scatters. The
# groups are the blocks, the embedding, the head and the rest, which is the final norm.
#
# Forward gathers each group that has parameters in FSDP: 5 + 1 + 1 + 1; where the frozen part is
# replicated, only the trainable groups, which are N blocks, head and norm (at N=0 the head alone).
# Backward gathers the trainable blocks but the last, which stays gathered, as do head and norm;
# SHARD_GRAD_OP gathers none again; full training gathers 4 blocks and the embedding.
# Reduce-scatters: one for each trainable group.
GATHERS = {
    Case("collectives", 0, layers=5): (8, 0, 1),
    Case("collectives", 2, layers=5): (8, 1, 4),
    Case("collectives", 3, layers=5): (8, 2, 5),
    Case("collectives", 6, layers=5): (8, 5, 8),
    Case("collectives", 2, layers=5, recompute=True): (8, 1, 4),
    Case("collectives", 0, "SHARD_GRAD_OP", layers=5): (8, 0, 1),
    Case("collectives", 2, "SHARD_GRAD_OP", layers=5): (8, 0, 4),
    Case("collectives", 0, "REPLICATE_FROZEN", layers=5): (1, 0, 1),
    Case("collectives", 2, "REPLICATE_FROZEN", layers=5): (4, 1, 4),
    Case("collectives", 0, "NO_SHARD", layers=5): (0, 0, 0),
    Case("collectives", 2, "NO_SHARD", layers=5): (0, 0, 0),
}
FROZEN_GATHERED = Case("collectives", 2, layers=5, gather_frozen=True)


def _in_steps(case: Case) -> list[Case]:
    """The first step, and several micro-batches in the second: nothing may stay gathered."""
    return [case, replace(case, budget=64, steps=2)]


COLLECTIVES = {step: figures for case, figures in GATHERS.items() for step in _in_steps(case)}
# What tests without a parameter look at, on two ranks.
ALWAYS = [
    *SAVED.values(),
    RECOMPUTED_SAVED,
    FROZEN_GATHERED,
    replace(FROZEN_GATHERED, gather_frozen=False),
    SHARDS[2][0],
]
Measure = Callable[[int, Case], Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trunks of 4, 5 and 16 blocks, and rows of uneven lengths."""
    path = tmp_path_factory.mktemp("gradients")
    torch.manual_seed(0)
    for layers in (4, 5, 16):
        # sizes that neither 2 nor 4 ranks can share out evenly
        config = TransformerConfig(
            dim=32, n_layers=layers, n_heads=4, n_kv_heads=2, ffn_hidden=85, vocab_size=61
        )
        save_transformer(Transformer(config), path / f"trunk-{layers}")
        write_character_tokenizer(path / f"trunk-{layers}", ALPHABET)
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": "1+" * int(rng.integers(1, 10)),
            "response": "".join(rng.choice(list("0123456789"), rng.integers(1, 40))),
            "reward": float(rng.random()),
        }
        for _ in range(60)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def measure(folder: Path, request: pytest.FixtureRequest) -> Measure:
    """Results of cases; all that run on the same number of ranks come from one start of them."""
    asked = _asked(request.session.items)
    known: dict[int, dict[Case, Result]] = {}

    def look_up(world: int, case: Case) -> Result:
        if world not in known:
            known[world] = {}  # ranks that fail are not started again
            known[world] |= zip(asked[world], _run(folder, world, asked[world]), strict=True)
        if not known[world]:
            pytest.skip(f"{world} rank(s) failed in the first test that needed them")
        return known[world][case]

    return look_up


def _asked(items: Iterable[pytest.Item]) -> dict[int, list[Case]]:
    """The cases of this session's tests, by the number of ranks."""
    asked: dict[int, dict[Case, None]] = {1: {}, 2: dict.fromkeys(ALWAYS), 4: {}}
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if item.path == Path(__file__) and "case" in given:
            asked[given.get("world", 2)][given["case"]] = None
    return {world: list(cases) for world, cases in asked.items()}


def _run(folder: Path, world: int, listed: Sequence[Case]) -> list[Result]:
    cases, results = folder / f"cases-{world}.json", folder / f"results-{world}.json"
    cases.write_text(json.dumps([asdict(case) for case in listed]))
    command = [gradients_worker.__file__, cases.name, results.name]
    run_ranks(command, world, folder, per_node=2 if world == 4 else None)
    return list(json.loads(results.read_text()))


def _on_ranks(cases: dict[int, list[Case]]) -> Any:
    """Parametrizes with (world, case), a grid."""
    pairs: Iterable[tuple[int, Case]] = [
        (w, case) for w, listed in cases.items() for case in listed
    ]
    parametrize = pytest.mark.parametrize(
        ("world", "case"), [pytest.param(w, case, id=f"{w}-{case}") for w, case in pairs]
    )
    return lambda test: pytest.mark.grid(parametrize(test))


def _grid(cases: Iterable[Case]) -> Any:
    """Parametrizes with cases on two ranks."""
    parametrize = pytest.mark.parametrize("case", cases, ids=str)
    return lambda test: pytest.mark.grid(parametrize(test))


def _assert_gradients(result: Result, tolerance: float) -> None:
    """All gradients together, each by itself, and their norm on every rank."""
    assert result["overall"] < tolerance
    far = {name: error for name, error in result["by_parameter"].items() if not error < tolerance}
    assert not far
    assert len(set(result["norms"])) == 1
    assert result["norms"][0] == pytest.approx(result["reference_norm"], rel=tolerance)


@_on_ranks(ACCUMULATED)
def test_accumulated_gradients_equal_those_of_one_process(
    measure: Measure, world: int, case: Case
) -> None:
    result = measure(world, case)
    _assert_gradients(result, TOLERANCE)
    assert min(result["micro_batches"]) > 1
    assert len(set(result["micro_batches"])) == 1
    assert world == 1 or len(set(result["tokens"])) > 1


@_on_ranks({2: SHARED})
def test_gradients_with_shared_prompts_equal_those_of_separate_sequences(
    measure: Measure, world: int, case: Case
) -> None:
    result = measure(world, case)
    _assert_gradients(result, TOLERANCE)
    assert sum(result["tokens"]) < sum(result["of_sequences"])


@_on_ranks(AT_ONCE)
def test_gradients_of_one_micro_batch_equal_those_of_one_process(
    measure: Measure, world: int, case: Case
) -> None:
    result = measure(world, case)
    _assert_gradients(result, TOLERANCE)
    assert result["micro_batches"] == [1] * world
    assert len(set(result["tokens"])) > 1


@_on_ranks(WITH_EMPTY_RANK)
def test_a_rank_without_sequences_changes_no_gradient(
    measure: Measure, world: int, case: Case
) -> None:
    result = measure(world, case)
    _assert_gradients(result, TOLERANCE)
    assert min(result["sequences"]) == 0


@_grid(RECOMPUTED)
def test_recomputed_blocks_get_the_same_gradients(measure: Measure, case: Case) -> None:
    _assert_gradients(measure(2, case), TOLERANCE)


def test_recomputing_stores_less(measure: Measure) -> None:
    stored = zip(
        measure(2, RECOMPUTED_SAVED)["bytes"], measure(2, SAVED[4, 2])["bytes"], strict=True
    )
    assert all(recomputed < kept / 4 for recomputed, kept in stored)


@_on_ranks({1: MIXED, 2: MIXED})
def test_mixed_precision_gradients_are_float32_and_close(
    measure: Measure, world: int, case: Case
) -> None:
    result = measure(world, case)
    _assert_gradients(result, 3e-2)
    assert result["gradient_dtypes"] == ["torch.float32"]
    assert result["overall"] > TOLERANCE  # it did compute in bfloat16


@_grid(MIXED_SHARDS)
def test_mixed_precision_keeps_frozen_weights_in_bfloat16_and_masters_in_float32(
    measure: Measure, case: Case
) -> None:
    parameters = measure(2, case)
    frozen = {p["dtype"] for p in parameters.values() if p["frozen"]}
    trainable = {p["dtype"] for p in parameters.values() if not p["frozen"]}
    assert frozen == {"torch.bfloat16"}
    assert trainable == {"torch.float32"}
    assert parameters["value_head.weight"]["dtype"] == "torch.float32"
    assert all(p["loaded"] for p in parameters.values())


@_on_ranks(STEPS)
def test_every_rank_holds_the_same_weights_after_30_clipped_steps(
    measure: Measure, world: int, case: Case
) -> None:
    result = measure(world, case)
    first, *others = result["ranks"]
    assert {"value_head.weight", "value_head.bias"} <= first["whole"].keys()
    assert case.n == 0 or "trunk.norm.weight" in first["whole"]
    assert result["clipped"]
    for other in others:
        for key in ("norms", "losses", "whole", "outputs"):
            assert other[key] == first[key], key
    # ranks that hold the same slice hold the same bytes
    held: dict[tuple[str, str], set[str]] = {}
    for rank in result["ranks"]:
        for name, (piece, digest) in rank["replicas"].items():
            held.setdefault((name, str(piece)), set()).add(digest)
    assert all(len(digests) == 1 for digests in held.values())
    slices = {"FULL_SHARD": world, "HYBRID_SHARD": 2, "NO_SHARD": 1}[case.strategy]
    assert len(held) == slices * len(first["whole"])


@_on_ranks(STEPS)
def test_30_steps_lead_where_one_process_goes(measure: Measure, world: int, case: Case) -> None:
    assert measure(world, case)["drift"] < 1e-5  # AdamW divides by small second moments


@pytest.mark.parametrize("n", [0, 2])
def test_frozen_blocks_store_nothing_and_add_nothing_to_backward(measure: Measure, n: int) -> None:
    shallow, deep = measure(2, SAVED[4, n]), measure(2, SAVED[16, n])
    assert deep["bytes"] == shallow["bytes"]
    assert deep["nodes"] == shallow["nodes"]


def test_one_more_trainable_block_stores_more(measure: Measure) -> None:
    two, three = measure(2, SAVED[16, 2]), measure(2, SAVED[16, 3])
    assert min(three["bytes"]) > 1.2 * max(two["bytes"])
    assert min(three["nodes"]) > 1.2 * max(two["nodes"])


@_grid(COLLECTIVES)
def test_collectives_of_a_step_are_the_fewest(measure: Measure, case: Case) -> None:
    result = measure(2, case)
    times = result["micro_batches"]
    forward, backward, scatters = COLLECTIVES[case]
    assert times > 1 or case.budget > 64
    for rank in result["ranks"]:
        assert rank["forward"].get("all_gather", 0) == forward * times
        assert rank["backward"].get("all_gather", 0) == backward * times
        assert rank["forward"].get("reduce_scatter", 0) == 0
        assert rank["backward"].get("reduce_scatter", 0) == scatters * times
    if case.strategy == "NO_SHARD":  # one all-reduce for each trainable group instead
        groups = 1 if case.n == 0 else case.n + 2
        assert all(r["backward"] == {"allreduce_": groups * times} for r in result["ranks"])


def test_frozen_blocks_would_be_gathered_in_backward_if_sharding_did_not_forbid_it(
    measure: Measure,
) -> None:
    """FSDP prefetches the block before the first trainable one: one gathering in vain."""
    forbidden = measure(2, replace(FROZEN_GATHERED, gather_frozen=False))["ranks"]
    allowed = measure(2, FROZEN_GATHERED)["ranks"]
    for without, with_it in zip(forbidden, allowed, strict=True):
        assert with_it["backward"]["all_gather"] == without["backward"]["all_gather"] + 1
        assert with_it["forward"] == without["forward"]


@_on_ranks(SHARDS)
def test_weights_lie_in_shards_and_nothing_else(measure: Measure, world: int, case: Case) -> None:
    parameters = measure(world, case)
    for name, found in parameters.items():
        shards = _shards(case, world, found["frozen"])
        assert found["loaded"], name
        assert sum(found["local"]) == found["numel"] * world / shards, name
        # FSDP pads the first dimension so that each shard has as many rows
        rows = found["rows"]
        padded = -(-rows // shards) * (found["numel"] // rows)
        assert max(found["stored"]) <= padded, name


def test_each_of_two_ranks_stores_half(measure: Measure) -> None:
    full = measure(2, SHARDS[2][0]).values()
    total = sum(found["numel"] for found in full)
    for rank in range(2):
        assert sum(found["stored"][rank] for found in full) == pytest.approx(total / 2, rel=0.02)


def _shards(case: Case, world: int, frozen: bool) -> int:
    """In how many parts a parameter is held."""
    if case.strategy == "NO_SHARD" or (case.strategy == "REPLICATE_FROZEN" and frozen):
        return 1
    return 2 if case.strategy == "HYBRID_SHARD" else world


@_on_ranks(EVALUATED)
def test_an_evaluation_changes_nothing_that_a_checkpoint_would_hold(
    measure: Measure, world: int, case: Case
) -> None:
    result = measure(world, case)
    assert result["after"] == []
    assert result["cut_short"] == []
