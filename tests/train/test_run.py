"""Runs on a small catalogue with faults: they go on, say so, survive being killed, and train encoders when asked to."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for package in ("pyarrow", "PIL", "sklearn", "matplotlib", "omegaconf", "safetensors", "tokenizers"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from em3.data.table import DataError
from em3.train import checkpoint, loop
from em3.train.config import Config, ConfigError, load
from em3.train.embed import embed
from em3.train.report.summary import RunSummary
from em3.train.run import Run

from .small import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = [
    *SMALL, "seeds=[3]", "arms=[em3]", "train.epochs=2", "train.batch_size=64", "train.checkpoint_every=3",
    "train.log_every=2", "train.refresh_every=3", "history_length=10",
]  # fmt: skip
WORDS = ["red", "green", "blue", "lamp", "chair", "kettle", "large", "small"]
ITEMS = 40


def write_catalogue(folder: Path, *, unknown_item: bool = False) -> None:
    """Item 0: a JPEG cut off, item 1: no title, item 2: a picture that is not there, item 3: none named."""
    from PIL import Image

    rng = np.random.default_rng(5)
    (folder / "pictures").mkdir(parents=True)
    for item in range(ITEMS):
        pixels = rng.integers(0, 60, (40, 36, 3)) + rng.integers(0, 190, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "pictures" / f"{item}.jpg")
    broken = folder / "pictures" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    (folder / "pictures" / "2.jpg").unlink()
    with open(folder / "items.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item", "title", "picture"])
        for item in range(ITEMS):
            title = "" if item == 1 else " ".join(rng.choice(WORDS, 3))
            rows.writerow([f"thing-{item}", title, "" if item == 3 else f"pictures/{item}.jpg"])
    with open(folder / "interactions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "item", "label", "timestamp", "request"])
        for row in range(900):
            item = rng.integers(ITEMS) if row > 10 else row % 4
            rows.writerow([f"u{row // 3 % 25}", f"thing-{item}", int(rng.random() < 0.4), 1000 + row // 3, row // 3])
        if unknown_item:
            rows.writerow(["u1", "thing-99", 1, 2000, 301])


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "cat"
    write_catalogue(folder)
    return folder


def configured(catalogue: Path, *words: str) -> Config:
    return load([], [f"data={catalogue}", *SETTINGS, *words])


def silent(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def executed(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run of EM3 with one seed, executed to its report."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run = Run(configured(catalogue), folder, silent)
    assert run.execute(["em3", "train", "it's"]) == folder / "report.html"
    torch.set_num_threads(threads)
    return run, folder


def test_faults_of_the_data_are_in_the_report(executed: tuple[Run, Path]) -> None:
    run, folder = executed
    warnings = "\n".join(RunSummary.from_dict(json.loads((folder / "summary.json").read_text())).warnings)
    assert "0.jpg: no picture, it cannot be read" in warnings
    assert "1 of 39 pictures named are not there" in warnings
    assert "pictures/2.jpg" in warnings
    page = (folder / "report.html").read_text()
    assert "0.jpg: no picture, it cannot be read" in page
    lengths = [stream.offsets().diff().tolist() for stream in run.store.read(torch.arange(ITEMS))]
    assert [i for i, n in enumerate(lengths[0]) if n == 0] == [0, 2, 3]
    assert [i for i, n in enumerate(lengths[1]) if n == 0] == [1]


def test_what_a_run_leaves(executed: tuple[Run, Path]) -> None:
    run, folder = executed
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml", "costs.json", "em3", "encoders", "report.html", "summary.json", "tokens.safetensors"]  # fmt: skip
    assert load([folder / "config.yaml"]) == run.config
    cost = json.loads((folder / "costs.json").read_text())["em3"]
    assert 0 < cost["step_ms_p20"] <= cost["step_ms"] <= cost["step_ms_p80"]
    assert cost["samples_per_s"] == pytest.approx(64e3 / cost["step_ms"])
    assert set(cost["parts_ms"]) == {"tokens", "Fusion-Q-Former", "history", "ranker", "contrast", "optimizer", "bank"}
    assert cost["peak_memory_mib"] is None or cost["peak_memory_mib"] >= 0
    summary = RunSummary.from_dict(json.loads((folder / "summary.json").read_text()))
    assert summary.command == "em3 train 'it'\"'\"'s'"
    result = json.loads((folder / "em3" / "seed3" / "result.json").read_text())
    assert [arm.metrics for arm in summary.arms] == [[result["test"]]]
    assert summary.alignment is not None
    assert summary.neighbours
    assert f"{result['test']['auc']:.4f}" in run.table()


def test_the_model_of_the_best_epoch_scores_as_it_did(executed: tuple[Run, Path]) -> None:
    run, folder = executed
    training = run.training("em3", 3)
    checkpoint.load(folder / "em3" / "seed3" / loop.BEST, training.model)
    result = json.loads((folder / "em3" / "seed3" / "result.json").read_text())
    assert training.evaluate("test") == result["test"]
    assert training.evaluate("valid") == result["valid"]


def test_neighbours_and_alignment_are_those_of_the_trained_model(executed: tuple[Run, Path]) -> None:
    run, folder = executed
    tensors, _ = checkpoint.read(folder / "em3" / "seed3" / loop.BEST)
    bank = tensors["model.bank"] - tensors["model.bank"].mean(0)
    summary = RunSummary.from_dict(json.loads((folder / "summary.json").read_text()))
    pictured = [i for i, path in enumerate(run.data.items.pictures) if path is not None]
    assert len(summary.neighbours) == 8
    queries = [pictured[k * len(pictured) // 8] for k in range(8)]
    for query, shown in zip(queries, summary.neighbours, strict=True):
        assert shown.query.picture == str(run.data.items.pictures[query].resolve())
        similarity = torch.cosine_similarity(bank, bank[query][None])
        others = sorted((float(s) for i, s in enumerate(similarity) if i != query), reverse=True)[:5]
        assert [card.similarity for card in shown.nearest] == pytest.approx(others, abs=1e-5)
    content = tensors["model.bank"] @ tensors["model.to_id.weight"].T + tensors["model.to_id.bias"]
    ids = run.batches.item_ids()
    cosine = torch.cosine_similarity(content, tensors["model.ranker.items.weight"][ids])[ids > 0].mean()
    before, after = summary.alignment.numbers["mean cosine of an item's content and ID"]
    assert after == pytest.approx(float(cosine), abs=1e-5)
    assert before != after


def test_the_bank_is_what_embed_writes(executed: tuple[Run, Path], catalogue: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    run, folder = executed
    training = run.training("em3", 3)
    checkpoint.load(folder / "em3" / "seed3" / loop.BEST, training.model)
    bank = training.model.bank.numpy()
    assert np.abs(bank).max() > 0.1
    assert embed(folder, catalogue, tmp_path / "e.npy", "em3", None, silent) == (ITEMS, 8)
    rows = np.load(tmp_path / "e.npy", allow_pickle=False)
    np.testing.assert_allclose(rows, bank, atol=5e-3)  # the store's tokens are of half precision
    assert rows.dtype == np.float32
    embed(folder, catalogue, tmp_path / "e.parquet", "em3", 3, silent)
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.column("item").to_pylist() == [f"thing-{i}" for i in range(ITEMS)]
    np.testing.assert_array_equal(np.array(table.column("embedding").to_pylist(), np.float32), rows)

    # Items that the catalogue never had, in another order.
    new = tmp_path / "new"
    (new / "pictures").mkdir(parents=True)
    (new / "pictures" / "7.jpg").write_bytes((catalogue / "pictures" / "7.jpg").read_bytes())
    title = run.data.items.texts[7]
    (new / "items.csv").write_text(f"item,title,picture\nx,never seen words,\ny,{title},pictures/7.jpg\n")
    assert embed(folder, new, tmp_path / "n.npy", "em3", None, silent) == (2, 8)
    found = np.load(tmp_path / "n.npy", allow_pickle=False)
    np.testing.assert_allclose(found[1], rows[7], atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 0.01
    assert np.isfinite(found).all()


@pytest.mark.parametrize(("out", "arm", "seed", "message"), [
    ("e.csv", "em3", None, r"--out: was .*e\.csv, must end in \.parquet or \.npy"),
    ("e.npy", "id_only", None, "--arm: was 'id_only', must be an arm of the run that reads tokens: em3"),
    ("e.npy", "em3", 4, r"--seed: was 4, must be one of the run's \[3\]"),
])  # fmt: skip
def test_what_cannot_be_embedded(executed, catalogue: Path, tmp_path: Path, out: str, arm: str, seed: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        embed(executed[1], catalogue, tmp_path / out, arm, seed, silent)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_changes_nothing(executed: tuple[Run, Path], catalogue: Path) -> None:
    _, folder = executed
    kept = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*")
            if p.is_file() and p.name not in ("report.html", "summary.json")}  # fmt: skip
    before = json.loads((folder / "summary.json").read_text())
    Run(load([folder / "config.yaml"]), folder, silent).execute(["em3", "train"])
    after = json.loads((folder / "summary.json").read_text())
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in kept} == kept
    for summary in (before, after):
        for key in ("command", "warnings", "date", "environment", "machine"):
            summary.pop(key)
    assert after == before


def test_another_configuration_is_refused(executed: tuple[Run, Path], catalogue: Path) -> None:
    _, folder = executed
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run of another configuration \(seeds, model differ\)"):
        Run(configured(catalogue, "seeds=[4]", "model.rank=3"), folder, silent)
    assert (folder / "config.yaml").read_bytes() == before


def test_a_folder_is_not_taken_before_the_data_are_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        Run(configured(tmp_path / "nowhere"), tmp_path / "run", silent)
    assert not (tmp_path / "run").exists()


def test_an_unknown_item(tmp_path: Path) -> None:
    write_catalogue(tmp_path / "cat", unknown_item=True)
    with pytest.raises(DataError, match=r"interactions\.csv: row 901, column 'item': was 'thing-99', must be an item of"):
        Run(configured(tmp_path / "cat"), tmp_path / "run", silent)


def test_tokens_of_another_catalogue_and_of_nobody(executed: tuple[Run, Path], catalogue: Path, tmp_path: Path) -> None:
    _, folder = executed
    write_catalogue(tmp_path / "cat")
    items = tmp_path / "cat" / "items.csv"
    items.write_text(items.read_text() + "another,more words,\n")
    with pytest.raises(ConfigError, match="holds the tokens of another catalogue: its item ids differ"):
        Run(configured(tmp_path / "cat", f"tokens={folder / 'tokens.safetensors'}"), tmp_path / "run", silent)
    with pytest.raises(ConfigError, match="none does not exist, must be a token store"):
        Run(configured(catalogue, f"tokens={tmp_path / 'none'}"), tmp_path / "run2", silent)
    with pytest.raises(ConfigError, match=r"encoder\.image, encoder\.text: were both none"):
        Run(configured(catalogue, "encoder.image=none", "encoder.text=none"), tmp_path / "run3", silent)
    run = Run(configured(catalogue, f"tokens={folder / 'tokens.safetensors'}"), tmp_path / "run4", silent)
    assert not (tmp_path / "run4" / "tokens.safetensors").exists()
    assert run.store.item_ids == run.data.items.ids


KILLED = """
import os, signal, sys
from pathlib import Path
from em3.train import loop
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


@pytest.mark.parametrize(("mode", "trained"), [("lora", ".lora_"), ("last_n", "layers.1.")])
def test_encoders_are_trained(mode: str, trained: str, catalogue: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("em3.train.cost.peak_memory", lambda folder, arm: 1.0)  # takes a process; measured above
    if mode == "lora":
        pytest.importorskip("peft", reason="peft is not installed")
    folder = tmp_path / "run"
    run = Run(configured(catalogue, f"encoder.train={mode}", "train.epochs=1", "train.lr=0.01"), folder, silent)
    start = {name: t.clone() for name, t in run.training("em3", 3).model.tokens.state_dict().items()}
    run.execute(["em3"])  # with the costs of its parts
    training = run.training("em3", 3)
    checkpoint.load(folder / "em3" / "seed3" / loop.BEST, training.model)
    end = training.model.tokens.state_dict()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert {name.split(".")[1] for name in moved} == {"image", "text"}
    assert all(trained in name or ".norm." in name for name in moved), moved
    assert all(name in moved for name in start if ".layers.1." in name and trained in name and ".k.bias" not in name), moved
    result = json.loads((folder / "em3" / "seed3" / "result.json").read_text())
    assert training.evaluate("test") == result["test"]

    bank = training.model.model.bank
    embed(folder, catalogue, tmp_path / "e.npy", "em3", None, silent)
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), bank.numpy(), atol=1e-4)
    training.model.refresh(training.read)
    np.testing.assert_allclose(training.model.model.bank.numpy(), np.load(tmp_path / "e.npy"), atol=1e-4)
