"""A linear layer with low-rank adapters: Triton kernels for the low-rank part around PyTorch's products with the weight.

The contract of ``forward`` and ``backward`` is that of ``em3.ops.lora_linear``. Rows are read and added to where they lie;
memory beyond the results is ``R`` numbers a row, the sorted row numbers, and sums of parts of the adapters' gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops._dropout import Dropout, threshold
from ..torch import lora_linear as plain
from . import cannot_use, kernel, unavailable

__all__ = ["backward", "forward", "supports", "unavailable", "wins"]

_RANK = 128
_MOST = 2**30  # rows are counted in 32 bits, and the last part goes beyond them


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float,
             scalings: Tensor | None, adapter: Tensor | None, offsets: Tensor | None,
             drop: Dropout | None = None) -> str | None:  # fmt: skip
    if x.dtype == torch.float64:
        return "it computes in float32 and the rows are torch.float64; convert them or use another backend"
    if 0 in weight.shape:
        return f"it reads and writes rows of width 1 and more, and the weight is {list(weight.shape)}"
    if lora_a.shape[-2] > _RANK:
        return f"it holds a row's rank in registers, at most {_RANK}, and the rank is {lora_a.shape[-2]}; use another backend"
    if max(x.shape[0], *weight.shape) > _MOST:
        return f"it reads at most {_MOST} rows and columns, and there are {max(x.shape[0], *weight.shape)}"
    return cannot_use(x.device)


def wins(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float,
         scalings: Tensor | None, adapter: Tensor | None, offsets: Tensor | None,
         drop: Dropout | None = None) -> bool:  # fmt: skip
    # Counted, not measured: the torch backend reads a copy of the rows in float32 and a row of a factor for each row and
    # rank; this reads x once and y twice (docs/design.md). The interpreter is for tests.
    return x.is_cuda


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float,
            scalings: Tensor | None, adapter: Tensor | None, offsets: Tensor | None,
            drop: Dropout | None = None) -> Tensor:  # fmt: skip
    if plain.merges(x, weight, lora_a, drop, plain.enough(weight)):
        return F.linear(x, plain.merged(weight, lora_a, lora_b, scaling), bias)
    y = F.linear(x, weight, bias).contiguous()
    kernels, a, b = kernel("lora_linear"), _stacked(lora_a), _stacked(lora_b)
    rows = kernels.by_adapter(adapter, offsets, x.shape[0], a.shape[0])
    kernels.low_rank(_rows(x), (a, b), y, rows, _scaling(scaling, scalings), _mask(drop), behind=False, keep=False)
    return y


def backward(dy: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float,
             scalings: Tensor | None, adapter: Tensor | None, offsets: Tensor | None, drop: Dropout | None,
             need: list[bool]) -> plain.Gradients:  # fmt: skip
    need_x, need_weight, _, need_a, need_b = need
    merges = plain.merges(dy, weight, lora_a, drop, plain.enough(weight))
    if merges and need_weight:  # from which the adapter's gradient follows, without another pass over the rows
        return plain.backward(dy, x, weight, lora_a, lora_b, scaling, scalings, adapter, offsets, drop, need)
    met = plain.merged(weight, lora_a, lora_b, scaling) if merges and need_x else weight
    dx, dweight, dbias = plain.of_layer(dy, x, met, need)
    da: Tensor | None = None
    db: Tensor | None = None
    adds = need_x and not merges
    if not (adds or need_a or need_b):
        return dx, dweight, dbias, da, db
    kernels, a, b = kernel("lora_linear"), _stacked(lora_a), _stacked(lora_b)
    factors, mask = _scaling(scaling, scalings), _mask(drop)
    rows, dy = kernels.by_adapter(adapter, offsets, dy.shape[0], a.shape[0]), _rows(dy)
    if adds or need_a:
        dlow = kernels.low_rank(dy, (b, a), dx if adds else None, rows, factors, mask, behind=True, keep=need_a)
    if need_a:
        assert x is not None
        da = kernels.collect(dlow, _rows(x), rows, a, mask, turned=False).view_as(lora_a)
    if need_b:
        assert x is not None
        low = kernels.low_rank(_rows(x), (a, b), None, rows, factors, mask, behind=False, keep=True)
        db = kernels.collect(low, dy, rows, b, None, turned=True).view_as(lora_b)
    return dx, dweight, dbias, da, db


def _stacked(factor: Tensor) -> Tensor:
    return (factor if factor.dim() == 3 else factor[None]).contiguous()


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _scaling(scaling: float, scalings: Tensor | None) -> Any:
    return kernel("lora_linear").Scaling(scaling, None if scalings is None else scalings.contiguous().float())


def _mask(drop: Dropout | None) -> Any:
    if drop is None:
        return None
    return kernel("lora_linear").Mask(drop.seed, threshold(drop.p), 1 / (1 - drop.p) if drop.p < 1 else 0.0)
