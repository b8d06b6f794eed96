"""Few queries read many tokens, keys and values never formed: the compiled CPU kernel.

The contract of ``forward`` and ``backward`` is that of ``em3.ops.qformer_attention``; memory beyond the outputs is one
tile of tokens a thread. The kernel computes in float32: tokens in a half type are read as they are, everything else in one
is converted here. The kernel hands whole items to its threads. Where there are fewer long items than would keep
them busy, each is cut into parts that the kernel takes for items, and their softmaxes are joined here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops._dropout import Dropout
from .. import cpp
from . import _parts, unavailable

MAX_STREAMS = 8

__all__ = ["backward", "forward", "supports", "unavailable", "wins"]


class How(NamedTuple):
    """What a call asks of the kernel beside its tensors."""

    drop: Dropout | None
    pairs: bool  # whether products with tokens multiply numbers in bf16
    parts: bool = False  # whether items are parts of others

    def arguments(self) -> tuple[int, str, tuple[int, float, int] | None, bool, bool]:
        return torch.get_num_threads(), cpp.isa, _parts.drawn(self.drop), self.pairs, self.parts


def in_pairs(u: list[Tensor], w: list[Tensor], values: list[Tensor]) -> bool:
    """Whether every number that meets a token is in bf16, in rows of which pairs can be made, on a processor that multiplies
    these. What is rounded on the way (the weights of the softmax, gradients) adds an error of the size of the output's own.

    Times as fast as the same call in float32, forward and backward on Zen 4, one thread (processor time while other work
    ran), B=16, N=256, C=D=512, H=8, tokens frozen: 1.53 to 1.58 at Q=4, 1.55 at Q=8, 1.62 at Q=16, 1.45 to 1.66 at Q=32;
    C=D=768, H=12, Q=8: 1.60; N=100: 1.48 to 1.55. With a gradient to the tokens 1.34 to 1.52. Without pairs: 1.0.
    """
    even = all(x.shape[-1] % 2 == 0 and all(stride % 2 == 0 for stride in x.stride()[:-1]) for x in values)
    even = even and w[0].shape[1] % 2 == 0
    return even and all(t.dtype == torch.bfloat16 for t in (*u, *values)) and cpp.multiplies_bf16()


def supports(u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor], offsets: list[Tensor | None],
             masks: list[Tensor | None], batch: int, drop: Dropout | None = None) -> str | None:  # fmt: skip
    if len(values) > MAX_STREAMS:
        return f"it reads at most {MAX_STREAMS} streams and got {len(values)}; join some or use another backend"
    return next((why for x in values if (why := _parts.refusal(x, u[0], "token stream")) is not None), None)


def wins(u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor], offsets: list[Tensor | None],
         masks: list[Tensor | None], batch: int, drop: Dropout | None = None) -> bool:  # fmt: skip
    # Also for a single item, whose tokens are shared out in parts. Forward and backward at B=1, C=D=512, H=8, AVX2 on two
    # threads, tokens frozen / with gradient, ms, this against the torch backend: N=1024, Q=4: 4.1 / 4.7 against 4.4 /
    # 5.0; Q=16: 8.3 / 10.0 against 7.9 / 9.8; N=8192, Q=4: 13 / 17 against 23 / 29; Q=16: 39 / 54 against 50 / 64. In one
    # piece, on one thread: 5.1 / 5.6, 12 / 16, 22 / 29 and 71 / 101.
    return True


def forward(u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor], offsets: list[Tensor | None],
            masks: list[Tensor | None], batch: int,
            drop: Dropout | None = None) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    how = How(drop, in_pairs(u, w, values))
    y, o, mass, lse = _forward(_wide(u), c, _wide(w), values, offsets, masks, batch, how)
    return [_parts.rounded(t, u[0]) for t in y], _parts.rounded(o, u[0]), mass, lse


def _forward(u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor], offsets: list[Tensor | None],
             masks: list[Tensor | None], batch: int, how: How) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    parts = _parts.count(values, offsets, batch)
    if parts == 1:
        return _whole_forward(u, c, w, values, offsets, masks, batch, how)
    u, c = _of_parts(u, c, parts)
    values, offsets, masks = _cut(values, offsets, masks, parts)
    y, o, mass, lse = _whole_forward(u, c, w, values, offsets, masks, batch * parts, how)
    share, whole = _parts.shares(lse, batch, parts)
    mass = (mass.view(len(y), *share.shape) * share).sum(3)
    return [_parts.joined(t, share) for t in y], _parts.joined(o, share), mass, whole


def _whole_forward(u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor], offsets: list[Tensor | None],
                   masks: list[Tensor | None], batch: int, how: How) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    h, _, q, _ = u[0].shape
    y = [_parts.empty(h, batch, q, x.shape[-1]) for x in values]
    o, mass, lse = (_parts.empty(*s) for s in ((h, batch, q, w[0].shape[1]), (len(u), h, batch, q), (h, batch, q)))
    cpp.compiled().qformer_attention_forward(
        *_inputs(u, c, w, values, offsets, masks), y, o, mass, lse, *how.arguments()
    )
    return y, o, mass, lse


def backward(dout: Tensor, dmass: Tensor | None, u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor],
             offsets: list[Tensor | None], masks: list[Tensor | None], y: list[Tensor], o: Tensor, mass: Tensor,
             lse: Tensor, need_u: bool, need_w: list[bool], need_values: list[bool], drop: Dropout | None = None,
             ) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    du, dc, dw, dx = _backward(
        dout.float(), dmass, _wide(u), c, _wide(w), values, offsets, masks, _wide(y), o.float(), mass, lse, need_u, need_w,
        need_values, How(drop, in_pairs(u, w, values)),
    )  # fmt: skip
    return (
        [_parts.rounded(g, t) for g, t in zip(du, u, strict=True)], dc, [_parts.rounded(g, t) for g, t in zip(dw, w, strict=True)],
        dx,
    )  # fmt: skip


def _backward(dout: Tensor, dmass: Tensor | None, u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor],
              offsets: list[Tensor | None], masks: list[Tensor | None], y: list[Tensor], o: Tensor, mass: Tensor,
              lse: Tensor, need_u: bool, need_w: list[bool], need_values: list[bool], how: How,
              ) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    batch, need = lse.shape[1], (need_u, need_w, need_values, how)
    parts = _parts.count(values, offsets, batch)
    if parts == 1:
        return _whole_backward(dout, dmass, u, c, w, values, offsets, masks, y, o, mass, lse, *need)
    # Every part gets what belongs to its whole item, and contributes what its tokens add to the sums.
    shapes = [x.shape for x in values]
    u, c = _of_parts(u, c, parts)
    values, offsets, masks = _cut(values, offsets, masks, parts)
    dout, o, lse = (t.repeat_interleave(parts, 1) for t in (dout, o, lse))
    mass, dmass = mass.repeat_interleave(parts, 2), None if dmass is None else dmass.repeat_interleave(parts, 2)
    y = [_parts.first(t, parts) for t in y]
    need = (need_u, need_w, need_values, how._replace(parts=True))
    du, dc, dw, dx = _whole_backward(dout, dmass, u, c, w, values, offsets, masks, y, o, mass, lse, *need)
    if u[0].shape[1] > 1:
        du, dc = [t.unflatten(1, (batch, parts)).sum(2) for t in du], dc.unflatten(2, (batch, parts)).sum(3)
    return du, dc, dw, [g.view(shape) if n else g for g, shape, n in zip(dx, shapes, need_values, strict=True)]


def _whole_backward(dout: Tensor, dmass: Tensor | None, u: list[Tensor], c: Tensor | None, w: list[Tensor],
                    values: list[Tensor], offsets: list[Tensor | None], masks: list[Tensor | None], y: list[Tensor],
                    o: Tensor, mass: Tensor, lse: Tensor, need_u: bool, need_w: list[bool], need_values: list[bool],
                    how: How) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    du, dc = [_parts.empty(*x.shape) for x in u], _parts.empty(len(u), *u[0].shape[:3])
    dw = [_parts.empty(*(t.shape if n else (0,))) for t, n in zip(w, need_w, strict=True)]
    dx = [torch.empty(x.shape if n else (0,), dtype=x.dtype, device="cpu") for x, n in zip(values, need_values, strict=True)]
    if not need_u:
        for unwanted in (*du, dc):
            unwanted.zero_()
    cpp.compiled().qformer_attention_backward(
        dout.contiguous(), None if dmass is None else dmass.contiguous(), *_inputs(u, c, w, values, offsets, masks),
        [r.contiguous() for r in y], o.contiguous(), mass.contiguous(), lse.contiguous(), du if need_u else None,
        dc if need_u else None, *([g if n else None for g, n in zip(grads, needs, strict=True)]
                                  for grads, needs in ((dw, need_w), (dx, need_values))),
        *how.arguments(),
    )  # fmt: skip
    return du, dc, dw, dx


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    return [t.float() for t in tensors]


def _cut(values: list[Tensor], offsets: list[Tensor | None], masks: list[Tensor | None],
         parts: int) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    flat, bounds = zip(*(_parts.cut(x, o, parts) for x, o in zip(values, offsets, strict=True)), strict=True)
    return list(flat), list(bounds), [None if mask is None else mask.flatten() for mask in masks]


def _of_parts(u: list[Tensor], c: Tensor | None, parts: int) -> tuple[list[Tensor], Tensor | None]:
    """What belongs to an item belongs to each of its parts; what all items share, or the only one has, all parts share."""
    if u[0].shape[1] == 1:
        return u, c
    return [t.repeat_interleave(parts, 1) for t in u], None if c is None else c.repeat_interleave(parts, 2)


def _inputs(u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor], offsets: list[Tensor | None],
            masks: list[Tensor | None]) -> tuple:  # fmt: skip
    """As the kernel reads them: everything contiguous, but of the tokens only the elements of each."""
    return (
        [x.contiguous() for x in u], None if c is None else c.contiguous(), [t.contiguous() for t in w],
        [x if x.stride(-1) == 1 else x.contiguous() for x in values],
        *([None if t is None else t.contiguous() for t in given] for given in (offsets, masks)),
    )  # fmt: skip
