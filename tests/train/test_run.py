"""Runs on a small catalogue with faults: they say so, are reported and embedded, and train encoders when asked to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("pyarrow", "PIL", "sklearn", "matplotlib", "omegaconf", "safetensors", "tokenizers"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from em3.data.table import DataError
from em3.data.token_store import TokenStoreError
from em3.train import checkpoint, loop
from em3.train.config import ConfigError, load
from em3.train.cost import measure_costs
from em3.train.embed import embed
from em3.train.report.summary import RunSummary
from em3.train.run import Run

from .small import ITEMS, configured, silent, write_catalogue

pytestmark = pytest.mark.usefixtures("one_thread")


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
        ".lock", "config.yaml", "costs.json", "em3", "encoders", "report.html", "summary.json", "tokens.safetensors", "warnings.jsonl"]  # fmt: skip
    assert load([folder / "config.yaml"]) == run.config
    cost = json.loads((folder / "costs.json").read_text())["em3"]
    assert 0 < cost["step_ms_p20"] <= cost["step_ms"] <= cost["step_ms_p80"]
    assert cost["samples_per_s"] == pytest.approx(64e3 / cost["step_ms"])
    assert set(cost["parts_ms"]) == {"tokens", "Fusion-Q-Former", "history", "ranker", "contrast", "optimizer", "bank", "refresh"}
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
    np.testing.assert_allclose(rows, bank, atol=1e-5)  # of the same tokens, rounded as the store's are
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


def test_an_unknown_item(tmp_path: Path) -> None:
    write_catalogue(tmp_path / "cat", unknown_item=True)
    with pytest.raises(DataError, match=r"interactions\.csv: row 901, column 'item': was 'thing-99', must be an item of"):
        Run(configured(tmp_path / "cat"), tmp_path / "run", silent)


def test_tokens_of_another_catalogue_of_nobody_and_damaged(executed: tuple[Run, Path], catalogue: Path, tmp_path: Path) -> None:
    _, folder = executed
    write_catalogue(tmp_path / "cat")
    items = tmp_path / "cat" / "items.csv"
    items.write_text(items.read_text() + "another,more words,\n")
    with pytest.raises(ConfigError, match="holds the tokens of another catalogue: its item ids differ"):
        Run(configured(tmp_path / "cat", f"tokens={folder / 'tokens.safetensors'}"), tmp_path / "run", silent).execute([])
    with pytest.raises(ConfigError, match="none does not exist, must be a token store"):
        Run(configured(catalogue, f"tokens={tmp_path / 'none'}"), tmp_path / "run2", silent).execute([])
    damaged = bytearray((folder / "tokens.safetensors").read_bytes())
    damaged[-1] ^= 1  # in the last item's name
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(TokenStoreError, match=r"damaged: damaged: item_ids\.values; write the store again"):
        Run(configured(catalogue, f"tokens={tmp_path / 'damaged'}"), tmp_path / "run6", silent).execute([])
    with pytest.raises(ConfigError, match=r"encoder\.image, encoder\.text: were both none"):
        Run(configured(catalogue, "encoder.image=none", "encoder.text=none"), tmp_path / "run3", silent).execute([])
    # Words without pictures: what MovieLens is without posters.
    items.write_text("\n".join(line.rsplit(",", 1)[0] for line in items.read_text().splitlines()))
    with pytest.raises(ConfigError, match=r"encoder\.image, encoder\.text: .* 0 items have both .*; one of them may be none"):
        Run(configured(tmp_path / "cat"), tmp_path / "run5", silent).execute([])
    run = Run(configured(catalogue, f"tokens={folder / 'tokens.safetensors'}"), tmp_path / "run4", silent)
    assert run.store.item_ids == run.data.items.ids
    assert not (tmp_path / "run4").exists()


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


def test_costs(executed: tuple[Run, Path], catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are those of an epoch where a batch is longer; memory is what the steps take, whatever setting up took."""
    monkeypatch.setattr("em3.train.cost.peak_memory", lambda folder, arm: None)
    run = Run(configured(catalogue, "train.batch_size=5000", "arms=[id_only]"), tmp_path, silent)
    found = measure_costs(run, lambda done, total: None)["id_only"]
    assert found["samples_per_s"] == pytest.approx(len(run.data.of_split("train")) * 1e3 / found["step_ms"])
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the high-water mark of memory can only be reset on Linux")
    code = (
        "import sys, torch\nfrom em3.train import cost, loop, run\n"
        "def taking(mebibytes, call):\n"
        "    def taken(*arguments):\n"
        "        held = [torch.ones(2**18) for _ in range(mebibytes)]\n        return call(*arguments)\n"
        "    return taken\n"
        "run.Run.training = taking(400, run.Run.training)\nloop.Training.step = taking(100, loop.Training.step)\n"
        "cost._memory_of(sys.argv[1], 'em3', '1')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(executed[1])], capture_output=True, text=True, check=True)
    assert 95 < float(done.stdout) < 300  # the steps' own and what they hold here, not the 400 of setting up
