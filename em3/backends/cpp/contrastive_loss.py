"""In-batch contrast without the ``B x B`` matrix: the compiled CPU kernel.

The contract of ``forward`` and ``backward`` is that of ``em3.ops._contrastive_operator``; memory beyond the outputs is some
numbers a row, and a tile and the rows that it meets a thread. The torch backend says when one exponential serves rows and
columns. ``whole_forward`` and ``whole_backward`` are the loss from the embeddings on, for ``em3.ops._contrastive_whole``: these
take the half types too, and read and write the embeddings as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import _contrastive_checks as check
from .. import cpp
from ..torch import contrastive_loss as tiled
from . import unavailable
from ._parts import empty

__all__ = ["backward", "forward", "supports", "unavailable", "whole_backward", "whole_forward", "wins"]


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
    # 4096: 108, 143, 522; 8192: 414, 548, 2089; 16384: 1650, 2227, 8603. This was before what surrounds the kernel was
    # compiled too; see ops/_contrastive_whole.py.
    return True


def forward(x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None, rows: bool,
            cols: bool, apart: int | None = None, *, bias: Tensor | None = None, kind: str = "infonce",
            ) -> tuple[Tensor, Tensor]:  # fmt: skip
    row, col = (
        torch.empty(count if asked else 0, dtype=torch.float64, device="cpu")
        for count, asked in ((x.shape[0], rows), (x.shape[0] if apart is None else apart, cols))
    )
    cpp.compiled().contrastive_loss_forward(
        *_inputs(x, y, scale, bias, item_ids, offset), kind, limits(), row if rows else None, col if cols else None,
        torch.get_num_threads(), cpp.isa, apart,
    )  # fmt: skip
    return row, col


def backward(drow: Tensor | None, dcol: Tensor | None, x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None,
             offset: Tensor | None, row: Tensor, col: Tensor, need: list[bool], apart: int | None = None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    need_x, need_y, need_scale, need_offset = need
    given = (drow, dcol, x, y, scale, None, item_ids, offset, "infonce")
    sums = (row if row.numel() else None, col if col.numel() else None)
    dx, dy, dscale, _, doffset = gradients(*given, sums, [need_x, need_y, need_scale, False, need_offset], apart)
    return dx, dy, dscale, doffset


def gradients(drow: Tensor | None, dcol: Tensor | None, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None,
              item_ids: Tensor | None, offset: Tensor | None, kind: str, sums: tuple[Tensor | None, Tensor | None],
              need: list[bool], apart: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of either kind: to ``x, y, scale, bias, offset``."""
    need_x, need_y, need_scale, need_bias, need_offset = need
    dx, dy = (_room(t, n) for t, n in ((x, need_x or need_scale), (y, need_y)))
    dscale, dbias = (_room(t, n, torch.float64) for t, n in ((scale, need_scale), (bias, need_bias)))
    if dscale is not None and not x.shape[0]:
        dscale.zero_()  # no rows, whose gradient the kernel would find it by
    doffset = _room(offset, need_offset)
    cpp.compiled().contrastive_loss_backward(
        drow, dcol, *_inputs(x, y, scale, bias, item_ids, offset), kind, limits(), *sums, dx, dy, dscale, dbias, doffset,
        torch.get_num_threads(), cpp.isa, apart,
    )  # fmt: skip
    return _or_empty(dx if need_x else None), _or_empty(dy), _or_empty(dscale), _or_empty(dbias), _or_empty(doffset)


def _room(like: Tensor | None, wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return torch.empty(like.shape, dtype=dtype, device="cpu") if wanted and like is not None else None


def _or_empty(gradient: Tensor | None) -> Tensor:
    return empty(0) if gradient is None else gradient


def _inputs(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, item_ids: Tensor | None,
            offset: Tensor | None) -> tuple:  # fmt: skip
    return (
        *(t if t.stride(-1) == 1 else t.contiguous() for t in (x, y)), scale, bias,
        None if item_ids is None else item_ids.contiguous().long(), None if offset is None else offset.contiguous(),
    )  # fmt: skip


def limits() -> tuple[float, ...]:
    """When one exponential serves rows and columns."""
    return tiled.TOP, tiled.LOW, tiled.LARGEST_LOGIT, tiled.LARGEST_SPREAD


def whole_forward(inputs: Sequence[Tensor | None], numbers: tuple[float, float], item_ids: Tensor | None, options: dict[str, Any],
                  keep: bool) -> tuple[float, Tensor]:  # fmt: skip
    """The loss (0 for ``reduction="none"``), and what the backward needs: float64, of which the first ``B`` are the rows' losses
    without weights. With ``keep``, the logits are part of it.

    ``inputs`` are content, ids_embedding and negatives, of one dtype, log_q and weight; ``numbers`` scale and bias.

    Raises:
        ValueError: for a log_q that is no logarithm of probabilities, and weights below 0.
    """
    content, _, negatives, log_q, weight = inputs
    assert content is not None
    lib, k = cpp.compiled(), 0 if negatives is None else negatives.shape[0]
    state = torch.empty(
        lib.contrastive_loss_whole_state(
            content.shape[0], k, item_ids is not None, options["duplicates"], options["direction"], options["normalize"], keep
        ),
        dtype=torch.float64, device="cpu",
    )  # fmt: skip
    found = lib.contrastive_loss_whole_forward(
        *_whole(inputs, numbers, item_ids, options, state), check.ROUNDING, torch.get_num_threads(), cpp.isa
    )
    if found is None:
        check.log_probabilities(None if log_q is None else -log_q.detach().float())
        check.weights(weight)
    return found, state


def whole_backward(upstream: Tensor, inputs: Sequence[Tensor | None], numbers: tuple[float, float], item_ids: Tensor | None,
                   options: dict[str, Any], state: Tensor, grads: Sequence[Tensor | None]) -> None:  # fmt: skip
    """Fills ``grads``: those to ``inputs``, of the embeddings' dtype and float32, then those to ``numbers``, float64 or float32;
    None where not wanted."""
    given = upstream.double().contiguous() if options["reduction"] == "none" else upstream.item()
    dcontent, dids, dnegatives, dlog_q, dweight, dscale, dbias = grads
    cpp.compiled().contrastive_loss_whole_backward(
        given, *_whole(inputs, numbers, item_ids, options, state), dcontent, dids, dnegatives, dscale, dbias, dlog_q, dweight,
        torch.get_num_threads(), cpp.isa,
    )  # fmt: skip


def _whole(inputs: Sequence[Tensor | None], numbers: tuple[float, float], item_ids: Tensor | None, options: dict[str, Any],
           state: Tensor) -> tuple:  # fmt: skip
    content, ids, negatives, log_q, weight = [None if t is None else t.contiguous() for t in inputs]
    if log_q is not None:
        log_q = log_q.float()
    if weight is not None:
        weight = weight.float()
    return (
        content, ids, negatives, *numbers, None if item_ids is None else item_ids.long().contiguous(), log_q, weight,
        options["kind"], options["duplicates"], options["direction"], options["reduction"], options["label_smoothing"],
        options["normalize"], state, limits(),
    )  # fmt: skip
