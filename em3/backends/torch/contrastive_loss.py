"""In-batch contrast without the ``B x B`` matrix: tiles of logits, used once and overwritten, in plain PyTorch.

The contract of ``forward`` and ``backward`` is that of ``em3.ops._contrastive_operator``. Memory beyond the outputs is a few
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
LARGEST_LOGIT, LARGEST_SPREAD = 150.0, 40.0


def unavailable() -> str | None:
    return None


def supports(*args: object) -> str | None:
    return None


def wins(*args: object) -> bool:
    return True


class Side(NamedTuple):
    """The rows or the columns of the matrix of logits; with ids, in their order."""

    vectors: Tensor  # [B, V] times the logit scale; [M, V]
    ids: Tensor | None  # [B]; [N], ascending
    offset: Tensor | None  # [B]; [M]
    order: Tensor | None  # [B]; [N], where each came from
    anchors: int  # B; N, those that have a statistic: the first ones


class Sheet(NamedTuple):
    """The matrix of logits that is never formed, ``S = x y^T``."""

    x: Side
    y: Side
    own: bool  # whether row i is column i
    tile: tuple[int, int]


def forward(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None, rows: bool,
            cols: bool, apart: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    sheet = arrange(x, y, scale, item_ids, offset, apart)
    shift = _one_shift(sheet)
    if shift is not None:
        row, col = _sums(sheet, shift, rows, cols)
    if shift is None or not _in_range(sheet, shift, row, col):
        row, col = _logsumexps(sheet, rows, cols)
    row, col = row.double(), col.double()
    return restored(sheet.x, row) if rows else row, restored(sheet.y, col) if cols else col


def backward(drow: Tensor | None, dcol: Tensor | None, x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None,
             offset: Tensor | None, row: Tensor, col: Tensor, need: list[bool], apart: int | None = None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to ``x, y, scale, offset``; an empty tensor for each that ``need`` leaves out."""
    sheet = arrange(x, y, scale, item_ids, offset, apart)
    row, col = arranged(sheet.x, row.to(x.dtype)), arranged(sheet.y, col.to(x.dtype))
    drow = None if drow is None else arranged(sheet.x, drow)
    dcol = None if dcol is None else arranged(sheet.y, dcol)
    need_x, need_y, need_scale, need_offset = need
    to_x = torch.zeros_like(sheet.x.vectors) if need_x or need_scale else None  # [B, V]
    to_y = torch.zeros_like(sheet.y.vectors) if need_y else None  # [M, V]
    # [B] and [M], of the rows and of the columns as candidates
    to_offset = tuple(x.new_zeros(side.shape[0]) for side in (x, y)) if need_offset and offset is not None else None
    shift = _one_shift(sheet)
    if shift is None or not _in_range(sheet, shift, row, col):
        shares = _softmaxes(sheet, drow, dcol, row, col, to_offset)
    else:
        shares = _shifted_softmaxes(sheet, shift, drow, dcol, row, col, to_offset)
    for r, c, ds in shares:  # [r, c] of the gradient to S
        if to_x is not None:
            to_x[r].addmm_(ds, sheet.y.vectors[c])
        if to_y is not None:
            to_y[c].addmm_(ds.t(), sheet.x.vectors[r])
    dx = x.new_empty(0) if to_x is None else restored(sheet.x, to_x)
    # S = scale x y^T, so the gradient to the scale is that to S summed against x y^T, row by row.
    dscale = (dx * x).sum(dtype=scale.dtype) if need_scale else x.new_empty(0)
    dx = dx.mul_(scale) if need_x else x.new_empty(0)
    # No tensor may be returned twice: an operator's outputs must not alias.
    dy = x.new_empty(0) if to_y is None else restored(sheet.y, to_y)
    return dx, dy, dscale, x.new_empty(0) if to_offset is None else of_offset(sheet, *to_offset)


def of_offset(sheet: Sheet, down: Tensor, across: Tensor) -> Tensor:
    """The gradient in the form in which ``offset`` came."""
    if not sheet.own:
        return torch.cat([restored(sheet.x, down), restored(sheet.y, across)])
    across[: down.shape[0]] += down
    return restored(sheet.y, across)


def arrange(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None,
             apart: int | None) -> Sheet:  # fmt: skip
    """Equal ids side by side, so that only tiles near the diagonal hold duplicates and have to compare ids."""
    b, own = x.shape[0], apart is None
    kind = "plain" if item_ids is None else "ids"
    height, width = decide("contrastive_loss.tile", x, kind, (b, *y.shape), "x".join(map(str, TILE))).split("x")
    first = 0 if own else b  # where the ids and offsets of columns begin
    of_rows = _sorted(item_ids, 0, b)
    of_cols = of_rows if own else _sorted(item_ids, b, None)
    rows = _side(x * scale, of_rows, None if offset is None else offset[:b], b)
    cols = _side(y, of_cols, None if offset is None else offset[first:], b if apart is None else apart)
    return Sheet(rows, cols, own, (int(height), int(width)))


def _sorted(ids: Tensor | None, begin: int, end: int | None) -> tuple[Tensor, Tensor] | None:
    return None if ids is None else ids[begin:end].sort(stable=True)


def _side(vectors: Tensor, ids: tuple[Tensor, Tensor] | None, offset: Tensor | None, anchors: int) -> Side:
    if ids is None:
        return Side(vectors.contiguous(), None, offset, None, anchors)
    whole = torch.cat([ids[1], torch.arange(anchors, vectors.shape[0], device=vectors.device)])
    return Side(vectors[whole], ids[0], None if offset is None else offset[whole], ids[1], anchors)


def arranged(side: Side, t: Tensor) -> Tensor:
    """``t`` in the order of the sheet; a direction that was not asked for has an empty tensor."""
    return t if side.order is None or not t.numel() else t[side.order]


def restored(side: Side, t: Tensor) -> Tensor:
    """``t`` from the order of the sheet back in the caller's; extra negatives behind it stay where they are."""
    if side.order is None:
        return t
    out = torch.empty_like(t)
    out[side.order] = t[: side.anchors]
    out[side.anchors :] = t[side.anchors :]
    return out


def _one_shift(sheet: Sheet) -> float | None:
    """The shift that keeps every ``exp(S - shift)`` under e^TOP; None if summing that way is not worth an attempt."""
    if sheet.x.vectors.device.type != "cpu" or not sheet.x.vectors.numel() or not sheet.y.vectors.numel():
        return None
    low, high = _offsets_range(sheet)
    if not high - low <= LARGEST_SPREAD:
        return None
    longest_x, longest_y = (torch.linalg.vector_norm(side.vectors, dim=1).max() for side in (sheet.x, sheet.y))
    bound = float(longest_x * longest_y)
    return max(0.0, bound - TOP) if bound <= LARGEST_LOGIT else None


def _offsets_range(sheet: Sheet) -> tuple[float, float]:
    """The smallest and the largest offset; the rows' are among the columns' where these are the same."""
    if sheet.x.offset is None or sheet.y.offset is None:
        return 0.0, 0.0
    ranges = [torch.aminmax(offset) for offset in (sheet.y.offset, *([] if sheet.own else [sheet.x.offset]))]
    return min(float(low) for low, _ in ranges), max(float(high) for _, high in ranges)


def _in_range(sheet: Sheet, shift: float, row: Tensor, col: Tensor) -> bool:
    lowest = shift + LOW + _offsets_range(sheet)[1]
    return all(float(t.min()) >= lowest for t in (row, col) if t.numel())


def _blocks(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def tiles(sheet: Sheet) -> Iterator[tuple[slice, slice, Tensor]]:
    """``S`` tile by tile, in a buffer that the next tile overwrites. No tile spans in-batch and extra candidates."""
    b, n, m = sheet.x.anchors, sheet.y.anchors, sheet.y.vectors.shape[0]
    height, width = sheet.tile
    buffer = sheet.x.vectors.new_empty(min(height, b) * min(width, m))
    for r in _blocks(0, b, height):
        for c in _blocks(0, n, width) + _blocks(n, m, width):
            yield r, c, torch.mm(sheet.x.vectors[r], sheet.y.vectors[c].t(), out=part(buffer, r, c))


def part(buffer: Tensor, r: slice, c: slice) -> Tensor:
    height, width = r.stop - r.start, c.stop - c.start
    return buffer[: height * width].view(height, width)


def exclude(sheet: Sheet, tile: Tensor, r: slice, c: slice, value: float) -> None:
    """Write ``value`` where a row meets itself or, with ids, its own item."""
    if sheet.x.ids is None:
        exclude_itself(sheet, tile, r, c, value)
        return
    same = same_item(sheet, r, c)
    if same is not None:
        tile.masked_fill_(same, value)


def exclude_itself(sheet: Sheet, tile: Tensor, r: slice, c: slice, value: float) -> None:
    """Write ``value`` where row i meets column i of the same batch, which extra negatives stand behind."""
    low, high = max(r.start, c.start), min(r.stop, c.stop, sheet.x.anchors)
    if sheet.own and low < high:
        tile[low - r.start : high - r.start, low - c.start : high - c.start].diagonal().fill_(value)


def same_item(sheet: Sheet, r: slice, c: slice) -> Tensor | None:
    """``[r, c]``: where a row meets its own item; None where it is known that none does."""
    if sheet.x.ids is None or sheet.y.ids is None or c.start >= sheet.y.anchors:
        return None
    down, across = sheet.x.ids[r], sheet.y.ids[c]
    if down.device.type == "cpu" and bool((down[-1] < across[0]) | (across[-1] < down[0])):
        return None
    return down[:, None] == across


def _weights(sheet: Sheet) -> tuple[Tensor | None, Tensor | None, float]:
    """``exp(offset - top)`` of rows ``[B]`` and columns ``[M]``, and ``top``: the offsets' share of the exponential."""
    if sheet.x.offset is None or sheet.y.offset is None:
        return None, None, 0.0
    top = _offsets_range(sheet)[1]
    return (sheet.x.offset - top).exp_(), (sheet.y.offset - top).exp_(), top


def _exponentials(sheet: Sheet, shift: float) -> Iterator[tuple[slice, slice, Tensor]]:
    for r, c, tile in tiles(sheet):
        if shift:
            tile.sub_(shift)
        torch.exp(tile, out=tile)
        exclude(sheet, tile, r, c, 0.0)
        yield r, c, tile


def _sums(sheet: Sheet, shift: float, rows: bool, cols: bool) -> tuple[Tensor, Tensor]:
    down, across, top = _weights(sheet)
    row, col = (
        side.vectors.new_zeros(side.anchors if asked else 0) for side, asked in ((sheet.x, rows), (sheet.y, cols))
    )
    for r, c, e in _exponentials(sheet, shift):
        if rows:
            row[r] += e.sum(1) if across is None else torch.mv(e, across[c])
        if cols and c.start < sheet.y.anchors:
            col[c] += e.sum(0) if down is None else torch.mv(e.t(), down[r])
    return row.log_().add_(shift + top), col.log_().add_(shift + top)


def _shifted_softmaxes(sheet: Sheet, shift: float, drow: Tensor | None, dcol: Tensor | None, row: Tensor, col: Tensor,
                       to_offset: tuple[Tensor, ...] | None) -> Iterator[tuple[slice, slice, Tensor]]:  # fmt: skip
    """The gradient to ``S``: ``e_ij (a_i w_j + b_j w_i)``, the two softmaxes from one exponential."""
    down, across, top = _weights(sheet)
    m = sheet.y.vectors.shape[0]
    a = sheet.x.vectors.new_zeros(sheet.x.anchors) if drow is None else drow * (shift + top - row).exp_()  # [B]
    b = sheet.x.vectors.new_zeros(m)  # the columns of extra negatives have no softmax
    if dcol is not None:
        b[: sheet.y.anchors] = dcol * (shift + top - col).exp_()
    buffer = sheet.x.vectors.new_empty(min(sheet.tile[0], sheet.x.anchors) * min(sheet.tile[1], m))
    for r, c, e in _exponentials(sheet, shift):
        factor = part(buffer, r, c)
        if down is None or across is None:
            torch.add(a[r, None], b[c], out=factor)
        else:
            torch.mul(a[r, None], across[c], out=factor).addcmul_(down[r, None], b[c])
            if to_offset is not None:
                to_offset[0][r] += torch.mv(e, b[c]) * down[r]
                to_offset[1][c] += torch.mv(e.t(), a[r]) * across[c]
        yield r, c, e.mul_(factor)


def _logsumexps(sheet: Sheet, rows: bool, cols: bool) -> tuple[Tensor, Tensor]:
    row, col = (
        side.vectors.new_full((side.anchors if asked else 0,), -torch.inf)
        for side, asked in ((sheet.x, rows), (sheet.y, cols))
    )
    for r, c, tile in tiles(sheet):
        exclude(sheet, tile, r, c, -torch.inf)
        if rows:
            row[r] = torch.logaddexp(row[r], _offset(sheet.y, tile, c).logsumexp(1))
        if cols and c.start < sheet.y.anchors:
            col[c] = torch.logaddexp(col[c], _offset(sheet.x, tile.t(), r).logsumexp(1))
    return row, col


def _softmaxes(sheet: Sheet, drow: Tensor | None, dcol: Tensor | None, row: Tensor, col: Tensor,
               to_offset: tuple[Tensor, ...] | None) -> Iterator[tuple[slice, slice, Tensor]]:  # fmt: skip
    # A row without a candidate has only -inf logits: against +inf instead of -inf they give 0, not NaN.
    row, col = (t.masked_fill(t == -torch.inf, torch.inf) for t in (row, col))
    for r, c, tile in tiles(sheet):
        exclude(sheet, tile, r, c, -torch.inf)
        ds = torch.zeros_like(tile)
        if drow is not None:
            share = (_offset(sheet.y, tile, c) - row[r, None]).exp_().mul_(drow[r, None])  # [r, c]
            ds += share
            if to_offset is not None:
                to_offset[1][c] += share.sum(0)
        if dcol is not None and c.start < sheet.y.anchors:
            share = (_offset(sheet.x, tile.t(), r) - col[c, None]).exp_().mul_(dcol[c, None])  # [c, r]
            ds += share.t()
            if to_offset is not None:
                to_offset[0][r] += share.sum(0)
        yield r, c, ds


def _offset(candidates: Side, tile: Tensor, which: slice) -> Tensor:
    """``[anchors, candidates]`` with the candidates' offsets added."""
    return tile if candidates.offset is None else tile + candidates.offset[which]
