"""The moving average of the weights: what is validated, tested and kept where ``train.average`` asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """An exponential moving average of the parameters of an optimizer.

    It lies in the optimizer's state, beside Adam's own averages, and so is saved and restored with it. A parameter's
    begins with its first step.

    Args:
        decay: the share of the average that a step keeps. In the first steps it is less, ``(1 + step) / (10 + step)``, lest
            the weights as they were drawn stay in it for long.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the exponential form and the
    decay of the first steps are TensorFlow's ``ExponentialMovingAverage``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.optimizer, self.decay = optimizer, decay

    def update(self, step: int) -> None:
        """Take in the weights after step number ``step`` (from 0)."""
        for parameter, state in self.optimizer.state.items():
            if "average" not in state:
                state["average"] = parameter.detach().clone()
        parameters, averages = self._pairs()
        get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))(averages, parameters, step)

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Within, the parameters hold the average."""
        parameters, averages = self._pairs()
        was = [p.detach().clone() for p in parameters]
        _fill(parameters, averages)
        try:
            yield
        finally:
            _fill(parameters, was)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        states = self.optimizer.state
        return list(states), [state["average"] for state in states.values()]


@torch.no_grad()
def _fill(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
