"""Folders of either layout: told apart, read whole, and refused where they are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bases import (
    change_json,
    change_safetensors,
    language_model,
    loaded,
    write_hugging_face,
    write_meta,
    write_parts,
    write_shards,
)

from job.common.errors import InputError
from job.model.architecture import TransformerConfig
from job.model.architecture_file import read_architecture
from job.model.fingerprint import fingerprint
from job.model.transformer import Transformer
from job.model.trunk_folder import Layout, find_trunk
from job.model.weights import check_trunk, open_weights

pytestmark = pytest.mark.slow

TINY = TransformerConfig(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=12, multiple_of=8)
BIASED = replace(TINY, qkv_bias=True, head_dim=6)
NORMED = replace(TINY, qk_norm=True)
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return language_model(TINY)


def _write_all(folder: Path, model: Transformer) -> dict[str, Path]:
    return {
        "one file": write_meta(folder / "meta", model),
        "parts by columns": write_parts(folder / "parts2", model, 2, embedding_dim=1),
        "parts by rows": write_parts(folder / "parts4", model, 2, embedding_dim=0),
        "one part": write_parts(folder / "parts1", model, 1, embedding_dim=0),
        "safetensors": write_hugging_face(folder / "hf", model),
        "shards": write_shards(folder / "shards", model, 3),
    }


@pytest.mark.parametrize("config", [TINY, BIASED, NORMED], ids=["plain", "biases", "norms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_trunk_however_it_is_stored(
    config: TransformerConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = language_model(config, dtype)
    for way, folder in _write_all(tmp_path, model).items():
        check_trunk(folder, 10**6)
        for name, parameter in loaded(folder).named_parameters():
            assert torch.equal(parameter, model.state_dict()[name].float()), (way, name)


def test_four_parts_of_a_grouped_model(tmp_path: Path) -> None:
    model = language_model(replace(TINY, n_kv_heads=4))
    folder = write_parts(tmp_path, model, 4, embedding_dim=1)
    for name, parameter in loaded(folder).named_parameters():
        assert torch.equal(parameter, model.state_dict()[name]), name


def test_the_fingerprint_does_not_depend_on_files_but_on_the_layout(
    model: Transformer, tmp_path: Path
) -> None:
    folders = _write_all(tmp_path, model)
    found = {way: fingerprint(folder, tmp_path / "cache") for way, folder in folders.items()}
    meta = {found[way] for way in ("one file", "parts by columns", "parts by rows", "one part")}
    hugging_face = {found[way] for way in ("safetensors", "shards")}
    assert (len(meta), len(hugging_face), len(meta | hugging_face)) == (1, 1, 2)


@pytest.mark.parametrize("way", ["parts by rows", "shards"])
def test_a_change_of_any_file_is_a_new_fingerprint(
    way: str, model: Transformer, tmp_path: Path
) -> None:
    folder, cache = _write_all(tmp_path, model)[way], tmp_path / "cache"
    before = fingerprint(folder, cache)
    assert fingerprint(folder, cache) == before
    changed = model.state_dict()["layers.1.ffn_norm.weight"]
    if way == "shards":
        for file in folder.glob("*.safetensors"):
            change_safetensors(file, lambda named: [t.add_(1) for t in named.values()])
    else:
        for file in folder.glob("*.pth"):
            named = torch.load(file)
            torch.save(named | {"layers.1.ffn_norm.weight": changed + 1}, file)
    assert fingerprint(folder, cache) != before


@pytest.mark.parametrize("dim", [0, 1])
def test_a_vocabulary_left_open_is_that_of_all_parts(
    dim: int, model: Transformer, tmp_path: Path
) -> None:
    folder = write_parts(tmp_path, model, 2, embedding_dim=dim)
    change_json(folder / "params.json", vocab_size=-1)
    assert read_architecture(folder) == TINY


# Memory


def _resident(file: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counts = line.endswith(str(file.resolve()))
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("way", ["meta", "hf"])
def test_weights_are_mapped_and_given_back(way: str, tmp_path: Path) -> None:
    model = language_model(replace(TINY, vocab_size=100_000))
    folder = (write_meta if way == "meta" else write_hugging_face)(tmp_path, model)
    (file,) = find_trunk(folder).weight_files()
    tensors = open_weights(folder, read_architecture(folder))
    embedding = tensors["tok_embeddings.weight"]
    assert all(tensor.mapped for tensor in tensors.values())
    assert _resident(file) == 0  # nothing was touched, so that the disk read nothing ahead
    expected = model.state_dict()["tok_embeddings.weight"]
    assert torch.equal(embedding.rows(slice(0, 100_000)), expected)
    assert _resident(file) > 6e6
    embedding.release(slice(0, 100_000))
    assert _resident(file) < 2**20
    assert torch.equal(embedding.rows(slice(7, 9)), expected[7:9])


@pytest.mark.parametrize("padding", range(4))
def test_safetensors_may_begin_at_any_byte(
    padding: int, model: Transformer, tmp_path: Path
) -> None:
    folder = write_hugging_face(tmp_path, model)
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].rstrip() + b" " * padding
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    for name, tensor in open_weights(folder, TINY).items():
        expected = model.state_dict()[name]
        assert torch.equal(tensor.rows(slice(0, len(expected))), expected), name


def test_pieces_of_heads_are_the_rows_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.model.stored._PIECE", 1)
    model = language_model(BIASED)
    tensors = open_weights(write_hugging_face(tmp_path, model), BIASED)
    for name, tensor in tensors.items():
        expected = model.state_dict()[name]
        for rows in (slice(0, len(expected)), slice(3, len(expected) - 2), slice(5, 5)):
            pieces = [tensor.rows(piece) for piece in tensor.pieces(rows)]
            assert len(pieces) >= (rows.stop - rows.start) / 6
            assert torch.equal(torch.cat([expected[:0], *pieces]), expected[rows]), name


# Which layout


LAYOUTS: dict[str, tuple[list[str], Layout | str]] = {
    "Meta": (["params.json", "consolidated.pth"], Layout.META),
    "Meta, parts": (["params.json", "consolidated.00.pth"], Layout.META),
    "Meta, architecture alone": (["params.json"], Layout.META),
    "Hugging Face": (["config.json", "model.safetensors"], Layout.HUGGING_FACE),
    "Hugging Face, shards": (["config.json", "model.safetensors.index.json"], Layout.HUGGING_FACE),
    "Mistral's": (
        ["config.json", "model.safetensors", "params.json", "consolidated.safetensors"],
        Layout.HUGGING_FACE,
    ),
    "both": (["params.json", "consolidated.00.pth", "config.json"], "a model in two layouts"),
    "none": (["README.md"], "neither params.json nor config.json"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_layout_is_told_by_the_files(case: str, tmp_path: Path) -> None:
    files, expected = LAYOUTS[case]
    for name in files:
        (tmp_path / name).touch()
    if isinstance(expected, Layout):
        assert find_trunk(tmp_path).layout is expected
        return
    with pytest.raises(InputError, match=expected) as caught:
        find_trunk(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")


# Damage


def _header(change: Callable[[bytes], bytes]) -> Change:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return lambda folder: change_safetensors(folder / "model.safetensors", change)


NORM, QUERIES = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
SAFETENSORS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json: cannot read the",)),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        ("model.safetensors: cannot read the weights: No such file", "model.path must be"),
    ),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ("not from pickled pytorch_model*.bin", "save_pretrained"),
    ),
    "empty": (_header(lambda _: b""), ("model.safetensors: damaged",)),
    "header truncated": (_header(lambda raw: raw[:100]), ("model.safetensors: damaged",)),
    "content truncated": (_header(lambda raw: raw[:-1]), ("model.safetensors: damaged",)),
    "more content": (_header(lambda raw: raw + b"\0"), ("model.safetensors: damaged",)),
    "header damaged": (_header(lambda r: r[:8] + b"[" + r[9:]), ("model.safetensors: damaged",)),
    "Git LFS pointer": (_header(lambda _: b"version https://git-lfs"), ("damaged",)),
    "missing": (_tensors(lambda t: t.pop(NORM)), ("model.safetensors: 1 tensor", f"{NORM} is mis")),
    "surplus": (
        _tensors(lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(16)})),
        ("model.layers.0.self_attn.o_proj.bias in model.safetensors is not part of the model",),
    ),
    "Meta's name": (
        _tensors(lambda t: t.update({"layers.0.attention.wq.weight": t.pop(QUERIES)})),
        (
            "layers.0.attention.wq.weight in model.safetensors is not part",
            f"{QUERIES} is missing",
        ),
    ),
    "wrong shape": (
        _tensors(lambda t: t.update({QUERIES: torch.ones(16, 15)})),
        (f"{QUERIES} in model.safetensors has shape (16, 15), config.json says (16, 16)",),
    ),
    "wrong type": (
        _tensors(lambda t: t.update({NORM: t[NORM].to(torch.int32)})),
        (f"{NORM} in model.safetensors is stored as torch.int32",),
    ),
    "eight bits": (
        _tensors(lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})),
        (f"{NORM} in model.safetensors is stored as torch.float8_e4m3fn",),
    ),
    "complex numbers": (
        _tensors(lambda t: t.update({NORM: t[NORM].to(torch.complex64)})),
        ("model.safetensors: 1 tensor", f"{NORM} is stored as C64"),
    ),
    "another vocabulary": (
        lambda f: change_json(f / "config.json", vocab_size=13),
        ("model.embed_tokens.weight in", "has shape (12, 16), config.json says (13, 16)"),
    ),
}
INDEX, FIRST = "model.safetensors.index.json", "model-00001-of-00003.safetensors"
SECOND = FIRST.replace("00001", "00002")


def _map(change: Callable[[dict[str, str]], object]) -> Change:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def _move_norm(folder: Path) -> None:
    """Out of its shard into the first, behind the index's back."""
    held: dict[str, torch.Tensor] = {}
    home = json.loads((folder / INDEX).read_text())["weight_map"][NORM]
    other = FIRST if home != FIRST else SECOND
    change_safetensors(folder / home, lambda t: held.update({NORM: t.pop(NORM)}))
    change_safetensors(folder / other, lambda t: t.update(held))


SHARDS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "shard missing": (lambda f: (f / FIRST).unlink(), (f"{FIRST}: cannot read the weights",)),
    "shards missing": (
        lambda f: [file.unlink() for file in f.glob("*.safetensors")],
        ("3 files of weights are missing", FIRST),
    ),
    "shard truncated": (
        lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-4]),
        (f"{FIRST}: damaged",),
    ),
    "tensor in the wrong shard": (_move_norm, (INDEX, f"{NORM} is model-0000", "the index says")),
    "tensor in no shard": (
        lambda f: change_safetensors(f / FIRST, lambda t: t.pop(next(iter(t)))),
        (INDEX, "is in no shard, the index says model-00001"),
    ),
    "tensor of no index": (
        lambda f: change_safetensors(f / FIRST, lambda t: t.update(spare=torch.ones(1))),
        (f"spare is {FIRST}, the index says nothing of it",),
    ),
    "tensor twice": (
        lambda f: change_safetensors(f / FIRST, lambda t: t.update({NORM: torch.ones(16)})),
        (f"{NORM} is {FIRST} and model-0000",),
    ),
    "index garbage": (lambda f: (f / INDEX).write_text("{"), (f"{INDEX}: not valid JSON",)),
    "index empty": (lambda f: (f / INDEX).write_text("{}"), (f"{INDEX}: weight_map must",)),
    "index leads out": (
        _map(lambda m: m.update({NORM: "../model.safetensors"})),
        (f"{INDEX}: {NORM}: '../model.safetensors' is no file of this folder",),
    ),
    "one file too": (
        lambda f: shutil.copyfile(f / FIRST, f / "model.safetensors"),
        (f"holds model.safetensors and {INDEX}",),
    ),
}


def _part(number: int, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        file = folder / f"consolidated.{number:02}.pth"
        named = torch.load(file)
        change(named)
        torch.save(named, file)

    return apply


WQ, WO = "layers.0.attention.wq.weight", "layers.0.attention.wo.weight"
PARTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "first missing": (
        lambda f: (f / "consolidated.00.pth").unlink(),
        ("consolidated.00.pth: cannot read the weights",),
    ),
    "last missing": (
        lambda f: (f / "consolidated.01.pth").unlink(),
        (f"{WQ} in consolidated.00.pth has shape (8, 16), params.json says (16, 16)",),
    ),
    "one too many": (
        lambda f: shutil.copyfile(f / "consolidated.01.pth", f / "consolidated.02.pth"),
        (f"{WQ}: parts of shapes (8, 16) do not make up (16, 16) along dimension 0",),
    ),
    "truncated": (
        lambda f: (f / "consolidated.01.pth").write_bytes(b"PK"),
        ("consolidated.01.pth: truncated",),
    ),
    "missing in one": (
        _part(1, lambda t: t.pop(WO)),
        (f"{WO} is missing in consolidated.01.pth",),
    ),
    "missing in all": (
        lambda f: [_part(n, lambda t: t.pop(WO))(f) for n in (0, 1)],
        (f"{WO} is missing",),
    ),
    "cut the other way": (
        lambda f: [_part(n, lambda t: t.update({WQ: t[WQ].T.contiguous()}))(f) for n in (0, 1)],
        (f"{WQ}: parts of shapes (16, 8) do not make up (16, 16) along dimension 0",),
    ),
    "whole in each": (
        lambda f: [_part(n, lambda t: t.update({WQ: torch.ones(16, 16)}))(f) for n in (0, 1)],
        (f"{WQ}: parts of shapes (16, 16) do not make up (16, 16)",),
    ),
    "norms differ": (
        _part(1, lambda t: t["norm.weight"].add_(1)),
        ("norm.weight: differs between consolidated.00.pth and consolidated.01.pth",),
    ),
    "norm cut": (
        lambda f: [_part(n, lambda t: t.update({"norm.weight": torch.ones(8)}))(f) for n in (0, 1)],
        ("norm.weight: has shape (8,) instead of (16,) in each file",),
    ),
    "types differ": (
        _part(1, lambda t: t.update({WQ: t[WQ].half()})),
        (f"{WQ}: parts of types torch.float32, torch.float16",),
    ),
    "surplus": (
        lambda f: [_part(n, lambda t: t.update(spare=torch.ones(1)))(f) for n in (0, 1)],
        ("spare in consolidated.00.pth is not part of the model",),
    ),
    "one file too": (
        lambda f: shutil.copyfile(f / "consolidated.00.pth", f / "consolidated.pth"),
        ("holds consolidated.pth and consolidated.00.pth",),
    ),
}
WRITERS: dict[str, Callable[[Path, Transformer], Path]] = {
    "safetensors": write_hugging_face,
    "shards": lambda folder, model: write_shards(folder, model, 3),
    "parts": lambda folder, model: write_parts(folder, model, 2, embedding_dim=1),
}
DAMAGES = [
    *(("safetensors", case) for case in SAFETENSORS),
    *(("shards", case) for case in SHARDS),
    *(("parts", case) for case in PARTS),
]


@pytest.mark.parametrize(("way", "case"), DAMAGES)
def test_damage_is_named(way: str, case: str, model: Transformer, tmp_path: Path) -> None:
    change, words = {"safetensors": SAFETENSORS, "shards": SHARDS, "parts": PARTS}[way][case]
    folder = WRITERS[way](tmp_path, model)
    loaded(folder)
    change(folder)
    for read in (lambda: check_trunk(folder, 1), lambda: loaded(folder)):
        with pytest.raises(InputError) as caught:
            read()
        message = str(caught.value)
        assert message.startswith(str(folder))
        assert all(word in message for word in words), message
