"""The registered operator ``em3::qformer_attention``: the part between the query's projection and the last one, which are
ordinary products.

With ``r = (h, q)`` for the ``H * Q`` rows of every item::

    s[r, t] = u_m[r] . x_m[t] + c_m[r];  p = softmax over the item's tokens of all streams;  y_m[r] = sum_t p x_m[t];
    o[r] = sum_m w_m,h y_m[r];  mass_m[r] = sum_t p;  lse[r] = logsumexp_t s

With a seed, y and mass take p times the factors of ``_dropout.Dropout(dropout, seed)``, which the backward draws again. An
item without tokens has y = 0, o = 0, mass = 0, lse = -inf. y and lse are outputs for the backward of the same backend to
read; the Triton one leaves the factor mass_m out of y_m.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tuning import layout
from . import _checks, _dispatch
from ._dropout import Dropout

torch.library.define(
    "em3::qformer_attention",
    "(Tensor[] u, Tensor? c, Tensor[] w, Tensor[] values, Tensor?[] offsets, Tensor?[] masks, SymInt batch, Tensor? seed,"
    " float dropout, str backend) -> (Tensor[] y, Tensor o, Tensor mass, Tensor lse)",
)
torch.library.define(
    "em3::qformer_attention_backward",
    "(Tensor dout, Tensor? dmass, Tensor[] u, Tensor? c, Tensor[] w, Tensor[] values, Tensor?[] offsets, Tensor?[] masks,"
    " Tensor[] y, Tensor o, Tensor mass, Tensor lse, bool need_u, bool[] need_w, bool[] need_values, Tensor? seed,"
    " float dropout, str backend) -> (Tensor[] du, Tensor dc, Tensor[] dw, Tensor[] dvalues)",
)


def forward(u, c, w, values, offsets, masks, batch, seed, dropout, backend):
    check_content(values, offsets)
    args = (u, c, w, values, offsets, masks, batch, _drop(seed, dropout))
    with _checks.no_autocast(values[0].device):
        return _dispatch.choose("qformer_attention", backend, args, lambda: _about(*args)).forward(*args)


def backward(dout, dmass, u, c, w, values, offsets, masks, y, o, mass, lse, need_u, need_w, need_values, seed, dropout,
              backend):  # fmt: skip
    check_content(values, offsets)
    drop = _drop(seed, dropout)
    args = (u, c, w, values, offsets, masks, lse.shape[1], drop)
    chosen = _dispatch.choose("qformer_attention", backend, args, lambda: _about(*args))
    with _checks.no_autocast(lse.device):
        return chosen.backward(
            dout, dmass, u, c, w, values, offsets, masks, y, o, mass, lse, need_u, need_w, need_values, drop
        )


def _drop(seed, dropout):
    return None if seed is None else Dropout(dropout, seed)


def _about(u, c, w, values, offsets, masks, batch, drop):
    """What the choice of a backend depends on. Not on gradients: an operator's forward does not know who wants them."""
    h, of_items, q, _ = u[0].shape
    kind = f"{layout(values[0], offsets[0], u[0])} {'shared' if of_items == 1 else 'own'}"
    return u[0], kind, (batch, q, h, w[0].shape[1], *sizes(values, offsets))


def sizes(values: Sequence[Tensor], offsets: Sequence[Tensor | None]) -> list[int]:
    """Tokens and width of each stream."""
    found: list[int] = []
    for x, bounds in zip(values, offsets, strict=True):
        found += (x.shape[0] * x.shape[1] if bounds is None else x.shape[0], x.shape[-1])
    return found


def check_content(values, offsets):
    """In the backward again: the user's offsets may have been written to in between."""
    for m, bounds in enumerate(offsets):
        if bounds is not None:
            _checks.offsets_content(bounds, values[m].shape[0], f"streams[{m}].offsets")


torch.library.impl("em3::qformer_attention", "default", forward)
torch.library.impl("em3::qformer_attention_backward", "default", backward)


@torch.library.register_fake("em3::qformer_attention")
def _forward_fake(u, c, w, values, offsets, masks, batch, seed, dropout, backend):
    h, _, q, _ = u[0].shape
    wide = torch.float64 if u[0].dtype == torch.float64 else torch.float32
    y = [u[0].new_empty(h, batch, q, x.shape[-1]) for x in values]
    o, mass = u[0].new_empty(h, batch, q, w[0].shape[1]), u[0].new_empty(len(u), h, batch, q, dtype=wide)
    return y, o, mass, u[0].new_empty(h, batch, q, dtype=wide)


@torch.library.register_fake("em3::qformer_attention_backward")
def _backward_fake(dout, dmass, u, c, w, values, offsets, masks, y, o, mass, lse, need_u, need_w, need_values, seed,
                   dropout, backend):  # fmt: skip
    dc = lse.new_empty(len(u), *u[0].shape[:3])
    dw, dvalues = (
        [t.new_empty(t.shape if need else (0,)) for t, need in zip(tensors, needs, strict=True)]
        for tensors, needs in ((w, need_w), (values, need_values))
    )
    return [x.new_empty(x.shape) for x in u], dc, dw, dvalues


def _setup_context(ctx, inputs, output):
    u, c, w, values, offsets, masks, _, seed, dropout, backend = inputs
    y, o, mass, lse = output
    ctx.mark_non_differentiable(*y, lse)
    ctx.set_materialize_grads(False)
    ctx.m, ctx.dropout, ctx.backend = len(u), dropout, backend
    ctx.save_for_backward(*u, *w, *values, *y, *offsets, *masks, c, o, mass, lse, seed)


def _autograd(ctx, _, dout, dmass, __):
    m, saved = ctx.m, ctx.saved_tensors
    u, w, values, y, offsets, masks = (list(saved[i * m : (i + 1) * m]) for i in range(6))
    c, o, mass, lse, seed = saved[6 * m :]
    need = ctx.needs_input_grad
    dout = torch.zeros_like(o) if dout is None else dout.contiguous()
    dmass = None if dmass is None else dmass.contiguous()
    du, dc, dw, dvalues = torch.ops.em3.qformer_attention_backward(
        dout, dmass, u, c, w, values, offsets, masks, y, o, mass, lse, any(need[0]) or need[1], list(need[2]),
        list(need[3]), seed, ctx.dropout, ctx.backend,
    )  # fmt: skip
    return (
        _wanted(du, need[0]), dc if need[1] else None, _wanted(dw, need[2]), _wanted(dvalues, need[3]),
        _no_gradient(offsets), _no_gradient(masks), None, None, None, None,
    )  # fmt: skip


def _wanted(grads, need):
    return [g if n else None for g, n in zip(grads, need, strict=True)]


def _no_gradient(given):
    """What register_autograd wants back for a ``Tensor?[]``: it takes a list apart only if it is full of tensors."""
    return None if any(t is None for t in given) else [None] * len(given)


torch.library.register_autograd("em3::qformer_attention", _autograd, setup_context=_setup_context)
_checks.no_second_order("qformer_attention")
