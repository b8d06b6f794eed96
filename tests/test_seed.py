"""``EM3_TEST_SEED`` repeats a run: hypothesis' inputs as well as torch's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

DRAWS = """
import torch
from hypothesis import given, settings, strategies as st

def test_draws():
    drawn = [float(torch.rand(()))]

    @settings(max_examples=5)
    @given(number=st.integers(0, 10**9))
    def draw(number):
        drawn.append(number)

    draw()
    print("drawn", drawn)
"""


def run(folder: Path, seed: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "."], cwd=folder,
        env=os.environ | {"EM3_TEST_SEED": str(seed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "drawn" in line)
    return line


def test_a_seed_repeats_a_run_and_another_does_not(tmp_path):
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "test_draws.py").write_text(DRAWS)
    first = run(tmp_path, 1)
    assert run(tmp_path, 1) == first
    assert run(tmp_path, 2) != first
