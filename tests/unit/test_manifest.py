"""No checkpoint that is not as it was written passes for a good one."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from disturbed_runs import environment, run_training, workspace

from job.run.manifest import MANIFEST, DamagedError, FileSum, Manifest

FILES = [".metadata", "__0_0.distcp", "rank-00000.state", "facts.json", "config.yaml"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that a training has written."""
    path = workspace(tmp_path_factory.mktemp("manifest"))
    with environment(path):
        run_training("real", "training.max_steps=2")
    return path / "runs/real/checkpoints/step-00000002"


@pytest.fixture
def folder(real: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(real, tmp_path / "step-00000002"))


def _check(folder: Path) -> None:
    Manifest.read(folder).verify(folder)


def _refused(folder: Path, name: str) -> None:
    with pytest.raises(DamagedError) as caught:
        _check(folder)
    assert str(folder / name) in str(caught.value)


def _flip(file: Path, position: int, mask: int) -> None:
    """Change some bits of one byte; doing it again undoes it."""
    with file.open("r+b", buffering=0) as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ mask]))


def test_an_intact_checkpoint_verifies_and_lists_every_file(folder: Path) -> None:
    _check(folder)
    manifest = Manifest.read(folder)
    assert (manifest.step, manifest.attempt) == (2, 1)
    assert sorted(manifest.files) == sorted(FILES)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, MANIFEST])


def test_a_manifest_reads_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "ä b").write_bytes(b"x")
    written = Manifest(10**12, 3, {"ä b": FileSum.of(tmp_path / "ä b")})
    written.write(tmp_path)
    assert Manifest.read(tmp_path) == written
    _check(tmp_path)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(0x20, id="case"),  # of letters, which hexadecimal digits may be, too
        pytest.param(0x01, marks=pytest.mark.slow, id="lowest bit"),
        pytest.param(0x80, marks=pytest.mark.slow, id="highest bit"),
    ],
)
def test_every_flipped_byte_of_the_manifest_is_detected(folder: Path, mask: int) -> None:
    file = folder / MANIFEST
    for position in range(file.stat().st_size):
        _flip(file, position, mask)
        _refused(folder, MANIFEST)
        _flip(file, position, mask)
    _check(folder)


def test_a_manifest_cut_anywhere_is_detected(folder: Path) -> None:
    intact = (folder / MANIFEST).read_bytes()
    for length in (*range(0, len(intact), 20), len(intact) - 2, len(intact) - 1):
        (folder / MANIFEST).write_bytes(intact[:length])
        _refused(folder, MANIFEST)


def test_a_manifest_with_anything_added_is_detected(folder: Path) -> None:
    intact = (folder / MANIFEST).read_bytes()
    for more in (b"\n", b" ", b"{}", b"\0"):
        for content in (intact + more, more + intact):
            (folder / MANIFEST).write_bytes(content)
            _refused(folder, MANIFEST)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"1", b'{"files": {"a": 1}}', b'{"files": []}', b"\xff", b"[" * 10**5],
    ids=["empty", "null", "list", "number", "sums", "files", "no UTF-8", "deep"],
)
def test_a_manifest_that_is_something_else_is_detected(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    _refused(folder, MANIFEST)


def test_a_missing_manifest_is_damage(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    _refused(folder, MANIFEST)


def test_a_manifest_of_another_checkpoint_is_detected(folder: Path) -> None:
    ours = Manifest.read(folder)
    files = {name: FileSum(one.bytes, "0" * 64) for name, one in ours.files.items()}
    Manifest(2, 1, files).write(folder)
    with pytest.raises(DamagedError, match="its checksum differs"):
        _check(folder)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bytes_of_every_file_are_detected(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    drawn = random.Random(name).sample(range(size), 20)
    for position in (0, size // 2, size - 1, *drawn):
        for mask in (0x01, 0x80):
            _flip(folder / name, position, mask)
            _refused(folder, name)
            _flip(folder / name, position, mask)
    _check(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: bytes(len(content)),
    ],
    ids=["empty", "half", "one byte less", "one byte more", "zeros"],
)
def test_every_file_of_another_length_or_of_zeros_is_detected(
    folder: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    _refused(folder, name)


@pytest.mark.parametrize("name", FILES)
def test_every_missing_file_is_detected(folder: Path, name: str) -> None:
    (folder / name).unlink()
    _refused(folder, name)
    (folder / name).mkdir()
    _refused(folder, name)


def test_two_files_that_changed_places_are_detected(folder: Path) -> None:
    (folder / "facts.json").rename(folder / "x")
    (folder / "config.yaml").rename(folder / "facts.json")
    (folder / "x").rename(folder / "config.yaml")
    with pytest.raises(DamagedError, match=r"facts\.json"):
        _check(folder)
