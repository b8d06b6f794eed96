"""`pytest benchmarks`: no speed and no memory is lost. Floors, margins and how to set them: ``floors.yaml``."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

import em3
from em3.benchmarks import registry

from . import guard

REPEATS = 3  # of the memory when floors are set
OPTIONS = 1.15  # what masked duplicates, logQ and weights may cost together
SET = "set them by `EM3_SET_FLOORS=1 pytest benchmarks`, once while the machine is idle and once while it is busy"


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
