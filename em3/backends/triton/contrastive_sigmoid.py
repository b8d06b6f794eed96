"""The pairwise sigmoid loss without the ``B x B`` matrix: the Triton kernels, float32.

The contract of ``forward`` and ``backward`` is that of ``em3.ops._contrastive_sigmoid``; what is served, and memory, are those
of ``contrastive_loss``.
"""

from __future__ import annotations

from torch import Tensor

from . import contrastive_loss as infonce
from . import kernel, unavailable

__all__ = ["backward", "forward", "supports", "unavailable", "wins"]

supports, wins = infonce.supports, infonce.wins


def forward(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, item_ids: Tensor | None, offset: Tensor | None, rows: bool,
            cols: bool, positive: bool, apart: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, n = x.shape[0], x.shape[0] if apart is None else apart
    if not b or not y.shape[0]:
        row, col = (scale.new_zeros(count if asked else 0) for count, asked in ((b, rows), (n, cols)))
        return row, col
    sheet = infonce.sheet(x, y, scale, item_ids, offset, apart)
    found: tuple[Tensor, Tensor] = kernel("contrastive_sigmoid").sums(sheet, bias, positive, rows, cols)
    return found


def backward(drow: Tensor | None, dcol: Tensor | None, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor,
             item_ids: Tensor | None, offset: Tensor | None, need: list[bool], positive: bool, apart: int | None = None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to ``x, y, scale, bias, offset``; an empty tensor for each that ``need`` leaves out."""
    b, m = x.shape[0], y.shape[0]
    need_x, need_y, need_scale, need_bias, need_offset = need
    need_offset = need_offset and offset is not None
    dx, dy, to_scale, to_bias, down, across = (None,) * 6
    if b and m and (drow is not None or dcol is not None):
        gradient, sheet = kernel("contrastive_sigmoid").gradient, infonce.sheet(x, y, scale, item_ids, offset, apart)
        exchanged = sheet._replace(rows=sheet.cols, cols=sheet.rows)
        wanted = (need_x, need_scale, need_bias, need_offset)
        if any(wanted):
            dx, to_scale, to_bias, down = gradient(sheet, bias, positive, drow, dcol, wanted)
        if need_y or need_offset:
            dy, _, _, across = gradient(exchanged, bias, positive, dcol, drow, (need_y, False, False, need_offset))
    # The terms of what is one number may cancel: they are summed in float64.
    dscale, dbias = (None if t is None else t.sum(dtype=scale.dtype) for t in (to_scale, to_bias))
    doffset = None if down is None or across is None else infonce.of_offset(down, across, apart)
    return infonce.results((x, y, scale, bias, offset), need, (dx, dy, dscale, dbias, doffset))
