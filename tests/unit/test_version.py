"""Whether a checkout's code is its commit's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from job.common import version


def _git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=one", "-c", "user.email=one@where")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A commit of code, notes and an accepted baseline."""
    for name in ("job/a.py", "configs/nightly/baseline/b.json", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    for words in (["init"], ["add", "."], ["commit", "-m", "all"]):
        _git(tmp_path, *words)
    monkeypatch.setattr(version, "_CHECKOUT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "edited"),
    [
        ("job/a.py", True),
        ("job/new.py", False),  # which no code that was committed knows
        ("configs/nightly/baseline/b.json", False),
        ("notes.md", False),
    ],
)
def test_code_that_is_in_no_commit_is_told(checkout: Path, name: str, edited: bool) -> None:
    assert not version.is_edited()
    (checkout / name).write_text("2")
    assert version.is_edited() == edited


def test_without_git_nothing_is_known(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "job/a.py").write_text("2")
    monkeypatch.setenv("PATH", "/nowhere")
    assert not version.is_edited()
