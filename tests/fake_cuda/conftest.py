"""The torch that the tests of this folder run."""

from __future__ import annotations

import pytest

from fake_cuda.runtime import NEWEST, FakeCuda


@pytest.fixture(scope="session")
def cuda() -> FakeCuda:
    """The newest torch that is allowed."""
    return FakeCuda.of(NEWEST)
