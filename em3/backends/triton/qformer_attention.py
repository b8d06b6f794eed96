"""Few queries read many tokens, keys and values never formed: the Triton kernels.

The contract of ``forward`` and ``backward`` is that of ``em3.ops.qformer_attention``, but for what ``y`` holds: each
stream is read under a softmax of its own, and ``y`` is what it gave. A stream's share, ``mass``, is put on what the
value weights make of ``y``, which is ``H`` times smaller.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...ops._dropout import Dropout, threshold
from ..torch import qformer_attention as plain
from . import cannot_use, kernel, unavailable

__all__ = ["backward", "forward", "supports", "unavailable", "wins"]

MAX_FLOAT32_ROWS = 64
_LONGEST_ITEM = 2**31  # the kernels are given strides in 32 bits
_LONGEST_STRIDE = 2**31 // 256  # within a tile of at most 128 tokens the kernels count elements in 32 bits


def supports(u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor], offsets: list[Tensor | None],
             masks: list[Tensor | None], batch: int, drop: Dropout | None = None) -> str | None:  # fmt: skip
    if torch.float64 in (u[0].dtype, *(x.dtype for x in values)):
        return "it computes in float32 and the tensors are torch.float64; convert them or use another backend"
    if any(x.shape[-1] == 0 for x in values):
        return "it reads tokens of width 1 and more, and a stream has width 0"
    if any(mask is not None and o is not None for mask, o in zip(masks, offsets, strict=True)):
        return "it takes no mask of a jagged stream; leave the tokens out instead"
    if any(x.dim() == 3 and abs(x.stride(0)) >= _LONGEST_ITEM for x in values):
        return f"it reads padded tokens whose items lie less than {_LONGEST_ITEM} elements apart; make them jagged"
    return cannot_use(values[0].device)


def wins(u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor], offsets: list[Tensor | None],
         masks: list[Tensor | None], batch: int, drop: Dropout | None = None) -> bool:  # fmt: skip
    # Counted, not measured: the torch backend writes and reads scores and weights, and copies tokens of a half type to
    # float32; this reads tokens once (docs/design.md). Many rows in true float32 are bound by arithmetic that neither
    # saves, and there cuBLAS is the better at products without tensor cores. The interpreter is for tests.
    h, _, q, _ = u[0].shape
    cheap = u[0].dtype != torch.float32 or h * q <= MAX_FLOAT32_ROWS or torch.backends.cuda.matmul.allow_tf32
    return values[0].is_cuda and cheap


def forward(u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor], offsets: list[Tensor | None],
            masks: list[Tensor | None], batch: int,
            drop: Dropout | None = None) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    drops = _drops(drop, len(u))
    read = [
        kernel("qformer_attention").forward(*inputs, batch, of)
        for *inputs, of in zip(*_rows(u, c), _streams(values, offsets, masks, u[0].dtype), drops, strict=True)
    ]
    y, levels, kept = zip(*(joined(part, level, u[0].dtype, left) for part, level, left in read), strict=True)
    lse = levels[0] if len(u) == 1 else torch.stack(levels).logsumexp(0)  # [H, B, Q]
    share = _share(torch.stack(levels), lse)
    if len(u) == 1:
        return list(y), plain.project(list(y), w), share if drop is None else share * kept[0], lse
    parts = (of[..., None] * plain.project([a], [b]) for of, a, b in zip(share, y, w, strict=True))
    o = functools.reduce(torch.add, parts).to(u[0].dtype)
    if drop is None:
        return list(y), o, share, lse
    # The backward finds no share in a mass that dropout has changed, so it is given what the rows read with it.
    return [(of[..., None] * a).to(a.dtype) for of, a in zip(share, y, strict=True)], o, share * torch.stack(kept), lse


def backward(dout: Tensor, dmass: Tensor | None, u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor],
             offsets: list[Tensor | None], masks: list[Tensor | None], y: list[Tensor], o: Tensor, mass: Tensor,
             lse: Tensor, need_u: bool, need_w: list[bool], need_values: list[bool], drop: Dropout | None = None,
             ) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    kernels = kernel("qformer_attention")
    streams = _streams(values, offsets, masks, u[0].dtype)
    delta = (dout.float() * o.float()).sum(-1)  # [H, B, Q]: sum_t p dp, but for what the masses add
    if dmass is not None:
        delta = delta + (dmass * mass).sum(0)
    lse = lse.contiguous()
    du, dc, dw, dx = [], [], [], []
    for m, (rows, shift, stream, of) in enumerate(zip(*_rows(u, c), streams, _drops(drop, len(u)), strict=True)):
        (dy,), _ = plain.project_backward(dout, [y[m]], [w[m]], [False])
        more = None if dmass is None else dmass[m].contiguous()
        dropped = {} if of is None else {"drop": of, "dmass": more}
        inputs = (rows, shift, stream, dy.contiguous(), -delta if more is None or dropped else more - delta, lse)
        if need_u:
            to_u, to_c, _ = kernels.query_gradient(*inputs, **dropped)
            du.append(to_u)
            dc.append(to_c)
        dx.append(kernels.token_gradient(*inputs, **dropped).to(values[m].dtype) if need_values[m] else values[m].new_empty(0))
        scaled = dout if len(u) == 1 or dropped else (dout * mass[m][..., None]).to(dout.dtype)
        dw += plain.project_backward(scaled, [y[m]], [w[m]], [True])[1] if need_w[m] else [w[m].new_empty(0)]
    if not need_u:
        du, dc = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in u], [lse.new_zeros(u[0].shape[:3])] * len(u)
    return du, torch.stack(dc), dw, dx


def joined(y: Tensor, lse: Tensor, dtype: torch.dtype, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the parts of an item read, ``[P, H, B, Q, C]`` with ``[P, H, B, Q]`` -> what the item read, its logsumexp, and what
    dropout has left of its softmax."""
    if y.shape[0] == 1:
        return y[0], lse[0], None if kept is None else kept[0]
    whole = lse.logsumexp(0)
    share = _share(lse, whole)
    return y.mul_(share[..., None]).sum(0).to(dtype), whole, None if kept is None else kept.mul_(share).sum(0)


def _share(lse: Tensor, whole: Tensor) -> Tensor:
    """The share of each softmax in one over all; 0 where there is no token."""
    return (lse - whole.clamp(min=torch.finfo(lse.dtype).min)).exp_()


def _rows(u: list[Tensor], c: Tensor | None) -> tuple[list[Tensor], list[Tensor | None]]:
    return [x.contiguous() for x in u], [None] * len(u) if c is None else list(c.contiguous())


def _streams(values: list[Tensor], offsets: list[Tensor | None], masks: list[Tensor | None], dtype: torch.dtype) -> list:
    """Tokens as they lie; copied only if of another dtype, if the elements of one are apart, or tokens too far apart."""
    values = [x.to(dtype) for x in values]
    near = [x if x.stride(-1) == 1 and abs(x.stride(-2)) < _LONGEST_STRIDE else x.contiguous() for x in values]
    others = ([None if t is None else t.contiguous() for t in given] for given in (offsets, masks))
    return [kernel("qformer_attention").Stream(*given) for given in zip(near, *others, strict=True)]


def _drops(drop: Dropout | None, streams: int) -> list:
    if drop is None:
        return [None] * streams
    factor = 1 / (1 - drop.p) if drop.p < 1 else 0.0
    return [kernel("qformer_attention").Drop(drop.seed, threshold(drop.p), factor, m) for m in range(streams)]
