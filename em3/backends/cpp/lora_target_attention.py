"""A target reads its history out of the bank: the compiled CPU kernel.

The kernel is that of ``qformer_attention`` with one stream whose tokens are looked up in the bank: nothing but its output
grows with the history. It computes in float32: the rows of a bank in a half type are read as they are, everything else in
one is converted here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops._pooling import SOFTMAX, Pooling
from .. import cpp
from . import _parts, unavailable

__all__ = ["backward", "forward", "supports", "unavailable", "wins"]


def supports(u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None,
             pool: Pooling) -> str | None:  # fmt: skip
    if pool.kind == "top_k":
        return "it has no pooling 'top_k', only 'softmax' and 'din'; use another backend"
    return _parts.refusal(bank, u, "bank")


def wins(u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None,
         pool: Pooling) -> bool:  # fmt: skip
    # Forward and backward, AVX2, two threads, ms, this against the torch backend; H=4, one target a user, bank frozen:
    # B=64, N=200, C=D=256: 9.2 against 14.5; B=64, N=1000, C=D=128: 15.5, 34.2; B=2048, N=20, C=D=64: 10.7, 17.0; one user
    # with 10,000 events of 128: 5.9, 9.2. One thread, the first: 6.1, 15.5; with a trained bias 7.6, 16.9 (the torch backend
    # with the 10 best 18.1). With gradient to the bank, the first: 22.0, 29.3. 16 targets, C=D=128:
    # 15.5, 31.0.
    return True


def forward(u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None,
            pool: Pooling) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, o, lse = _forward(u.float(), w.float(), history, offsets, bank, bias, pool != SOFTMAX)
    return _parts.rounded(y, u), _parts.rounded(o, u), lse


def _forward(u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None,
             sigmoid: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch = u.shape[1]
    parts = _parts.count([history], [offsets], batch)
    if parts == 1:
        return _whole_forward(u, w, history, offsets, bank, bias, sigmoid)
    of_parts = u.repeat_interleave(parts, 1)
    y, o, lse = _whole_forward(of_parts, w, *_parts.cut(history, offsets, parts), bank, _by_place(bias), sigmoid)
    if sigmoid:  # what parts have read adds up
        y, o = (t.unflatten(1, (-1, parts)).sum(2) for t in (y, o))
        return y, o, lse.unflatten(1, (-1, parts)).amax(2)
    share, whole = _parts.shares(lse, batch, parts)
    return _parts.joined(y, share), _parts.joined(o, share), whole


def _whole_forward(u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor,
                   bias: Tensor | None, sigmoid: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, o, lse = _parts.empty(*u.shape), _parts.empty(*u.shape[:3], w.shape[1]), _parts.empty(*u.shape[:3])
    cpp.compiled().lora_target_attention_forward(
        *_inputs(u, w, history, offsets, bank, bias), y, o, lse, torch.get_num_threads(), cpp.isa, sigmoid
    )
    return y, o, lse


def backward(dout: Tensor, u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None,
             pool: Pooling, y: Tensor, o: Tensor, lse: Tensor, need_u: bool, need_w: bool, need_bank: bool, need_bias: bool,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    du, dw, dbank, dbias = _backward(
        dout.float(), u.float(), w.float(), history, offsets, bank, bias, y.float(), o.float(), lse,
        (need_u, need_w, need_bank, need_bias), pool != SOFTMAX,
    )  # fmt: skip
    du, dw, dbank = (_parts.rounded(g, t) for g, t in ((du, u), (dw, w), (dbank, bank)))
    return du, dw, dbank, u.new_empty(0) if dbias is None else dbias


Needs = tuple[bool, bool, bool, bool]


def _backward(dout: Tensor, u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None,
              y: Tensor, o: Tensor, lse: Tensor, needs: Needs,
              sigmoid: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    parts = _parts.count([history], [offsets], u.shape[1])
    if parts == 1:
        return _whole_backward(dout, u, w, history, offsets, bank, bias, y, o, lse, needs, sigmoid)
    y = _parts.first(y, parts)
    dout, of_parts, o, lse = (t.repeat_interleave(parts, 1) for t in (dout, u, o, lse))
    history, offsets = _parts.cut(history, offsets, parts)
    du, dw, dbank, dbias = _whole_backward(
        dout, of_parts, w, history, offsets, bank, _by_place(bias), y, o, lse, needs, sigmoid
    )
    return du.unflatten(1, (-1, parts)).sum(2), dw, dbank, None if dbias is None or bias is None else dbias.view_as(bias)


def _by_place(bias: Tensor | None) -> Tensor | None:
    """``[B, N, H]`` as ``[T, H]``: as `_parts.cut` leaves the history."""
    return None if bias is None else bias.flatten(0, -2)


def _whole_backward(dout: Tensor, u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor,
                    bias: Tensor | None, y: Tensor, o: Tensor, lse: Tensor, needs: Needs,
                    sigmoid: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    need_u, need_w, need_bank, need_bias = needs
    du = _parts.empty(*u.shape) if need_u else None
    dw = _parts.empty(*w.shape) if need_w else None
    dx = _parts.empty(*history.shape, bank.shape[1]) if need_bank else None  # a row for each place of the history
    dbias = torch.zeros(bias.shape, dtype=torch.float32, device="cpu") if need_bias and bias is not None else None
    cpp.compiled().lora_target_attention_backward(
        dout.contiguous(), *_inputs(u, w, history, offsets, bank, bias), y.contiguous(), o.contiguous(), lse.contiguous(),
        du, dw, dx, dbias, torch.get_num_threads(), cpp.isa, sigmoid,
    )  # fmt: skip
    dbank = _parts.empty(0)
    if dx is not None:
        # Row by row in the order of the history, so that the same call gives the same bits.
        rows, dx = history.flatten(), dx.flatten(0, -2)
        dbank = torch.zeros(bank.shape, dtype=torch.float32, device="cpu")  # a row may be read many times over
        dbank.index_add_(0, rows.clamp(min=0), dx)  # zeros, for no item
    return torch.zeros_like(u) if du is None else du, _parts.empty(0) if dw is None else dw, dbank, dbias


def _inputs(u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None) -> tuple:
    return (
        u.contiguous(), w.contiguous(), history.contiguous(), None if offsets is None else offsets.contiguous(),
        bank if bank.stride(-1) == 1 else bank.contiguous(), None if bias is None else bias.contiguous(),
    )  # fmt: skip
