"""A trunk that a recipe makes is made once, and again where its folder is not whole any more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from micro_job import write_recipe

from job.common.derived import SUMS, defect, seal
from job.common.errors import InputError
from job.training.pretraining import ensure_trunk

pytestmark = pytest.mark.slow

RECIPE = ("data.arithmetic.train_examples=32", "training.max_steps=1", "training.batch_size=4")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trunk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_recipe(folder / "pretrain.yaml", RECIPE)
        ensure_trunk(Path("trunk"), "pretrain.yaml")
    return folder


@pytest.fixture
def trunk(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trunk, beside its recipe and the cache of its data."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here" / "trunk"


def _zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _same_weights(one: Path, other: Path) -> bool:
    a, b = (torch.load(path / "consolidated.pth", weights_only=True) for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


NAMES = ("consolidated.pth", "params.json", "tokenizer.json", "recipe.yaml")
LOSSES = [*((name, damage) for name in NAMES for damage in (_zeros, Path.unlink)), (SUMS, _zeros)]


@pytest.mark.parametrize(("name", "damage"), LOSSES)
def test_a_trunk_that_is_not_whole_is_made_anew_and_the_other_one_kept(
    made: Path,
    trunk: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    (trunk / "notes.txt").write_text("mine")
    damage(trunk / name)
    ensure_trunk(trunk, "pretrain.yaml")
    assert _same_weights(trunk, made / "trunk")
    assert _names(trunk) == _names(made / "trunk")
    assert (trunk.parent / "damaged-trunk" / "notes.txt").read_text() == "mine"
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().endswith("; made anew")]
    assert said.startswith(f"{trunk / name} ")
    ensure_trunk(trunk, "pretrain.yaml", verify=True)
    assert "damaged-trunk.2" not in _names(trunk.parent)


@pytest.mark.parametrize("more", ["notes.txt", None])
def test_a_trunk_of_before_there_were_sums_is_used_as_it_is(trunk: Path, more: str | None) -> None:
    (trunk / SUMS).unlink()
    if more is not None:
        (trunk / more).touch()
    before = trunk.stat().st_ino
    ensure_trunk(trunk, "pretrain.yaml", verify=True)
    assert trunk.stat().st_ino == before
    (trunk / "consolidated.pth").unlink()
    ensure_trunk(trunk, "pretrain.yaml")
    assert (trunk / "consolidated.pth").exists()


def test_the_other_layout_may_be_removed(trunk: Path) -> None:
    before = trunk.stat().st_ino
    shutil.rmtree(trunk / "hf")
    ensure_trunk(trunk, "pretrain.yaml", verify=True)
    assert trunk.stat().st_ino == before


def test_a_damaged_trunk_of_another_recipe_is_not_replaced(trunk: Path) -> None:
    _zeros(trunk / "consolidated.pth")
    write_recipe(Path("other.yaml"), [*RECIPE, "training.seed=7"])
    with pytest.raises(InputError, match="made by another recipe"):
        ensure_trunk(trunk, "other.yaml")
    assert "damaged-trunk" not in _names(trunk.parent)


def test_one_bit_is_found_where_all_of_it_is_looked_at(made: Path, trunk: Path) -> None:
    file = trunk / "consolidated.pth"
    with file.open("ab") as stream:
        stream.truncate(3 << 20)
    seal(trunk)
    content = bytearray(file.read_bytes())
    content[2_000_000] ^= 1
    file.write_bytes(bytes(content))
    assert defect(trunk) is None
    assert defect(trunk, verify=True) == f"{file} was changed: its checksum differs"
    ensure_trunk(trunk, "pretrain.yaml", verify=True)
    assert _same_weights(trunk, made / "trunk")
