"""`pytest benchmarks`: no speed and no memory is lost. Floors, margins and how to set them: ``floors.yaml``."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

import em3
from em3.benchmarks import forms, memory, registry, shapes
from em3.ops.lora_target_attention import cheaper

from . import guard

REPEATS = 3  # of the memory when floors are set
OPTIONS = 1.15  # what masked duplicates, logQ and weights may cost together
SET = "set them by `EM3_SET_FLOORS=1 pytest benchmarks`, once while the machine is idle and once while it is busy"
LONGER = 11.0  # what a history of 10,000 may cost beside one of 1,000
NEAR = 1.1  # two forms that differ by less are equally good choices
TARGET = registry.OPERATIONS["lora_target_attention"]
HISTORY: dict[str, Any] = {"B": 8, "C": 64, "D": 64, "H": 4, "R": 8, "Q": 1, "bank": 100_000, "lengths": "full"}


def names(shapes):
    return [f"{shape.op}, {shape.name}" for shape in shapes]


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("shape", guard.SPEED, ids=names(guard.SPEED))
def test_speed(benchmark, shape, floors, found):
    calls, grad = guard.bound(shape)

    def recorded(setup, call):
        benchmark.pedantic(call, setup=setup, rounds=guard.ROUNDS)

    def again(setup, call):
        for _ in range(guard.ROUNDS):
            setup()
            call()

    speeds = guard.speeds(calls, grad, recorded)
    benchmark.extra_info |= {"first": speeds}
    if found is not None:
        every = [speeds, *(guard.speeds(calls, grad, again) for _ in range(guard.ATTEMPTS - 1))]
        for rival in speeds:
            found.append((("speed", guard.kind(), shape.op, shape.name, rival), [max(of[rival] for of in every)]))
        return
    held = floors["speed"].get(guard.kind(), {}).get(shape.op, {}).get(shape.name)
    if held is None:
        pytest.skip(f"there are no floors of it for {guard.kind()}: {SET}")
    assert held.keys() == speeds.keys(), f"the backends have changed: take its floors out of floors.yaml, then {SET}"
    least = guard.speed_floors(held, floors["margins"])
    attempts = 1
    while attempts < guard.ATTEMPTS and any(speeds[rival] < least[rival] for rival in least):
        more = guard.speeds(calls, grad, again)
        speeds = {rival: max(value, more[rival]) for rival, value in speeds.items()}
        attempts += 1
    benchmark.extra_info |= {"best": speeds, "attempts": attempts}
    short = [
        f"{speeds[rival]:.2f} times as fast as {rival} ({lowest} to {highest} was measured, {least[rival]:.2f} is the floor)"
        for rival, (lowest, highest) in held.items() if speeds[rival] < least[rival]
    ]  # fmt: skip
    assert not short, f"{shape.op}, {shape.name}: em3 was, at best in {attempts} attempts, {' and '.join(short)}"


@pytest.mark.parametrize("shape", guard.MEMORY, ids=names(guard.MEMORY))
def test_memory(shape, floors, found):
    if found is not None:
        found.append((("memory", shape.op, shape.name), [guard.memory_share(shape) for _ in range(REPEATS)]))
        return
    held = floors["memory"][shape.op][shape.name]
    ceiling = guard.memory_ceiling(held, floors["margins"])
    share = guard.memory_share(shape)
    if share > ceiling:  # what the heap adds now and then, it adds to one in six: a real loss is in all three
        share = min(share, guard.memory_share(shape), guard.memory_share(shape))
    assert share <= ceiling, (
        f"{shape.op}, {shape.name}: the peak of forward and backward was {share:.2f} times the inputs' size three times in a row; "
        f"{held} was measured, {ceiling:.2f} is the ceiling"
    )


@pytest.mark.parametrize("b", [512, 2048])
def test_what_recommenders_need_costs_little(b):
    """Duplicates masked, logQ and weights together, over none of them: of contrastive_loss, forward and backward."""
    inputs = registry.OPERATIONS["contrastive_loss"].make({"B": b, "V": 128}, "cpu", torch.float32)
    more = dict(item_ids=torch.randint(b // 2, (b,)), log_q=torch.rand(b).log(), weight=torch.rand(b))

    def seconds(options):
        start = time.process_time()
        loss = em3.ops.contrastive_loss(**inputs, **options)
        torch.autograd.grad(loss, list(inputs.values()))
        return time.process_time() - start

    def ratio():
        return statistics.median([seconds(more) / seconds({}) for _ in range(guard.ROUNDS)][2:])

    cost = ratio()
    if cost > OPTIONS:
        cost = min(cost, ratio(), ratio())
    assert cost <= OPTIONS, f"with item_ids, log_q and weight a step took {cost:.2f} times as long three times in a row"


def step_of_target(inputs, **options):
    """Seconds of forward and backward."""
    start = time.process_time()
    out = em3.ops.lora_target_attention(
        history=em3.Jagged(inputs["ids"], inputs["offsets"]), **options,
        **{name: value for name, value in inputs.items() if name not in ("ids", "offsets")},
    )  # fmt: skip
    torch.autograd.grad(out, list(forms.leaves(inputs).values()), torch.ones_like(out))
    return time.process_time() - start


def test_a_history_costs_what_its_length_says():
    short, long = (TARGET.make(HISTORY | {"N": n}, "cpu", torch.float32) for n in (1_000, 10_000))

    def ratio():
        return statistics.median([step_of_target(long) / step_of_target(short) for _ in range(guard.ROUNDS)][2:])

    cost = ratio()
    if cost > LONGER:
        cost = min(cost, ratio(), ratio())
    assert cost <= LONGER, f"a history of 10,000 cost {cost:.2f} times one of 1,000 three times in a row"


def test_memory_does_not_grow_with_the_history():
    """Keys and values are not formed, and rows not gathered: what grows is less than a tenth of either."""
    short, long = (
        memory.peak(TARGET.name, HISTORY | {"N": n}, "em3", "cpu", "float32", threads=2)["peak"] for n in (1_000, 5_000)
    )
    keys = 4_000 * HISTORY["B"] * HISTORY["D"] * 4
    assert long - short < keys / 10, f"4,000 more places raised the peak from {short} to {long} bytes; their keys have {keys}"


def test_the_cost_model_takes_the_faster_form_for_candidates():
    """Of at least 95% of the shapes: those of the table, and around where projecting begins to pay."""
    table = [shape.dims for shape in shapes.load() if shape.op == TARGET.name and shape.dims["B"] * shape.dims["N"] <= 16_000]
    for b, n, d, h in ((1, 1_000, 128, 4), (1, 200, 256, 4), (4, 500, 64, 4), (1, 200, 512, 8)):
        of = HISTORY | {"B": b, "N": n, "C": d, "D": d, "H": h, "bank": 20_000}
        table += [of | {"Q": q} for q in (4, 32, 128, 256)]
    wrong = []
    for dims in table:
        inputs = TARGET.make(dims, "cpu", torch.float32)
        picked = cheaper(len(inputs["ids"]), dims["B"], inputs["bank"], dims["Q"], dims["H"], dims["D"])
        other = "absorb" if picked == "project" else "project"
        times = [[step_of_target(inputs, strategy=way) for way in (picked, other)] for _ in range(7)]
        loss = statistics.median(ours / theirs for ours, theirs in times[2:])
        if loss > NEAR:
            wrong.append(f"{dims}: {picked} took {loss:.2f} times as long")
    assert len(wrong) <= 0.05 * len(table), "; ".join(wrong)
