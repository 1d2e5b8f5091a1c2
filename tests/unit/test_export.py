"""Exports of a run score as the run does, take no more memory than they must, and are whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tokenizers
import torch
from launch import PYTHONPATH, ended
from micro_critic import MicroCritics, write_rows
from micro_job import MicroRun
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from job.common.config import load_config
from job.common.errors import InputError
from job.common.schema import CriticConfig
from job.data.tokenizer import load_tokenizer, write_bpe_tokenizer
from job.data.tokenizer_files import padding
from job.export import whole_critic
from job.export.formats import HEAD, export
from job.model.critic import Critic
from job.model.packed_layout import PackedLayout
from job.model.weights import load_trunk, read_architecture
from job.run.manifest import FileSum, Manifest
from job.run.trained import TrainedCritic
from job.training.scoring import score
from job.training.trainer import train

pytestmark = pytest.mark.slow

ROWS = [{"prompt": f"{a}+2?", "response": f"{a}+2={a + 2};A{a + 2}"} for a in range(8)]
UMASK = os.umask(0)
os.umask(UMASK)


def _export(source: Path, form: str, out: Path, base: str | None = None) -> Path:
    export(TrainedCritic.find(source, base), form, out)
    return out


def _values(source: Path, folder: Path, name: str, base: str | None = None) -> list[Any]:
    data = write_rows(folder / "rows.jsonl", ROWS)
    out = folder / f"{name}.parquet"
    score(lambda: TrainedCritic.find(source, base), str(data), out)
    return pyarrow.parquet.read_table(out).to_pylist()


def _whole(source: Path) -> dict[str, torch.Tensor]:
    """All tensors of a critic by its names, from files that the product's readers did not touch."""
    trained = TrainedCritic.find(source)
    base = torch.load(Path(trained.config.model.path) / "consolidated.pth", weights_only=True)
    tensors = {f"trunk.{n}": t for n, t in base.items() if not n.startswith(("output", "extra"))}
    return tensors | load_file(source / "critic.safetensors")


@pytest.fixture
def run(critics: MicroCritics) -> MicroRun:
    return critics.run("n1")


# Deltas


@pytest.mark.parametrize("settings", [(), ("objective.loss=bce", "training.value_head.bias=false")])
def test_a_delta_scores_as_the_run(
    critics: MicroCritics, settings: tuple[str, ...], tmp_path: Path
) -> None:
    run = critics.run("n1" if not settings else "bce-no-bias", *settings)
    delta = _export(run.path, "delta", tmp_path / "delta")
    assert _values(delta, tmp_path, "delta") == _values(run.path, tmp_path, "run")
    assert (
        load_file(delta / "critic.safetensors").keys()
        == load_file(run.path / "critic.safetensors").keys()
    )


def test_a_delta_says_what_it_is_and_holds_nothing_frozen(run: MicroRun, tmp_path: Path) -> None:
    delta = _export(run.path, "delta", tmp_path / "delta")
    facts = json.loads((delta / "facts.json").read_text())
    assert facts["step"] == 6
    assert facts["identity"]["num_unfrozen_layers"] == 1
    assert len(facts["identity"]["base"]) == 64
    assert facts["identity"]["tokenizer"] == load_tokenizer(delta).fingerprint
    assert facts["evaluation"]["validation/value/mse"] == run.records[-1]["validation/value/mse"]
    assert load_config(CriticConfig, delta / "config.yaml").objective.loss.name == "mse"
    tensors = load_file(delta / "critic.safetensors")
    whole = load_file(run.path / "critic.safetensors")
    assert tensors.keys() == whole.keys()
    assert all(tensors[name].equal(whole[name]) for name in whole)
    assert not list(delta.glob("*.distcp"))
    assert not list(delta.glob(".*"))


def test_a_delta_of_a_delta_is_the_same(run: MicroRun, tmp_path: Path) -> None:
    first = _export(run.path, "delta", tmp_path / "first")
    second = _export(first, "delta", tmp_path / "second")
    assert _content(first) == _content(second)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_new_run_begins_with_the_weights_of_a_delta(
    critics: MicroCritics, run: MicroRun, tmp_path: Path
) -> None:
    delta = _export(run.path, "delta", tmp_path / "delta")
    ends_as_it_began = ("training.learning_rate=0", "training.max_steps=1")
    begun = critics.run("from-delta", f"model.init_from={delta}", *ends_as_it_began)
    ours, theirs = (load_file(r.path / "critic.safetensors") for r in (begun, run))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("there", "here"), [("true", "false"), ("false", "true")], ids=["to none", "from none"]
)
def test_a_head_with_and_one_without_bias_are_not_mixed(
    critics: MicroCritics, there: str, here: str, tmp_path: Path
) -> None:
    settings = (f"training.value_head.bias={there}",)
    source = critics.run("n1") if there == "true" else critics.run("no-bias", *settings)
    with pytest.raises(InputError, match=f"value_head.bias: {there} -> {here}"):
        _train(
            critics,
            f"run.dir={tmp_path}/run",
            f"training.value_head.bias={here}",
            f"model.init_from={source.path}",
        )


def _train(critics: MicroCritics, *settings: str) -> None:
    train(load_config(CriticConfig, critics.folder / "critic.yaml", settings))


def test_a_damaged_delta_and_one_of_another_n_are_refused(run: MicroRun, tmp_path: Path) -> None:
    delta = _export(run.path, "delta", tmp_path / "delta")
    file = delta / "critic.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="no intact checkpoint here"):
        TrainedCritic.find(delta)
    tensors = load_file(run.path / "critic.safetensors")
    dropped = next(name for name in tensors if "wq" in name)
    save_file({n: t for n, t in tensors.items() if n != dropped}, file)
    _sign(delta)
    with pytest.raises(
        InputError, match=rf"(?s)1 parameter\(s\) do not fit .*layers 1\n  {dropped}: \(32, 32\)"
    ):
        TrainedCritic.find(delta).check()
    file.write_bytes(b"x" * 100)
    _sign(delta)
    with pytest.raises(InputError, match="cannot read the delta"):
        TrainedCritic.find(delta).check()


def _sign(delta: Path) -> None:
    names = ("critic.safetensors", "config.yaml", "facts.json")
    Manifest(6, 1, {name: FileSum.of(delta / name) for name in names}).write(delta)


# Meta's layout


def test_metas_layout_holds_the_critic_to_the_bit(run: MicroRun, tmp_path: Path) -> None:
    folder = _export(run.path, "meta", tmp_path / "meta")
    stored = torch.load(folder / "consolidated.pth", weights_only=True)
    head = load_file(folder / HEAD)
    tensors = {f"trunk.{n}": t for n, t in stored.items()}
    tensors |= {f"value_head.{n}": t for n, t in head.items()}
    expected = _whole(run.path)
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(expected[name]) for name in expected)
    assert not list(folder.glob(".*"))


def test_metas_layout_is_a_trunk_whose_values_are_the_runs(run: MicroRun, tmp_path: Path) -> None:
    folder = _export(run.path, "meta", tmp_path / "meta")
    architecture = read_architecture(folder)
    assert (architecture.n_layers, architecture.n_future_tokens) == (3, 1)
    critic = Critic(architecture)
    load_trunk(critic.trunk, folder)
    critic.value_head.load_state_dict(load_file(folder / HEAD))
    for row in _values(run.path, tmp_path, "run"):
        tokens = load_tokenizer(folder).encode([(ROWS[row["line"] - 1]["prompt"], "")])[0].ids[:-1]
        stream = torch.tensor(tokens + row["tokens"])
        at = torch.arange(len(tokens), len(stream))
        with torch.no_grad():
            found = critic(stream, PackedLayout([len(stream)]), at)
        assert found.tolist() == pytest.approx(row["values"], abs=1e-6)


# Hugging Face folders (what transformers makes of them: tests/interop)


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def test_shards_hold_what_one_file_holds(
    run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _export(run.path, "token-classification", tmp_path / "whole")
    monkeypatch.setattr(whole_critic, "SHARD_BYTES", 20_000)
    sharded = _export(run.path, "token-classification", tmp_path / "sharded")
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert max(file.stat().st_size for file in files) < 20_000 + 4_000  # header, and the head
    a, b = _stored(whole), _stored(sharded)
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in b.values())
    for file in files:
        with safe_open(file, "pt") as opened:
            held = {name for name, where in index["weight_map"].items() if where == file.name}
            assert set(opened.keys()) == held


def test_frozen_tensors_keep_their_type_and_trained_ones_their_precision(
    critics: MicroCritics, tmp_path: Path
) -> None:
    base = tmp_path / "half"
    shutil.copytree(critics.trunk, base)
    weights = torch.load(base / "consolidated.pth", weights_only=True)
    half = {name: t.half() for name, t in weights.items()}
    torch.save(half, base / "consolidated.pth")
    run = critics.run("half", f"model.path={base}", "model.recipe=null")
    stored = _stored(_export(run.path, "token-classification", tmp_path / "hf"))
    dtypes = {name: t.dtype for name, t in stored.items()}
    assert dtypes["model.embed_tokens.weight"] == torch.float16
    assert dtypes["model.layers.1.mlp.up_proj.weight"] == torch.float16
    assert dtypes["model.layers.2.mlp.up_proj.weight"] == torch.float32
    assert dtypes["model.norm.weight"] == dtypes["score.weight"] == torch.float32
    trained = load_file(run.path / "critic.safetensors")
    name = "layers.2.feed_forward.w3.weight"
    assert stored["model.layers.2.mlp.up_proj.weight"].equal(trained[f"trunk.{name}"])
    assert not trained[f"trunk.{name}"].equal(half[name].float())
    meta = torch.load(_export(run.path, "meta", tmp_path / "meta") / "consolidated.pth")
    assert meta["layers.1.feed_forward.w3.weight"].equal(half["layers.1.feed_forward.w3.weight"])
    assert meta[name].equal(trained[f"trunk.{name}"])


@pytest.mark.parametrize("n", [0, 4])
def test_every_n_is_exported(critics: MicroCritics, n: int, tmp_path: Path) -> None:
    run = critics.run(f"exported-{n}", f"training.num_unfrozen_layers={n}")
    stored = _stored(_export(run.path, "token-classification", tmp_path / "hf"))
    expected = _whole(run.path)
    assert stored["score.weight"].equal(expected["value_head.weight"])
    assert stored["model.embed_tokens.weight"].equal(expected["trunk.tok_embeddings.weight"])
    assert stored["model.norm.weight"].equal(expected["trunk.norm.weight"])
    base = torch.load(critics.trunk / "consolidated.pth", weights_only=True)
    kept = base["tok_embeddings.weight"].equal(expected["trunk.tok_embeddings.weight"])
    assert kept == (n == 0)


# Folders, cards, tokenizers


def test_a_card_tells_quality_data_depth_and_commit(run: MicroRun, tmp_path: Path) -> None:
    card = (_export(run.path, "token-classification", tmp_path / "hf") / "README.md").read_text()
    facts = TrainedCritic.find(run.path).facts
    mse = run.records[-1]["validation/value/mse"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    assert head
    for words in (
        f"| mse | {mse:.4g} |",
        "| training data | embedded |",
        "N = 1 of 3 blocks, the final norm and the value head",
        facts["identity"]["base"],
        f"| commit of the training | {head} |",
        "Outputs are values, in units of the reward.",
        "the first that PPO reads, is trained as the others are.",
    ):
        assert words in card
    assert re.search(r"\| sequences \| 30 \|", card)  # counts are whole numbers, however large
    assert re.search(r"\| tokens \| [\d,]+ \|", card)
    assert "bias" not in card


def test_a_card_says_what_outputs_are_and_what_the_missing_bias_shifts(
    critics: MicroCritics, run: MicroRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bce = critics.run("bce", "objective.loss=bce")
    card = (_export(bce.path, "token-classification", tmp_path / "a") / "README.md").read_text()
    assert "Outputs are logits: a value is `sigmoid(output)`." in card
    bias = load_file(run.path / "critic.safetensors")["value_head.bias"].item()
    sequences = _export(run.path, "sequence-classification", tmp_path / "b")
    note = f"This head has no bias, and the critic's is {bias:.6g}: add it to each output."
    assert note in (sequences / "README.md").read_text()
    assert note in caplog.text
    none = critics.run("no-bias", "training.value_head.bias=false")
    caplog.clear()
    card = (_export(none.path, "sequence-classification", tmp_path / "c") / "README.md").read_text()
    assert "no bias" not in card + caplog.text


def test_a_folder_that_is_there_is_left_alone(run: MicroRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _export(run.path, "meta", out)
    before = _content(out)
    with pytest.raises(InputError, match="there already"):
        _export(run.path, "delta", out)
    assert _content(out) == before


@pytest.mark.parametrize("form", ["token-classification", "meta", "delta"])
def test_who_may_read_the_folder_may_read_its_files(
    run: MicroRun, form: str, tmp_path: Path
) -> None:
    files = list(_export(run.path, form, tmp_path / "out").iterdir())
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(0o666 & ~UMASK)}


def test_an_export_that_fails_leaves_nothing(
    run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the machine burns")

    monkeypatch.setattr(whole_critic, "save_tensors", broken)
    with pytest.raises(RuntimeError, match="burns"):
        _export(run.path, "token-classification", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _command(run: MicroRun, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, "--critic", str(run.path)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("form", "size"), [("meta", 9000), ("meta", 20_000), ("delta", 20_000), ("token-", 20_000)]
)
def test_a_full_disk_leaves_nothing(run: MicroRun, form: str, size: int, tmp_path: Path) -> None:
    limited = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
        "import job.export.__main__ as c; c.run_and_leave(c.main)"
    )
    form = form.replace("token-", "token-classification")
    command = ["-c", limited, "--format", form, "--out", "out", "--critic", str(run.path)]
    full = ended(command, tmp_path)
    assert full.returncode == 74
    assert "out: cannot be written: " in full.stderr
    assert "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_line(run: MicroRun, tmp_path: Path) -> None:
    command = ("-m", "job.export", "--format", "meta", "--out")
    done = _command(run, tmp_path, *command, "out")
    assert done.returncode == 0, done.stderr
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        *("README.md", "consolidated.pth", "params.json", HEAD),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    wrong = ended([*command, "b", "--base", "nowhere", "--critic", str(run.path)], tmp_path)
    assert wrong.returncode == 78
    assert "nowhere: the trunk" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_padding_is_never_the_end_token(tmp_path: Path) -> None:
    def folder(name: str, **settings: Any) -> Path:
        write_bpe_tokenizer(tmp_path / name, ["one and two"] * 3, 300)
        file = tmp_path / name / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return tmp_path / name

    assert padding(load_tokenizer(folder("plain")), 300) == "<s>"
    assert padding(load_tokenizer(folder("eos", pad_token="</s>")), 300) == "<s>"
    assert padding(load_tokenizer(folder("named", pad_token="a")), 300) == "a"
    assert padding(load_tokenizer(folder("lone", bos_token=None)), 300) == "<s>"
    beyond = folder("beyond", pad_token="[PAD]")
    raw = tokenizers.Tokenizer.from_file(str(beyond / "tokenizer.json"))
    raw.add_special_tokens(["[PAD]"])
    raw.save(str(beyond / "tokenizer.json"))
    known = load_tokenizer(beyond)
    last = known.token_id("[PAD]")
    assert last is not None
    assert padding(known, last + 1) == "[PAD]"
    assert padding(known, last) == "<s>", "the model has no row for it"
    both = folder("both", bos_token="</s>", eos_token="</s>")
    assert padding(load_tokenizer(both), 300) not in ("</s>", None)
