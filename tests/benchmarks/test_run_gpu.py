"""``benchmarks/run_gpu.sh``: its order and its budget, with an interpreter that only writes down what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SUITES = ("qformer_attention", "lora_linear", "lora_target_attention", "contrastive_loss", "strategies", "overhead", "end_to_end")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "run_gpu.sh"
PYTHON = """#!/bin/sh
echo "$@" >>"$LOG"
case "$*" in *{slow}*) {deaf}exec sleep 60 ;; *{broken}*) exit 3 ;; esac
"""


@pytest.fixture
def go(tmp_path):
    for tool in ("bash", "timeout"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here")

    def run(slow: str = "nothing", deaf: bool = False, broken: str = "nothing", budget: int = 60, resume: str = "") -> tuple[int, list[str]]:
        python, log = tmp_path / "python", tmp_path / "log"
        python.write_text(PYTHON.format(slow=slow, deaf="trap '' INT; " if deaf else "", broken=broken))
        python.chmod(0o755)
        environment = os.environ | {"PYTHON": str(python), "LOG": str(log), "OUT": str(tmp_path / "out"), "BUDGET": str(budget), "GRACE": "1", "RESUME": resume}
        status = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True).returncode
        return status, log.read_text().splitlines() if log.exists() else []

    return run


def test_build_tests_then_the_shortest_set_first(go):
    status, asked = go()
    assert status == 0
    assert [line.split()[1] for line in asked] == ["import", "pip", "em3.cli", "pytest", *["em3.cli"] * 2 * len(SUITES)]
    assert "is_available" in asked[0]  # before the minutes that a build takes
    assert "--no-index" in asked[1]
    quick, full = asked[4 : 4 + len(SUITES)], asked[4 + len(SUITES) :]
    assert {line.split()[3] for line in quick} == {line.split()[3] for line in full} == set(SUITES)
    assert all("--device cuda --resume" in line for line in (*quick, *full))
    assert ["--quick" in line for line in (*quick, *full)] == [True] * len(SUITES) + [False] * len(SUITES)


def test_what_is_there_is_not_taken_for_new(go, tmp_path):
    (tmp_path / "out" / "quick").mkdir(parents=True)
    (tmp_path / "out" / "quick" / "results.jsonl").write_text("{}")
    assert go() == (1, [])
    assert len(go(resume="1")[1]) == 4 + 2 * len(SUITES)


def test_tests_leave_time_for_the_benchmarks(go):
    status, asked = go(slow="tests/gpu", budget=15)
    assert status == 0
    assert len(asked) > 4 + len(SUITES)


def test_it_stops_in_time_without_failing(go):
    start = time.monotonic()
    status, asked = go(slow="--quick", budget=8)
    assert status == 0
    assert len(asked) == 5  # no time was left for what follows
    assert time.monotonic() - start < 25


def test_what_does_not_heed_the_end_is_killed_without_failing(go):
    """A compiler or a kernel may not hand Ctrl-C on for long."""
    status, asked = go(slow="--quick", deaf=True, budget=7)
    assert (status, len(asked)) == (0, 5)


def test_what_fails_is_told_at_the_end_and_stops_nothing_but_the_build(go):
    status, asked = go(broken="tests/gpu")
    assert (status, len(asked)) == (1, 4 + 2 * len(SUITES))


def test_a_suite_that_fails_stops_no_other(go):
    status, asked = go(broken="contrastive_loss")
    assert (status, len(asked)) == (1, 4 + 2 * len(SUITES))


def test_without_a_build_there_is_nothing_to_measure(go):
    status, asked = go(broken="pip")
    assert (status, len(asked)) == (3, 2)
