"""The operations that have benchmarks, by name."""

from __future__ import annotations

import importlib

from .forms import Dims, Form, Operation
from .shapes import DIMENSIONS

OPERATIONS: dict[str, Operation] = {
    name: importlib.import_module(f".{name}", __package__).OPERATION for name in DIMENSIONS
}


def form(operation: Operation, name: str) -> Form:
    return next(form for form in operation.forms() if form.name == name)


def smallest(op: str, dims: Dims) -> Dims:
    """The shape with as few items or rows as make sense, for a first call that goes the same way as one with the shape."""
    if op == "contrastive_loss":
        return dims | {"B": min(dims["B"], 600)}  # few logits are one call, see em3/ops/_contrastive_whole.py
    return dims | ({"T": 16} if op == "lora_linear" else {"B": 2})
