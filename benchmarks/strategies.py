"""Whether an attention operation chooses the faster strategy by itself: both timed in turns, shape by shape. `em3 tune` times
every decision and keeps the winners; this only looks."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import measure, operations
from .forms import Call, Form, Inputs, Operation, leaves
from .operations import ABSORB, PROJECT, STRATEGIES, Effort
from .registry import OPERATIONS
from .shapes import Shape


def measured(shape: Shape, device: str, dtype: torch.dtype, effort: Effort) -> list[dict[str, Any]]:
    """A row: the seconds of both strategies, which one is chosen, and how far it is behind. ``right`` says that the other one
    is not faster beyond noise. Only strategies that agree with float64 are timed, and only shapes that fit into memory."""
    about = {"suite": "strategies", "op": shape.op, "shape": shape.name, "label": shape.label, "dtype": measure.name_of(dtype)}
    torch.manual_seed(zlib.crc32(f"{shape.op} {shape.dims} {dtype}".encode()))
    operation = OPERATIONS[shape.op]
    try:
        return [about | _compared(operation, operation.make(shape.dims, device, dtype), device, dtype, effort)]
    except (RuntimeError, MemoryError) as error:  # mostly of memory: the other shapes are measured all the same
        return [about | {"reason": f"not measured: {' '.join(str(error).split())}"}]


def _compared(operation: Operation, inputs: Inputs, device: str, dtype: torch.dtype, effort: Effort) -> dict[str, Any]:
    grad = operations.gradient(operation.ours(inputs, "auto"))
    want = measure.true_results(operation.truth, inputs, grad)
    limit = operations.limit_beside(operation, inputs, grad, want, dtype)
    calls: dict[str, Call] = {}
    for strategy in STRATEGIES:
        form = Form(strategy, _by(operation, strategy), operation.our_work)
        row = operations.same_function(form, inputs, grad, want, limit, calls)
        if "reason" in row:
            return {"reason": f"not timed, {strategy}: {row['reason']}"}
    times = {name: of.sum(1) for name, of in measure.alternate(calls, grad, device, 2 * effort.seconds, effort.rounds).items()}
    chosen, _ = operations.choice(operation, inputs)
    other = PROJECT if chosen == ABSORB else ABSORB
    return {
        "seconds": {name: np.percentile(of, [20, 50, 80]).tolist() for name, of in times.items()}, "chosen": chosen,
        "behind": max(0.0, float(np.median(times[chosen] / times[other])) - 1),
        "right": not measure.faster(times[other], times[chosen]),
    }  # fmt: skip


def _by(operation: Operation, strategy: str) -> Callable[[Inputs], Call]:
    def forward(inputs: Inputs) -> Tensor:
        assert operation.by is not None
        return operation.by(inputs, strategy)

    return lambda inputs: Call(lambda: forward(inputs), leaves(inputs))
