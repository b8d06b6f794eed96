"""The examples of the README, and of docs/ranker.md, are run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(language: str, path: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def test_the_layers(tmp_path, monkeypatch):
    """All blocks in one session, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), names)
    assert names["content"].shape == (32, 512)
    assert names["queries"].grad is not None
    assert names["y"].shape == (64, 256)
    assert names["interest"].shape == (2, 256)
    assert names["ids"].weight.grad.any()
    assert names["to_id"].weight.grad.any()


def test_em3_around_another_ranker():
    names: dict = {}
    (block,) = blocks("python", README.parent / "docs" / "ranker.md")
    exec(compile(block, "docs/ranker.md", "exec"), names)
    assert names["logits"].shape == (500,)
    assert names["losses"].contrast > 0


def test_training_from_end_to_end(tmp_path):
    for package in ("pyarrow", "PIL", "sklearn", "omegaconf", "tokenizers", "matplotlib"):
        pytest.importorskip(package)
    script = next(block for block in blocks("sh") if "em3 train" in block)
    assert script.count("/tmp/") >= 6
    script = script.replace("/tmp/", f"{tmp_path}/")
    # `em3` is the one of this environment, wherever PATH leads.
    script = f'em3() {{ "{sys.executable}" -m em3.cli "$@"; }}\nset -e\n{script}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "content.npy").exists()
    assert (tmp_path / "shop-run" / "report.html").exists()
    assert re.search(r"^EM3 +0\.\d{4}", done.stdout, re.M), done.stdout
