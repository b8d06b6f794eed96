"""Few queries read many tokens, keys and values never formed: the compiled CPU kernel, float32.

The contract of ``forward`` and ``backward`` is that of ``em3.ops.qformer_attention``; memory beyond the outputs is one
tile of tokens a thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpp
from . import pointer, unavailable

MAX_STREAMS = 8

__all__ = ["backward", "forward", "supports", "unavailable", "wins"]


def supports(u: list[Tensor], c: Tensor | None, values: list[Tensor], offsets: list[Tensor | None],
             masks: list[Tensor | None], batch: int) -> str | None:  # fmt: skip
    if values[0].device.type != "cpu":
        return f"it computes on the CPU and the tensors are on {values[0].device}"
    if values[0].dtype != torch.float32:
        return f"it computes in float32 and the tensors are {values[0].dtype}; convert them or use another backend"
    if len(values) > MAX_STREAMS:
        return f"it reads at most {MAX_STREAMS} streams and got {len(values)}; join some or use another backend"
    return None


def wins(u: list[Tensor], c: Tensor | None, values: list[Tensor], offsets: list[Tensor | None],
         masks: list[Tensor | None], batch: int) -> bool:  # fmt: skip
    return True


def forward(u: list[Tensor], c: Tensor | None, values: list[Tensor], offsets: list[Tensor | None],
            masks: list[Tensor | None], batch: int) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    h, _, q, _ = u[0].shape
    y = [torch.empty(h, batch, q, x.shape[-1]) for x in values]
    mass, lse = torch.empty(len(u), h, batch, q), torch.empty(h, batch, q)
    streams, keep = _streams(u, c, values, offsets, masks)
    arguments = [(*s, pointer(y[m]), pointer(mass[m])) for m, s in enumerate(streams)]
    shape = (batch, h, q, u[0].shape[1] != batch)
    cpp.compiled().qformer_attention_forward(shape, arguments, pointer(lse), torch.get_num_threads(), cpp.isa)
    del keep  # the pointers were alive until here
    return y, mass, lse


def backward(dy: list[Tensor], dmass: Tensor | None, u: list[Tensor], c: Tensor | None, values: list[Tensor],
             offsets: list[Tensor | None], masks: list[Tensor | None], y: list[Tensor], mass: Tensor, lse: Tensor,
             need_u: bool, need_values: list[bool]) -> tuple[list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    h, batch, q = lse.shape
    du = [torch.empty(x.shape) for x in u] if need_u else [torch.zeros(x.shape) for x in u]
    dc = torch.empty(len(u), *u[0].shape[:3]) if need_u else torch.zeros(len(u), *u[0].shape[:3])
    dx = [torch.empty(x.shape if need else (0,)) for x, need in zip(values, need_values, strict=True)]
    streams, keep = _streams(u, c, values, offsets, masks)
    dy, y = [g.contiguous() for g in dy], [r.contiguous() for r in y]
    dmass, mass, lse = None if dmass is None else dmass.contiguous(), mass.contiguous(), lse.contiguous()
    arguments = [
        (*s, pointer(y[m]), pointer(mass[m]), pointer(dy[m]), 0 if dmass is None else pointer(dmass[m]),
         pointer(du[m]) if need_u else 0, pointer(dc[m]) if need_u else 0, pointer(dx[m]) if need_values[m] else 0)
        for m, s in enumerate(streams)
    ]  # fmt: skip
    shape = (batch, h, q, u[0].shape[1] != batch)
    cpp.compiled().qformer_attention_backward(shape, arguments, pointer(lse), torch.get_num_threads(), cpp.isa)
    del keep
    return du, dc, dx


def _streams(u: list[Tensor], c: Tensor | None, values: list[Tensor], offsets: list[Tensor | None],
             masks: list[Tensor | None]) -> tuple[list[tuple], list]:  # fmt: skip
    """The first ten words of each stream's tuple, and the tensors that must outlive the call for them to be valid."""
    out, keep = [], []
    c = None if c is None else c.contiguous()
    for m, x in enumerate(values):
        x = x if x.stride(-1) == 1 else x.contiguous()
        query = u[m].contiguous()
        mask, bounds = (None if t is None else t.contiguous() for t in (masks[m], offsets[m]))
        padded = bounds is None
        out.append(
            (pointer(x), x.stride(0) if padded else 0, x.stride(-2), x.shape[-2], x.shape[-1], pointer(bounds),
             pointer(mask), 0 if mask is None else mask.stride(0), pointer(query), 0 if c is None else pointer(c[m]))
        )  # fmt: skip
        keep.append((x, query, mask, bounds, c))
    return out, keep
