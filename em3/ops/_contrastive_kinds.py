"""The two kinds of contrast as a ring of processes sees them: a block of the matrix is summed, and blocks' sums are joined."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _contrastive_sigmoid, _dispatch
from ._contrastive_operator import about

INFONCE, SIGMOID, SIGMOID_POSITIVE = "infonce", "sigmoid", "sigmoid, one item's rows are positives"


class InfoNCE:
    """Logsumexps, of any backend."""

    nothing = -torch.inf  # the sum over no candidate

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.logaddexp(a, b)

    def forward(self, x, y, scale, bias, *rest):
        return self.module.forward(x, y, scale, *rest)

    def backward(self, drow, dcol, x, y, scale, bias, item_ids, offset, row, col, need, apart):
        """Gradients to ``x, y, scale, bias, offset``, an empty one where ``need`` wants none."""
        need = [need[0], need[1], need[2], need[4]]
        dx, dy, dscale, doffset = self.module.backward(
            drow, dcol, x, y, scale, item_ids, offset, row, col, need, apart
        )
        return dx, dy, dscale, x.new_empty(0), doffset


class Sigmoid:
    """Sums of pairs."""

    nothing = 0.0

    def __init__(self, module: ModuleType, positive: bool) -> None:
        self.module, self.positive = module, positive

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def forward(self, x, y, scale, bias, item_ids, offset, rows, cols, apart):
        return self.module.forward(x, y, scale, bias, item_ids, offset, rows, cols, self.positive, apart)

    def backward(self, drow, dcol, x, y, scale, bias, item_ids, offset, row, col, need, apart):
        return self.module.backward(drow, dcol, x, y, scale, bias, item_ids, offset, need, self.positive, apart)


def chosen(kind: str, backend: str, x: Tensor, y: Tensor, *rest: Any) -> InfoNCE | Sigmoid:
    """``rest`` are ``scale, item_ids, offset, rows, cols`` of ``em3::contrastive_loss``."""
    if kind == INFONCE:
        args = (x, y, *rest)
        return InfoNCE(_dispatch.choose("contrastive_loss", backend, args, lambda: about(x, y, rest[1])))
    return Sigmoid(_contrastive_sigmoid.served(backend, x, y, *rest), kind == SIGMOID_POSITIVE)
