"""A linear layer with low-rank adapters: the compiled CPU kernel around PyTorch's products with the weight.

The contract of ``forward`` and ``backward`` is that of ``em3.ops.lora_linear``. The kernel adds the low-rank part to what
the layer gave, where the rows lie: it sorts row numbers by adapter, not rows, and reads x and dy once each in the backward.
It computes in float32, and rows of a half type are rounded once where they are written.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops._dropout import Dropout
from .. import cpp
from ..torch import lora_linear as plain
from . import _parts, unavailable

__all__ = ["backward", "forward", "supports", "unavailable", "wins"]


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float,
             scalings: Tensor | None, adapter: Tensor | None, offsets: Tensor | None,
             drop: Dropout | None = None) -> str | None:  # fmt: skip
    if x.device.type != "cpu":
        return f"it computes on the CPU and the tensors are on {x.device}"
    if x.dtype not in _parts.STORED:
        return f"it computes in float32 and the rows are {x.dtype}; convert them or use another backend"
    if 0 in weight.shape:
        return f"it reads and writes rows of width 1 and more, and the weight is {list(weight.shape)}"
    return None


def wins(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float,
         scalings: Tensor | None, adapter: Tensor | None, offsets: Tensor | None,
         drop: Dropout | None = None) -> bool:  # fmt: skip
    # Forward and backward with x's gradient, AVX-512, one thread, ms of processor time on a busy machine, this against the
    # torch backend: one adapter, T=8192, C=D=512, R=8: 103.4, 107.8; T=16384, C=256, D=64, R=8: 21.9, 25.6; T=8192,
    # C=D=1024, R=64: 487, 499; T=256, C=D=512, R=8: 4.3, 4.4; T=64, C=D=64: 0.44, 0.47. G adapters over random rows,
    # T=8192: G=64, C=D=512, R=8: 112, 149; G=1024, C=D=256, R=4: 40, 58. Two threads, wall time: 64 adapters 62.4, 80.2; one,
    # T=16384, C=256, D=64, 10.6, 12.5 (the frozen layer 8.2) with a heap that keeps what was freed. glibc's does not always,
    # and its page faults, 1 ms for the 4 MiB of y, were measured to fall on either form: 12.8 to 14.6 against 12.1 to 15.1.
    return True


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float,
            scalings: Tensor | None, adapter: Tensor | None, offsets: Tensor | None,
            drop: Dropout | None = None) -> Tensor:  # fmt: skip
    if lora_a.dim() == 2 and plain.merges(x, weight, lora_a, drop, plain.enough(weight)):
        return F.linear(x, plain.merged(weight, lora_a, lora_b, scaling), bias)
    y = F.linear(x, weight, bias)
    cpp.compiled().lora_linear_forward(
        _rows(x), *_adapters(lora_a, lora_b, scaling, scalings, adapter, offsets), y, _parts.drawn(drop), torch.get_num_threads(),
        cpp.isa,
    )  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float,
             scalings: Tensor | None, adapter: Tensor | None, offsets: Tensor | None, drop: Dropout | None,
             need: list[bool]) -> plain.Gradients:  # fmt: skip
    need_x, need_weight, _, need_a, need_b = need
    merges = lora_a.dim() == 2 and plain.merges(dy, weight, lora_a, drop, plain.enough(weight))
    if merges and need_weight:  # from which the adapter's gradient follows, without another pass over the rows
        return plain.backward(dy, x, weight, lora_a, lora_b, scaling, scalings, adapter, offsets, drop, need)
    met = plain.merged(weight, lora_a, lora_b, scaling) if merges and need_x else weight
    dx, dweight, dbias = plain.of_layer(dy, x, met, need)
    adds = need_x and not merges
    if not (adds or need_a or need_b):
        return dx, dweight, dbias, None, None
    a, b, *rest = _adapters(lora_a, lora_b, scaling, scalings, adapter, offsets)
    da = torch.empty_like(a) if need_a else None
    db = torch.empty_like(b) if need_b else None
    cpp.compiled().lora_linear_backward(
        _rows(dy), _rows(x) if x is not None and (need_a or need_b) else None, a, b, *rest, dx if adds else None, da, db,
        _parts.drawn(drop), torch.get_num_threads(), cpp.isa,
    )  # fmt: skip
    return dx, dweight, dbias, da, db


def _adapters(lora_a: Tensor, lora_b: Tensor, scaling: float, scalings: Tensor | None, adapter: Tensor | None,
              offsets: Tensor | None) -> tuple[Any, ...]:  # fmt: skip
    """As the kernel reads them."""
    return (
        lora_a.contiguous(), lora_b.contiguous(), scaling, None if scalings is None else scalings.contiguous().float(),
        None if adapter is None else adapter.contiguous().long(), None if offsets is None else offsets.contiguous().long(),
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
