"""Values as histograms: distributions around targets, and the means of predicted ones."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from micro_critic import MicroCritics, write_rows
from safetensors.torch import load_file, save_file

from job.common.errors import InputError
from job.common.schema import Loss, ObjectiveConfig, TermsConfig
from job.data.packing import Batch
from job.export.formats import export
from job.model.packed_layout import PackedLayout
from job.run.manifest import FACTS, FileSum, Manifest
from job.run.trained import TENSORS, TrainedCritic, find_weights
from job.training.histogram import Histogram
from job.training.objective import Counts, Objective
from job.training.scoring import score

ONE = Counts(1, 1)


def objective(**settings: object) -> Objective:
    return Objective(ObjectiveConfig(loss=Loss.hl_gauss, **settings))  # type: ignore[arg-type]


def batch(rewards: list[float], pairs: list[list[int]] | None = None) -> Batch:
    """Responses of one token each."""
    n = len(rewards)
    ones = torch.ones(n, dtype=torch.int64)
    return Batch(
        tokens=torch.zeros(n, dtype=torch.int64),
        layout=PackedLayout([1] * n),
        positions=torch.arange(n),
        lengths=ones,
        response_lengths=ones,
        weights=torch.ones(n),
        weight=float(n),
        rewards=torch.tensor(rewards),
        problems=np.zeros(n, np.uint64),
        optimal=None,
        pairs=torch.tensor(pairs or [], dtype=torch.int64).reshape(-1, 2),
    )


def normal(x: float) -> float:
    return (1 + math.erf(x / 2**0.5)) / 2


def test_bins_and_a_target_s_distribution_by_hand() -> None:
    """Ten bins, of which [0, 1] has four: three sigma of one bin lie on either side."""
    histogram = Histogram(10, 1.0)
    assert histogram.centres.tolist() == pytest.approx([(i - 2.5) / 4 for i in range(10)])
    (found,) = histogram.distribution(torch.tensor([0.3])).tolist()
    at = [(i - 3) - 4 * 0.3 for i in range(11)]  # the edges, in sigmas from the target
    inside = normal(at[-1]) - normal(at[0])
    expected = [(normal(b) - normal(a)) / inside for a, b in itertools.pairwise(at)]
    assert found == pytest.approx(expected, abs=1e-6)
    assert sum(found) == pytest.approx(1)


@pytest.mark.parametrize(("bins", "sigma"), [(51, 0.75), (101, 2.0), (12, 0.5)])
def test_a_target_s_distribution_has_its_mean(bins: int, sigma: float) -> None:
    histogram, targets = Histogram(bins, sigma), torch.tensor([0.0, 0.013, 0.5, 0.77, 1.0])
    logits = histogram.distribution(targets).clamp_min(1e-30).log()
    width = float(histogram.centres[1] - histogram.centres[0])
    assert (histogram.expectation(logits) - targets).abs().max() < 0.02 * width


def test_the_loss_is_the_cross_entropy_by_hand_and_least_at_the_distribution() -> None:
    one, batch_ = objective(bins=10, sigma=1.0), batch([1.0, 0.0])
    p = Histogram(10, 1.0).distribution(torch.tensor([1.0, 0.0]))
    outputs = torch.randn(2, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    q = outputs.detach().exp() / outputs.detach().exp().sum(1, keepdim=True)
    loss = one.loss(outputs, batch_, 0, Counts(2, 0))
    assert loss.item() == pytest.approx(-(p * q.log()).sum().item() / 2, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(outputs.grad, (q - p) / 2, rtol=1e-4, atol=1e-6)


def test_weights_terms_and_pairs_take_the_mean_for_the_value() -> None:
    batch_ = dataclasses.replace(
        batch([1.0, 0.0], [[0, 1]]), weights=torch.tensor([3.0, 1.0]), weight=4.0
    )
    outputs = torch.randn(2, 51, generator=torch.Generator().manual_seed(1))
    plain = objective()
    better, worse = plain.values(outputs).tolist()
    each = [
        plain.loss(outputs[i : i + 1], batch([r]), 0, ONE).item() for i, r in enumerate([1.0, 0.0])
    ]
    joint = objective(terms=TermsConfig(monte_carlo=1.0, pairwise=2.0))
    expected = (3 * each[0] + each[1]) / 4 + 2 * math.log1p(math.exp(worse - better))
    found = joint.loss(outputs, batch_, 0, joint.counts(batch_)).item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mean", [0.0, 0.3, 1.0])
def test_the_first_bias_predicts_the_mean_reward(mean: float) -> None:
    one = objective()
    bias = torch.tensor([one.initial_bias(mean)])
    assert bias.shape == (1, 51)
    assert one.values(bias).item() == pytest.approx(mean, abs=0.005)


# In a run

ROWS = [
    {"prompt": f"{a}+{b}?", "response": f"{a}+{b}={a + b};A{a + b}"} for a, b in ((1, 2), (4, 5))
]


def delta(folder: Path, head: torch.Tensor, settings: str) -> Path:
    """A delta of nothing but a head."""
    folder.mkdir()
    save_file({"value_head.weight": head}, folder / TENSORS)
    needed = "run: {name: r, dir: r}\nmodel: {path: m}\ndata: {train: t, validation: v}\n"
    (folder / "config.yaml").write_text(f"{needed}objective: {{loss: hl_gauss, {settings}}}\n")
    (folder / FACTS).write_text(json.dumps({"identity": {"base": "b"}}))
    names = (TENSORS, "config.yaml", FACTS)
    Manifest(1, 1, {name: FileSum.of(folder / name) for name in names}).write(folder)
    return folder


def test_a_head_of_as_many_bins_at_other_places_is_no_beginning(tmp_path: Path) -> None:
    critic = torch.nn.ModuleDict({"value_head": torch.nn.Linear(4, 21, bias=False)})
    given = delta(tmp_path / "delta", torch.zeros(21, 4), "bins: 21, sigma: 1.5")
    identity = {"architecture": None, "base": "b"}
    here = ObjectiveConfig(loss=Loss.hl_gauss, bins=21, sigma=1.5)
    assert find_weights(given, critic, identity, here) == given
    here.sigma = 0.75
    with pytest.raises(InputError, match=r"objective.sigma\): 1.5 -> 0.75 \(there -> here\)"):
        find_weights(given, critic, identity, here)


@pytest.mark.slow
def test_a_run_is_scored_and_exported_with_its_bins(critics: MicroCritics, tmp_path: Path) -> None:
    import transformers

    run = critics.run("hl", "objective.loss=hl_gauss", "objective.bins=21").path
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert 0 <= last["validation/value/mean_prediction"] <= 1
    data, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "values.jsonl"
    score(lambda: TrainedCritic.find(run), str(data), out)
    values = [json.loads(line) for line in out.read_text().splitlines()]
    folder = tmp_path / "tokens"
    export(TrainedCritic.find(run), "token-classification", folder)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    assert model.config.num_labels == 21
    centres = torch.tensor(model.config.bin_centres)
    assert centres.tolist() == Histogram(21, 0.75).centres.tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row, known in zip(ROWS, values, strict=True):
        ids = tokenizer(row["prompt"] + row["response"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found = model(ids).logits[0].softmax(-1) @ centres
        # without the end token, which the text does not have
        wanted = [known["prompt_value"], *known["values"][:-1]]
        assert found[-len(wanted) :].tolist() == pytest.approx(wanted, abs=1e-5)
    assert "softmax(-1) @ centres" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_formats_for_readers_of_one_label_are_refused_and_meta_names_the_bins(
    critics: MicroCritics, tmp_path: Path
) -> None:
    run = critics.run("hl", "objective.loss=hl_gauss", "objective.bins=21").path
    with pytest.raises(InputError, match=r"sequence-classification: its readers take one label"):
        export(TrainedCritic.find(run), "sequence-classification", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(TrainedCritic.find(run), "meta", tmp_path / "meta")
    head = load_file(tmp_path / "meta/value_head.safetensors")
    assert head["weight"].shape[0] == head["bias"].shape[0] == len(head["bin_centres"]) == 21
    with pytest.raises(InputError, match=r"outputs of the head .*: 21 -> 1 \(there -> here\)"):
        critics.run("from-hl", f"model.init_from={run}")
