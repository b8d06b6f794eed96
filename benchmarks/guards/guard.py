"""What a guard measures, and what it is held against.

A speed guard holds how many times faster em3 is than another form in the same run: the median over rounds of the ratio of
two calls that stood side by side. They run on one thread and are timed by the processor time they use: with ten processes
on two cores, two threads that wait for each other took 40 times as long, and their ratio moved by a factor of two.

What a ratio is depends on what else the machine does, even so: other work takes caches and memory from one form more than
from the other. So a guard that finds too little measures again, up to ``ATTEMPTS`` times, and the best counts: other work
passes, a real loss is in all of them. ``floors.yaml`` holds the lowest and the highest best of so many attempts that was
found, idle and busy, and the floor lies between the lowest of em3 as it is and the highest of one 1.3 times slower. The
torch backend, which works like the compiled one, is moved least. The plain form, which waits for memory, is moved too much
for that; its floor is below the lowest.

A memory guard holds the peak of forward and backward above the inputs, as a share of the inputs' own size.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import em3
from em3.benchmarks import machine, measure, memory, registry, shapes
from em3.benchmarks.forms import Call, our_name
from em3.benchmarks.operations import gradient
from em3.benchmarks.shapes import Shape
from em3.files import atomic
from em3.ops import _dispatch

FLOORS = Path(__file__).with_name("floors.yaml")
ROUNDS, ATTEMPTS = 25, 5
SLOWDOWN = 1.3  # that every speed guard must tell from noise
Held = dict[str, list[float]]  # for each rival the lowest and the highest that was measured
SPEED = shapes.load(Path(__file__).with_name("shapes.yaml"))
# The smallest batch has inputs of the size of what the heap itself rounds up.
MEMORY = [shape for shape in shapes.load() if shape.quick and shape.name != "small"]


def rivals(shape: Shape) -> list[str]:
    """What em3 is held against: the plain formulation, then the form that works most like em3, where there is one: the
    torch backend if another serves the operation, else a loop over adapters or over blocks of rows."""
    if _dispatch.BACKENDS[shape.op] != ("torch",):
        return ["plain", our_name("torch")]
    forms = [form for form in registry.OPERATIONS[shape.op].forms() if form.name in ("loop", "blocks")]
    return ["plain", *(form.name for form in forms if form.refuses(shape.dims, "cpu") is None)]


def kind() -> str:
    """What the ratios of this machine go by: the kernels' instruction set and the processor. Floors are of one such kind.

    A forced instruction set is a kind of its own, since PyTorch, of which the other forms are made, keeps the widest."""
    features = em3.env_report()["system"]["cpu_features"]
    forced = os.environ.get("EM3_CPU_ISA")
    isa = f"{forced} forced" if forced else features["default"] if features else "em3._C was not built"
    return f"{isa}, {machine.processor().rsplit(',', 1)[0]}"


def bound(shape: Shape) -> tuple[dict[str, Call], torch.Tensor | None]:
    """em3 and its rivals on one draw of inputs, and the gradient for the backward."""
    operation = registry.OPERATIONS[shape.op]
    torch.manual_seed(0)
    inputs = operation.make(shape.dims, "cpu", torch.float32)
    calls = {name: registry.form(operation, name).bind(inputs) for name in ("em3", *rivals(shape))}
    return calls, gradient(calls["em3"].forward())


def speeds(calls: dict[str, Call], grad: torch.Tensor | None,
           run: Callable[[Callable[[], None], Callable[[], None]], object]) -> dict[str, float]:  # fmt: skip
    """How many times faster em3 is than each rival. ``run(setup, call)`` repeats the two in turn, as pytest-benchmark does
    it: the rivals are timed in the set-up of each round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str) -> None:
        start = time.process_time()
        measure.results(calls[name], grad)
        seconds[name].append(time.process_time() - start)

    def warmed(name: str) -> None:
        measure.trim()  # see measure.alternate
        measure.results(calls[name], grad)

    def setup() -> None:
        for name in seconds:
            if name != "em3":
                warmed(name)
                timed(name)
        warmed("em3")

    run(setup, lambda: timed("em3"))
    ours = np.array(seconds["em3"])
    return {name: float(np.median(np.array(of) / ours)) for name, of in seconds.items() if name != "em3"}


def memory_share(shape: Shape) -> float:
    """Peak memory above the inputs over the inputs' size."""
    found = memory.peak(shape.op, shape.dims, "em3", "cpu", "float32", threads=2)
    if found["peak"] is None or found["inputs"] is None:
        raise RuntimeError("the high-water mark of a process is not to be had here: there is no /proc/self/clear_refs")
    return found["peak"] / found["inputs"]


def read() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(FLOORS.read_text())
    return content


def write(found: Sequence[tuple[tuple[str, ...], list[float]]]) -> None:
    """Put newly measured values into ``floors.yaml``, each at its path of keys. Of speeds the lowest and the highest are
    kept, those that were there included; of memory the median."""
    content = read()
    for path, values in found:
        inner = content
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        if path[0] == "speed":
            every = [*inner.get(path[-1], []), *values]
            inner[path[-1]] = [round(min(every), 2), round(max(every), 2)]
        else:
            inner[path[-1]] = round(statistics.median(values), 2)
    head = "".join(line for line in FLOORS.read_text().splitlines(keepends=True) if line.startswith("#"))
    with atomic(FLOORS) as file:
        file.write(f"{head}{yaml.safe_dump(content, sort_keys=False, default_flow_style=None)}".encode())


def nearest(held: Held) -> str:
    """The rival that works most like em3, whose ratio moves least."""
    return list(held)[-1]


def speed_floors(held: Held, margins: dict[str, float]) -> dict[str, float]:
    """For each rival how many times faster em3 must be at least; see ``floors.yaml``."""
    floors = {rival: lowest / margins["plain"] for rival, (lowest, _) in held.items()}
    lowest, highest = held[nearest(held)]
    return floors | {nearest(held): min((lowest * highest / SLOWDOWN) ** 0.5, lowest / margins["nearest"])}


def memory_ceiling(measured: float, margins: dict[str, float]) -> float:
    return 1.1 * measured + margins["memory"]
