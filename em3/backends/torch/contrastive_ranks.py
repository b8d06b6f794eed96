"""How many candidates are above a positive, without the ``B x B`` matrix: tiles of logits compared and overwritten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import contrastive_loss as tiled


def forward(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None, of_row: Tensor | None,
            of_col: Tensor | None, apart: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """For each row ``[B]`` and column ``[N]`` how many candidates have a larger logit than the row's or column's positive,
    and half of those with the same one; float64.

    The arguments are those of ``em3::contrastive_loss``, ``of_row [B, 2]`` and ``of_col [N, 2]`` the least and the largest
    logit, offsets included, that is taken for the positive's; None for a direction that is not asked for, whose result is
    empty.
    """
    sheet = tiled.arrange(x, y, scale, item_ids, offset, apart)
    above_row, above_col = (
        x.new_zeros(0 if of is None else of.shape[0], dtype=torch.float64) for of in (of_row, of_col)
    )
    of_row = None if of_row is None else tiled.arranged(sheet.x, of_row)
    of_col = None if of_col is None else tiled.arranged(sheet.y, of_col)
    for r, c, tile in tiled.tiles(sheet):
        tiled.exclude(sheet, tile, r, c, -torch.inf)
        if of_row is not None:
            logits = tile if sheet.y.offset is None else tile + sheet.y.offset[c]
            above_row[r] += _above(logits, of_row[r, None].unbind(-1), 1)
        if of_col is not None and c.start < sheet.y.anchors:
            logits = tile if sheet.x.offset is None else tile + sheet.x.offset[r, None]
            above_col[c] += _above(logits, of_col[c].unbind(-1), 0)
    if of_row is not None:
        above_row = tiled.restored(sheet.x, above_row)
    if of_col is not None:
        above_col = tiled.restored(sheet.y, above_col)
    return above_row, above_col


def _above(logits: Tensor, positive: Sequence[Tensor], dim: int) -> Tensor:
    least, largest = positive
    return ((logits > largest).sum(dim) + (logits >= least).sum(dim)) / 2
