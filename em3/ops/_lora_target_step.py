"""``lora_target_attention`` in its absorbed form as one step of autograd, in float32 on the CPU.

The products around the history are small, and each had a node of autograd and copies of its own. A graph of ``torch.compile``
holds the registered operator, other dtypes and devices use it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _lora_target_operator
from ._pooling import Pooling


def attend(targets: Tensor, ids: Tensor, offsets: Tensor | None, bank: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor,
           w_o: Tensor, num_heads: int, bias: Tensor | None, pool: Pooling, backend: str) -> Tensor:  # fmt: skip
    """``targets [B, M, D]`` -> ``[B, M, D]``, with the adapted weights ``w_k`` and ``w_v [D, C]``."""
    given = (targets, w_q, w_k, w_v, w_o, bank, bias)
    anchor = _checks.anchor("lora_target_attention", given)
    found: Tensor = _checks.apply(_Step, anchor is not None, (ids, offsets, num_heads, pool, backend, anchor), *given)
    return found.view(targets.shape)  # here: what a function of autograd returns as a view cannot be changed in place


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Any, targets: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, bank: Tensor,
                bias: Tensor | None) -> Tensor:  # fmt: skip
        ids, offsets, h, pool, backend, ctx.anchor = how
        batch, m, d = targets.shape
        e, c = d // h, bank.shape[1]
        flat = targets.reshape(batch * m, d)
        # A product a head leaves its rows side by side. The scale is a product's factor, which costs no pass over a weight.
        heads = w_q.view(h, e, d).transpose(1, 2)
        rows = torch.baddbmm(flat.new_empty(1, 1, 1), flat.expand(h, -1, -1), heads, beta=0, alpha=e**-0.5)  # [H, B * M, E]
        u = torch.bmm(rows, w_k.view(h, e, c)).view(h, batch, m, c)
        w = w_v.view(h, e, c)
        y, o, lse = _lora_target_operator.forward(u, w, ids, offsets, bank, bias, pool.kind, pool.k, backend)
        read = o.view(h, batch * m, e).transpose(0, 1).reshape(batch * m, d)
        ctx.how = (h, pool, backend)
        ctx.save_for_backward(flat, w_q, w_k, w, w_o, rows, u, read, ids, offsets, bank, bias, y, o, lse)
        return read @ w_o.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.no_grad(), _checks.no_autocast(grad.device):
            grads = _gradients(ctx, grad)
        if torch.is_grad_enabled():  # under create_graph
            grads = list(_checks.NoSecondOrder.apply("lora_target_attention", grad, ctx.anchor, *grads))
        return None, *grads


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """To targets, w_q, w_k, w_v, w_o, bank and bias."""
    h, pool, backend = ctx.how
    flat, w_q, w_k, w, w_o, rows, u, read, ids, offsets, bank, bias, y, o, lse = ctx.saved_tensors
    need_target, need_q, need_k, need_v, need_o, need_bank, need_bias = ctx.needs_input_grad[1:]
    _, batch, m, c = u.shape
    d, e = w_o.shape[0], w.shape[1]
    dflat = grad.reshape(batch * m, d)
    dread = torch.bmm(dflat.expand(h, -1, -1), w_o.view(d, h, e).transpose(0, 1))  # [H, B * M, E]
    need_u = need_target or need_q or need_k
    du, dw, dbank, dbias = _lora_target_operator.backward(
        dread.view(h, batch, m, e), u, w, ids, offsets, bank, bias, pool.kind, pool.k, y, o, lse, need_u, need_v, need_bank,
        need_bias, backend,
    )  # fmt: skip
    du = du.view(h, batch * m, c)
    to_target: Tensor | None = None
    to_q: Tensor | None = None
    if need_target or need_q:
        drows = torch.bmm(du, w_k.view(h, e, c).transpose(1, 2))  # [H, B * M, E]
        joined = drows.transpose(0, 1).reshape(batch * m, d)
        to_target = _scaled_mm(joined, w_q, e**-0.5).view(batch, m, d) if need_target else None
        to_q = _scaled_mm(joined.t(), flat, e**-0.5) if need_q else None
    return [
        to_target, to_q, torch.bmm(rows.transpose(1, 2), du).view(d, c) if need_k else None,
        dw.view(d, c) if need_v else None, dflat.t() @ read if need_o else None,
        dbank if need_bank else None, dbias if need_bias else None,
    ]  # fmt: skip


def _scaled_mm(left: Tensor, right: Tensor, by: float) -> Tensor:
    return torch.addmm(left.new_empty(1, 1), left, right, beta=0, alpha=by)
