"""What ``em3::qformer_attention`` and the products around it compute, as one step of autograd, in float32 on the CPU.

For few and short items the time goes into the number of calls: a registered operator with lists among its arguments takes
0.4 ms forward and backward whatever its size, and every small product around it has a node of autograd of its own. A graph
of ``torch.compile`` holds the operator, other dtypes and devices use it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..jagged import Stream
from . import _checks, _qformer_operator


def attend(q: Tensor, streams: Sequence[Stream], w_k: Sequence[Tensor], w_v: Sequence[Tensor], b_k: Sequence[Tensor | None],
           b_v: Sequence[Tensor | None], batch: int, seed: Tensor | None, dropout: float, backend: str) -> Tensor:  # fmt: skip
    """The queries of each head, scaled, ``[1 or B, Q, H, E]`` -> what they have read, ``[B, Q, D]``."""
    values, offsets, masks = (list(t) for t in zip(*streams, strict=True))
    given = (q, *w_k, *w_v, *b_k, *b_v, *values)
    anchor = _checks.anchor("qformer_attention", given)
    found: Tensor = _checks.apply(_Step, anchor is not None, (offsets, masks, batch, dropout, backend, anchor), seed, *given)
    return found


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Any, seed: Tensor | None, q: Tensor, *tensors: Any) -> Tensor:
        offsets, masks, batch, dropout, backend, ctx.anchor = how
        m = len(offsets)
        w_k, w_v, b_k, b_v, values = (list(tensors[i * m : (i + 1) * m]) for i in range(5))
        bu, nq, h, e = q.shape
        rows = q.permute(2, 0, 1, 3).reshape(h, bu * nq, e)  # [H, Bu * Q, E]
        u = [torch.bmm(rows, w.view(h, e, w.shape[1])).view(h, bu, nq, w.shape[1]) for w in w_k]
        keys, biases = _by_head(b_k, h, e), _by_head(b_v, h, e)  # [H, M, E]
        c = None
        if keys is not None:  # [M, H, Bu, Q]
            c = torch.bmm(rows, keys.transpose(1, 2)).permute(2, 0, 1).contiguous().view(m, h, bu, nq)
        w = [t.view(h, e, t.shape[1]) for t in w_v]
        y, o, mass, lse = _qformer_operator.forward(u, c, w, values, offsets, masks, batch, seed, dropout, backend)
        out = o.flatten(1, 2)  # [H, B * Q, E]
        if biases is not None:
            out = torch.baddbmm(out, _by_stream(mass), biases)
        ctx.dropout, ctx.backend, ctx.shape = dropout, backend, (m, batch, bu, nq, h, e)
        ctx.save_for_backward(*u, *w, *values, *y, *offsets, *masks, *w_k, c, o, mass, lse, seed, rows, keys, biases)
        return out.view(h, batch, nq, e).permute(1, 2, 0, 3).reshape(batch, nq, h * e)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.no_grad(), _checks.no_autocast(grad.device):
            grads = _gradients(ctx, grad, ctx.saved_tensors)
        if torch.is_grad_enabled():  # under create_graph
            grads = list(_checks.NoSecondOrder.apply("qformer_attention", grad, ctx.anchor, *grads))
        return None, None, *grads


def _gradients(ctx: Any, grad: Tensor, saved: Sequence[Tensor]) -> list[Tensor | None]:
    """To the queries, and a stream each to key weights, value weights, their biases and the tokens."""
    m, batch, bu, nq, h, e = ctx.shape
    u, w, values, y, offsets, masks, w_k = (list(saved[i * m : (i + 1) * m]) for i in range(7))
    c, o, mass, lse, seed, rows, keys, biases = saved[7 * m : 7 * m + 8]
    need = ctx.needs_input_grad[2:]
    need_q, need_wk, need_wv, need_bk, need_bv, need_x = need[0], *(list(need[1 + i * m : 1 + (i + 1) * m]) for i in range(5))
    dout = grad.view(batch, nq, h, e).permute(2, 0, 1, 3).contiguous()  # [H, B, Q, E]
    flat = dout.view(h, batch * nq, e)
    dmass: Tensor | None = None
    to_q: Tensor | None = None
    to_bk: list[Tensor | None] = [None] * m
    to_bv = list(to_bk)
    if biases is not None:
        if any(need_bv):
            to_bv = _of_heads(torch.bmm(_by_stream(mass).transpose(1, 2), flat), need_bv)
        dmass = torch.bmm(flat, biases.transpose(1, 2)).permute(2, 0, 1).contiguous().view(mass.shape)
    need_u = need_q or any(need_wk) or any(need_bk)
    du, dc, dw, dx = _qformer_operator.backward(
        dout, dmass, u, c, w, values, offsets, masks, y, o, mass, lse, need_u, need_wv, need_x, seed, ctx.dropout, ctx.backend
    )
    du = [t.view(h, bu * nq, t.shape[3]) for t in du]
    dc = dc.view(m, h, bu * nq).permute(1, 2, 0)  # [H, Bu * Q, M]
    if need_q:
        drows = torch.bmm(du[0], w_k[0].view(h, e, -1).transpose(1, 2))
        for t, weight in zip(du[1:], w_k[1:], strict=True):
            drows.baddbmm_(t, weight.view(h, e, -1).transpose(1, 2))
        if keys is not None:
            drows.baddbmm_(dc, keys)
        to_q = drows.view(h, bu, nq, e).permute(1, 2, 0, 3)
    if any(need_bk):
        to_bk = _of_heads(torch.bmm(dc.transpose(1, 2), rows), need_bk)
    to_wk = [torch.bmm(rows.transpose(1, 2), t).flatten(0, 1) if n else None for t, n in zip(du, need_wk, strict=True)]
    to_wv = [t.flatten(0, 1) if n else None for t, n in zip(dw, need_wv, strict=True)]
    return [to_q, *to_wk, *to_wv, *to_bk, *to_bv, *(t if n else None for t, n in zip(dx, need_x, strict=True))]


def _by_head(biases: Sequence[Tensor | None], h: int, e: int) -> Tensor | None:
    """A bias ``[D]`` a stream -> ``[H, M, E]``, zeros where there is none; None if there are none."""
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return None
    full = [some.new_zeros(h * e) if bias is None else bias for bias in biases]
    return torch.stack(full).view(len(full), h, e).transpose(0, 1)


def _of_heads(gradient: Tensor, need: Sequence[bool]) -> list[Tensor | None]:
    """``[H, M, E]`` -> ``[D]`` for each stream that wants one."""
    apart = gradient.transpose(0, 1).flatten(1)
    return [of if n else None for of, n in zip(apart.unbind(0), need, strict=True)]


def _by_stream(mass: Tensor) -> Tensor:
    """``[M, H, B, Q]`` -> ``[H, B * Q, M]``."""
    return mass.flatten(2).permute(1, 2, 0)
