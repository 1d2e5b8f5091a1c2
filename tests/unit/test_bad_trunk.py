"""Bad tokenizers, weights and recipes end in exit code 78 and a short message that names them."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spoiled_input import (
    Change,
    Code,
    Command,
    assert_refused,
    hide_code,
    raw_weights,
    zipped,
)

import job.pretrain
from job.data.arithmetic import ALPHABET
from job.data.tokenizer import write_character_tokenizer

pytestmark = pytest.mark.slow


TOKENIZERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing": (lambda trunk: (trunk / "tokenizer.json").unlink(), ("no tokenizer.json",)),
    "garbage": (
        lambda trunk: (trunk / "tokenizer.json").write_text("{"),
        ("tokenizer.json: cannot read the tokenizer",),
    ),
    "not UTF-8": (
        lambda trunk: (trunk / "tokenizer.json").write_bytes(b"\xff"),
        ("tokenizer.json: cannot read the tokenizer",),
    ),
    "garbage settings": (
        lambda trunk: (trunk / "tokenizer_config.json").write_text("{"),
        ("tokenizer_config.json: not valid JSON",),
    ),
    "settings are a list": (
        lambda trunk: (trunk / "tokenizer_config.json").write_text("[]"),
        ("tokenizer_config.json", "a JSON object"),
    ),
    "garbage SentencePiece": (
        lambda trunk: (trunk / "tokenizer.json").rename(trunk / "tokenizer.model"),
        ("tokenizer.model: cannot read the tokenizer",),
    ),
    "more tokens than the model": (
        lambda trunk: write_character_tokenizer(trunk, "abcdefghijklmnop" + ALPHABET),
        ("tokenizer.path: token", "does not exist in the model", "vocabulary of 19"),
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer(case: str, workplace: Path, refused: Callable[..., None]) -> None:
    change, words = TOKENIZERS[case]
    change(workplace / "trunk")
    refused("trunk", *words) if "model" not in case else refused(*words)


def test_no_tokenizer_where_it_is_said_to_be(refused: Callable[..., None]) -> None:
    refused("nowhere", "set tokenizer.path", overrides=("tokenizer.path=nowhere",))


def _params(**changes: Any) -> Change:
    def change(trunk: Path) -> None:
        params = json.loads((trunk / "params.json").read_text()) | changes
        (trunk / "params.json").write_text(json.dumps(params))

    return change


def _raw_params(content: bytes) -> Change:
    return lambda trunk: (trunk / "params.json").write_bytes(content)


def _weights(change: Callable[[dict[str, Any]], object]) -> Change:
    """Store what `change` makes of the weights, or returns."""

    def apply(trunk: Path) -> None:
        weights = torch.load(trunk / "consolidated.pth")
        changed = change(weights)
        torch.save(weights if changed is None else changed, trunk / "consolidated.pth")

    return apply


def _without_embedding(trunk: Path) -> None:
    _params(vocab_size=-1)(trunk)
    _weights(lambda w: w.__delitem__("tok_embeddings.weight"))(trunk)


NORM = "norm.weight"
TRUNKS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no params": (lambda t: (t / "params.json").unlink(), ("params.json", "No such file")),
    "garbage params": (_raw_params(b"{"), ("params.json: not valid JSON", "line 1")),
    "binary params": (_raw_params(b"\xff\xfe"), ("params.json: not valid JSON",)),
    "deep params": (_raw_params(b"[" * 100_000), ("params.json: not valid JSON",)),
    "list of params": (_raw_params(b"[]"), ("params.json", "a JSON object")),
    "no sizes": (_raw_params(b"{}"), ("no value for dim, n_heads, n_layers",)),
    "unknown parameter": (_params(n_layer=2), ("params.json: unknown parameter(s) n_layer",)),
    "size is text": (_params(dim="8"), ("dim", "not '8'")),
    "size is a fraction": (_params(n_kv_heads=1.0), ("n_kv_heads", "not 1.0")),
    "size is zero": (_params(head_dim=0), ("head_dim", "not 0")),
    "size is negative": (_params(n_kv_heads=-2), ("n_kv_heads", "not -2")),
    "size is absurd": (_params(dim=10**12), ("dim", f"not {10**12}")),
    "indivisible": (_params(n_heads=3), ("dim 8 is not divisible by n_heads 3",)),
    "odd head width": (_params(head_dim=3), ("head width 3 must be even",)),
    "more heads than layers": (_params(n_future_tokens=3), ("n_future_tokens 3 exceeds n_layers",)),
    "theta is zero": (_params(rope_theta=0), ("rope_theta must be a positive number, not 0",)),
    "eps is NaN": (_params(norm_eps=math.nan), ("norm_eps must be a positive number, not nan",)),
    "flag is text": (_params(qkv_bias="no"), ("qkv_bias must be true or false, not 'no'",)),
    "scaled is text": (_params(use_scaled_rope="no"), ("use_scaled_rope must be true or false",)),
    "scaling is text": (_params(rope_scaling="8"), ("rope_scaling must hold factor",)),
    "scaling misspelt": (_params(rope_scaling={"fctor": 8}), ("rope_scaling", "'fctor'")),
    "scaling of text": (_params(rope_scaling={"factor": "8"}), ("factor must be", "'8'")),
    "scaling upside down": (_params(rope_scaling={"high_freq_factor": 1}), ("must exceed",)),
    "no weights": (lambda t: (t / "consolidated.pth").unlink(), ("consolidated.pth", "No such")),
    "empty weights": (raw_weights(lambda _: b""), ("consolidated.pth: truncated",)),
    "truncated weights": (raw_weights(lambda raw: raw[: len(raw) // 2]), ("truncated",)),
    "last bytes lacking": (raw_weights(lambda raw: raw[:-10]), ("truncated",)),
    "Git LFS pointer": (raw_weights(lambda _: b"version https://git-lfs"), ("torch.save",)),
    "code, zipped": (hide_code, ("never run",)),
    "code, bare": (raw_weights(lambda _: pickle.dumps(Code(), 2)), ("torch.save",)),
    "code among tensors": (_weights(lambda w: w.update(x=Code())), ("never run",)),
    "damaged inside": (raw_weights(lambda _: zipped(b"\x80\x02h\x07.")), ("consolidated.pth",)),
    "tensor missing": (_weights(lambda w: w.__delitem__(NORM)), (f"{NORM} is missing",)),
    "all missing": (_weights(lambda w: w.clear()), ("20 tensor(s) do not fit",)),
    "tensor surplus": (
        _weights(lambda w: w.update(spare=torch.ones(1))),
        ("spare in consolidated.pth is not part of the model",),
    ),
    "wrong shape": (
        _weights(lambda w: w.update({NORM: torch.ones(9)})),
        (f"{NORM} in consolidated.pth has shape (9,), params.json says (8,)",),
    ),
    "integers": (_weights(lambda w: w.update({NORM: w[NORM].to(torch.int8)})), (NORM, "int8")),
    "sparse": (_weights(lambda w: w.update({NORM: w[NORM].to_sparse()})), (NORM, "sparse")),
    "list of tensors": (_weights(lambda w: list(w.values())), ("a dictionary of named tensors",)),
    "nested": (_weights(lambda w: {"model": w}), ("a dictionary of named tensors",)),
    "numbered": (_weights(lambda w: dict(enumerate(w.values()))), ("of named tensors",)),
    "no embedding to count": (_without_embedding, ("no matrix tok_embeddings.weight",)),
}


@pytest.mark.parametrize("case", TRUNKS)
def test_trunk(case: str, workplace: Path, refused: Callable[..., None]) -> None:
    change, words = TRUNKS[case]
    change(workplace / "trunk")
    refused("trunk/", *words)
    assert not (workplace / "executed").exists()


@pytest.mark.parametrize(
    ("path", "reason"), [("nowhere", "No such file"), ("train.jsonl", "Not a directory")]
)
def test_no_trunk(path: str, reason: str, refused: Callable[..., None]) -> None:
    refused(
        f"{path}: cannot read the model: {reason}",
        "params.json",
        "config.json",
        "model.path",
        overrides=(f"model.path={path}",),
    )


RECIPES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "none": (lambda t: None, ("trunk: the trunk here was made by another recipe",)),
    "another": (
        lambda t: (t / "recipe.yaml").write_text("training: {seed: 5}"),
        ("trunk: the trunk here was made by another recipe",),
    ),
    "garbage": (lambda t: (t / "recipe.yaml").write_text("{"), ("recipe.yaml",)),
    "binary": (lambda t: (t / "recipe.yaml").write_bytes(b"\xff"), ("recipe.yaml",)),
    "list": (lambda t: (t / "recipe.yaml").write_text("[1]"), ("recipe.yaml",)),
}


@pytest.mark.parametrize("case", RECIPES)
def test_trunk_of_another_recipe(case: str, workplace: Path, refused: Callable[..., None]) -> None:
    change, words = RECIPES[case]
    change(workplace / "trunk")
    refused(*words, overrides=("model.recipe=pretrain.yaml",))


def test_the_difference_between_recipes_is_shown(workplace: Path, command: Command) -> None:
    ended = command(job.pretrain.main, "--config", "pretrain.yaml", "--override", "out=new")
    assert ended.code == 0, ended.err
    again = ("--config", "pretrain.yaml", "--override", "out=new", "training.seed=7")
    words = ("new: the trunk here", "training.seed: 0 -> 7")
    assert_refused(lambda: command(job.pretrain.main, *again), words)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("none.yaml", ("none.yaml", "No such file")), ("critic.yaml", ("critic.yaml", "unknown key"))],
)
def test_no_recipe(recipe: str, words: tuple[str, ...], refused: Callable[..., None]) -> None:
    refused(*words, overrides=(f"model.recipe={recipe}", "model.path=new"))
