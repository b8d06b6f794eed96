"""``em3 data``, ``train``, ``evaluate`` and ``embed`` as a user types them: what they print, write and exit with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for package in ("pyarrow", "PIL", "sklearn", "matplotlib", "omegaconf", "safetensors", "tokenizers", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from em3.cli import main
from em3.commands.progress import Progress, complaints
from em3.data.table import DataError
from em3.train.config import ARMS
from em3.train.loop import TrainingError
from em3.train.report.summary import RunSummary

from .data.test_readers import SEEN, movielens_latest
from .train.small import SMALL

SETTINGS = "\n".join([
    "arms: [id_only, two_stage, em3, em3_mean_tokens, em3_no_lora, em3_no_contrast]",
    "train: {epochs: 3, batch_size: 256, checkpoint_every: 10, log_every: 5, refresh_every: 20}",
    *(word.replace("=", ": ", 1) for word in SMALL),
])  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A name that YAML would take for a number and a remark.
    folder = tmp_path_factory.mktemp("data") / "010 #1"
    assert main(["data", "make", str(folder), "--items", "300", "--users", "300", "--seed", "4"]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Run folder and the output of a training of all arms with two seeds, in a process of its own."""
    folder = tmp_path_factory.mktemp("runs")
    settings = folder / "settings.yaml"
    settings.write_text(SETTINGS)
    words = ["train", "--data", str(catalogue), "--config", str(settings), "--out", str(folder / "run"), "--threads", "1",
             "seeds=[0,1]", "train.epochs=1"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "em3.cli", *words], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout, done.stderr


def complaint(words: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says when it exits with 1 (a message as the exit's code is that)."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code


def test_train(trained: tuple[Path, str, str], catalogue: Path) -> None:
    folder, out, err = trained
    summary = RunSummary.from_dict(json.loads((folder / "summary.json").read_text()))
    assert summary.to_dict() == json.loads((folder / "summary.json").read_text())
    assert len(summary.arms) == len(ARMS) + 1  # and the perfect ranker
    assert summary.config["data"] == str(catalogue)
    assert [len(arm.metrics) for arm in summary.arms] == [2] * len(ARMS) + [1]
    assert all(arm.cost.step_ms > 0 for arm in summary.arms[:-1])
    assert summary.config["train"]["epochs"] == 1  # the word wins over the file
    assert summary.config["train"]["log_every"] == 5

    lines = out.splitlines()
    assert lines[-1] == f"report: {folder / 'report.html'}"
    assert lines[0].split() == ["AUC", "warm", "items", "cold", "items", "GAUC", "log", "loss"]
    assert [line[:22].strip() for line in lines[1:-1]] == [arm.name for arm in summary.arms]
    for line, arm in zip(lines[1:-1], summary.arms, strict=True):
        values = [found["auc"] for found in arm.metrics]
        assert line.split(arm.name, 1)[1].split()[0] == f"{np.mean(values):.4f}"
    assert "Traceback" not in err
    assert "EM3, seed 1: 5/37" in err
    assert "costs of a step: 18/18" in err
    page = (folder / "report.html").read_text()
    assert all(arm.name in page for arm in summary.arms)
    for arm in ARMS:
        for seed in (0, 1):
            kept = sorted(p.name for p in (folder / arm / f"seed{seed}").iterdir())
            assert kept == ["best.safetensors", "last.safetensors", "metrics.jsonl", "result.json"]


def test_evaluate(trained: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained[0]
    for split in ("test", "valid"):
        assert main(["evaluate", str(folder), "--split", split]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 * len(ARMS)
        for line, (arm, seed) in zip(lines, [(a, s) for a in ARMS for s in (0, 1)], strict=True):
            want = json.loads((folder / arm / f"seed{seed}" / "result.json").read_text())[split]
            start, _, numbers = line.partition(": ")
            assert start == f"{arm} seed {seed} {split}"
            found = dict(part.split() for part in numbers.split(", "))
            assert found.keys() == {key for key, value in want.items() if value is not None}
            for key, value in found.items():
                assert abs(float(value) - want[key]) < 1e-4, (line, key)  # as many digits as are printed
    assert main(["evaluate", str(folder), "--arm", "em3", "--arm", "id_only"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["em3"] * 2 + ["id_only"] * 2


def test_embed(trained: tuple[Path, str, str], catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet as pq

    out = tmp_path / "deep" / "e.parquet"
    assert main(["embed", str(trained[0]), "--items", str(catalogue), "--out", str(out), "--seed", "1"]) == 0
    assert capsys.readouterr().out == f"{out}: 300 embeddings of width 8\n"
    assert pq.read_table(out).num_rows == 300


def test_resume(trained: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, out, _ = trained
    best = folder / "em3" / "seed0" / "best.safetensors"
    before = best.stat().st_mtime_ns
    assert main(["train", "--resume", str(folder)]) == 0
    assert capsys.readouterr().out == out
    assert best.stat().st_mtime_ns == before


def test_show(catalogue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(catalogue)]) == 0
    out = capsys.readouterr().out
    assert re.match(r"010 #1: 300 items, \d+ users, [\d,]+ events\n", out)
    assert re.search(r"  train: 9,600 rows, \d\d\.\d% of them clicked, \d\.\d% of cold items\n", out)


@pytest.mark.filterwarnings("error")  # of numpy, about the mean of nothing
def test_show_what_has_no_test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "items.csv").write_text("item\na\nb\n")
    (tmp_path / "interactions.csv").write_text("user,item,label,timestamp,split\nu,a,1,5,train\nu,b,0,6,valid\n")
    assert main(["data", "show", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("valid: 1 rows, 0.0% of them clicked, 100.0% of cold items\n  test: 0 rows\n")


def test_show_some_of_a_users_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    movielens_latest(tmp_path)
    for words, rows in ([], 5 * len(SEEN)), (["--requests-per-user", "2"], 5 * 2 * 30):
        assert main(["data", "show", str(tmp_path), *words]) == 0
        found = re.findall(r"(\d+) rows", capsys.readouterr().out.replace(",", ""))
        assert sum(map(int, found)) == rows
    assert "per_user: was 0, must be 1 or more" in complaint(["data", "show", tmp_path, "--requests-per-user", "0"], capsys)


def test_complaints(trained: tuple[Path, str, str], catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained[0]
    for words, message in [
        (["train", "--data", catalogue, "--out", folder], f"holds a run; `em3 train --resume {folder}` goes on with it, another --out begins"),
        (["train"], "em3: data: was not given"),
        (["train", "--data", tmp_path / "none", "--out", tmp_path / "r"], "none: must be a folder"),
        (["train", "--data", catalogue, "--out", tmp_path / "r", "model.rnak=2"], "did you mean 'model.rank'?"),
        (["train", "--data", catalogue, "--config", tmp_path / "c.yaml"], f"em3: {tmp_path / 'c.yaml'}: no such file or directory"),
        (["train", "--data", catalogue, "--out", tmp_path / "r", "model.num_heads=3"], "must be a multiple of model.num_heads 3"),
        (["train", "--resume", folder, "seeds=[1]"], "--resume: goes on with the run's own configuration"),
        (["train", "--resume", folder, "--posters", tmp_path], "--resume: goes on with the run's own configuration"),
        (["train", "--resume", tmp_path / "none"], "none: is not there, must be the folder of a run; `em3 train --data CATALOGUE"),
        (["train", "--resume", tmp_path], f"{tmp_path}: holds no config.yaml, must be the folder of a run"),
        (["train", "--data", catalogue, "--out", catalogue / "items.parquet"], "items.parquet: is a file, must be a folder"),
        (["train", "--resume", folder, "--threads", "0"], "--threads: was 0, must be at least 1"),
        (["evaluate", tmp_path / "none"], "none: is not there, must be the folder of a run"),
        (["evaluate", catalogue / "items.parquet"], "items.parquet: is a file, must be the folder of a run"),
        (["embed", tmp_path / "none", "--items", catalogue, "--out", tmp_path / "e.npy"], "none: is not there, must be the folder of a run"),
        (["evaluate", folder, "--arm", "em4"], "--arm: was 'em4', must be one of the run's: id_only, two_stage, em3"),
        (["embed", folder, "--items", tmp_path, "--out", tmp_path / "e.npy"], "must hold one of items.parquet and items.csv, has neither"),
        (["embed", folder, "--items", catalogue, "--out", tmp_path / "e.txt"], "must end in .parquet or .npy"),
        (["data", "make", catalogue], "holds a finished catalogue already"),
        (["data", "make", tmp_path / "m", "--items", "10"], "em3: num_items: was 10, must be at least 50"),
        (["data", "show", tmp_path / "none"], "none: must be a folder"),
    ]:  # fmt: skip
        assert message in complaint(words, capsys), words
    assert not (tmp_path / "r").exists()
    assert not list(tmp_path.glob("e.*"))


def test_words_and_options_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none, out = tmp_path / "none", tmp_path / "r"
    for words, message in [
        (["train", "seeds=[0]", "--data", none, "arms=[em3]", "--out", out, "model.rank=2"], "none: must be a folder"),
        (["train", "--data", none, "seeds=[0]", "--out", out, "oops"], "oops: must be key=value"),
        (["evaluate", none, "--split", "valid"], "none: is not there, must be the folder of a run"),
        (["evaluate", "--split", "valid", none], "none: is not there, must be the folder of a run"),
        (["embed", "--items", none, none, "--out", "e.npy"], "none: is not there, must be the folder of a run"),
        (["tune", "--threads", "0"], "--threads: was 0, must be at least 1"),
        (["bench", "--out", none, "--threads", "-2"], "--threads: was -2, must be at least 1"),
        (["data", "make", "--items", "3", none], "num_items: was 3"),
        (["data", "make", none, "--items", "3"], "num_items: was 3"),
        (["data", "show", "--posters", none, none], "none: must be a folder"),
    ]:
        assert message in complaint(words, capsys), words
    with pytest.raises(SystemExit) as stop:
        main(["train", "--data", str(none), "--oops"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --oops" in capsys.readouterr().err


def test_a_store_cut_off(trained: tuple[Path, str, str], tmp_path: Path) -> None:
    """The exit status and that there is no traceback, in a process of its own."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((trained[0] / "config.yaml").read_bytes())
    store = (trained[0] / "tokens.safetensors").read_bytes()
    (folder / "tokens.safetensors").write_bytes(store[: len(store) // 2])
    done = subprocess.run([sys.executable, "-m", "em3.cli", "train", "--resume", str(folder)], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(rf"^em3: {re.escape(str(folder))}/tokens\.safetensors: is \d+ bytes long, must be \d+: it is cut off$",
                     done.stderr, re.MULTILINE)  # fmt: skip
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint(trained: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    path = trained[0] / "em3" / "seed1" / "best.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-9])
        assert f"{path}: is not a whole safetensors file" in complaint(["evaluate", trained[0], "--arm", "em3"], capsys)
    finally:
        path.write_bytes(whole)


def test_time_left_of_a_resumed_training(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Progress() as progress:
        for step in (900, 910, 1000):
            progress("EM3", step, 1000, {})
            now += 20
    assert capsys.readouterr().err == "EM3: 900/1000, 0 s\nEM3: 910/1000, 20 s, 180 s left\nEM3: 1000/1000, 40 s\n"


def test_which_errors_are_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    """A missing package and em3's own errors become one line; a mistake in the program keeps its traceback."""
    missing = ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")
    for error, cause, message in [
        (missing, None, "em3: the package pyarrow is missing: pip install 'em3[train]' (or em3[hf])"),
        (ImportError("reading data sets needs pyarrow"), missing, "em3: reading data sets needs pyarrow"),
        (DataError("a.csv: row 3"), None, "em3: a.csv: row 3"),
        (TrainingError("the loss"), None, "em3: the loss"),
        (PermissionError(13, "not allowed", "file"), None, "em3: file: not allowed"),
    ]:
        with pytest.raises(SystemExit) as stop, complaints():
            raise error from cause
        assert stop.value.code == message
    for error in (ImportError("cannot import name 'x'"), ValueError("in torch"), RuntimeError("in torch"), KeyError("x")):
        with pytest.raises(type(error)), complaints():
            raise error
