"""An architecture is read without torch, and nothing in a weight file is executed or trusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from job.common.errors import InputError
from job.model.architecture_file import read_architecture
from job.model.weights import open_weights

EMBEDDING = "tok_embeddings.weight"
VOCABULARY, DIM = 37, 8
PARAMS = {"dim": DIM, "n_layers": 2, "n_heads": 2, "vocab_size": -1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    return tmp_path


def _store(weights: object, folder: Path, **options: Any) -> Path:
    torch.save(weights, folder / "consolidated.pth", **options)
    return folder


def _store_pickle(content: bytes, folder: Path, name: str = "a/data.pkl") -> Path:
    """A file laid out as torch.save does, with this pickle in it."""
    with zipfile.ZipFile(folder / "consolidated.pth", "w") as archive:
        archive.writestr(name, content)
        archive.writestr("a/version", "3\n")
    return folder


def _refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_architecture(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'consolidated.pth'}: ")
    return message


# What is read


class _Llama(nn.Module):
    """A state dict of this carries versions as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.tok_embeddings = nn.Embedding(VOCABULARY, DIM)


def _with_attribute(weight: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(weight)
    parameter.model_parallel = True  # type: ignore[attr-defined]
    return parameter


def _plain(weight: Tensor) -> dict[str, Tensor]:
    return {"norm.weight": torch.ones(3), EMBEDDING: weight}


STATE_DICTS: dict[str, Callable[[Tensor], object]] = {
    "dict": _plain,
    "OrderedDict": lambda w: OrderedDict(_plain(w)),
    "parameters": lambda w: {k: nn.Parameter(v) for k, v in _plain(w).items()},
    "parameter with an attribute": lambda w: {EMBEDDING: _with_attribute(w)},
    "of a module": lambda w: _Llama().to(w.dtype).state_dict(),
    "tied": lambda w: {"output.weight": w, EMBEDDING: w},
    "part of a larger storage": lambda w: {EMBEDDING: torch.cat([w, w])[:VOCABULARY]},
    "transposed in memory": lambda w: {EMBEDDING: w.T.contiguous().T},
    "other numbers beside": lambda w: (
        _plain(w)
        | {
            "rope.freqs": torch.ones(2, dtype=torch.complex64),
            "output.weight": torch.ones(2, dtype=torch.float8_e4m3fn),
            "extra_heads.0": torch.ones(2, dtype=torch.uint16),
            "scale": torch.tensor(1),
        }
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", STATE_DICTS)
def test_the_vocabulary_is_that_of_the_stored_embedding(
    case: str, dtype: torch.dtype, folder: Path
) -> None:
    _store(STATE_DICTS[case](torch.zeros(VOCABULARY, DIM, dtype=dtype)), folder)
    architecture = read_architecture(folder)
    assert architecture.vocab_size == VOCABULARY
    assert open_weights(folder, architecture)[EMBEDDING].shape == (VOCABULARY, DIM)


def test_without_torch(folder: Path) -> None:
    _store(_plain(torch.zeros(VOCABULARY, DIM)), folder)
    code = (
        "import sys; from job.model.architecture_file import read_architecture; "
        "print(read_architecture(sys.argv[1]).vocab_size, {'torch', 'numpy'} & set(sys.modules))"
    )
    line = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout == f"{VOCABULARY} set()\n"


def test_a_given_vocabulary_needs_no_weights(folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": 5}))
    assert read_architecture(folder).vocab_size == 5


def test_numbers_are_left_unread(folder: Path) -> None:
    _store(_plain(torch.zeros(VOCABULARY, DIM)), folder)
    file = folder / "consolidated.pth"
    shorter = file.with_suffix(".new")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(shorter, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"" if "/data/" in name else source.read(name))
    shutil.move(shorter, file)
    assert read_architecture(folder).vocab_size == VOCABULARY


# What is refused


class _Call:
    """A pickle of this calls a function when it is loaded."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def _call_by_name(name: str, argument: str) -> bytes:
    """A pickle that calls a function of a name that only the reader resolves."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n(V{argument}\ntR.".encode()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, exec])
def test_code_is_refused_and_not_run(
    function: Callable[..., object], protocol: int, folder: Path
) -> None:
    made = folder / "executed"
    shell, python = f"touch {made}", f"open({str(made)!r}, 'w')"
    code = _Call(function, shell if function is os.system else python)
    for content in (code, {EMBEDDING: code}, [code]):
        _store_pickle(pickle.dumps(content, protocol), folder)
        assert "never run" in _refusal(folder)
    assert not made.exists()


@pytest.mark.parametrize(
    "name",
    [
        "posix.system",
        "builtins.getattr",
        "collections.namedtuple",
        "collections.OrderedDict.fromkeys",
        "torch.load",
        "torch.hub.load",
        "torch.storage.os.FloatStorage",
        "torch.FloatStorage.from_file",
        "torch._utils.importlib.import_module",
        "torch.serialization._get_layout",
        "job.model.architecture.read_architecture",
    ],
)
def test_any_other_name_is_refused(name: str, folder: Path) -> None:
    _store_pickle(_call_by_name(name, "x"), folder)
    assert "never run" in _refusal(folder)


@pytest.mark.parametrize("name", ["torch.FloatStorage", "torch.float32"])
def test_a_type_cannot_be_called(name: str, folder: Path) -> None:
    _store_pickle(_call_by_name(name, "x"), folder)
    assert "not a readable weight file" in _refusal(folder)


def _shape(sizes: bytes) -> bytes:
    """A state dict whose embedding has these pickled sizes."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00" + sizes + b"tR"
    return b"\x80\x02}X\x15\x00\x00\x00" + EMBEDDING.encode() + call + b"s."


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (b"(K\x25K\x08t", None),
        (b"(X\x01\x00\x00\x003K\x08t", "damaged"),
        (b"]", "damaged"),
        (b"N", "damaged"),
        (b"(\x88K\x08t", "damaged"),  # True is no size
        (b"(K\x25t", "no matrix tok_embeddings.weight"),
        (b"(K\x25K\x08K\x01t", "no matrix tok_embeddings.weight"),
    ],
)
def test_sizes_are_two_integers(sizes: bytes, words: str | None, folder: Path) -> None:
    _store_pickle(_shape(sizes), folder)
    if words is None:
        assert read_architecture(folder).vocab_size == VOCABULARY
    else:
        assert words in _refusal(folder)


@pytest.mark.parametrize("size", [b"J\xff\xff\xff\xff", b"K\x00", b"J\x00\x00\x00\x7f"])
def test_an_impossible_vocabulary(size: bytes, folder: Path) -> None:
    _store_pickle(_shape(b"(" + size + b"K\x08t"), folder)
    with pytest.raises(InputError, match="vocab_size must be an integer from 1 to"):
        read_architecture(folder)


W = torch.zeros(VOCABULARY, DIM)
OTHERS: dict[str, tuple[object, str]] = {
    "no embedding": ({"norm.weight": W}, "no matrix tok_embeddings.weight"),
    "a vector": ({EMBEDDING: W[0]}, "no matrix tok_embeddings.weight"),
    "nothing": ({}, "no matrix tok_embeddings.weight"),
    "a list": ([W], "a dictionary of named tensors"),
    "a tensor": (W, "a dictionary of named tensors"),
    "nested": ({"model": {EMBEDDING: W}}, "a dictionary of named tensors"),
    "numbered": ({0: W, EMBEDDING: W}, "a dictionary of named tensors"),
    "a number beside": ({EMBEDDING: W, "step": 3}, "a dictionary of named tensors"),
    "a type beside": ({EMBEDDING: W, "dtype": torch.float32}, "a dictionary of named tensors"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_contents(case: str, folder: Path) -> None:
    weights, words = OTHERS[case]
    assert words in _refusal(_store(weights, folder))


def test_the_format_before_zip(folder: Path) -> None:
    _store(_plain(W), folder, _use_new_zipfile_serialization=False)
    assert "no zip file as torch.save writes it" in _refusal(folder)


def test_no_file(folder: Path) -> None:
    assert "cannot read the weights: No such file" in _refusal(folder)


def test_a_truncated_file(folder: Path) -> None:
    file = _store(_plain(W), folder) / "consolidated.pth"
    file.write_bytes(file.read_bytes()[:-10])
    assert "truncated" in _refusal(folder)


def test_any_flipped_byte_is_harmless(folder: Path) -> None:
    """Each byte of the pickle in turn: an InputError or an architecture, and nothing else."""
    stream = io.BytesIO()
    torch.save(_plain(W), stream)
    with zipfile.ZipFile(stream) as archive:
        content = archive.read("archive/data.pkl")
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= 1
        _store_pickle(bytes(damaged), folder)
        try:
            read_architecture(folder)
        except InputError:
            continue


def test_a_wrong_checksum(folder: Path) -> None:
    file = _store(_plain(W), folder) / "consolidated.pth"
    raw = file.read_bytes()
    at = raw.index(b"tok_embeddings")
    file.write_bytes(raw[:at] + b"T" + raw[at + 1 :])
    assert "not a readable weight file: BadZipFile" in _refusal(folder)


def test_a_zip_without_a_pickle(folder: Path) -> None:
    _store_pickle(b"", folder, name="a/other")
    assert "not a readable weight file" in _refusal(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x02h\x07.", b"\x80\x02}"])
def test_a_pickle_cut_short(content: bytes, folder: Path) -> None:
    _store_pickle(content, folder)
    _refusal(folder)
