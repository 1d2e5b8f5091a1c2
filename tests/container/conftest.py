"""The image and the SIF of this checkout, built once for all that goes into them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest
from built import BUILD_SECONDS, Built, build, build_sandbox, name_of
from tools import Missing, NotPackaged, Tools, find_tools


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test that needs the image builds it."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(BUILD_SECONDS + 600))


@pytest.fixture(scope="session")
def tools() -> Tools:
    try:
        return find_tools()
    except Missing as missing:
        here = os.environ.get("CI") == "true" and os.geteuid() == 0
        if here and Path("/etc/debian_version").exists() and not isinstance(missing, NotPackaged):
            pytest.fail(f"not to be had: {missing}")
        pytest.skip(f"not to be had here: {missing}")


@pytest.fixture(scope="session")
def built(tools: Tools) -> Built:
    """With the SIF as a folder, which is there sooner than a compressed file."""
    return build_sandbox(tools)


@pytest.fixture(scope="session")
def compressed(tools: Tools, built: Built) -> Built:
    """With the SIF as the nodes of a cluster run it."""
    result = Built(built.sif.with_name("critic.sif"))
    if not Path(f"{result.sif}.json").exists():
        with tools.alone():
            build(tools, result.sif, name_of(built.sif.parent))
    return result


@pytest.fixture(scope="session")
def built_again(tools: Tools, built: Built) -> Built:
    """From nothing, of the same checkout; the image alone, and only what was written about it."""
    result = Built(built.sif.with_name("again.sif"))
    if not Path(f"{result.sif}.json").exists():
        with tools.alone(), tools.with_another_storage() as others:
            build(others, result.sif, "critic-test-again", "--image-only", "--no-cache")
    return result


@pytest.fixture(scope="session")
def image(built: Built) -> str:
    return str(built.facts["image"])


@pytest.fixture(
    scope="session",
    params=["built", pytest.param("compressed", marks=pytest.mark.all)],
    ids=["sandbox", "compressed"],
)
def packed(request: pytest.FixtureRequest) -> Built:
    """Both forms of the SIF."""
    return cast(Built, request.getfixturevalue(request.param))


@pytest.fixture(scope="session")
def sif(packed: Built) -> Path:
    return packed.sif
