"""Freed memory stays in the process, so that the next step finds its pages there."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from em3.train.allocator import keep_freed_memory
if {keep}:
    keep_freed_memory()
def step():
    tensors = [torch.ones(2_000_000) for _ in range(20)]  # 160 MB
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


def faults(keep: bool) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_step_finds_the_pages_of_the_last_one():
    kept, usual = faults(True), faults(False)
    if usual < 10_000:
        pytest.skip(f"the allocator keeps freed memory by itself here: {usual} page faults a step")
    assert kept < usual / 10
