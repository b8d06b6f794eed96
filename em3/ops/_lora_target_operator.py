"""The registered operator ``em3::lora_target_attention``: the part between the target's projection and the last one, which
are ordinary products.

For the row ``r = (h, m)`` of a user::

    s[r, t] = u[r] . bank[history[t]] + bias[t, h];  p = softmax_t s;  y[r] = sum_t p bank[history[t]];  o[r] = w_h y[r];
    lse[r] = logsumexp_t s

y and lse are outputs for the backward to read. Other poolings than softmax: see ``_pooling``. bias is ``[B, N, H]`` or
``[T, H]`` as history is ``[B, N]`` or ``[T]``, in the dtype of scores.
"""

from __future__ import annotations

import torch

from ..tuning import layout
from . import _checks, _dispatch
from ._pooling import SOFTMAX, Pooling

torch.library.define(
    "em3::lora_target_attention",
    "(Tensor u, Tensor w, Tensor history, Tensor? offsets, Tensor bank, Tensor? bias, str pooling, int top_k, str backend)"
    " -> (Tensor y, Tensor o, Tensor lse)",
)
torch.library.define(
    "em3::lora_target_attention_backward",
    "(Tensor dout, Tensor u, Tensor w, Tensor history, Tensor? offsets, Tensor bank, Tensor? bias, str pooling, int top_k,"
    " Tensor y, Tensor o, Tensor lse, bool need_u, bool need_w, bool need_bank, bool need_bias, str backend)"
    " -> (Tensor du, Tensor dw, Tensor dbank, Tensor dbias)",
)
torch.library.define("em3::bank_rows", "(Tensor history, SymInt rows) -> (Tensor rows, Tensor present)")
torch.library.define("em3::bias_rows", "(Tensor buckets, SymInt count, str name) -> Tensor")


def forward(u, w, history, offsets, bank, bias, pooling, top_k, backend):
    _check_content(history, offsets, bank)
    args = (u, w, history, offsets, bank, bias, Pooling(pooling, top_k))
    with _checks.no_autocast(u.device):
        return _dispatch.choose("lora_target_attention", backend, args, lambda: _about(*args)).forward(*args)


def backward(dout, u, w, history, offsets, bank, bias, pooling, top_k, y, o, lse, need_u, need_w, need_bank, need_bias,
             backend):  # fmt: skip
    _check_content(history, offsets, bank)
    args = (u, w, history, offsets, bank, bias, Pooling(pooling, top_k))
    chosen = _dispatch.choose("lora_target_attention", backend, args, lambda: _about(*args))
    with _checks.no_autocast(u.device):
        return chosen.backward(dout, *args, y, o, lse, need_u, need_w, need_bank, need_bias)


def _about(u, w, history, offsets, bank, bias, pool):
    """What the choice of a backend depends on. Not on gradients: an operator's forward does not know who wants them."""
    h, batch, m, _ = u.shape
    kind = layout(bank, offsets, u) + ("" if bias is None else " biased") + ("" if pool == SOFTMAX else f" {pool.kind}")
    return u, kind, (history.numel(), batch, *bank.shape, m, h, w.shape[1])


def _check_content(history, offsets, bank):
    """In the backward again: the user's index tensors may have been written to in between."""
    _checks.index_content(history, -1, bank.shape[0], "history", "row of the bank")
    if offsets is not None:
        _checks.offsets_content(offsets, history.shape[0], "history.offsets")


torch.library.impl("em3::lora_target_attention", "default", forward)
torch.library.impl("em3::lora_target_attention_backward", "default", backward)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which scores are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.impl("em3::bank_rows", "default")
def _bank_rows(history, rows):
    """Row numbers that are safe to read in a bank of ``rows`` and one more, which stands for none; and which are real."""
    _checks.index_content(history, -1, rows, "history", "row of the bank")
    present = (history >= 0) & (history < rows)
    return history.masked_fill(~present, rows), present


@torch.library.impl("em3::bias_rows", "default")
def _bias_rows(buckets, count, name):
    """Buckets that are safe to read in a table of ``count`` and one more, which stands for none."""
    _checks.index_content(buckets, -1, count, name, "bucket")
    return buckets.masked_fill((buckets < 0) | (buckets >= count), count)


@torch.library.register_fake("em3::lora_target_attention")
def _forward_fake(u, w, history, offsets, bank, bias, pooling, top_k, backend):
    return u.new_empty(u.shape), u.new_empty(*u.shape[:3], w.shape[1]), u.new_empty(u.shape[:3], dtype=score_dtype(u.dtype))


@torch.library.register_fake("em3::lora_target_attention_backward")
def _backward_fake(dout, u, w, history, offsets, bank, bias, pooling, top_k, y, o, lse, need_u, need_w, need_bank,
                   need_bias, backend):  # fmt: skip
    given = ((w, need_w), (bank, need_bank), (bias if need_bias else u, need_bias))
    return u.new_empty(u.shape), *(t.new_empty(t.shape if n else (0,)) for t, n in given)


@torch.library.register_fake("em3::bank_rows")
def _bank_rows_fake(history, rows):
    return torch.empty_like(history), torch.empty_like(history, dtype=torch.bool)


@torch.library.register_fake("em3::bias_rows")
def _bias_rows_fake(buckets, count, name):
    return torch.empty_like(buckets)


def _setup_context(ctx, inputs, output):
    u, w, history, offsets, bank, bias, ctx.pooling, ctx.top_k, ctx.backend = inputs
    y, o, lse = output
    ctx.mark_non_differentiable(y, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, w, history, offsets, bank, bias, y, o, lse)


def _autograd(ctx, _, dout, __):
    need_u, need_w, _, _, need_bank, need_bias, *_ = ctx.needs_input_grad
    if dout is None:
        return (None,) * 9
    *args, y, o, lse = ctx.saved_tensors
    du, dw, dbank, dbias = torch.ops.em3.lora_target_attention_backward(
        dout.contiguous(), *args, ctx.pooling, ctx.top_k, y, o, lse, need_u, need_w, need_bank, need_bias, ctx.backend
    )
    return (du if need_u else None, dw if need_w else None, None, None, dbank if need_bank else None,
            dbias if need_bias else None, None, None, None)  # fmt: skip


torch.library.register_autograd("em3::lora_target_attention", _autograd, setup_context=_setup_context)
_checks.no_second_order("lora_target_attention")
