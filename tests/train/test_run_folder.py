"""A run's folder: one process writes it, a killed one goes on from any working directory, a finished one stays as it is."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("pyarrow", "PIL", "sklearn", "matplotlib", "omegaconf", "safetensors", "tokenizers"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from em3.data.table import DataError
from em3.files import LockedError
from em3.train import checkpoint, loop
from em3.train.config import ConfigError, load
from em3.train.run import Run

from .small import configured, silent

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_finished_run_changes_nothing(executed: tuple[Run, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(executed[1], folder)
    kept = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*")
            if p.is_file() and p.name not in ("report.html", "summary.json", ".lock", "warnings.jsonl")}  # fmt: skip
    before = json.loads((folder / "summary.json").read_text())
    handlers = list(logging.getLogger("em3").handlers)
    Run(load([folder / "config.yaml"]), folder, silent).execute(["em3", "train"])
    assert logging.getLogger("em3").handlers == handlers
    after = json.loads((folder / "summary.json").read_text())
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in kept} == kept
    for summary in (before, after):
        for key in ("command", "date", "environment", "machine"):
            summary.pop(key)
    assert after == before


def test_another_configuration_is_refused(executed: tuple[Run, Path], catalogue: Path) -> None:
    _, folder = executed
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run of another configuration \(model\.rank, seeds differ\)"):
        Run(configured(catalogue, "seeds=[4]", "model.rank=3"), folder, silent).execute([])
    assert (folder / "config.yaml").read_bytes() == before


def test_a_finished_training_of_another_configuration(executed: tuple[Run, Path], tmp_path: Path) -> None:
    """What somebody changes in config.yaml would else be said of results that were made without it."""
    folder = tmp_path / "run"
    shutil.copytree(executed[1], folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 2\n", "epochs: 3\n"))
    with pytest.raises(checkpoint.CheckpointError, match=r"best\.safetensors: is of another configuration \(train\.epochs differ\)"):
        Run(load([config]), folder, silent).execute([])


def test_data_that_moved(executed: tuple[Run, Path], catalogue: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(executed[1], folder)
    shutil.copytree(catalogue, tmp_path / "moved")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(f"data: {catalogue}\n", f"data: {tmp_path / 'moved'}\n"))
    run = Run(load([config]), folder, silent)
    run.execute([])
    assert run.config.data == str(tmp_path / "moved")


WORKING = """
import sys, time
from pathlib import Path
from em3.files import locked

with locked(Path(sys.argv[1])):
    print("working", flush=True)
    time.sleep(60)
"""


def test_one_process_a_folder(executed: tuple[Run, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(executed[1], folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    with subprocess.Popen([sys.executable, "-c", WORKING, str(folder)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"working\n"
            run = Run(load([folder / "config.yaml"]), folder, silent)
            with pytest.raises(LockedError, match=rf"^{re.escape(str(folder))}: process {other.pid} is at work in it"):
                run.execute([])
            assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"} == before
            assert run.trained("em3", 3).evaluate("valid")["auc"] is not None  # who only reads may
        finally:
            other.kill()
    run.execute([])


def test_from_another_working_directory(catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data named by a relative path; killed, then gone on with from elsewhere: nothing that was warned of is lost."""
    monkeypatch.chdir(catalogue.parent)
    config = configured(Path(catalogue.name))
    assert config.data == str(catalogue)
    folder = tmp_path / "run"
    run = Run(config, Path(os.path.relpath(folder)), silent)

    def failing(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_costs", failing)
    with pytest.raises(KeyboardInterrupt):
        run.execute([])
    monkeypatch.undo()
    left_behind = folder / "em3" / "seed3" / ".last.safetensors.123.tmp"
    left_behind.write_bytes(b"half")
    with open(folder / "warnings.jsonl", "a") as file:
        file.write('"half a li')
    monkeypatch.chdir(tmp_path)
    again = Run(load([Path("run/config.yaml")]), Path("run"), silent)
    again.execute([])
    assert not left_behind.exists()
    texts = json.loads((folder / "summary.json").read_text())["warnings"]
    assert texts == run.warnings.texts
    assert [name for name in ("2.jpg", "0.jpg") for text in texts if name in text] == ["2.jpg", "0.jpg"]
    assert not any("half a li" in text for text in texts)


def test_nothing_is_trained_yet(catalogue: Path, tmp_path: Path) -> None:
    run = Run(configured(catalogue), tmp_path / "run", silent)
    with pytest.raises(ConfigError, match=r"best\.safetensors: is not there yet; `em3 train --resume .*` goes on with the run"):
        run.trained("em3", 3)
    assert not (tmp_path / "run").exists()


def test_a_folder_is_not_taken_before_the_data_are_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        Run(configured(tmp_path / "nowhere"), tmp_path / "run", silent).execute([])
    assert not (tmp_path / "run").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from em3.files import LockedError
from em3.train import checkpoint, loop
from em3.train.config import load
from em3.train.run import Run

folder, where, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
calls = 0
replace, step = os.replace, loop.Training.step

def dying_replace(source, target):
    global calls
    calls += Path(target).name == where
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)  # written, not renamed yet
    replace(source, target)

def dying_step(self, batch):
    if where == "step" and self.state.step == count:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, batch)

os.replace, loop.Training.step = dying_replace, dying_step
Run(load([folder / "config.yaml"]), folder, lambda *_: None).train("em3", 3)
"""


def test_killed_and_killed_again(executed: tuple[Run, Path], tmp_path: Path) -> None:
    """In the middle of an epoch, between the best epoch and the last checkpoint, while the result is written."""
    _, whole = executed
    folder = tmp_path / "killed"
    for name in ("config.yaml", "tokens.safetensors"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes((whole / name).read_bytes())
    there = folder / "em3" / "seed3"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for where, count in (("step", 8), ("last.safetensors", 2), ("result.json", 1)):
        code = subprocess.run([sys.executable, "-c", KILLED, str(folder), where, str(count)], env=environment).returncode
        assert code == -signal.SIGKILL, (where, count)
        with open(there / "metrics.jsonl", "a") as file:
            file.write('{"step": 7, "loss": 0.')
    assert not (there / "result.json").exists()
    result = Run(load([folder / "config.yaml"]), folder, silent).train("em3", 3)
    assert result == json.loads((whole / "em3" / "seed3" / "result.json").read_text())
    for name in (loop.BEST, loop.LAST):
        assert (there / name).read_bytes() == (whole / "em3" / "seed3" / name).read_bytes()
    lines = [[{k: v for k, v in line.items() if k != "time"} for line in loop.read_metrics(f / "em3" / "seed3")] for f in (folder, whole)]
    assert lines[0] == lines[1]
    for kind in ("loss", "valid"):
        steps = [line["step"] for line in lines[0] if kind in line]
        assert len(set(steps)) == len(steps) > 1
