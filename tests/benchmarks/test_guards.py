"""The guards catch what they are there for, and nothing else.

They are run as a contributor runs them, in a process of its own; what is planted comes in through a ``sitecustomize`` that
wraps em3's form before it is measured.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("yaml", "psutil", "pytest_benchmark"):
    pytest.importorskip(package)

from benchmarks.guards import guard
from em3.benchmarks import registry
from em3.benchmarks.forms import nbytes

ROOT = Path(__file__).resolve().parents[2]
SPEED, MEMORY = "test_speed and lora_target_attention and history", "test_memory and lora_target_attention and wide"

PLANT = """
import dataclasses, time
import torch
from em3.benchmarks import measure, registry
from em3.benchmarks.forms import Call

honest = registry.form

def planted(operation, name):
    form = honest(operation, name)
    if name != "em3":
        return form
    def bind(inputs):
        call = form.bind(inputs)
        return Call({wrap}(call, inputs), call.leaves)
    return dataclasses.replace(form, bind=bind)

def slower(call, inputs):
    "1.3 times the processor time of a forward and backward."
    grad = torch.ones_like(call.forward())
    times = []
    for _ in range(9):
        start = time.process_time()
        measure.results(call, grad)
        times.append(time.process_time() - start)
    extra = 0.3 * sorted(times)[4]
    def forward():
        until = time.process_time() + extra
        while time.process_time() < until:
            pass
        return call.forward()
    return forward

class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, temporary):
        ctx.save_for_backward(temporary)
        return out.view_as(out)
    @staticmethod
    def backward(ctx, grad):
        return grad, None

def hungrier(call, inputs):
    "One tensor [B, N, D] that lives from the forward to the backward, as keys would."
    size = inputs["ids"].numel() * inputs["w_q"].shape[0]
    return lambda: Kept.apply(call.forward(), torch.ones(size))

registry.form = planted
"""


def guards(which: str, tmp_path: Path, wrap: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("EM3_SET", "PYTEST"))}
    if wrap:
        (tmp_path / "sitecustomize.py").write_text(PLANT.replace("{wrap}", wrap))
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])])
    words = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", which]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_they_pass_on_what_is_there(tmp_path):
    done = guards(f"({SPEED}) or ({MEMORY})", tmp_path)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_a_planted_slowdown_is_caught(tmp_path):
    done = guards(SPEED, tmp_path, "slower")
    if "1 skipped" in done.stdout:
        pytest.skip("there are no floors for this instruction set")
    assert done.returncode == 1, done.stdout
    assert re.search(r"em3 was, at best in 5 attempts, .*[\d.]+ times as fast as em3 torch", done.stdout), done.stdout


def test_a_planted_temporary_is_caught(tmp_path):
    done = guards(MEMORY, tmp_path, "hungrier")
    assert done.returncode == 1, done.stdout
    assert "times the inputs' size three times in a row" in done.stdout


def test_a_slowdown_is_told_from_what_other_work_does():
    """Of every speed guard that is committed, but one: its floor is below all that was measured, above all that slowed down
    by 1.3."""
    content = guard.read()
    wide = {("lora_linear", "adapters"): 1.37}
    for kind, ops in content["speed"].items():
        for op, shapes in ops.items():
            for name, held in shapes.items():
                floor = guard.speed_floors(held, content["margins"])[guard.nearest(held)]
                lowest, highest = held[guard.nearest(held)]
                assert highest / wide.get((op, name), 1.3) < 0.995 * floor, f"{kind}: {op}, {name}"
                assert floor < 0.98 * lowest, f"{kind}: {op}, {name}"


@pytest.mark.parametrize("shape", guard.MEMORY, ids=[f"{shape.op}, {shape.name}" for shape in guard.MEMORY])
def test_a_temporary_is_told_from_what_the_heap_does(shape):
    """Of every memory guard that is committed: one tensor of the rows' size, [T, C] or [T, D], is more than its margin; for
    candidates, whose one history is small beside the bank, one of scores [H, Q, T]."""
    content, dims = guard.read(), shape.dims
    inputs = registry.OPERATIONS[shape.op].make(dims, "cpu", torch.float32)
    rows = {"qformer_attention": lambda: sum(x.numel() // x.shape[-1] for x in inputs["values"]), "lora_linear": lambda: dims["T"],
            "lora_target_attention": lambda: inputs["ids"].numel(), "contrastive_loss": lambda: dims["B"]}[shape.op]()
    widths = {key: dims[key] for key in ("D", "V") if key in dims}
    if shape.op == "lora_linear":  # the narrow one's results are no more than the heap's own rounding
        widths["C"] = dims["C"]
    if shape.name == "candidates":
        widths = {"scores": dims["H"] * dims["Q"]}
    held = content["memory"][shape.op][shape.name]
    margin = guard.memory_ceiling(held, content["margins"]) - held
    assert 4 * rows * max(widths.values()) / nbytes(inputs) > 1.1 * margin


def test_floors_lie_between_what_was_measured_and_what_must_be_caught():
    margins = {"plain": 1.25, "nearest": 1.02}
    floors = guard.speed_floors({"plain": [4.0, 6.0], "em3 torch": [2.0, 2.6 / 1.1]}, margins)
    assert floors == pytest.approx({"plain": 3.2, "em3 torch": 2.0 / 1.1**0.5})
    assert guard.speed_floors({"em3 torch": [2.0, 2.6]}, margins) == pytest.approx({"em3 torch": 2.0 / 1.02})


def test_setting_floors_widens_them(tmp_path, monkeypatch):
    path = tmp_path / "floors.yaml"
    path.write_text("# kept\nspeed:\n  kind:\n    op:\n      shape:\n        plain: [2, 3]\nmemory: {op: {shape: 1.0}}\n")
    monkeypatch.setattr(guard, "FLOORS", path)
    at = ("speed", "kind", "op", "shape")
    guard.write([((*at, "plain"), [2.5, 3.555]), ((*at, "em3 torch"), [1.5, 1.25]), (("memory", "op", "shape"), [3.0, 1.0, 2.0])])
    assert path.read_text().startswith("# kept\n")
    assert guard.read() == {"speed": {"kind": {"op": {"shape": {"plain": [2, 3.56], "em3 torch": [1.25, 1.5]}}}}, "memory": {"op": {"shape": 2.0}}}


def test_a_machine_without_floors_says_so_and_how_to_set_them(tmp_path):
    """A forced instruction set has none."""
    environment = os.environ | {"EM3_CPU_ISA": "baseline"}
    words = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", SPEED]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "there are no floors of it for baseline forced" in done.stdout, done.stdout
    assert "EM3_SET_FLOORS=1 pytest benchmarks" in done.stdout
