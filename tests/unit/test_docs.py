"""Docs say what is there: files, commands and targets that they name exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*.md")])
    if page.name != "names.md"  # which is about names that are gone
]
_ROOMS = "job|slurm|configs|bench|tests|containers|docs"
_PATH = re.compile(rf"(?<![\w-])(?:{_ROOMS})/[\w./-]*\w(?![\w*{{])")


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    file: Path = request.param
    return file


def _links(text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            yield target.partition("#")[0]


def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in _links(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_paths_exist(page: Path) -> None:
    named = {path.rstrip(".") for path in _PATH.findall(page.read_text())}
    missing = {p for p in named if not (ROOT / p).exists() and not (ROOT / f"{p}.py").exists()}
    assert not missing


def test_commands_exist(page: Path) -> None:
    modules = set(re.findall(r"-m (job[.\w]*)", page.read_text()))
    assert not {module for module in modules if find_spec(module) is None}


def test_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ *)make ([\w-]+)", page.read_text(), re.MULTILINE))
    assert named <= targets


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
