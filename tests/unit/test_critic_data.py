"""What a critic is trained and evaluated on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from micro_job import write_job

from job.common.config import load_config
from job.common.schema import CriticConfig
from job.data.arithmetic import ALPHABET
from job.data.packing import single_units
from job.data.tokenizer import write_character_tokenizer
from job.distributed.world import World
from job.run.directory import RunDirectory
from job.training.data import (
    CriticData,
    load_critic_data,
    sample_of_problems,
    warn_of_one_label,
)


def test_a_sample_is_of_whole_problems_from_all_over_the_file() -> None:
    problems = np.repeat(np.arange(100, dtype=np.uint64), 8)
    rows = sample_of_problems(problems, 161)
    assert len(rows) == 161
    assert (np.diff(rows) > 0).all()
    counts = np.bincount(problems[rows].astype(int), minlength=100)
    assert sorted(counts.tolist())[-21:] == [1, *[8] * 20]
    assert (counts[:50] > 0).sum() > 5, "not the first rows alone"
    assert (counts[50:] > 0).sum() > 5, "nor the last"


def test_a_sample_is_the_same_in_every_run_and_a_larger_one_holds_it() -> None:
    problems = np.random.default_rng(1).integers(0, 2**63, 50).astype(np.uint64).repeat(3)
    small, large = (sample_of_problems(problems, n) for n in (30, 90))
    assert np.array_equal(small, sample_of_problems(problems, 30))
    assert set(small) <= set(large)


@pytest.mark.parametrize("most", [None, 7, 8])
def test_all_rows_are_kept_where_no_more_are_asked_for(most: int | None) -> None:
    assert sample_of_problems(np.arange(7, dtype=np.uint64), most).tolist() == list(range(7))


def test_evaluations_of_one_label_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_one_label(np.array([0.0, 0.0, 1.0]))
        assert not caplog.text
        warn_of_one_label(np.array([1.0, 1.0]))
    assert "all 2 solutions of the evaluations have the reward 1" in caplog.text


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, a tokenizer and an architecture: all that loading data asks of a trunk."""
    folder = tmp_path_factory.mktemp("workplace")
    write_job(folder, (f"data.cache_dir={folder}/cache", f"model.path={folder}/trunk"))
    write_character_tokenizer(folder / "trunk", ALPHABET)
    params = {"dim": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 32}
    (folder / "trunk/params.json").write_text(json.dumps(params))
    return folder


def loaded(workplace: Path, *overrides: str) -> CriticData:
    config = load_config(CriticConfig, workplace / "critic.yaml", overrides)
    return load_critic_data(config, RunDirectory(workplace / "run", is_main=False), World())


@pytest.mark.parametrize("prompt_value", [True, False])
def test_values_before_responses_are_trained_and_evaluated_where_they_are_asked_for(
    workplace: Path, prompt_value: bool
) -> None:
    data = loaded(workplace, f"objective.prompt_value={str(prompt_value).lower()}")
    for packer in (data.train, data.validation):
        batch = packer.assemble(single_units(3))
        assert int(batch.at_prompts.sum()) == 3 * prompt_value


def test_pairs_have_no_target_before_their_responses(workplace: Path) -> None:
    data = loaded(workplace, "objective.loss=pairwise")
    for packer in (data.train, data.validation):
        assert not packer.assemble(packer.units[:3]).at_prompts.any()


def test_training_sets_weigh_as_configured(workplace: Path) -> None:
    plain = loaded(workplace).train
    assert plain.assemble(single_units(3)).weights.unique().tolist() == [1.0]
    by_sequence = loaded(workplace, "objective.weighting=sequence").train
    batch = by_sequence.assemble(single_units(3))
    assert batch.weight == pytest.approx(3)
    assert batch.weights[0] * batch.lengths[0] == pytest.approx(1)  # the prompt's value included
    balanced = loaded(workplace, "objective.balance_labels=true").train
    weights = balanced.assemble(single_units(200)).weights
    right = balanced.data.rewards.repeat(balanced.data.response_lengths + 1) == 1
    assert weights[right].sum() == pytest.approx(weights[~right].sum().item(), rel=1e-5)


def write_rows(file: Path, problems: str) -> str:
    """A file of a solution for each letter, which names its problem."""
    texts = (
        {"prompt": "1+2?", "response": f"1+2={k % 10};A3", "reward": k % 2, "problem_id": problem}
        for k, problem in enumerate(problems)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return str(file)


def test_solutions_of_one_problem_share_its_weight(workplace: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", "aaab")
    files = (f"data.train={file}", f"data.validation={file}")
    batch = loaded(workplace, *files, "objective.weighting=problem").train.assemble(single_units(4))
    sums = [float(part.sum()) for part in batch.weights.split(batch.lengths.tolist())]
    assert sums == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])


def test_the_seed_of_a_training_says_which_problems_are_held_out(
    workplace: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", "abcdefghijklmnopqrst")
    share = (f"data.train={file}", "data.validation=0.5")
    held_out = [
        set(loaded(workplace, *share, f"training.seed={seed}").validation.data.problems.tolist())
        for seed in (1, 1, 2)
    ]
    assert held_out[0] == held_out[1] != held_out[2]


def test_solutions_are_grouped_by_problem_where_that_is_asked_for(workplace: Path) -> None:
    changes = "training.batch_size=16", "training.micro_batch_tokens=1024"
    together = {}
    for choice in ("false", "true", "auto"):
        data = loaded(workplace, f"data.group_by_problem={choice}", *changes)
        rows = np.concatenate(data.train.plan(0, 16, 0))[:, 0]
        _, each = np.unique(data.train.data.problems[rows], return_counts=True)
        together[choice] = sorted(each.tolist())
        evaluated = [data.validation.assemble(part) for part in data.validation.everything]
        assert sum(len(b.tokens) for b in evaluated) < sum(b.layout.n_keys for b in evaluated)
    assert together["true"] == together["auto"] == [4] * 4
    assert max(together["false"]) < 4
    pairs = loaded(workplace, "objective.loss=pairwise").train.step(0, 10, 0)
    assert all(len(batch.tokens) < batch.layout.n_keys for batch in pairs)


def test_a_joint_objective_trains_pairs_and_every_other_solution(workplace: Path) -> None:
    terms = "objective.terms={monte_carlo: 1.0, pairwise: 0.5}"
    joint = loaded(workplace, terms).train
    pairs = loaded(workplace, "objective.loss=pairwise").train
    assert joint.units[: len(pairs.units)].tolist() == pairs.units.tolist()
    assert sorted(joint.units[joint.units >= 0].tolist()) == list(range(200))
    assert loaded(workplace).train.units.shape == (200, 1)
