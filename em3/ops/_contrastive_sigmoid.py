"""The registered operator ``em3::contrastive_sigmoid``, that of ``kind="sigmoid"``: it never holds ``B x B`` numbers.

With ``S = scale x y^T + bias`` and the offsets of the ``M = B + K`` candidates::

    row_i = sum over j != i, j < M, of softplus(z_ij (S_ij + offset_j)),
    col_j = sum over i != j, i < B, of softplus(z_ij (S_ij + offset_i)), for j < B,

where pairs of the same item (``item_ids``) are left out, or have ``z = -1`` with ``positive``; all others have ``z = 1``.
0 where no pair is left; empty where not asked for. x and y come in float32 or float64, scale and bias in float64, and so go
row and col, the gradients to which are in the dtype of x.

Backends have one argument more, ``apart``, as in ``_contrastive_operator.py``; sums over parts are added. What a
pair loses depends on no other pair, so the backward needs none of the forward's results.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends.cpp import contrastive_sigmoid as cpp
from ..backends.torch import contrastive_sigmoid as tiled
from ..backends.triton import contrastive_sigmoid as triton
from . import _checks, _dispatch
from . import _contrastive_checks as check

torch.library.define(
    "em3::contrastive_sigmoid",
    "(Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor? item_ids, Tensor? offset, bool rows, bool cols, bool positive,"
    " str backend) -> (Tensor row, Tensor col)",
)
torch.library.define(
    "em3::contrastive_sigmoid_backward",
    "(Tensor? drow, Tensor? dcol, Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor? item_ids, Tensor? offset,"
    " bool[] need, bool positive, str backend) -> (Tensor dx, Tensor dy, Tensor dscale, Tensor dbias, Tensor doffset)",
)


_MODULES: dict[str, Any] = {"cpp": cpp, "triton": triton, "torch": tiled}  # fastest first


def served(backend: str, x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None, rows: bool,
           cols: bool) -> ModuleType:  # fmt: skip
    """The first that can serve and claims to win; one that was asked for by name and cannot is refused."""
    args = (x, y, scale, item_ids, offset, rows, cols)
    if backend == "auto":
        return next(m for m in _MODULES.values() if not (m.unavailable() or m.supports(*args)) and m.wins(*args))
    chosen: ModuleType = _MODULES[backend]
    reason = chosen.unavailable() or chosen.supports(*args)
    if reason is not None:
        raise _dispatch.BackendError(f"backend {backend!r} cannot serve this call of contrastive_loss: {reason}")
    return chosen


@torch.library.impl("em3::contrastive_sigmoid", "default")
def _forward(x, y, scale, bias, item_ids, offset, rows, cols, positive, backend):
    check.log_probabilities(offset)
    chosen = served(backend, x, y, scale, item_ids, offset, rows, cols)
    with _checks.no_autocast(x.device):
        return chosen.forward(x, y, scale, bias, item_ids, offset, rows, cols, positive)


@torch.library.impl("em3::contrastive_sigmoid_backward", "default")
def _backward(drow, dcol, x, y, scale, bias, item_ids, offset, need, positive, backend):
    chosen = served(backend, x, y, scale, item_ids, offset, drow is not None, dcol is not None)
    with _checks.no_autocast(x.device):
        return chosen.backward(drow, dcol, x, y, scale, bias, item_ids, offset, need, positive)


@torch.library.register_fake("em3::contrastive_sigmoid")
def _forward_fake(x, y, scale, bias, item_ids, offset, rows, cols, positive, backend):
    return scale.new_empty(x.shape[0] if rows else 0), scale.new_empty(x.shape[0] if cols else 0)


@torch.library.register_fake("em3::contrastive_sigmoid_backward")
def _backward_fake(drow, dcol, x, y, scale, bias, item_ids, offset, need, positive, backend):
    wanted = zip((x, y, scale, bias, offset), need, strict=True)
    return tuple(t.new_empty(t.shape) if n else x.new_empty(0) for t, n in wanted)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.rows, ctx.cols, ctx.positive, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _autograd(ctx, drow, dcol):
    # A direction that was not asked for has an empty sum, and so an empty gradient.
    dtype = ctx.saved_tensors[0].dtype
    drow, dcol = (
        None if d is None or not asked else d.to(dtype).contiguous() for d, asked in ((drow, ctx.rows), (dcol, ctx.cols))
    )
    need = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 5)]
    grads = torch.ops.em3.contrastive_sigmoid_backward(drow, dcol, *ctx.saved_tensors, need, ctx.positive, ctx.backend)
    dx, dy, dscale, dbias, doffset = (g if n else None for g, n in zip(grads, need, strict=True))
    return dx, dy, dscale, dbias, None, doffset, None, None, None, None


torch.library.register_autograd("em3::contrastive_sigmoid", _autograd, setup_context=_setup_context)
_checks.no_second_order("contrastive_sigmoid")
