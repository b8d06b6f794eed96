"""Fresh random inputs in every run, and a seed that brings them back: ``EM3_TEST_SEED=... pytest``."""

from __future__ import annotations

import logging
import os
import random
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# No database: an example kept from another run would come first, and move all that are drawn after it.
settings.register_profile(
    "em3", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True, database=None
)
settings.load_profile("em3")


@pytest.hookimpl(tryfirst=True)  # hypothesis reads its option in this hook
def pytest_configure(config: pytest.Config) -> None:
    # Workers of pytest-xdist inherit the controller's seed through the environment.
    os.environ["EM3_TUNING"] = "0"  # what the user has tuned must not change what is tested
    os.environ.setdefault("EM3_TEST_SEED", str(random.SystemRandom().randrange(2**31)))
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = os.environ["EM3_TEST_SEED"]


def pytest_report_header(config: pytest.Config) -> str:
    return f"EM3_TEST_SEED={os.environ['EM3_TEST_SEED']} (set it to repeat this run's inputs)"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of its own for each test, drawn from the run's; torch's generator starts there."""
    value = zlib.crc32(f"{os.environ['EM3_TEST_SEED']}/{request.node.nodeid}".encode())
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    """Every test starts from its own seed."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The same bits in every process that takes one thread too; and no handler of a run stays behind."""
    threads, handlers = torch.get_num_threads(), list(logging.getLogger("em3").handlers)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.getLogger("em3").handlers[:] = handlers
