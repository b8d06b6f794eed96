"""In-batch contrast without the ``B x B`` matrix: the Triton kernels, float32.

The contract of ``forward`` and ``backward`` is that of ``em3.ops._contrastive_operator``; memory beyond the outputs is a few
numbers a row and, for a small batch, the parts of its gradients that programs beside each other make.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cannot_use, kernel, unavailable

__all__ = ["backward", "forward", "supports", "unavailable", "wins"]

_MOST = 2**31 - 2**12  # rows and columns are counted in 32 bits, and the last tile goes beyond them


def supports(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None, rows: bool,
             cols: bool) -> str | None:  # fmt: skip
    if x.dtype != torch.float32:
        return f"it computes in float32 and the embeddings come as {x.dtype}; convert them or use another backend"
    if x.shape[1] == 0:
        return "it reads embeddings of width 1 and more, and these have width 0"
    if y.shape[0] > _MOST:
        return f"it reads at most {_MOST} candidates, and there are {y.shape[0]}"
    return cannot_use(x.device)


def wins(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None, rows: bool,
         cols: bool) -> bool:  # fmt: skip
    # Counted, not measured: the torch backend makes each tile of logits without tensor cores, and passes over it in
    # memory a dozen times; this keeps it in registers (docs/design.md). The interpreter is for tests.
    return x.is_cuda


def forward(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None, rows: bool,
            cols: bool, apart: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, n = x.shape[0], x.shape[0] if apart is None else apart
    if not b or not y.shape[0]:
        row, col = (scale.new_full((count if asked else 0,), -torch.inf) for count, asked in ((b, rows), (n, cols)))
        return row, col
    given = sheet(x, y, scale, item_ids, offset, apart)
    found: tuple[Tensor, Tensor] = kernel("contrastive_loss").statistics(given, rows, cols)
    return found


def backward(drow: Tensor | None, dcol: Tensor | None, x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None,
             offset: Tensor | None, row: Tensor, col: Tensor, need: list[bool], apart: int | None = None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to ``x, y, scale, offset``; an empty tensor for each that ``need`` leaves out."""
    b, m = x.shape[0], y.shape[0]
    need_x, need_y, need_scale, need_offset = need
    dx, dy, to_scale, down, across = (None,) * 5
    # A direction without a statistic has no gradient either.
    drow, dcol = (d if t.numel() else None for d, t in ((drow, row), (dcol, col)))
    if b and m and (drow is not None or dcol is not None):
        gradient, given = kernel("contrastive_loss").gradient, sheet(x, y, scale, item_ids, offset, apart)
        exchanged = given._replace(rows=given.cols, cols=given.rows)
        if need_x or need_scale or need_offset:
            dx, to_scale, down = gradient(given, row, col, drow, dcol, (need_x, need_scale, need_offset))
        if need_y or need_offset:
            dy, _, across = gradient(exchanged, col, row, dcol, drow, (need_y, False, need_offset))
    # The terms of the scale's gradient may cancel: they are summed in float64.
    dscale = None if to_scale is None else to_scale.sum(dtype=scale.dtype)
    doffset = None if down is None or across is None else of_offset(down, across, apart)
    return results((x, y, scale, offset), need, (dx, dy, dscale, doffset))


def of_offset(down: Tensor, across: Tensor, apart: int | None) -> Tensor:
    """The gradient in the form in which ``offset`` came, from those of the rows and of the columns as candidates."""
    if apart is not None:
        return torch.cat([down, across])
    across[: down.shape[0]] += down
    return across


def results(like: tuple[Tensor | None, ...], need: list[bool], gradients: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """What a backward returns: a tensor of its own for each, for an operator's outputs must not alias."""
    x = like[0]
    assert x is not None
    wanted = zip(like, need, gradients, strict=True)
    return tuple(x.new_empty(0) if not n or t is None else _result(t, gradient) for t, n, gradient in wanted)


def _result(like: Tensor, gradient: Tensor | None) -> Tensor:
    """Without the columns that ``split`` has added."""
    if gradient is None:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    return gradient[..., : like.shape[-1]].contiguous() if like.dim() == 2 else gradient


def sheet(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None, apart: int | None) -> Any:
    kernels = kernel("contrastive_loss")
    b, n = x.shape[0], x.shape[0] if apart is None else apart
    first = 0 if apart is None else b  # where the ids and offsets of columns begin
    ids = None if item_ids is None else _numbered(item_ids)
    offset = None if offset is None else offset.contiguous()

    def side(vectors: Tensor, begin: int, anchors: int) -> Any:
        rest = (None if t is None else t[begin:] for t in (ids, offset))
        return kernels.Side(kernels.split(vectors), *rest, anchors)

    return kernels.Sheet(side(x, 0, b), side(y, first, n), scale, apart is None)


def _numbered(ids: Tensor) -> Tensor:
    """The same items under numbers from 0 on, which fit in 32 bits; nothing here waits for the device."""
    ids, order = ids.sort(stable=True)
    item = torch.cat([ids[:1] != ids[:1], ids[1:] != ids[:-1]]).cumsum(0, dtype=torch.int32)
    return torch.empty_like(item).scatter_(0, order, item)
