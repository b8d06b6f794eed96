from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import guard

Found = list[tuple[tuple[str, ...], list[float]]]
FOUND = pytest.StashKey[Found]()


def pytest_configure(config: pytest.Config) -> None:
    os.environ["EM3_TUNING"] = "0"  # the floors were measured with what the cost models choose
    found: Found = []
    config.stash[FOUND] = found


def pytest_sessionfinish(session: pytest.Session) -> None:
    found = session.config.stash[FOUND]
    if found:
        guard.write(found)


@pytest.fixture
def found(request: pytest.FixtureRequest) -> Found | None:
    """Where to put what is measured if floors are to be set, None if they are to be held."""
    return request.config.stash[FOUND] if os.environ.get("EM3_SET_FLOORS") == "1" else None


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def floors() -> dict[str, Any]:
    return guard.read()
