"""``em3 tune`` as a user types it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

for package in ("yaml", "psutil", "tqdm"):
    pytest.importorskip(package)

from em3 import tuning
from em3.benchmarks import measure, tune
from em3.cli import main
from em3.commands import tune as command
from em3.ops import _dispatch
from em3.tuning import table

CPU = torch.device("cpu")
SHAPES = """
qformer_attention:
  - {name: tiny, B: 4, N: [9], C: [8], D: 16, H: 2, Q: 3, tokens: trained, quick: true}
lora_linear:
  - {name: tiny, T: 64, C: 512, D: 512, R: 2, quick: true}
  - {name: adapters, T: 64, C: 8, D: 8, R: 2, G: 3}
lora_target_attention:
  - {name: tiny, B: 4, N: 6, C: 8, D: 16, H: 2, R: 2, bank: 30, quick: true}
contrastive_loss:
  - {name: tiny, B: 16, V: 8, quick: true}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.setenv("EM3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EM3_TUNING", "1")
    tuning.forget()
    path = tmp_path / "mine.yaml"
    path.write_text(SHAPES)
    yield path
    tuning.try_out(None)
    tuning.forget()


@pytest.fixture
def pretended(monkeypatch):
    """Nothing is timed: each answer takes the seconds given here, or 1."""
    seconds: dict[str, float] = {}

    def alternate(calls, grad, device, total, least):
        return {name: np.full((5, 2), seconds.get(name, 1.0)) for name in calls}

    monkeypatch.setattr(measure, "alternate", alternate)
    return seconds


def entries():
    return {entry.key[0]: entry.choice for entry in table.read(table.path(CPU), CPU)[0]}


def test_a_run_of_its_own(mine, tmp_path):
    words = [sys.executable, "-m", "em3.cli", "tune", "--shapes", str(mine), "--quick", "--device", "cpu", "--threads", "1"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split("  ")[0] == "operation and decision"
    assert lines[-1] == str(table.path(CPU))
    for start in ("qformer_attention.strategy trained padded", "qformer_attention.strategy inference padded", "lora_linear.form",
                  "lora_target_attention.rows frozen", "lora_target_attention.strategy frozen jagged",
                  "lora_target_attention.strategy frozen padded"):  # fmt: skip
        assert any(line.startswith(start) for line in lines), start
    assert re.search(r"lora_linear.form: the cost model was right [01] of 1 times, at worst \d+% behind", done.stdout)
    assert "lora_linear.shrink" not in done.stdout, "--quick measures the quick shapes only"
    for entry in table.read(table.path(CPU), CPU)[0]:
        assert entry.ratio > 1
        assert entry.key[2] == 1


def test_winners_are_kept_used_and_withdrawn(mine, pretended, capsys):
    pretended["merged"] = 0.5  # the cost model's answer for so few rows is "separate"
    assert main(["tune", "lora_linear", "--shapes", str(mine), "--device", "cpu"]) == 0
    assert re.search(r"lora_linear.form +T=64 C=512 D=512 R=2 +separate +merged +2.00x", capsys.readouterr().out)
    assert entries() == {"lora_linear.form": "merged"}
    trial = tuning.Trial({})
    tuning.try_out(trial)
    em3_call()
    tuning.try_out(None)
    (key,) = trial.asked["lora_linear.form"]
    assert table.load(CPU) == {key: "merged"}
    pretended["merged"] = 1.0
    main(["tune", "lora_linear", "--shapes", str(mine), "--device", "cpu"])
    assert re.search(r"lora_linear.form +T=64 C=512 D=512 R=2 +merged +separate", capsys.readouterr().out)
    assert entries() == {}


def em3_call():
    import em3

    em3.ops.lora_linear(torch.randn(60, 512), torch.randn(512, 512), None, torch.randn(2, 512), torch.randn(512, 2))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([0.90, 0.91, 0.92, 0.90, 0.91], "other"),
        ([0.97, 0.97, 0.97, 0.97, 0.97], "model"),  # within the margin
        ([0.70, 0.70, 0.70, 1.20, 1.20], "model"),  # within the noise
        ([1.10, 1.10, 1.10, 1.10, 1.10], "model"),
    ],
)
def test_a_winner_is_faster_by_the_margin_and_beyond_noise(seconds, expected):
    assert tune.best({"model": np.ones(5), "other": np.array(seconds)}, "model") == expected


@pytest.fixture
def tuned_while_off(mine, pretended, monkeypatch):
    """Tunes contrastive_loss while this backend of it is off by 0.01; nothing of that is kept."""
    if _dispatch.module("contrastive_loss", "cpp").unavailable():
        pytest.skip("em3._C is not built")

    def tuned(name):
        backend = _dispatch.module("contrastive_loss", name)
        honest, whole = backend.forward, getattr(backend, "whole_forward", None)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "forward", lambda *args: tuple(t + 0.01 for t in honest(*args)))
            if whole is not None:  # which serves so small a batch
                patch.setattr(backend, "whole_forward", lambda *args: (whole(*args)[0] + 0.01, whole(*args)[1]))
            assert main(["tune", "contrastive_loss", "--shapes", str(mine), "--device", "cpu"]) == 0
        assert entries() == {}

    return tuned


def test_a_wrong_answer_is_never_kept(mine, pretended, tuned_while_off, capsys):
    pretended.update({"torch": 0.1, "cpp": 1.0})
    tuned_while_off("torch")
    assert re.search(r"not timed, contrastive_loss.backend of B=16 V=8: torch: .* is off by .* from float64", capsys.readouterr().out)
    main(["tune", "contrastive_loss", "--shapes", str(mine), "--device", "cpu"])
    assert entries() == {"contrastive_loss.backend": "torch"}


def test_a_wrong_answer_of_the_cost_model_is_named(tuned_while_off, caplog):
    """Nothing can be compared with it, so the table has no line for it; but it is what serves."""
    tuned_while_off("cpp")
    assert re.search(r"contrastive_loss.backend of B=16 V=8: the cost model's answer .*: cpp: .* is off by .* from float64", caplog.text)


def test_what_was_tuned_before_an_interruption_is_kept(mine, pretended, capsys, monkeypatch):
    pretended["merged"] = 0.5
    honest = tune._tuned

    def cut_off(shape, *rest):
        if shape.name == "adapters":
            raise KeyboardInterrupt
        return honest(shape, *rest)

    monkeypatch.setattr(tune, "_tuned", cut_off)
    assert main(["tune", "lora_linear", "--shapes", str(mine), "--device", "cpu"]) == 130
    assert capsys.readouterr().out.splitlines()[-1] == f"{table.path(CPU)}, interrupted"
    assert entries() == {"lora_linear.form": "merged"}


def test_an_interruption_ends_it_on_all_devices(mine, monkeypatch):
    begun = []
    monkeypatch.setattr(command.bench, "devices", lambda asked: ["cpu", "cuda"])
    monkeypatch.setattr(command, "_tune", lambda args, device: begun.append(device) or 130)
    assert main(["tune", "lora_linear", "--shapes", str(mine)]) == 130
    assert begun == ["cpu"]


def test_shapes_of_which_none_is_meant(mine):
    mine.with_name("other.yaml").write_text("lora_linear: [{name: tiny, T: 64, C: 8, D: 8, R: 2}]")
    with pytest.raises(SystemExit, match="must hold a shape of contrastive_loss; there is none"):
        main(["tune", "contrastive_loss", "--shapes", str(mine.with_name("other.yaml")), "--device", "cpu"])


def test_clear_removes_this_machines_file(mine, pretended, capsys):
    other = table.path(CPU).with_name("another-machine.json")
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    pretended["merged"] = 0.5
    main(["tune", "lora_linear", "--shapes", str(mine), "--device", "cpu"])
    assert main(["tune", "--clear", "--device", "cpu"]) == 0
    assert not table.path(CPU).exists()
    assert other.exists()
    assert capsys.readouterr().out.splitlines()[-1] == f"removed {table.path(CPU)}"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(["lora"], "no operation 'lora'"), (["--shapes", "/nonexistent.yaml"], "/nonexistent.yaml"), (["--device", "tpu"], "--device: was tpu")],
)
def test_complaints(words, complaint, mine):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *words])
    assert complaint in str(stop.value)
    assert not table.path(CPU).exists()
