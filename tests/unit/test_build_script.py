"""containers/build.sh where something is missing, without an engine or Apptainer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_PROGRAMS = ("sh", "date", "dirname", "basename", "git", "sed", "grep", "cat")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The little of a checkout that the script looks at before it builds."""
    folder = tmp_path / "checkout"
    for name in ("containers/build.sh", "job/__init__.py", "constraints.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "containers/build.sh").chmod(0o755)
    (tmp_path / "bin").mkdir()
    for name in _PROGRAMS:
        _program(tmp_path, name, f'exec {_where(name)} "$@"')
    _program(tmp_path, "engine", '[ "$1" = info ] || { echo "asked: $*" >&2; exit 1; }')
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


def _where(name: str) -> str:
    return subprocess.run(
        ["sh", "-c", f"command -v {name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def _program(folder: Path, name: str, text: str) -> None:
    file = folder / "bin" / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def _said(checkout: Path, *options: str, engine: str = "engine") -> str:
    """What the script says before it gives up."""
    environment = {"PATH": str(checkout.parent / "bin"), "ENGINE": engine, "HOME": os.devnull}
    done = subprocess.run(
        [checkout / "containers/build.sh", *options],
        env=environment,
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    return done.stderr


def test_without_an_engine_it_says_what_is_missing_what_for_and_how_to_get_it(
    checkout: Path,
) -> None:
    said = _said(checkout, engine="podman docker")
    assert "no container engine answers" in said
    assert "builds the image" in said
    assert "apt install podman" in said


def test_without_apptainer_it_says_so_before_it_builds(checkout: Path) -> None:
    said = _said(checkout)
    assert "apptainer is not installed, and it makes the SIF" in said
    assert "--image-only" in said
    assert "asked:" not in said


def test_options_that_cannot_hold_are_refused(checkout: Path) -> None:
    assert "no option '--varaint'" in _said(checkout, "--varaint")
    assert "no such folder" in _said(checkout, "--find-links", "nowhere")
    assert "its folder does not exist" in _said(checkout, "--out", "nowhere/critic.sif")


def test_the_label_marks_what_is_not_committed(checkout: Path) -> None:
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.strip()
    for name in ("notes.txt", "README.md"):
        (checkout / name).write_text("not in the image")
    assert f"COMMIT={head} " in _said(checkout, "--image-only")
    (checkout / "job/new.py").touch()
    said = _said(checkout, "--image-only")
    assert f"COMMIT={head}-dirty " in said
    assert "job/new.py" in said


def test_a_variant_names_its_build_of_torch(checkout: Path) -> None:
    torch = next(x for x in (checkout / "constraints.txt").read_text().split() if "torch==" in x)
    assert f"TORCH={torch} " in _said(checkout, "--image-only")
    assert f"TORCH={torch}+cpu " in _said(checkout, "--image-only", "--variant", "cpu")
    older = _said(checkout, "--image-only", "--variant", "cu126")
    assert f"TORCH={torch}+cu126 " in older
    assert "CONSTRAINTS=constraints.txt " in older  # without those of CUDA 13
