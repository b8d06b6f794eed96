"""A target reads its history out of the bank: the absorbed form in plain PyTorch, a chunk of users at a time.

The mathematics is that of ``qformer_attention`` with one stream whose tokens are rows of the bank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops._pooling import Pooling
from ._chunks import Rows
from .qformer_attention import attend, attend_backward, project, project_backward, supports, unavailable, wins

__all__ = ["backward", "forward", "supports", "unavailable", "wins"]


def forward(u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None,
            pool: Pooling) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, _, lse = attend([Rows(bank, offsets, None, history, bias)], [u], None, u.shape[1], pool=pool)
    return y[0], project(y, [w]), lse


def backward(dout: Tensor, u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, bias: Tensor | None,
             pool: Pooling, y: Tensor, o: Tensor, lse: Tensor, need_u: bool, need_w: bool, need_bank: bool, need_bias: bool,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    stream = Rows(bank, offsets, None, history, bias)
    dbias = torch.zeros_like(bias) if need_bias and bias is not None else u.new_empty(0)
    dy, dw = project_backward(dout, [y], [w], [need_w])
    # Without dmass the masses are not read: the shape is all that is asked of them.
    du, _, dbank = attend_backward([stream], dy, None, [u], None, [y], lse[None], lse, need_u, [need_bank], pool=pool,
                                   dbias=dbias if need_bias else None)  # fmt: skip
    return du[0], dw[0], dbank[0], dbias
