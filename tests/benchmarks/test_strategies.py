"""``em3 bench strategies``: both strategies of a shape, and which one is chosen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

for package in ("yaml", "psutil"):
    pytest.importorskip(package)

from em3 import tuning
from em3.benchmarks import measure, operations, presentation, registry, strategies
from em3.benchmarks.operations import Effort

from .tiny import SHAPES, TARGET

EFFORT = Effort(seconds=0.0, rounds=3, compiled=False)
ATTENTIONS = [shape for shape in SHAPES if registry.OPERATIONS[shape.op].by is not None]


@pytest.mark.parametrize("shape", ATTENTIONS, ids=[f"{s.op}, {s.name}" for s in ATTENTIONS])
def test_both_are_timed(shape):
    (row,) = strategies.measured(shape, "cpu", torch.float32, EFFORT)
    assert row["seconds"].keys() == {"absorb", "project"}
    assert row["chosen"] in row["seconds"]
    assert row["behind"] >= 0


@pytest.mark.parametrize(("times", "right", "behind"), [((1.0, 2.0), True, 0.0), ((2.0, 1.0), False, 1.0), ((1.02, 1.0), True, 0.02)])
def test_which_one_is_right(times, right, behind, monkeypatch):
    """Absorb is chosen for one target; in the last case every other round says otherwise."""
    absorb, project = times
    rounds = {"absorb": [[0, absorb]] * 5, "project": [[0, project]] * 5 if abs(absorb - project) > 0.1 else [[0, p] for p in (1, 1, 1, 1.5, 1.5)]}
    monkeypatch.setattr(measure, "alternate", lambda *given: {name: torch.tensor(of, dtype=torch.float64).numpy() for name, of in rounds.items()})
    (shape,) = (shape for shape in SHAPES if (shape.op, shape.name) == ("lora_target_attention", "full"))
    (row,) = strategies.measured(shape, "cpu", torch.float32, EFFORT)
    assert (row["chosen"], row["right"], row["behind"]) == ("absorb", right, pytest.approx(behind))


def test_the_choice_is_what_was_tuned_else_the_cost_models(monkeypatch):
    operation = registry.OPERATIONS["lora_target_attention"]
    inputs = operation.make(TARGET, "cpu", torch.float32)
    monkeypatch.setattr(operations.table, "load", lambda device: {})
    assert operations.choice(operation, inputs) == ("absorb", "absorb")
    trial = tuning.Trial({})
    tuning.try_out(trial)
    operation.by(inputs, "auto")
    tuning.try_out(None)
    monkeypatch.setattr(operations.table, "load", lambda device: dict.fromkeys(trial.asked["lora_target_attention.strategy"], "project"))
    assert operations.choice(operation, inputs) == ("project", "absorb")


def test_a_shape_that_cannot_be_measured_says_why(monkeypatch):
    def none_left(*given):
        raise RuntimeError("not enough memory:\nyou tried")

    monkeypatch.setattr(measure, "alternate", none_left)
    (row,) = strategies.measured(ATTENTIONS[0], "cpu", torch.float32, EFFORT)
    assert row["reason"] == "not measured: not enough memory: you tried"


def test_what_counts_as_ours_is_what_was_chosen(monkeypatch):
    """The arithmetic of the projected form, where that is taken; else a share of the machine's limit could be above one."""
    shape = next(shape for shape in SHAPES if (shape.op, shape.name) == ("lora_target_attention", "candidates"))
    operation = registry.OPERATIONS[shape.op]
    monkeypatch.setattr(operations.memory, "peak", lambda *about: {"peak": 1, "inputs": 1, "results": 1})
    monkeypatch.setattr(operations, "choice", lambda *given: ("project", "absorb"))
    work = {row["form"]: row["work"] for row in operations.measured(shape, "cpu", torch.float32, EFFORT)}
    assert work["em3"] == work["plain"] == operation.plain_work(shape.dims)._asdict()
    assert work["em3 torch"] == work["em3 cpp"] == operation.our_work(shape.dims)._asdict()


@pytest.mark.parametrize("shape", [s for s in ATTENTIONS if s.dims["lengths"] == "skewed"], ids=lambda s: f"{s.op}, {s.name}")
def test_jagged_work_is_counted_for_the_tokens_that_were_drawn(shape, monkeypatch):
    """Not for the mean that was asked for: the share of the limit was 1.15 times too high."""
    operation, drawn = registry.OPERATIONS[shape.op], []
    make = operation.make
    monkeypatch.setitem(registry.OPERATIONS, shape.op, dataclasses.replace(operation, make=lambda *of: drawn.append(make(*of)) or drawn[-1]))
    monkeypatch.setattr(operations.memory, "peak", lambda *about: {"peak": 1, "inputs": 1, "results": 1})
    rows = operations.measured(shape, "cpu", torch.float32, EFFORT)
    ends = drawn[0]["offsets"] if isinstance(drawn[0]["offsets"], list) else [drawn[0]["offsets"]]
    tokens = [int(of[-1]) for of in ends]
    asked = shape.dims["N"] if isinstance(shape.dims["N"], list) else [shape.dims["N"]]
    assert tokens != [shape.dims["B"] * n for n in asked]
    real = [t / shape.dims["B"] for t in tokens]
    want = operation.plain_work(shape.dims | {"N": real if isinstance(shape.dims["N"], list) else real[0]})._asdict()
    assert next(row["work"] for row in rows if row["form"] == "plain") == pytest.approx(want)


def test_the_table():
    row = {"suite": "strategies", "op": "o", "shape": "s", "label": "B=1", "dtype": "float32", "chosen": "absorb"}
    seconds = {"absorb": [0.001, 0.002, 0.003], "project": [0.001, 0.0015, 0.003]}
    rows = [row | {"seconds": seconds, "behind": 0.01, "right": True}, row | {"seconds": seconds, "behind": 0.07, "right": False},
            row | {"reason": "not measured: memory"}]
    (table,) = presentation.tables({}, rows)
    assert "the faster one for 1 of 2 shapes, and is at most 7% behind" in table.note
    assert [line[3:] for line in table.lines] == [("absorb", ""), ("absorb", "7% behind"), ("", "")]
    assert table.lines[2][1] == "not measured: memory"
