"""The pairwise sigmoid loss without the ``B x B`` matrix: tiles of logits, used once and overwritten, in plain PyTorch.

The contract of ``forward`` and ``backward`` is that of ``em3.ops._contrastive_sigmoid``. Memory beyond the outputs is a few
tensors of the inputs' size and three tiles. A pair's loss is ``softplus`` of its logit, or of the negated logit for a
positive pair, so that a small one keeps its digits. Without offsets the two directions differ in nothing but which sum
a pair goes to, and one softplus serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import contrastive_loss as tiled
from .contrastive_loss import Sheet, supports, unavailable, wins

__all__ = ["backward", "forward", "supports", "unavailable", "wins"]


def forward(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, item_ids: Tensor | None, offset: Tensor | None, rows: bool,
            cols: bool, positive: bool, apart: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    sheet = tiled.arrange(x, y, scale, item_ids, offset, apart)
    row, col = (
        x.new_zeros(side.anchors if asked else 0, dtype=torch.float64)
        for side, asked in ((sheet.x, rows), (sheet.y, cols))
    )
    pairs = _Pairs(sheet, bias, positive)
    for r, c, tile in tiled.tiles(sheet):
        in_batch = cols and c.start < sheet.y.anchors
        same = tiled.same_item(sheet, r, c)
        if sheet.y.offset is None:
            losses = pairs.losses(tile, None, same, r, c)
            if rows:
                row[r] += losses.sum(1)
            if in_batch:
                col[c] += losses.sum(0)
            continue
        if rows:
            row[r] += pairs.losses(tile, sheet.y.offset[None, c], same, r, c).sum(1)
        if in_batch and sheet.x.offset is not None:
            col[c] += pairs.losses(tile, sheet.x.offset[r, None], same, r, c).sum(0)
    return tiled.restored(sheet.x, row) if rows else row, tiled.restored(sheet.y, col) if cols else col


def backward(drow: Tensor | None, dcol: Tensor | None, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor,
             item_ids: Tensor | None, offset: Tensor | None, need: list[bool], positive: bool, apart: int | None = None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to ``x, y, scale, bias, offset``; an empty tensor for each that ``need`` leaves out."""
    sheet = tiled.arrange(x, y, scale, item_ids, offset, apart)
    drow = None if drow is None else tiled.arranged(sheet.x, drow)
    dcol = None if dcol is None else tiled.arranged(sheet.y, dcol)
    need_x, need_y, need_scale, need_bias, need_offset = need
    to_x = torch.zeros_like(sheet.x.vectors) if need_x or need_scale else None  # [B, V]
    to_y = torch.zeros_like(sheet.y.vectors) if need_y else None  # [M, V]
    to_bias = torch.zeros_like(bias)
    # [B] and [M], of the rows and of the columns as candidates
    to_offset = tuple(x.new_zeros(side.shape[0]) for side in (x, y)) if need_offset and offset is not None else None
    pairs = _Pairs(sheet, bias, positive)
    for r, c, tile in tiled.tiles(sheet):
        ds = pairs.gradient(tile, drow, dcol, r, c, to_offset)  # [r, c] of the gradient to S
        if to_x is not None:
            to_x[r].addmm_(ds, sheet.y.vectors[c])
        if to_y is not None:
            to_y[c].addmm_(ds.t(), sheet.x.vectors[r])
        if need_bias:
            to_bias += ds.sum(1).sum(dtype=bias.dtype)
    none = x.new_empty(0)
    dx = none if to_x is None else tiled.restored(sheet.x, to_x)
    # S = scale x y^T, so the gradient to the scale is that to S summed against x y^T, row by row.
    dscale = (dx * x).sum(dtype=scale.dtype) if need_scale else none.clone()
    dx = dx.mul_(scale) if need_x else none
    # No tensor may be returned twice: an operator's outputs must not alias.
    dy = none.clone() if to_y is None else tiled.restored(sheet.y, to_y)
    doffset = none.clone() if to_offset is None else tiled.of_offset(sheet, *to_offset)
    return dx, dy, dscale, to_bias if need_bias else none.clone(), doffset


class _Pairs:
    """From a tile of ``S`` to what its pairs lose and how that changes with ``S``, in buffers that the next tile overwrites."""

    def __init__(self, sheet: Sheet, bias: Tensor, positive: bool) -> None:
        self.sheet, self.bias, self.positive = sheet, bias.to(sheet.x.vectors.dtype), positive
        size = min(sheet.tile[0], sheet.x.anchors) * min(sheet.tile[1], sheet.y.vectors.shape[0])
        self.buffers = [sheet.x.vectors.new_empty(size) for _ in range(2)]

    def _margins(self, tile: Tensor, offset: Tensor | None, same: Tensor | None, r: slice, c: slice) -> Tensor:
        """The logits, those of positive pairs negated, -inf where there is no pair: softplus and sigmoid of it are 0."""
        z = torch.add(tile, self.bias, out=tiled.part(self.buffers[0], r, c))
        if offset is not None:
            z += offset
        if same is not None and self.positive:
            torch.where(same, -z, z, out=z)
        elif same is not None:
            z.masked_fill_(same, -torch.inf)
        tiled.exclude_itself(self.sheet, z, r, c, -torch.inf)
        return z

    def losses(self, tile: Tensor, offset: Tensor | None, same: Tensor | None, r: slice, c: slice) -> Tensor:
        z = self._margins(tile, offset, same, r, c)
        # At the threshold log(1 + e^40) is 40 in float64 too; the default of 20 is off by 2e-9.
        return torch.ops.aten.softplus.out(z, 1, 40, out=tiled.part(self.buffers[1], r, c))

    def _slopes(self, tile: Tensor, offset: Tensor | None, same: Tensor | None, r: slice, c: slice) -> Tensor:
        z = self._margins(tile, offset, same, r, c).sigmoid_()
        return torch.where(same, -z, z, out=z) if same is not None and self.positive else z

    def gradient(self, tile: Tensor, drow: Tensor | None, dcol: Tensor | None, r: slice, c: slice,
                 to_offset: tuple[Tensor, ...] | None) -> Tensor:  # fmt: skip
        """The gradient to ``S``, in place of the tile or in a buffer; the offsets' is added to ``to_offset``."""
        sheet, same = self.sheet, tiled.same_item(self.sheet, r, c)
        if c.start >= sheet.y.anchors:
            dcol = None  # the columns of extra negatives have no sum
        if sheet.y.offset is None or sheet.x.offset is None:
            upstream = tiled.part(self.buffers[1], r, c)
            upstream.copy_(upstream.new_zeros(1) if drow is None else drow[r, None])
            if dcol is not None:
                upstream += dcol[c]
            return self._slopes(tile, None, same, r, c).mul_(upstream)
        ds = tiled.part(self.buffers[1], r, c).zero_()
        if drow is not None:
            share = self._slopes(tile, sheet.y.offset[None, c], same, r, c).mul_(drow[r, None])
            ds += share
            if to_offset is not None:
                to_offset[1][c] += share.sum(0)
        if dcol is not None:
            share = self._slopes(tile, sheet.x.offset[r, None], same, r, c).mul_(dcol[c])
            ds += share
            if to_offset is not None:
                to_offset[0][r] += share.sum(1)
        return ds
