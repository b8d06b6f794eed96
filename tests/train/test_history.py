"""The table of what LoRA over the history buys: its cells are runs, what does not fit is left out, and it is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

for package in ("pyarrow", "PIL", "sklearn", "matplotlib", "omegaconf", "safetensors", "tokenizers", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from em3.cli import main
from em3.train import cost, history
from em3.train.config import load
from em3.train.run import Run

from .small import SMALL, silent

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = [*SMALL, "seeds=[3]", "train.epochs=1", "train.batch_size=64", "train.refresh_every=3"]


def command(catalogue: Path, out: Path, *words: str) -> list[str]:
    return ["history", "--data", str(catalogue), "--out", str(out), *words, *WORDS]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are timed once; memory takes a process, see test_run.py."""
    monkeypatch.setattr(cost, "WARM", 0)
    monkeypatch.setattr(cost, "ROUNDS", 1)
    monkeypatch.setattr(history, "peak_memory", lambda folder, arm: 12.0)


def test_the_table(executed: tuple[Run, Path], catalogue: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch,
                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out, tokens = tmp_path / "out", f"tokens={executed[1] / 'tokens.safetensors'}"
    # A full history is said to need too much where it is longer.
    estimate = history.estimate_mib
    monkeypatch.setattr(history, "estimate_mib", lambda training: (
        5000.0 if not training.model.caches_history and training.batches.history_length > 2 else estimate(training)))  # fmt: skip
    assert main(command(catalogue, out, "--lengths", "2,9", "--memory", "1", tokens)) == 0
    said = capsys.readouterr().out
    assert said == (out / "history.md").read_text() + f"\ntable: {out / 'history.md'}\n"
    rows = json.loads((out / "history.json").read_text())["rows"]
    assert [(row["length"], row["history"]) for row in rows] == [(n, h) for n in (2, 9) for h in ("frozen", "lora", "full")]
    assert ["skipped" in row for row in rows] == [False] * 5 + [True]
    line = said.splitlines()[-3]
    assert line.startswith("| 9, full |")
    assert "skipped: a step needs about 5,000 MiB, 1,024 MiB may be used (--memory)" in line
    assert not (out / "history9" / "full").exists()
    for row in rows[:5]:
        folder = out / f"history{row['length']}" / row["history"]
        config = load([folder / "config.yaml"])
        assert (config.history_length, config.model.history, config.arms) == (row["length"], row["history"], ["em3"])
        result = json.loads((folder / "em3" / "seed3" / "result.json").read_text())
        assert row["test"] == [result["test"]]
        assert 0 < row["events_per_row"] <= row["length"]
        assert row["step_ms"] > 0
        assert (row["refresh_ms"] is None) == (row["history"] == "full")
        assert 0 < row["estimated_mib"] < 100
        assert f"{row['test'][0]['auc']:.4f}" in said
    assert rows[2]["items_per_step"] > rows[1]["items_per_step"] == rows[0]["items_per_step"]
    assert rows[0]["parameters"] < rows[1]["parameters"] == rows[2]["parameters"]

    # The same again trains and measures nothing; without the limit the cell that was left out is added.
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    monkeypatch.setattr(history, "estimate_mib", estimate)
    assert main(command(catalogue, out, "--lengths", "2,9", tokens)) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = json.loads((out / "history.json").read_text())["rows"]
    assert again[:3] == rows[:3]
    assert [row["test"] for row in again[:5]] == [row["test"] for row in rows[:5]]
    assert "step_ms" in again[5]
    # A cell is a run: it is reported on as any other.
    folder = out / "history9" / "full"
    monkeypatch.setattr("em3.train.run.measure_costs", lambda run, progress: {"em3": {
        "step_ms_p20": 1.0, "step_ms": 1.0, "step_ms_p80": 1.0, "samples_per_s": 1.0}})  # fmt: skip
    assert main(["train", "--resume", str(folder)]) == 0
    assert "history: full" in (folder / "config.yaml").read_text()
    assert (folder / "report.html").exists()


def test_the_estimate_is_of_the_right_size(executed: tuple[Run, Path], catalogue: Path, tmp_path: Path) -> None:
    """Wide enough for a step to need more than a process's own noise; within a factor of two of what it took."""
    if not cost.CLEAR.exists():
        pytest.skip("the high-water mark of memory can only be reset on Linux")
    words = [f"data={catalogue}", *WORDS, f"tokens={executed[1] / 'tokens.safetensors'}", "train.batch_size=720", "arms=[em3]",
             "history_length=200", "model.time_buckets=8", "model.id_dim=256", "model.content_dim=256", "model.history=full"]  # fmt: skip
    run = Run(load([], words), tmp_path, silent)
    run.results()
    measured = cost.peak_memory(tmp_path, "em3")
    training = run.training("em3", 3)
    state, random = {k: v.clone() for k, v in training.model.state_dict().items()}, torch.get_rng_state()
    estimated = history.estimate_mib(training)
    assert measured is not None
    assert measured > 60
    assert measured / 2 < estimated < 2 * measured
    assert torch.equal(random, torch.get_rng_state())  # nothing has moved
    assert all(torch.equal(state[name], t) for name, t in training.model.state_dict().items())


@pytest.mark.parametrize(("words", "message"), [
    (["--lengths", "10,5"], "--lengths: was [10, 5], must be one length or more, from 1, ascending"),
    (["--lengths", "0"], "--lengths: was [0], must be"),
    (["--lengths", "ten"], "--lengths: was 'ten', must be integers with commas between"),
    (["--memory", "0"], "--memory: was 0.0, must be above 0"),
    (["--threads", "0"], "--threads: was 0, must be at least 1"),
    (["arms=[em3_no_lora]"], "arms: was ['em3_no_lora'], must be one arm that reads tokens and obeys model.history"),
    (["arms=[em3,id_only]"], "arms: was ['em3', 'id_only'], must be one arm"),
    (["encoder.train=lora"], "encoder.train: was lora, must be frozen"),
    (["history_length=5"], "history_length=5: must be left out"),
])  # fmt: skip
def test_complaints(words: list[str], message: str, catalogue: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command(catalogue, tmp_path / "out", *words))
    assert str(stop.value.code).startswith(f"em3: {message}")
    assert not (tmp_path / "out").exists()
