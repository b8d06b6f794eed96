"""`pytest benchmarks`: no speed and no memory is lost. Floors, margins and how to set them: ``floors.yaml``."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

import em3
from em3.benchmarks import registry

from . import guard

REPEATS = 3  # of each measurement when floors are set
OPTIONS = 1.15  # what masked duplicates, logQ and weights may cost together


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
    benchmark.extra_info |= speeds
    if found is not None:
        every = [speeds, *(guard.speeds(calls, grad, again) for _ in range(REPEATS - 1))]
        for rival in speeds:
            path = ("speed", guard.kind(), shape.op, shape.name, rival)
            found.append((path, statistics.median(of[rival] for of in every)))
        return
    held = floors["speed"].get(guard.kind(), {}).get(shape.op, {}).get(shape.name)
    if held is None:
        pytest.skip(f"there are no floors of it for {guard.kind()}: set them by EM3_SET_FLOORS=1 pytest benchmarks")
    assert held.keys() == speeds.keys(), "the backends have changed: set floors anew by EM3_SET_FLOORS=1 pytest benchmarks"
    least = guard.speed_floors(held, floors["margins"])
    if any(speeds[rival] < least[rival] for rival in least):
        speeds = guard.speeds(calls, grad, again)
    for rival, floor in least.items():
        assert speeds[rival] >= floor, (
            f"{shape.op}, {shape.name}: em3 was {speeds[rival]:.2f} times as fast as {rival} twice in a row; "
            f"{held[rival]} was measured, {floor:.2f} is the floor"
        )


@pytest.mark.parametrize("shape", guard.MEMORY, ids=names(guard.MEMORY))
def test_memory(shape, floors, found):
    if found is not None:
        found.append((("memory", shape.op, shape.name), statistics.median(guard.memory_share(shape) for _ in range(REPEATS))))
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
