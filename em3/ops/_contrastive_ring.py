"""The registered operator ``em3::contrastive_loss_ring``: the sums of ``em3::contrastive_loss`` or
``em3::contrastive_sigmoid`` (``kind``, see ``_contrastive_kinds.py``) for this rank's rows, against every rank's candidates.

The shard of candidates ``y`` goes around. Each rank makes the block of logits of its rows against it: the rows' sums
stay, the columns' travel on behind the shard and come home complete. So no logit is computed twice, and each rank does its
rows' share of the work. Backward the same way, where the gradient to the shard travels behind it: what a rank receives of
it, it needs only after its own block, so that it arrives meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks
from . import _contrastive_checks as check
from ._contrastive_kinds import chosen
from ._ring import Exchange, Ring, arrived

# sizes [W, 3]: of each rank B, K and V.
torch.library.define(
    "em3::contrastive_loss_ring",
    "(Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? item_ids, Tensor? offset, Tensor sizes, bool rows, bool cols,"
    " str kind, str backend, str group) -> (Tensor row, Tensor col)",
)
torch.library.define(
    "em3::contrastive_loss_ring_backward",
    "(Tensor? drow, Tensor? dcol, Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? item_ids, Tensor? offset,"
    " Tensor sizes, Tensor row, Tensor col, bool rows, bool cols, bool[] need, str kind, str backend, str group)"
    " -> (Tensor dx, Tensor dy, Tensor dscale, Tensor dbias, Tensor doffset)",
)


class Blocks:
    """This rank's rows and, one after the other, the shards that they meet."""

    def __init__(self, x: Tensor, y: Tensor, item_ids: Tensor | None, offset: Tensor | None, sizes: Tensor) -> None:
        self.x, self.b = x, x.shape[0]
        self.item_ids, self.offset, self.sizes = item_ids, offset, sizes.tolist()
        self.shard = [t.contiguous() for t in (y, item_ids, offset) if t is not None]

    def lengths(self, *kinds: str) -> list[list[int]]:
        """For every rank the rows of tensors that are of its batch (``"B"``) or of all its candidates (``"M"``)."""
        return [[b + k if kind == "M" else b for kind in kinds] for b, k, _ in self.sizes]

    @property
    def shard_lengths(self) -> list[list[int]]:
        return self.lengths("M", *["B"] * (self.item_ids is not None), *["M"] * (self.offset is not None))

    def against(self, own: bool, shard: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``y, item_ids, offset`` of a backend for the block of this rank's rows and a shard."""
        y, *rest = shard
        ids = None if self.item_ids is None else rest[0]
        offset = None if self.offset is None else rest[-1]
        if own:
            return y, ids, offset
        return y, _behind(self.item_ids, ids, self.b), _behind(self.offset, offset, self.b)


def _behind(of_rows: Tensor | None, of_cols: Tensor | None, b: int) -> Tensor | None:
    return None if of_rows is None or of_cols is None else torch.cat([of_rows[:b], of_cols])


@torch.library.impl("em3::contrastive_loss_ring", "default")
def _forward(x, y, scale, bias, item_ids, offset, sizes, rows, cols, kind, backend, group):
    check.log_probabilities(offset)
    ring, blocks = Ring(group), Blocks(x, y, item_ids, offset, sizes)
    kernel = chosen(kind, backend, x, y, scale, item_ids, offset, rows, cols)
    row = x.new_full((x.shape[0] if rows else 0,), kernel.nothing, dtype=torch.float64)
    passed: list[Tensor] | Exchange | None = None
    with _checks.no_autocast(x.device):
        for source, (theirs, *rest) in ring.circulate(blocks.shard, blocks.shard_lengths):
            own, n = source == ring.rank, blocks.sizes[source][0]
            col = x.new_full((n if cols else 0,), kernel.nothing, dtype=torch.float64)
            if x.shape[0] and theirs.shape[0]:
                candidates, ids, offsets = blocks.against(own, [theirs, *rest])
                part = kernel.forward(x, candidates, scale, bias, ids, offsets, rows, cols, None if own else n)
                row, col = (kernel.join(t, p.double()) for t, p in zip((row, col), part, strict=True))
            if cols:
                if passed is not None:
                    col = kernel.join(col, arrived(passed)[0])
                passed = ring.hand_on([col], source, blocks.lengths("B"))
        col = arrived(passed)[0] if passed is not None else row.new_empty(0)
    return row, col


@torch.library.impl("em3::contrastive_loss_ring_backward", "default")
def _backward(drow, dcol, x, y, scale, bias, item_ids, offset, sizes, row, col, rows, cols, need, kind, backend, group):
    ring, blocks = Ring(group), Blocks(x, y, item_ids, offset, sizes)
    # A rank without a gradient of its own sends zeros: what travels must be the same on all of them.
    drow, dcol = (
        x.new_zeros(t.shape) if d is None else d.to(x.dtype).contiguous() for d, t in ((drow, row), (dcol, col))
    )
    kernel = chosen(kind, backend, x, y, scale, item_ids, offset, rows, cols)
    need_x, need_y, need_scale, need_bias, need_offset = need
    none = x.new_empty(0)
    dx, dscale, dbias = torch.zeros_like(x), torch.zeros_like(scale), torch.zeros_like(scale)
    to_rows = x.new_zeros(x.shape[0] if offset is not None else 0)  # of the offsets, as candidates of columns
    passed: list[Tensor] | Exchange | None = None
    # Behind the shard itself: what the columns' softmax needs.
    shard = [*blocks.shard, *([col, dcol] if cols else [])]
    lengths = [a + b for a, b in zip(blocks.shard_lengths, blocks.lengths(*["B", "B"] * cols), strict=True)]
    traveling = ["M"] * (need_y + need_offset)  # the gradient to the shard and to its offsets
    with _checks.no_autocast(x.device):
        for source, theirs in ring.circulate(shard, lengths):
            own, (n, k, _) = source == ring.rank, blocks.sizes[source]
            to_shard = [x.new_zeros(n + k, x.shape[1])] * need_y + [x.new_zeros(n + k)] * need_offset
            if x.shape[0] and n + k:
                of_cols = theirs[-2:] if cols else [none, None]
                args = (x, theirs[0], scale, bias, *blocks.against(own, theirs[: len(blocks.shard)])[1:])
                grads = kernel.backward(drow if rows else None, of_cols[1], *args, row, of_cols[0], need, None if own else n)
                if need_x:
                    dx += grads[0]
                if need_scale:
                    dscale += grads[2]
                if need_bias:
                    dbias += grads[3]
                of_offset = grads[4]
                if need_offset and not own:
                    to_rows += of_offset[: x.shape[0]]
                    of_offset = of_offset[x.shape[0] :]
                to_shard = [g for g, wanted in zip((grads[1], of_offset), (need_y, need_offset), strict=True) if wanted]
            if traveling:
                if passed is not None:
                    to_shard = [t.add_(a) for t, a in zip(to_shard, arrived(passed), strict=True)]
                passed = ring.hand_on([t.contiguous() for t in to_shard], source, blocks.lengths(*traveling))
    home = arrived(passed) if passed is not None else []
    doffset = none
    if need_offset:
        doffset = home[-1]
        doffset[: x.shape[0]] += to_rows
    grads = (dx, home[0] if need_y else none, dscale, dbias)
    # No tensor may be returned twice: an operator's outputs must not alias.
    return *(g if n else none.clone() for g, n in zip(grads, need, strict=False)), doffset


@torch.library.register_fake("em3::contrastive_loss_ring")
def _forward_fake(x, y, scale, bias, item_ids, offset, sizes, rows, cols, kind, backend, group):
    return scale.new_empty(x.shape[0] if rows else 0), scale.new_empty(x.shape[0] if cols else 0)


@torch.library.register_fake("em3::contrastive_loss_ring_backward")
def _backward_fake(drow, dcol, x, y, scale, bias, item_ids, offset, sizes, row, col, rows, cols, need, kind, backend, group):
    wanted = zip((x, y, scale, bias, offset), need, strict=True)
    return tuple(t.new_empty(t.shape) if n else x.new_empty(0) for t, n in wanted)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.rows, ctx.cols, ctx.kind, ctx.backend, ctx.group = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, drow, dcol):
    need = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 5)]
    grads = torch.ops.em3.contrastive_loss_ring_backward(
        drow, dcol, *ctx.saved_tensors, ctx.rows, ctx.cols, need, ctx.kind, ctx.backend, ctx.group
    )
    dx, dy, dscale, dbias, doffset = (g if n else None for g, n in zip(grads, need, strict=True))
    return dx, dy, dscale, dbias, None, doffset, *[None] * 6


torch.library.register_autograd("em3::contrastive_loss_ring", _autograd, setup_context=_setup_context)
_checks.no_second_order("contrastive_loss_ring")
