"""A target reads its history out of the bank: the Triton kernels of ``qformer_attention``, whose tokens are looked up.

Rows are read where they lie, in the bank's own dtype, and nothing of the size of the history is written but for the gradient
to the bank, where that is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops._pooling import SOFTMAX, Pooling
from ..torch.qformer_attention import project, project_backward
from . import cannot_use, kernel, unavailable
from .qformer_attention import MAX_FLOAT32_ROWS, joined

__all__ = ["backward", "forward", "supports", "unavailable", "wins"]

_MOST = 2**31 - 2**12  # what is counted in 32 bits: rows of the bank, places of the history


def supports(u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None,
             pool: Pooling) -> str | None:  # fmt: skip
    if pool != SOFTMAX:
        return f"it pools by softmax only and pooling was {pool.kind!r}; use another backend"
    if torch.float64 in (u.dtype, bank.dtype):
        return "it computes in float32 and the tensors are torch.float64; convert them or use another backend"
    if bank.shape[1] == 0:
        return "it reads a bank of width 1 and more, and this one has width 0"
    if max(*bank.shape, *history.shape) > _MOST:
        return f"it reads banks and histories of at most {_MOST} rows, and these have {max(*bank.shape, *history.shape)}"
    return cannot_use(bank.device)


def wins(u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None,
         pool: Pooling) -> bool:  # fmt: skip
    # Counted, not measured: the torch backend copies the rows, in float32, and reads the copy five times. Many rows of
    # queries in true float32 are bound by arithmetic, as in qformer_attention. The interpreter is for tests.
    h, _, m, _ = u.shape
    return bank.is_cuda and (
        u.dtype != torch.float32 or h * m <= MAX_FLOAT32_ROWS or torch.backends.cuda.matmul.allow_tf32
    )


def forward(u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None,
            pool: Pooling) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stream = _stream(history, offsets, bank, bias)
    parts, lses, _ = kernel("qformer_attention").forward(u.contiguous(), None, stream, u.shape[1])
    y, lse, _ = joined(parts, lses, u.dtype)
    return y, project([y], [w]), lse


def backward(dout: Tensor, u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None,
             pool: Pooling, y: Tensor, o: Tensor, lse: Tensor, need_u: bool, need_w: bool, need_bank: bool, need_bias: bool,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kernels, stream = kernel("qformer_attention"), _stream(history, offsets, bank, bias)
    (dy,), (dw,) = project_backward(dout, [y], [w], [need_w])
    delta = (dout.float() * o.float()).sum(-1)  # [H, B, M]: sum_t p dp
    inputs = (u.contiguous(), None, stream, dy.contiguous(), -delta, lse.contiguous())
    du, dbias = torch.zeros_like(u, memory_format=torch.contiguous_format), None
    if need_u or need_bias:
        du, _, dbias = kernels.query_gradient(*inputs, need_bias=need_bias)
    dbank = bank.new_empty(0)
    if need_bank:
        dbank = _of_bank(kernels.token_gradient(*inputs), history, bank)
    return du, dw, dbank, u.new_empty(0) if dbias is None else dbias


def _of_bank(dx: Tensor, history: Tensor, bank: Tensor) -> Tensor:
    """``[n, C]``: what the places of each row have, added up in float32 in the order of a sort, always the same."""
    n, c = bank.shape
    rows = history.masked_fill((history < 0) | (history >= n), n)  # a row of its own for what is missing
    added: Tensor = torch.ops.aten.embedding_dense_backward(dx.view(-1, c), rows.view(-1), n + 1, n, False)
    return added[:n].to(bank.dtype)


def _stream(history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None) -> Any:
    """The bank as it lies; copied only if the elements of a row are apart."""
    near = bank if bank.stride(1) == 1 and bank.stride(0) < _MOST else bank.contiguous()
    offsets, bias = (None if t is None else t.contiguous() for t in (offsets, bias))
    return kernel("qformer_attention").Stream(near, offsets, None, history.contiguous(), bias)
