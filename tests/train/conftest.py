"""One small run for all tests that look at what a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .small import configured, silent, write_catalogue


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "cat"
    write_catalogue(folder)
    return folder


@pytest.fixture(scope="session")
def executed(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run of EM3 with one seed, executed to its report."""
    from em3.train.run import Run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run = Run(configured(catalogue), folder, silent)
    assert run.execute(["em3", "train", "it's"]) == folder / "report.html"
    torch.set_num_threads(threads)
    return run, folder
