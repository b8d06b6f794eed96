"""`em3 bench compare REV`: another revision built beside this one, and both measured in turns, each in a process of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from em3.files import atomic

from .shapes import Shape

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("worker.py")
SECONDS, ROUNDS = 3.0, 9  # of a shape: at least so many rounds, and more until the time is over
SAME = 1e-3  # relative difference of the norms of results, beyond which the revisions compute different things
COLUMNS = ("operation", "shape", "this, ms", "REV, ms", "this is faster by", "p20 to p80")


class CompareError(RuntimeError):
    """The other revision cannot be measured; the message says why."""


class Worker:
    """A process with the em3 of one tree; see ``worker.py``."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        words = [sys.executable, "-P", str(WORKER), str(tree)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, task: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([task, arguments]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone, and so is its answer
        line = self.process.stdout.readline()
        if not line:
            raise CompareError(f"the process that measures {self.tree} ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def compare(revision: str, shapes: Sequence[Shape], device: str, dtype: str, out: Path,
            progress: Callable[[str, int, int, dict[str, float]], None]) -> Path:  # fmt: skip
    """Measure this tree, as it stands, against a revision of it; returns the path of the table.

    Rows are written as they come, to ``compare.jsonl`` and ``compare.md`` in ``out``.

    Raises:
        CompareError: this is no git checkout, there is no such revision, or it cannot be built.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="em3-compare-") as folder:
        base = Path(folder)
        commit = check_out(revision, base)
        progress(f"build {revision}", 0, 1, {})  # minutes
        build(base, cuda=device != "cpu")
        progress(f"build {revision}", 1, 1, {})
        sides = [Worker(ROOT), Worker(base)]
        try:
            for i, shape in enumerate(shapes):
                rows.append({"op": shape.op, "shape": shape.name, "label": shape.label} | measured(sides, shape, device, dtype))
                path = _write(out, f"{revision} ({commit[:10]})", rows)
                progress(f"compare {revision}", i + 1, len(shapes), {})
        finally:
            for side in sides:
                side.close()
    return path


def check_out(revision: str, folder: Path) -> str:
    """The files of a revision into a folder; returns its commit."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"], capture_output=True, text=True)
    if found.returncode:
        raise CompareError(f"{revision}: no such revision in {ROOT}, which must be a git checkout of em3")
    commit = found.stdout.strip()
    archive = subprocess.run([*git, "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return commit


def build(tree: Path, cuda: bool) -> None:
    """em3._C of a tree, beside its sources."""
    words = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | ({} if cuda else {"EM3_BUILD_CUDA": "0"})
    done = subprocess.run(words, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CompareError(f"the revision cannot be built (setuptools and pybind11 must be installed):\n{done.stdout[-2000:]}")


def measured(sides: Sequence[Worker], shape: Shape, device: str, dtype: str) -> dict[str, Any]:
    """p20, median and p80 of the seconds of both sides, and of the ratio of the two steps of a round."""
    arguments = {"op": shape.op, "dims": shape.dims, "device": device, "dtype": dtype, "threads": torch.get_num_threads()}
    answers = [side.ask("prepare", **arguments) for side in sides]
    for answer, whose in zip(answers, ("this tree", "the revision"), strict=True):
        if "error" in answer:
            return {"reason": f"{whose}: {answer['error']}"}
    ours, theirs = (np.array(answer["norms"]) for answer in answers)
    if ours.shape != theirs.shape or not np.all(np.abs(ours - theirs) <= SAME * theirs.max()):
        return {"reason": "the two compute different things from the same inputs"}
    times: list[list[float]] = []
    while len(times) < ROUNDS or np.sum(times) < SECONDS:
        times.append([sum(side.ask("step")["seconds"]) for side in sides])
    this, other = np.array(times).T
    found = {"this_seconds": this, "other_seconds": other, "ratio": other / this}
    return {name: np.percentile(of, [20, 50, 80]).tolist() for name, of in found.items()}


def _write(out: Path, revision: str, rows: Sequence[dict[str, Any]]) -> Path:
    with atomic(out / "compare.jsonl") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    lines = [f"# This tree against {revision}", "", _line([c.replace("REV", revision) for c in COLUMNS]), _line(["---"] * 6)]
    for row in rows:
        name = (row["op"], f"{row['shape']}: {row['label']}")
        if "reason" in row:
            lines.append(_line((*name, row["reason"], "", "", "")))
            continue
        low, middle, high = row["ratio"]
        seconds = (f"{1e3 * row[side][1]:.2f}" for side in ("this_seconds", "other_seconds"))
        lines.append(_line((*name, *seconds, f"{middle:.2f}x", f"{low:.2f} to {high:.2f}")))
    path = out / "compare.md"
    with atomic(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return path


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
