"""The plain network at the end of a ranker."""

from __future__ import annotations

from torch import nn


def mlp(width: int, hidden: tuple[int, ...], out: int | None, dropout: float) -> nn.Sequential:
    """Linear, ReLU and dropout for each hidden width; then a linear layer to ``out`` outputs, unless that is None."""
    layers: list[nn.Module] = []
    for inner in hidden:
        layers += [nn.Linear(width, inner), nn.ReLU(), nn.Dropout(dropout)]
        width = inner
    return nn.Sequential(*layers, *([] if out is None else [nn.Linear(width, out)]))
