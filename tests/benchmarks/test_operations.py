"""What a shape's rows say: numbers where a form is right and fits, the reason where not."""

from __future__ import annotations

import dataclasses
import resource

import pytest
import torch

for package in ("yaml", "psutil"):
    pytest.importorskip(package)

import psutil

from em3.benchmarks import measure, memory, operations, registry
from em3.benchmarks.forms import Call, Form, leaves
from em3.benchmarks.operations import Effort

from .tiny import SHAPES

SHAPE = SHAPES[-1]
EFFORT = Effort(seconds=0.01, rounds=3, compiled=False)


def wrong(inputs):
    call = registry.OPERATIONS["contrastive_loss"].plain(inputs)
    return Call(lambda: 1.001 * call.forward(), call.leaves)


def without_a_gradient(inputs):
    """The output is right, and so is all but one gradient, which is NaN."""
    call = registry.OPERATIONS["contrastive_loss"].plain(inputs)
    return Call(lambda: call.forward() + (inputs["logit_scale"] * 0.0).sqrt() * 0.0, call.leaves)


def broken(inputs):
    raise KeyError("no such thing")


@pytest.fixture
def rows(monkeypatch):
    operation = registry.OPERATIONS["contrastive_loss"]
    work = operation.plain_work
    peers = (
        Form("wrong", wrong, work),
        Form("nan", without_a_gradient, work),
        Form("broken", broken, work),
        Form("absent", wrong, work, package="a_package_that_is_not_there"),
        Form("picky", wrong, work, refuses=lambda dims, device: f"not on {device}"),
        Form("large", wrong, work),
    )
    monkeypatch.setitem(registry.OPERATIONS, "contrastive_loss", dataclasses.replace(operation, peers=peers))

    def peak(op, dims, form, device, dtype, threads):
        if form == "large":
            raise memory.OutOfMemory("needs more memory than there is")
        return {"peak": 5, "inputs": 7, "results": 3}

    monkeypatch.setattr(memory, "peak", peak)
    made = operations.measured(SHAPE, "cpu", torch.float32, EFFORT)
    return {row["form"]: row for row in made}


def test_rows(rows):
    assert [name for name in rows if name not in ("em3 cpp", "em3 triton")] == ["em3", "em3 torch", "plain", "wrong", "nan", "broken", "absent", "picky", "large"]
    for name in ("em3", "em3 torch", "plain"):
        row = rows[name]
        assert row["status"] == "measured"
        assert row["rounds"] >= 3
        assert (row["peak_bytes"], row["inputs_bytes"], row["results_bytes"]) == (5, 7, 3)
        assert row["error"] < 1e-5
        for part in ("forward", "backward", "both"):
            p20, p50, p80 = row["seconds"][part]
            assert 0 < p20 <= p50 <= p80
        assert row["seconds"]["both"][1] >= max(row["seconds"]["forward"][0], row["seconds"]["backward"][0])
        assert row["work"]["forward_flops"] > 0


@pytest.mark.parametrize(
    ("form", "status", "reason"),
    [
        ("wrong", "wrong", "is off by 1.0e-03 from float64"),
        ("nan", "wrong", "logit_scale is off by inf from float64"),
        ("broken", "failed", "KeyError: 'no such thing'"),
        ("absent", "not installed", "pip install "),
        ("picky", "not usable", "not on cpu"),
        ("large", "out of memory", "needs more memory than there is"),
    ],
)
def test_a_form_that_is_not_timed_says_why(rows, form, status, reason):
    assert rows[form]["status"] == status
    assert reason in rows[form]["reason"]
    assert "seconds" not in rows[form]


def test_peak_memory_of_a_process_of_its_own():
    """The plain form keeps at least one matrix ``[B, B]``, em3 none."""
    dims = {"B": 2048, "V": 16}
    found = {form: memory.peak("contrastive_loss", dims, form, "cpu", "float32", 2) for form in ("plain", "em3")}
    matrix = 4 * 2048**2
    assert found["plain"]["inputs"] == 4 * (2 * 2048 * 16 + 1)
    assert found["plain"]["peak"] > 2 * matrix
    assert found["em3"]["results"] == found["em3"]["inputs"] < found["em3"]["peak"] < matrix


def test_a_form_that_does_not_fit_is_out_of_memory():
    with pytest.raises(memory.OutOfMemory, match="needs more memory than the"):
        memory.peak("contrastive_loss", {"B": 2**20, "V": 4}, "plain", "cpu", "float32", 1)


def test_what_does_not_fit_fails_instead_of_taking_the_process_along():
    """The inputs and the truth in float64 are made in the run's own process."""
    beyond = psutil.virtual_memory().available - memory.SPARE // 2
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory.bounded(), pytest.raises(RuntimeError, match=r"allocate memory|not enough memory"):
        torch.empty(beyond, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_form_that_fails_on_a_gpu_in_any_way_costs_only_its_own_row(monkeypatch):
    """There its memory is measured in the run's own process."""

    def broken(about):
        raise KeyError("no such kernel")

    monkeypatch.setattr(memory, "_measure", broken)
    form = Form("broken", wrong, registry.OPERATIONS["contrastive_loss"].plain_work)
    row = operations._needs(form, SHAPE, "cuda", torch.float32)
    assert row == {"status": "failed", "reason": "KeyError: 'no such kernel'"}


def test_times_are_of_both_directions_and_in_turns():
    inputs = registry.OPERATIONS["contrastive_loss"].make(SHAPE.dims, "cpu", torch.float32)
    order = []

    def call(name):
        plain = registry.OPERATIONS["contrastive_loss"].plain(inputs).forward

        def forward():
            order.append(name)
            return plain()

        return Call(forward, leaves(inputs))

    times = measure.alternate({"a": call("a"), "b": call("b")}, None, "cpu", 0.0, 4)
    assert order == ["a", "a", "b", "b"] * 4
    assert times["a"].shape == (4, 2)
    assert (times["a"] > 0).all()


def test_errors_are_relative_and_a_gradient_that_is_zero_counts_against_the_largest():
    want = {"output": torch.tensor([3.0, 4.0]), "w": torch.tensor([30.0]), "zero": torch.zeros(1), "scale": torch.tensor(1e-9)}
    got = {"output": torch.tensor([3.0, 4.5]), "w": torch.tensor([33.0]), "zero": torch.tensor([1.0]), "scale": torch.tensor(12.0)}
    found = measure.errors(got, {name: value.double() for name, value in want.items()})
    assert found == pytest.approx({"output": 0.1, "w": 0.1, "zero": 0.1, "scale": 0.1}, rel=1e-6)
    assert measure.errors({"output": torch.tensor([float("nan"), 0])}, want)["output"] != 0
    assert not measure.errors({"output": torch.tensor([float("nan"), 0])}, want)["output"] <= 1
    assert measure.errors({"w": torch.tensor([float("nan")])}, want)["w"] == float("inf")
    nothing = {"output": torch.tensor(0.0).double(), "w": torch.zeros(2).double()}  # a contrast of one row
    assert measure.errors({"output": torch.tensor(1e-7), "w": torch.zeros(2)}, nothing) == pytest.approx({"output": 1e-7, "w": 0.0})


@pytest.mark.parametrize(("factor", "loosened"), [(1 + 6e-5, True), (2.0, False), (float("nan"), False)])
def test_a_plain_form_that_is_wrong_does_not_loosen_the_limit_of_the_others(factor, loosened):
    operation = registry.OPERATIONS["contrastive_loss"]
    inputs = operation.make(SHAPE.dims, "cpu", torch.float32)
    want = measure.true_results(operation.truth, inputs, None)

    def off(inputs):
        call = operation.plain(inputs)
        return Call(lambda: factor * call.forward(), call.leaves)

    limit = operations.limit_beside(dataclasses.replace(operation, plain=off), inputs, None, want, torch.float32)
    assert (limit > measure.limit(torch.float32)) == loosened
