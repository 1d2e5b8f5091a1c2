"""All that a short training needs, for tests to spoil, and the commands that must refuse it."""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import job.pretrain
import job.train
from job.common.errors import Exit, run_command
from job.data.arithmetic import ALPHABET
from job.data.tokenizer import write_character_tokenizer
from job.model.architecture import TransformerConfig
from job.model.transformer import Transformer
from job.model.weights import save_transformer

ROWS = [
    {"prompt": "1+2?", "response": "1+2=3;A3", "reward": 1, "problem_id": "a"},
    {"prompt": "1+2?", "response": "1+2=4;A4", "reward": 0, "problem_id": "a"},
    {"prompt": "5-3?", "response": "5-3=2;A2", "reward": 1.0, "problem_id": "b"},
    {"prompt": "5-3?", "response": "5-3=1;A1", "reward": False, "problem_id": "b"},
]
CRITIC = """
run: {name: tiny, dir: "runs/${run.name}"}
model: {path: trunk}
data: {train: train.jsonl, validation: validation.jsonl, max_length: 32, cache_dir: cache}
training: {num_unfrozen_layers: 1, max_steps: 2, batch_size: 2, micro_batch_tokens: 64, threads: 1}
evaluation: {every_steps: 2}
distributed: {fsdp: {mixed_precision: false}}
mlflow: {enabled: false}
"""
PRETRAIN = """
out: trunk
architecture: {dim: 8, n_layers: 2, n_heads: 2, multiple_of: 8, n_future_tokens: 1}
data: {train: embedded, max_length: 64, cache_dir: cache, arithmetic: {train_examples: 8}}
training: {max_steps: 2, batch_size: 2, micro_batch_tokens: 64, threads: 1}
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


def json_lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


SCREEN = (100, 25)  # columns and lines
Change = Callable[[Path], object]  # of the working directory


@pytest.fixture(scope="session")
def tiny_trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "trunk"
    vocab_size = len(ALPHABET) + 3  # and three special tokens
    torch.manual_seed(0)
    config = TransformerConfig(8, n_layers=2, n_heads=2, multiple_of=8, vocab_size=vocab_size)
    save_transformer(Transformer(config), folder)
    write_character_tokenizer(folder, ALPHABET)
    return folder


@pytest.fixture
def workplace(tmp_path: Path, tiny_trunk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a command, with everything for a training of two steps."""
    shutil.copytree(tiny_trunk, tmp_path / "trunk")
    (tmp_path / "critic.yaml").write_text(CRITIC)
    (tmp_path / "pretrain.yaml").write_text(PRETRAIN)
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text(json_lines(*ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command's main with the given arguments, as `python -m` would."""

    def run(main: Callable[[], None], *arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["job", *arguments])
        code: object = 0
        try:
            run_command(main)
        except SystemExit as end:
            code = end.code or 0
        assert isinstance(code, int)
        return Ended(code, *capsys.readouterr())

    return run


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _check(ended: Ended, words: tuple[str, ...]) -> None:
    assert ended.code == Exit.BAD_INPUT, ended.err
    assert "Traceback" not in ended.err
    assert "\nerror: " in f"\n{ended.err}"
    columns, lines = SCREEN
    assert sum(math.ceil(len(line) / columns) for line in ended.err.splitlines()) <= lines
    for word in words:
        assert word in ended.err


def assert_refused(run: Callable[[], Ended], words: tuple[str, ...]) -> None:
    """The command is refused before its first step, and every file from before is as it was."""
    place = Path.cwd()
    before = _files(place)
    _check(run(), words)
    after = _files(place)
    assert before.items() <= after.items()
    for file in after.keys() - before.keys():
        assert file.name != "metrics.jsonl" or not after[file]
        assert file.suffix not in (".pth", ".safetensors")
        if file.name == "status.json":
            assert json.loads(after[file])["state"] == "failed"


@pytest.fixture
def refused(workplace: Path, command: Command) -> Callable[..., None]:
    """Refused by job.train with these overrides, in these words."""

    def check(*words: str, overrides: tuple[str, ...] = (), config: str = "critic.yaml") -> None:
        options = ["--config", config, *(["--override", *overrides] if overrides else [])]
        assert_refused(lambda: command(job.train.main, *options), words)

    return check


@pytest.fixture
def pretrain_refused(workplace: Path, command: Command) -> Callable[..., None]:
    """Refused by job.pretrain with these overrides, in these words; nothing is left behind."""

    def check(*words: str, overrides: tuple[str, ...] = ()) -> None:
        options = ["--config", "pretrain.yaml", "--override", "out=new", *overrides]
        assert_refused(lambda: command(job.pretrain.main, *options), words)
        assert not [p.name for p in workplace.iterdir() if p.name.startswith((".new", "new"))]

    return check


class Code:
    """A pickle of this makes a file when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return (open, ("executed", "w"))


def raw_weights(change: Callable[[bytes], bytes]) -> Change:
    def apply(trunk: Path) -> None:
        file = trunk / "consolidated.pth"
        file.write_bytes(change(file.read_bytes()))

    return apply


def zipped(content: bytes) -> bytes:
    """A file laid out as torch.save does, with this pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3\n")
    return stream.getvalue()


def hide_code(trunk: Path) -> None:
    """Weights that would run code, laid out as torch.save does."""
    raw_weights(lambda _: zipped(pickle.dumps(Code(), 2)))(trunk)
