"""``em3 bench compare``: two trees, each in a process of its own, in turns."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("yaml", "psutil"):
    pytest.importorskip(package)

import em3
from em3.benchmarks import compare
from em3.benchmarks.compare import CompareError, Worker

from .tiny import SHAPES

SHAPE = SHAPES[-1]
CODE = Path(em3.__file__).parent


@pytest.fixture
def tree(tmp_path):
    """A copy of em3, to be changed."""
    shutil.copytree(CODE, tmp_path / "base" / "em3", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "base"


@pytest.fixture
def measured(tree, monkeypatch):
    """Of this tree against the copy, as it is by then."""
    monkeypatch.setattr(compare, "SECONDS", 0.0)
    sides = []

    def both():
        sides.extend([Worker(CODE.parent), Worker(tree)])
        return compare.measured(sides, SHAPE, "cpu", "float32")

    yield both
    for side in sides:
        side.close()


def change(tree: Path, line: str) -> None:
    """Put a line before the first one of the public function's body."""
    module = tree / "em3" / "ops" / "contrastive_loss.py"
    head, found, rest = module.read_text().partition("    dtype = content.dtype\n")
    assert found
    module.write_text(f"{head}    {line}\n{found}{rest}")


def test_the_same_tree_twice(measured):
    row = measured()
    assert set(row) == {"this_seconds", "other_seconds", "ratio"}
    assert all(0 < p20 <= p50 <= p80 for p20, p50, p80 in row.values())


def test_a_slower_tree_is_slower(tree, measured):
    change(tree, "__import__('time').sleep(0.05)")
    assert measured()["ratio"][1] > 1.5


def test_a_tree_that_computes_something_else_is_no_comparison(tree, measured):
    change(tree, "logit_scale = logit_scale * 1.1")
    assert measured() == {"reason": "the two compute different things from the same inputs"}


def test_a_tree_that_cannot_do_a_shape_says_so(tree, measured):
    change(tree, "raise NotImplementedError('too old')")
    assert measured() == {"reason": "the revision: NotImplementedError: too old"}


def test_a_process_that_ends_is_an_error(tree):
    (tree / "em3" / "__init__.py").write_text("raise SystemExit(3)")
    side = Worker(tree)
    with pytest.raises(CompareError, match=f"measures {tree} ended with 3"):
        side.ask("prepare", op=SHAPE.op, dims=SHAPE.dims, device="cpu", dtype="float32", threads=1)
    side.close()


def test_a_whole_comparison(tmp_path, monkeypatch):
    """Of a checkout with one commit, whose revision differs from the tree; building is left out, it is that of setup.py."""
    root = tmp_path / "root"
    shutil.copytree(CODE, root / "em3", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    for words in (["init", "-q"], ["add", "em3"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True, env=environment)
    change(root, "__import__('time').sleep(0.05)")
    monkeypatch.setattr(compare, "ROOT", root)
    monkeypatch.setattr(compare, "build", lambda tree, cuda: None)
    monkeypatch.setattr(compare, "SECONDS", 0.0)
    done = []
    path = compare.compare("HEAD", [SHAPE], "cpu", "float32", tmp_path / "out", lambda name, i, of, numbers: done.append((i, of)))
    assert done == [(0, 1), (1, 1), (1, 1)]  # of the build, and of the shape
    title, _, head, _, row = path.read_text().splitlines()
    assert title.startswith("# This tree against HEAD (")
    assert head.startswith("| operation | shape | this, ms | HEAD (")
    faster = float(row.split("|")[5].strip().removesuffix("x"))
    assert faster < 0.7
    with pytest.raises(CompareError, match="nonsense: no such revision"):
        compare.compare("nonsense", [SHAPE], "cpu", "float32", tmp_path / "out", lambda *at: None)


def test_a_tree_that_cannot_be_built_is_an_error(tmp_path):
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler')")
    with pytest.raises(CompareError, match="no compiler"):
        compare.build(tmp_path, cuda=False)


@pytest.mark.parametrize("words", [["compare"], ["compare", "HEAD", "nothing"], ["compare", "HEAD", "overhead"]])
def test_complaints(words, tmp_path):
    code = [sys.executable, "-m", "em3.cli", "bench", *words, "--out", str(tmp_path / "out")]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert ("must be followed by a revision" if len(words) == 1 else f"no operation '{words[-1]}'") in done.stderr
