"""In-batch contrast without the ``B x B`` matrix: tiles of logits, used once and overwritten, in plain PyTorch.

The contract of ``forward`` and ``backward`` is that of ``em3.ops.contrastive_loss``. Memory beyond the outputs is a few
tensors of the inputs' size and two tiles.

Two ways to sum exponentials:

- one exponential for both statistics: ``e = exp(S - shift)`` with a single shift for the whole batch; rows sum
  ``e w``, columns ``e^T w``, where ``w_j = exp(offset_j)``. On the CPU only, where looking at the sums costs nothing:
  they are used if every one lies well inside what the type can represent (``_one_shift`` and ``_in_range``).
- logsumexp of each tile, row by row and column by column: any input, no look at the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...tuning import decide

TILE = (1024, 1024)

# Limits of the single shift, as exponents of e; float32 holds e^-87 to e^88. The logits' upper bound is shifted to TOP
# at most, so that a sum of 1e6 terms stays under e^54 and its reciprocal times a gradient of 1e-9 is still normal. A
# sum under e^LOW is not trusted: what was rounded to zero, less than e^-87 a term, is under e^-27 of any other.
TOP, LOW = 40.0, -60.0
# Beyond these the attempt is not worth making: most sums would fall under LOW, or the weights e^offset underflow.
LARGEST_LOGIT, LARGEST_SPREAD = 150.0, 20.0


def unavailable() -> str | None:
    return None


def supports(*args: object) -> str | None:
    return None


def wins(*args: object) -> bool:
    return True


class Sheet(NamedTuple):
    """The matrix of logits that is never formed, ``S = x y^T``; with ids, its rows and columns in their order."""

    x: Tensor  # [B, V], times the logit scale
    y: Tensor  # [M, V]
    ids: Tensor | None  # [B], ascending
    offset: Tensor | None  # [M]
    order: Tensor | None  # [B], where each row came from
    tile: tuple[int, int]


def forward(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None, rows: bool,
            cols: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    sheet = _arrange(x, y, scale, item_ids, offset)
    shift = _one_shift(sheet)
    if shift is not None:
        row, col = _sums(sheet, shift, rows, cols)
    if shift is None or not _in_range(sheet, shift, row, col):
        row, col = _logsumexps(sheet, rows, cols)
    return _restore(sheet, row) if rows else row, _restore(sheet, col) if cols else col


def backward(drow: Tensor | None, dcol: Tensor | None, x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None,
             offset: Tensor | None, row: Tensor, col: Tensor, need: list[bool],
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to ``x, y, scale, offset``; an empty tensor for each that ``need`` leaves out."""
    sheet = _arrange(x, y, scale, item_ids, offset)
    row, col = _arranged(sheet, row), _arranged(sheet, col)
    drow, dcol = (None if t is None else _arranged(sheet, t) for t in (drow, dcol))
    need_x, need_y, need_scale, need_offset = need
    to_x = torch.zeros_like(sheet.x) if need_x or need_scale else None  # [B, V]
    to_y = torch.zeros_like(sheet.y) if need_y else None  # [M, V]
    to_offset = torch.zeros_like(sheet.offset) if need_offset and sheet.offset is not None else None  # [M]
    shift = _one_shift(sheet)
    if shift is None or not _in_range(sheet, shift, row, col):
        tiles = _softmaxes(sheet, drow, dcol, row, col, to_offset)
    else:
        tiles = _shifted_softmaxes(sheet, shift, drow, dcol, row, col, to_offset)
    for r, c, ds in tiles:  # [r, c] of the gradient to S
        if to_x is not None:
            to_x[r].addmm_(ds, sheet.y[c])
        if to_y is not None:
            to_y[c].addmm_(ds.t(), sheet.x[r])
    dx = x.new_empty(0) if to_x is None else _restore(sheet, to_x)
    # S = scale x y^T, so the gradient to the scale is that to S summed against x y^T, row by row.
    dscale = (dx * x).sum(dtype=scale.dtype) if need_scale else x.new_empty(0)
    dx = dx.mul_(scale) if need_x else x.new_empty(0)
    # No tensor may be returned twice: an operator's outputs must not alias.
    dy, doffset = (x.new_empty(0) if t is None else _restore(sheet, t) for t in (to_y, to_offset))
    return dx, dy, dscale, doffset


def _arrange(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None) -> Sheet:
    """Equal ids side by side, so that only tiles near the diagonal hold duplicates and have to compare ids."""
    dims = (x.shape[0], *y.shape)
    kind = "plain" if item_ids is None else "ids"
    height, width = decide("contrastive_loss.tile", x, kind, dims, "x".join(map(str, TILE))).split("x")
    tile = (int(height), int(width))
    if item_ids is None:
        return Sheet(x * scale, y.contiguous(), None, offset, None, tile)
    ids, order = item_ids.sort(stable=True)
    whole = torch.cat([order, torch.arange(x.shape[0], y.shape[0], device=x.device)])  # [M]
    return Sheet(x[order] * scale, y[whole], ids, None if offset is None else offset[whole], order, tile)


def _restore(sheet: Sheet, sorted_rows: Tensor) -> Tensor:
    """Rows in the order of ``sheet`` back in the caller's; extra negatives behind them stay where they are."""
    if sheet.order is None:
        return sorted_rows
    out = torch.empty_like(sorted_rows)
    b = sheet.order.shape[0]
    out[sheet.order] = sorted_rows[:b]
    out[b:] = sorted_rows[b:]
    return out


def _one_shift(sheet: Sheet) -> float | None:
    """The shift that keeps every ``exp(S - shift)`` under e^TOP; None if summing that way is not worth an attempt."""
    if sheet.x.device.type != "cpu" or not sheet.x.numel():
        return None
    if sheet.offset is not None:
        low, high = torch.aminmax(sheet.offset)
        if not float(high - low) <= LARGEST_SPREAD:
            return None
    bound = float(torch.linalg.vector_norm(sheet.x, dim=1).max() * torch.linalg.vector_norm(sheet.y, dim=1).max())
    return max(0.0, bound - TOP) if bound <= LARGEST_LOGIT else None


def _in_range(sheet: Sheet, shift: float, row: Tensor, col: Tensor) -> bool:
    lowest = shift + LOW + (0.0 if sheet.offset is None else float(sheet.offset.max()))
    return all(float(t.min()) >= lowest for t in (row, col) if t.numel())


def _blocks(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def _tiles(sheet: Sheet) -> Iterator[tuple[slice, slice, Tensor]]:
    """``S`` tile by tile, in a buffer that the next tile overwrites. No tile spans in-batch and extra candidates."""
    b, m = sheet.x.shape[0], sheet.y.shape[0]
    height, width = sheet.tile
    buffer = sheet.x.new_empty(min(height, b) * min(width, m))
    for r in _blocks(0, b, height):
        for c in _blocks(0, b, width) + _blocks(b, m, width):
            yield r, c, torch.mm(sheet.x[r], sheet.y[c].t(), out=_part(buffer, r, c))


def _part(buffer: Tensor, r: slice, c: slice) -> Tensor:
    height, width = r.stop - r.start, c.stop - c.start
    return buffer[: height * width].view(height, width)


def _exclude(sheet: Sheet, tile: Tensor, r: slice, c: slice, value: float) -> None:
    """Write ``value`` where a row meets itself or, with ids, its own item."""
    if c.start >= sheet.x.shape[0]:
        return
    if sheet.ids is None:
        low, high = max(r.start, c.start), min(r.stop, c.stop)
        if low < high:
            tile[low - r.start : high - r.start, low - c.start : high - c.start].diagonal().fill_(value)
        return
    down, across = sheet.ids[r], sheet.ids[c]
    apart = sheet.ids.device.type == "cpu" and bool((down[-1] < across[0]) | (across[-1] < down[0]))
    if not apart:
        tile.masked_fill_(down[:, None] == across, value)


def _weights(sheet: Sheet) -> tuple[Tensor | None, float]:
    """``exp(offset - top) [M]`` and ``top``, for the offsets' share of the single exponential."""
    if sheet.offset is None:
        return None, 0.0
    top = sheet.offset.max()
    return (sheet.offset - top).exp_(), float(top)


def _exponentials(sheet: Sheet, shift: float) -> Iterator[tuple[slice, slice, Tensor]]:
    for r, c, tile in _tiles(sheet):
        if shift:
            tile.sub_(shift)
        torch.exp(tile, out=tile)
        _exclude(sheet, tile, r, c, 0.0)
        yield r, c, tile


def _sums(sheet: Sheet, shift: float, rows: bool, cols: bool) -> tuple[Tensor, Tensor]:
    b = sheet.x.shape[0]
    weights, top = _weights(sheet)
    row, col = sheet.x.new_zeros(b if rows else 0), sheet.x.new_zeros(b if cols else 0)
    for r, c, e in _exponentials(sheet, shift):
        if rows:
            row[r] += e.sum(1) if weights is None else torch.mv(e, weights[c])
        if cols and c.start < b:
            col[c] += e.sum(0) if weights is None else torch.mv(e.t(), weights[r])
    return row.log_().add_(shift + top), col.log_().add_(shift + top)


def _shifted_softmaxes(sheet: Sheet, shift: float, drow: Tensor | None, dcol: Tensor | None, row: Tensor, col: Tensor,
                       to_offset: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:  # fmt: skip
    """The gradient to ``S``: ``e_ij (a_i w_j + b_j w_i)``, the two softmaxes from one exponential."""
    weights, top = _weights(sheet)
    batch, m = sheet.x.shape[0], sheet.y.shape[0]
    a = sheet.x.new_zeros(batch) if drow is None else drow * (shift + top - row).exp_()  # [B]
    b = sheet.x.new_zeros(m)  # the columns of extra negatives have no softmax
    if dcol is not None:
        b[:batch] = dcol * (shift + top - col).exp_()
    buffer = sheet.x.new_empty(min(sheet.tile[0], batch) * min(sheet.tile[1], m))
    for r, c, e in _exponentials(sheet, shift):
        factor = _part(buffer, r, c)
        if weights is None:
            torch.add(a[r, None], b[c], out=factor)
        else:
            torch.mul(a[r, None], weights[c], out=factor).addcmul_(weights[r, None], b[c])
        if to_offset is not None and weights is not None:
            to_offset[c] += torch.mv(e.t(), a[r]) * weights[c]
            to_offset[r] += torch.mv(e, b[c]) * weights[r]
        yield r, c, e.mul_(factor)


def _arranged(sheet: Sheet, t: Tensor) -> Tensor:
    """``[B]`` in the order of the sheet; a direction that was not asked for has an empty tensor."""
    return t if sheet.order is None or not t.numel() else t[sheet.order]


def _logsumexps(sheet: Sheet, rows: bool, cols: bool) -> tuple[Tensor, Tensor]:
    b = sheet.x.shape[0]
    row, col = (sheet.x.new_full((b if asked else 0,), -torch.inf) for asked in (rows, cols))
    for r, c, tile in _tiles(sheet):
        _exclude(sheet, tile, r, c, -torch.inf)
        if rows:
            row[r] = torch.logaddexp(row[r], _offset(sheet, tile, c).logsumexp(1))
        if cols and c.start < b:
            col[c] = torch.logaddexp(col[c], _offset(sheet, tile.t(), r).logsumexp(1))
    return row, col


def _softmaxes(sheet: Sheet, drow: Tensor | None, dcol: Tensor | None, row: Tensor, col: Tensor,
               to_offset: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:  # fmt: skip
    # A row without a candidate has only -inf logits: against +inf instead of -inf they give 0, not NaN.
    row, col = (t.masked_fill(t == -torch.inf, torch.inf) for t in (row, col))
    for r, c, tile in _tiles(sheet):
        _exclude(sheet, tile, r, c, -torch.inf)
        ds = torch.zeros_like(tile)
        if drow is not None:
            share = (_offset(sheet, tile, c) - row[r, None]).exp_().mul_(drow[r, None])  # [r, c]
            ds += share
            if to_offset is not None:
                to_offset[c] += share.sum(0)
        if dcol is not None and c.start < sheet.x.shape[0]:
            share = (_offset(sheet, tile.t(), r) - col[c, None]).exp_().mul_(dcol[c, None])  # [c, r]
            ds += share.t()
            if to_offset is not None:
                to_offset[r] += share.sum(0)
        yield r, c, ds


def _offset(sheet: Sheet, tile: Tensor, candidates: slice) -> Tensor:
    """``[anchors, candidates]`` with the candidates' offsets added."""
    return tile if sheet.offset is None else tile + sheet.offset[candidates]
