"""The registered operator ``em3::contrastive_loss``, the part that must never hold ``B x B`` numbers.

With ``S = scale x y^T``, candidates ``j != i`` that are not of row i's item (``item_ids``), and the offsets of the
``M = B + K`` candidates::

    row_i = logsumexp_j (S_ij + offset_j), j < M;  col_j = logsumexp_i (S_ij + offset_i), i < B, for j < B.

-inf where no candidate is left; empty where not asked for. x and y come in float32 or float64, scale in float64, and so go
row and col: what float32 cuts off a logsumexp of 100, 4e-6, would be in all of its row's gradient. The gradients to them
are in the dtype of x.

Backends have one argument more, ``apart``. Where it is a number, the first ``N = apart`` candidates are another batch:
no row is its own column, ``item_ids [B + N]`` and ``offset [B + M]`` hold those of the rows and then those of the columns,
and ``col`` is ``[N]``. Logsumexps over parts of the candidates are joined by a logsumexp: that is how a ring of processes
works through its shards (``_contrastive_ring.py``). In the backward ``row`` and ``col`` are those over all parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tuning import About
from . import _checks, _dispatch
from . import _contrastive_checks as check

torch.library.define(
    "em3::contrastive_loss",
    "(Tensor x, Tensor y, Tensor scale, Tensor? item_ids, Tensor? offset, bool rows, bool cols, str backend)"
    " -> (Tensor row, Tensor col)",
)
torch.library.define(
    "em3::contrastive_loss_backward",
    "(Tensor? drow, Tensor? dcol, Tensor x, Tensor y, Tensor scale, Tensor? item_ids, Tensor? offset, Tensor row,"
    " Tensor col, bool[] need, str backend) -> (Tensor dx, Tensor dy, Tensor dscale, Tensor doffset)",
)


@torch.library.impl("em3::contrastive_loss", "default")
def _forward(x, y, scale, item_ids, offset, rows, cols, backend):
    check.log_probabilities(offset)
    args = (x, y, scale, item_ids, offset, rows, cols)
    with _checks.no_autocast(x.device):
        return _dispatch.choose("contrastive_loss", backend, args, lambda: about(x, y, item_ids)).forward(*args)


@torch.library.impl("em3::contrastive_loss_backward", "default")
def _backward(drow, dcol, x, y, scale, item_ids, offset, row, col, need, backend):
    args = (x, y, scale, item_ids, offset, row.shape[0] > 0, col.shape[0] > 0)
    chosen = _dispatch.choose("contrastive_loss", backend, args, lambda: about(x, y, item_ids))
    with _checks.no_autocast(x.device):
        return chosen.backward(drow, dcol, x, y, scale, item_ids, offset, row, col, need)


def about(x: Tensor, y: Tensor, item_ids: Tensor | None) -> About:
    """What the choice of a backend depends on."""
    return x, "plain" if item_ids is None else "ids", (x.shape[0], *y.shape)


@torch.library.register_fake("em3::contrastive_loss")
def _forward_fake(x, y, scale, item_ids, offset, rows, cols, backend):
    return scale.new_empty(x.shape[0] if rows else 0), scale.new_empty(x.shape[0] if cols else 0)


@torch.library.register_fake("em3::contrastive_loss_backward")
def _backward_fake(drow, dcol, x, y, scale, item_ids, offset, row, col, need, backend):
    wanted = zip((x, y, scale, offset), need, strict=True)
    return tuple(t.new_empty(t.shape) if n else x.new_empty(0) for t, n in wanted)


def _setup_context(ctx, inputs, output):
    x, y, scale, item_ids, offset, _, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, scale, item_ids, offset, *output)


def _autograd(ctx, drow, dcol):
    x, y, scale, item_ids, offset, row, col = ctx.saved_tensors
    # A direction that was not asked for has an empty statistic, and so an empty gradient.
    drow, dcol = (None if d is None or not d.numel() else d.to(x.dtype).contiguous() for d in (drow, dcol))
    need = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    grads = torch.ops.em3.contrastive_loss_backward(
        drow, dcol, x, y, scale, item_ids, offset, row, col, need, ctx.backend
    )
    dx, dy, dscale, doffset = (g if n else None for g, n in zip(grads, need, strict=True))
    return dx, dy, dscale, None, doffset, None, None, None


torch.library.register_autograd("em3::contrastive_loss", _autograd, setup_context=_setup_context)
_checks.no_second_order("contrastive_loss")
