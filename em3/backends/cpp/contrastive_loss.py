"""In-batch contrast without the ``B x B`` matrix: the compiled CPU kernel, float32.

The contract of ``forward`` and ``backward`` is that of ``em3.ops._contrastive_operator``; memory beyond the outputs is a few
tensors of the inputs' size and one tile a thread. The torch backend says when one exponential serves rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpp
from ..torch import contrastive_loss as tiled
from . import unavailable
from ._parts import empty

__all__ = ["backward", "forward", "supports", "unavailable", "whole", "wins"]


def supports(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None, rows: bool,
             cols: bool) -> str | None:  # fmt: skip
    if x.device.type != "cpu":
        return f"it computes on the CPU and the tensors are on {x.device}"
    if x.dtype != torch.float32:
        return f"it computes in float32 and the embeddings come as {x.dtype}; convert them or use another backend"
    if x.shape[1] == 0:
        return "it reads embeddings of width 1 and more, and these have width 0"
    return None


def wins(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None, rows: bool,
         cols: bool) -> bool:  # fmt: skip
    # Forward and backward, AVX2, two threads, ms, this against the torch backend and the full matrix with two cross
    # entropies (all with normalised rows and a gradient to the scale; the full matrix is no backend):
    # V=32,  B=64: 0.94, 1.26, 0.56; 256: 1.3, 1.9, 1.4; 1024: 3.6, 8.7, 22; 2048: 9.9, 24, 102; 4096: 35, 86, 519.
    # V=128, B=64: 1.10, 1.39, 0.61; 256: 1.7, 2.2, 1.3; 512: 3.2, 4.5, 5.5; 1024: 8.9, 12, 22; 2048: 29, 42, 95;
    # 4096: 108, 143, 522; 8192: 414, 548, 2089; 16384: 1650, 2227, 8603. Under B=256 the time went into what surrounds
    # the kernel (which took 0.10 of the 0.94 ms at V=32, B=64); see ops/_contrastive_whole.py for what is done there now.
    return True


def forward(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None, rows: bool,
            cols: bool, apart: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    row, col = empty(x.shape[0] if rows else 0), empty((x.shape[0] if apart is None else apart) if cols else 0)
    cpp.compiled().contrastive_loss_forward(
        *_inputs(x, y, scale, item_ids, offset), row if rows else None, col if cols else None, torch.get_num_threads(),
        cpp.isa, apart,
    )  # fmt: skip
    return row, col


def backward(drow: Tensor | None, dcol: Tensor | None, x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None,
             offset: Tensor | None, row: Tensor, col: Tensor, need: list[bool], apart: int | None = None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def room(like: Tensor | None, wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(like.shape, dtype=dtype, device="cpu") if wanted and like is not None else None

    need_x, need_y, need_scale, need_offset = need
    dx, dy, dscale, doffset = (
        room(x, need_x), room(y, need_y), room(scale, need_scale, torch.float64), room(offset, need_offset),
    )  # fmt: skip
    cpp.compiled().contrastive_loss_backward(
        drow, dcol, *_inputs(x, y, scale, item_ids, offset), row if row.numel() else None,
        col if col.numel() else None, dx, dy, dscale, doffset, torch.get_num_threads(), cpp.isa, apart,
    )  # fmt: skip
    return _or_empty(dx), _or_empty(dy), _or_empty(dscale), _or_empty(doffset)


def _or_empty(gradient: Tensor | None) -> Tensor:
    return empty(0) if gradient is None else gradient


def _inputs(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None) -> tuple:
    return (
        *(t if t.stride(-1) == 1 else t.contiguous() for t in (x, y)), scale,
        None if item_ids is None else item_ids.contiguous().long(), None if offset is None else offset.contiguous(),
        limits(),
    )  # fmt: skip


def limits() -> tuple[float, ...]:
    """When one exponential serves rows and columns."""
    return tiled.TOP, tiled.LOW, tiled.LARGEST_LOGIT, tiled.LARGEST_SPREAD


def whole(content: Tensor, ids_embedding: Tensor, negatives: Tensor | None, scale: Tensor, log_q: Tensor | None,
          weight: Tensor | None, item_ids: Tensor | None, asked: list[bool], mean: bool, normalize: bool,
          need: list[bool]) -> tuple[float, list[Tensor | None]]:  # fmt: skip
    """InfoNCE of a small batch in one call: the loss and its gradients to the first six arguments, as ``need`` wants them."""
    given = [
        None if t is None else t.contiguous().float() for t in (content, ids_embedding, negatives, scale, log_q, weight)
    ]
    given[3] = scale.double().view(())
    grads = [torch.empty_like(t) if n and t is not None else None for n, t in zip(need, given, strict=True)]
    x, y, extra, _, of_log_q, of_weight = given
    found = cpp.compiled().contrastive_loss_whole(
        x, y, extra, float(scale), None if item_ids is None else item_ids.contiguous().long(), of_log_q, of_weight,
        limits(), *asked, mean, normalize, *grads, torch.get_num_threads(), cpp.isa,
    )  # fmt: skip
    return found, grads
