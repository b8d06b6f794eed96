"""A target reads its history out of the bank: the absorbed form in plain PyTorch, a chunk of users at a time.

The mathematics is that of ``qformer_attention`` with one stream whose tokens are rows of the bank.
"""

from __future__ import annotations

from torch import Tensor

from ._chunks import Rows
from .qformer_attention import attend, attend_backward, project, project_backward, supports, unavailable, wins

__all__ = ["backward", "forward", "supports", "unavailable", "wins"]


def forward(u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None,
            bank: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, _, lse = attend([Rows(bank, offsets, None, history)], [u], None, u.shape[1])
    return y[0], project(y, [w]), lse


def backward(dout: Tensor, u: Tensor, w: Tensor, history: Tensor, offsets: Tensor | None, bank: Tensor, y: Tensor,
             o: Tensor, lse: Tensor, need_u: bool, need_w: bool, need_bank: bool,
             ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stream = Rows(bank, offsets, None, history)
    dy, dw = project_backward(dout, [y], [w], [need_w])
    # Without dmass the masses are not read: the shape is all that is asked of them.
    du, _, dbank = attend_backward([stream], dy, None, [u], None, [y], lse[None], lse, need_u, [need_bank])
    return du[0], dw[0], dbank[0]
