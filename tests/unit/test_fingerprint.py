"""Fingerprints: equal for equal trunks however they are stored, and different for any other."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from job.common.derived import sealed_text
from job.common.errors import InputError
from job.model.architecture import RopeScaling, TransformerConfig
from job.model.fingerprint import fingerprint
from job.model.transformer import Transformer
from job.model.weights import save_transformer

TINY = TransformerConfig(dim=16, n_layers=2, n_heads=4, vocab_size=11, multiple_of=8)
WEIGHTS = {
    "tok_embeddings.weight": torch.arange(22, dtype=torch.bfloat16).reshape(11, 2),
    "layers.0.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7,
    "layers.1.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4) / 9,
    "norm.weight": torch.ones(4, dtype=torch.float16),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 3),
}
A, B = "layers.0.weight", "layers.1.weight"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.model.fingerprint.BLOCK", 32)  # two rows of both matrices


def _write(
    folder: Path, weights: dict[str, Tensor] = WEIGHTS, config: TransformerConfig = TINY
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "consolidated.pth")
    (folder / "params.json").write_text(json.dumps(asdict(config)))
    return folder


def _uncached(folder: Path) -> str:
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    return fingerprint(folder, cache)


def _of(folder: Path, weights: dict[str, Tensor]) -> str:
    return _uncached(_write(folder, weights))


def _cache_file(cache: Path) -> Path:
    (file,) = (cache / "fingerprints").iterdir()
    return file


def _no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(folder: Path, config: TransformerConfig) -> None:
        raise AssertionError(f"{folder}: weights opened")

    monkeypatch.setattr("job.model.fingerprint.open_weights", opened)


# --- what it depends on ----------------------------------------------------------------------


def test_checkpoints_of_before_still_find_their_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the block size that is in use, and 68 MiB for it to divide
    large = {"large": torch.ones(1, 2**20).expand(17, -1)}
    assert _of(tmp_path, WEIGHTS | large) == (
        "752dfc2a28d7f72d0e054c497f479f1b10b7a3ff63a3d1f369b1b5cac8971637"
    )


@pytest.mark.slow
def test_one_flipped_bit_in_any_byte_changes_it(tmp_path: Path) -> None:
    found = {_of(tmp_path, WEIGHTS)}
    flips = 0
    for name, tensor in WEIGHTS.items():
        for byte in range(tensor.nbytes):
            flipped = tensor.clone()
            flipped.view(-1).view(torch.uint8)[byte] ^= 1 << byte % 8
            found.add(_of(tmp_path, WEIGHTS | {name: flipped}))
            flips += 1
    assert flips > 150
    assert len(found) == 1 + flips


OTHERS: dict[str, dict[str, Tensor]] = {
    "names swapped": WEIGHTS | {A: WEIGHTS[B], B: WEIGHTS[A]},
    "blocks swapped": WEIGHTS | {A: WEIGHTS[A][[2, 1, 0]]},
    "same bytes, other shape": WEIGHTS | {A: WEIGHTS[A].reshape(4, 3)},
    "same bytes, flat": WEIGHTS | {A: WEIGHTS[A].flatten()},
    "same bytes, other dtype": WEIGHTS | {A: WEIGHTS[A].view(torch.bfloat16)},
    "same bytes and shape, other dtype": WEIGHTS
    | {"norm.weight": WEIGHTS["norm.weight"].view(torch.bfloat16)},
    "same values, other dtype": WEIGHTS | {A: WEIGHTS[A].double()},
    "a row moved to the next tensor": WEIGHTS
    | {A: WEIGHTS[A][:2], B: torch.cat([WEIGHTS[A][2:], WEIGHTS[B]])},
    "a vector for a scalar": WEIGHTS | {"scalar": WEIGHTS["scalar"].reshape(1)},
    "other empty shape": WEIGHTS | {"empty": torch.empty(3, 0)},
    "nothing for an empty tensor": {k: v for k, v in WEIGHTS.items() if k != "empty"},
    "one more": WEIGHTS | {"more": torch.ones(1)},
    "renamed": {k.replace("layers.1", "layers.2"): v for k, v in WEIGHTS.items()},
    "minus zero": WEIGHTS | {A: torch.where(WEIGHTS[A] == 0, -0.0, WEIGHTS[A])},
}


def test_no_two_of_these_trunks_are_alike(tmp_path: Path) -> None:
    found = {case: _of(tmp_path, weights) for case, weights in OTHERS.items()}
    found["plain"] = _of(tmp_path, WEIGHTS)
    assert len(set(found.values())) == len(found), found


STORED_OTHERWISE: dict[str, dict[str, Tensor]] = {
    "other order": dict(reversed(WEIGHTS.items())),
    "transposed in memory": WEIGHTS | {A: WEIGHTS[A].T.contiguous().T},
    "every second number of a storage": WEIGHTS | {A: WEIGHTS[A].repeat_interleave(2, 1)[:, ::2]},
    "inside a larger storage": WEIGHTS | {A: torch.cat([WEIGHTS[B], WEIGHTS[A]])[3:]},
    "repeated by stride 0": WEIGHTS | {"norm.weight": torch.ones(1, dtype=torch.float16).expand(4)},
    "parameters": {k: torch.nn.Parameter(v) for k, v in WEIGHTS.items()},
    "a RoPE table too": WEIGHTS | {"rope.freqs": torch.zeros(3, dtype=torch.int8)},
    "heads too": WEIGHTS | {"output.weight": torch.ones(2), "extra_heads.0.wq": torch.ones(2)},
}


@pytest.mark.parametrize("case", STORED_OTHERWISE)
def test_how_weights_are_stored_plays_no_part(case: str, tmp_path: Path) -> None:
    assert _of(tmp_path, STORED_OTHERWISE[case]) == _of(tmp_path, WEIGHTS)


def test_tied_tensors_count_by_their_content(tmp_path: Path) -> None:
    tied = WEIGHTS | {B: WEIGHTS[A]}
    assert _of(tmp_path, tied) == _of(tmp_path, WEIGHTS | {B: WEIGHTS[A].clone()})
    assert _of(tmp_path, tied) != _of(tmp_path, WEIGHTS)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_plays_no_part(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _of(tmp_path, WEIGHTS)
    monkeypatch.setattr("job.model.fingerprint.THREADS", threads)
    assert _of(tmp_path, WEIGHTS) == expected


@pytest.mark.slow
def test_a_real_trunk_is_itself_with_and_without_its_heads(tmp_path: Path) -> None:
    model = Transformer(replace(TINY, n_layers=4, n_future_tokens=3))
    save_transformer(model, tmp_path)
    whole = _uncached(tmp_path)
    trunk = {k: v for k, v in model.state_dict().items() if k.startswith(("tok", "layers", "norm"))}
    assert 0 < len(trunk) < len(model.state_dict())
    torch.save(trunk, tmp_path / "consolidated.pth")
    assert _uncached(tmp_path) == whole


def test_architectures_that_compute_otherwise_differ(tmp_path: Path) -> None:
    configs = [
        TINY,
        replace(TINY, norm_eps=1e-6),
        replace(TINY, rope_theta=5e5),
        replace(TINY, n_heads=2),
        replace(TINY, rope_scaling=RopeScaling()),
        replace(TINY, rope_scaling=RopeScaling(factor=32.0)),
    ]
    assert len({_uncached(_write(tmp_path, config=config)) for config in configs}) == len(configs)


def test_how_params_are_written_plays_no_part(tmp_path: Path) -> None:
    expected = _uncached(_write(tmp_path))
    given: dict[str, Any] = {"vocab_size": -1, "rope_theta": 10000, "max_seq_len": 4096}
    given |= {"multiple_of": 8, "n_heads": 4, "n_layers": 2, "dim": 16}  # and defaults left out
    (tmp_path / "params.json").write_text(json.dumps(given, indent=4))
    assert _uncached(tmp_path) == expected


# --- the cache -------------------------------------------------------------------------------


def test_weights_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = _write(tmp_path / "base"), tmp_path / "not" / "yet"
    first = fingerprint(folder, cache)
    _no_reading(monkeypatch)
    assert fingerprint(str(folder), str(cache)) == first
    (tmp_path / "link").symlink_to(folder)
    assert fingerprint(tmp_path / "link", cache) == first
    _cache_file(cache).write_text(sealed_text("0" * 64))
    assert fingerprint(folder, cache) == "0" * 64


def test_weights_are_hashed_again_where_that_is_asked_for(tmp_path: Path) -> None:
    folder, cache = _write(tmp_path / "base"), tmp_path / "cache"
    file = folder / "consolidated.pth"
    first, before = fingerprint(folder, cache), file.stat()
    torch.save(WEIGHTS | {A: WEIGHTS[A] + 1}, file)
    os.utime(file, ns=(before.st_mtime_ns, before.st_mtime_ns))  # rotted, not changed
    assert fingerprint(folder, cache) == first
    assert fingerprint(folder, cache, verify=True) == _uncached(folder) != first


@pytest.mark.parametrize("later", [1, -1_000_000_000])
def test_a_change_of_the_same_size_is_seen(later: int, tmp_path: Path) -> None:
    folder, cache = _write(tmp_path / "base"), tmp_path / "cache"
    file = folder / "consolidated.pth"
    first, before = fingerprint(folder, cache), file.stat()
    torch.save(WEIGHTS | {A: WEIGHTS[A] + 1}, file)
    changed = before.st_mtime_ns + later
    os.utime(file, ns=(changed, changed))
    assert file.stat().st_size == before.st_size
    assert fingerprint(folder, cache) == _uncached(folder) != first


def test_a_change_of_size_at_the_same_time_is_seen(tmp_path: Path) -> None:
    folder, cache = _write(tmp_path / "base"), tmp_path / "cache"
    file = folder / "consolidated.pth"
    first, time = fingerprint(folder, cache), file.stat().st_mtime_ns
    torch.save(WEIGHTS | {"more": torch.ones(1)}, file)
    os.utime(file, ns=(time, time))
    assert fingerprint(folder, cache) != first


def test_another_architecture_is_seen(tmp_path: Path) -> None:
    folder, cache = _write(tmp_path / "base"), tmp_path / "cache"
    file = folder / "params.json"
    first, before = fingerprint(folder, cache), file.stat()
    file.write_text(json.dumps(asdict(replace(TINY, rope_theta=20000.0))))
    os.utime(file, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert fingerprint(folder, cache) != first


def test_folders_do_not_share_a_cached_value(tmp_path: Path) -> None:
    one = _write(tmp_path / "one")
    other = _write(tmp_path / "other", WEIGHTS | {A: WEIGHTS[A] + 1})
    for name in ("params.json", "consolidated.pth"):
        assert (one / name).stat().st_size == (other / name).stat().st_size
        for folder in (one, other):
            os.utime(folder / name, ns=(0, 0))
    assert fingerprint(one, tmp_path / "cache") != fingerprint(other, tmp_path / "cache")


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'"0000',
        b'"' + b"0" * 63 + b'"',
        b'"' + b"0" * 64 + b'"',  # without a checksum, as 0.1.0 wrote it
        sealed_text("0" * 64).replace("0" * 64, "1" * 64).encode(),
        bytes(100),
        b"\xff\xfe",
        b"7",
        b"[" * 9999,
    ],
)
def test_a_damaged_cache_file_is_made_again(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache = _write(tmp_path / "base"), tmp_path / "cache"
    expected = fingerprint(folder, cache)
    file = _cache_file(cache)
    intact = file.read_bytes()
    file.write_bytes(damage)
    assert fingerprint(folder, cache) == expected
    assert _cache_file(cache) == file
    assert file.read_bytes() == intact
    assert not caplog.records


@pytest.mark.parametrize("cache", ["file", "file/below", "x" * 300, "/proc/none"])
def test_without_a_cache_it_warns_and_goes_on(
    cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _write(tmp_path / "base")
    (tmp_path / "file").write_text("not a folder")
    assert fingerprint(folder, tmp_path / cache) == _uncached(folder)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "cannot keep the trunk's fingerprint: " in record.message


# --- what cannot be read ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["params.json", "consolidated.pth"])
def test_a_missing_file_is_an_error_after_a_cached_value_too(name: str, tmp_path: Path) -> None:
    folder, cache = _write(tmp_path / "base"), tmp_path / "cache"
    for _ in range(2):
        fingerprint(folder, cache)
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(InputError, match=f"base/{name}: cannot read"):
            fingerprint(folder, cache)
        (folder / name).write_bytes(content)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.11
@pytest.mark.parametrize(
    "unfit",
    [
        torch.eye(3).to_sparse(),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(3, dtype=torch.int8),
        torch.ones(3, device="meta"),
    ],
    ids=["sparse", "complex", "integers", "no content"],
)
def test_what_is_no_dense_array_of_floats_is_refused(unfit: Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"consolidated\.pth: norm\.weight is no dense array"):
        _of(tmp_path, WEIGHTS | {"norm.weight": unfit})
    assert not list(tmp_path.glob("cache/fingerprints/*"))
