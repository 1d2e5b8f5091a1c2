"""Closed-form counts are those of the real critic."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from job.common.errors import InputError
from job.model.architecture import RopeScaling, TransformerConfig
from job.model.critic import Critic, parameter_report, unfreeze_last_blocks
from job.model.parameters import (
    Count,
    Selection,
    checkpoint_bytes,
    count_parameters,
    select_trainable,
)

SMALL = TransformerConfig(dim=64, n_layers=6, n_heads=8, vocab_size=96, multiple_of=8)
ARCHITECTURES = {
    "plain": SMALL,
    "grouped heads": replace(SMALL, n_kv_heads=2),
    "bias": replace(SMALL, n_kv_heads=2, qkv_bias=True),
    "norms of heads": replace(SMALL, qk_norm=True),
    "own head width": replace(SMALL, head_dim=12, n_kv_heads=4, qkv_bias=True, qk_norm=True),
    "own hidden width": replace(SMALL, ffn_hidden=100),
    "multiplier": replace(SMALL, ffn_dim_multiplier=1.3, multiple_of=32),
    "extra heads": replace(SMALL, n_future_tokens=4),
    "scaled RoPE": replace(SMALL, rope_scaling=RopeScaling()),
}
SEVEN_B = TransformerConfig(
    dim=4096, n_layers=32, n_heads=32, vocab_size=32000, multiple_of=256, n_future_tokens=4
)
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "checkpoint.json"


def _critic(architecture: TransformerConfig, n: int, *, head_bias: bool = True) -> Critic:
    with torch.device("meta"):
        critic = Critic(architecture, head_bias=head_bias)
    unfreeze_last_blocks(critic, n)
    return critic


def _check_against_modules(
    architecture: TransformerConfig, n: int, *, head_bias: bool = True
) -> None:
    report = parameter_report(_critic(architecture, n, head_bias=head_bias))
    counts = count_parameters(architecture, n, head_bias=head_bias)
    assert list(counts.components.items()) == list(report.components.items())
    assert (counts.total, counts.trainable) == (report.total, report.trainable)
    assert counts.frozen == report.total - report.trainable
    assert {len(line) for line in str(report).splitlines()[:5]} == {60}  # of a terminal's 80


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, job.model.architecture, job.model.parameters; "
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_counts_are_those_of_the_modules(case: str) -> None:
    architecture = ARCHITECTURES[case]
    n_blocks = architecture.n_trunk_layers
    for n in sorted({0, 1, 2, 4, n_blocks, n_blocks + 1, 100}):
        _check_against_modules(architecture, n)


@pytest.mark.parametrize("n", [0, 2])
def test_counts_without_a_head_bias_are_those_of_the_modules(n: int) -> None:
    _check_against_modules(SMALL, n, head_bias=False)
    assert count_parameters(SMALL, n, head_bias=False).value_head == Count(64, 64)


@pytest.mark.parametrize("n", [0, 4, 29, 30])
def test_counts_of_a_seven_b_trunk_are_those_of_its_modules(n: int) -> None:
    _check_against_modules(SEVEN_B, n)


def test_four_blocks_of_a_seven_b_trunk() -> None:
    counts = count_parameters(SEVEN_B, 4)
    assert counts.trunk_blocks == Count(29 * 202_383_360, 809_533_440)
    assert counts.norm == Count(4096, 4096)
    assert counts.value_head == Count(4097, 4097)
    assert counts.embeddings == Count(131_072_000, 0)
    assert counts.trainable == 809_533_440 + 4096 + 4097
    assert checkpoint_bytes(counts) == 9_714_499_596


@pytest.mark.parametrize(
    ("n", "selection"),
    [
        (0, Selection(0, False, False)),
        (1, Selection(1, True, False)),
        (6, Selection(6, True, False)),
        (7, Selection(6, True, True)),
    ],
)
def test_what_n_selects(n: int, selection: Selection) -> None:
    assert select_trainable(n, 6) == selection


@pytest.mark.parametrize("n", [-1, 1.5, "4", None, True])
def test_other_values_of_n_are_refused(n: object) -> None:
    with pytest.raises(InputError, match="num_unfrozen_layers"):
        count_parameters(SMALL, n)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, 4])
def test_checkpoints_are_as_large_as_measured(n: int) -> None:
    results = json.loads(RESULTS.read_text())
    architecture = TransformerConfig(**results["settings"]["architecture"])
    measured = results["bytes"][f"n{n}"]["bytes_of_parameters_and_moments"]
    assert checkpoint_bytes(count_parameters(architecture, n)) == measured
