"""Few queries read many tokens, keys and values never formed: the absorbed form in plain PyTorch.

The shapes and the contract of ``forward`` and ``backward`` are those of ``em3.ops.qformer_attention``; ``K = H * Q``
rows of scores stand beside each item's tokens. Memory beyond the outputs is one chunk of items.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...ops._dropout import Dropout
from ...ops._pooling import SOFTMAX, Pooling
from ._chunks import Chunk, Rows, chunks, room, scatter, scatter_bias


def unavailable() -> str | None:
    return None


def supports(*args: object) -> str | None:
    return None


def wins(*args: object) -> bool:
    return True


def forward(u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor], offsets: list[Tensor | None],
            masks: list[Tensor | None], batch: int,
            drop: Dropout | None = None) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    y, mass, lse = attend([Rows(*s) for s in zip(values, offsets, masks, strict=True)], u, c, batch, drop)
    return y, project(y, w), mass, lse


def backward(dout: Tensor, dmass: Tensor | None, u: list[Tensor], c: Tensor | None, w: list[Tensor], values: list[Tensor],
             offsets: list[Tensor | None], masks: list[Tensor | None], y: list[Tensor], o: Tensor, mass: Tensor,
             lse: Tensor, need_u: bool, need_w: list[bool], need_values: list[bool], drop: Dropout | None = None,
             ) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    streams = [Rows(*s) for s in zip(values, offsets, masks, strict=True)]
    dy, dw = project_backward(dout, y, w, need_w)
    du, dc, dx = attend_backward(streams, dy, dmass, u, c, y, mass, lse, need_u, need_values, drop)
    return du, dc, dw, dx


def project(y: list[Tensor], w: list[Tensor]) -> Tensor:
    """``o [H, B, Q, E] = sum_m y_m w_m^T`` of ``y[m] [H, B, Q, C_m]`` and ``w[m] [H, E, C_m]``."""
    parts = [torch.bmm(a.flatten(1, 2), b.transpose(1, 2)) for a, b in zip(y, w, strict=True)]
    return functools.reduce(torch.add, parts).unflatten(1, y[0].shape[1:3])


def project_backward(dout: Tensor, y: list[Tensor], w: list[Tensor],
                     need_w: list[bool]) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Gradients to ``y`` and to the ``w`` asked for (an empty tensor for the others)."""
    rows = dout.flatten(1, 2)  # [H, B * Q, E]
    dy = [torch.bmm(rows, b).view_as(a) for a, b in zip(y, w, strict=True)]
    dw = [
        torch.bmm(rows.transpose(1, 2), a.flatten(1, 2)) if need else a.new_empty(0)
        for a, need in zip(y, need_w, strict=True)
    ]
    return dy, dw


def attend(streams: list[Rows], u: list[Tensor], c: Tensor | None, batch: int, drop: Dropout | None = None,
           pool: Pooling = SOFTMAX) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """``u[m] [H, 1 or B, Q, C_m]`` reads the streams: ``y[m] [H, B, Q, C_m]``, ``mass [M, H, B, Q]``, ``lse [H, B, Q]``."""
    h, _, q, _ = u[0].shape
    dtype, device = compute_dtype(u[0]), u[0].device
    y = [u[0].new_empty(h, batch, q, s.values.shape[-1]) for s in streams]
    by_item = [t.transpose(0, 1) for t in y]  # [B, H, Q, C] views, as a chunk writes them
    tops = torch.empty(batch, h * q, dtype=dtype, device=device)
    mass = torch.empty(len(streams), batch, h * q, dtype=dtype, device=device)
    total = torch.empty(batch, h * q, dtype=dtype, device=device)
    for chunk in chunks(streams, batch, row_cost(streams, h * q)):
        weights, shift = _exponentials(_scores(chunk, u, c, dtype), pool)  # [b, K, n] a stream
        part = torch.stack([w.sum(-1) for w in weights])  # [M, b, K]
        whole = part.sum(0) if pool.kind != "din" else torch.ones_like(shift)  # by which weights are divided
        if drop is not None:
            weights = [w.mul_(_factors(drop, m, chunk, w)) for m, w in enumerate(weights)]
            part = torch.stack([w.sum(-1) for w in weights])
        one_over = whole.clamp(min=1).reciprocal_()  # the largest weight is 1, so only an empty item is clamped
        tops[chunk.items], total[chunk.items], mass[:, chunk.items] = shift, whole, part * one_over
        for m, piece in enumerate(chunk.pieces):
            read = torch.bmm(weights[m], piece.x.to(dtype)).mul_(one_over[..., None])  # [b, K, C]
            by_item[m][chunk.items] = read.view(chunk.size, h, q, read.shape[-1]).to(y[m].dtype)
    mass = mass.view(len(streams), batch, h, q).transpose(1, 2)
    lse = total.log_().add_(tops).view(batch, h, q).transpose(0, 1)
    return y, mass.contiguous(), lse.contiguous()


def attention_weights(streams: list[Rows], u: list[Tensor], c: Tensor | None, batch: int, out: list[Tensor]) -> None:
    """What the rows read of each token, into zeros ``[B, H, Q, N]`` for a padded stream and ``[T, H, Q]`` for a jagged one."""
    h, _, q, _ = u[0].shape
    dtype = compute_dtype(u[0])
    for chunk in chunks(streams, batch, row_cost(streams, h * q)):
        weights, _ = _exponentials(_scores(chunk, u, c, dtype))
        total = functools.reduce(torch.add, [w.sum(-1, keepdim=True) for w in weights])  # [b, K, 1]
        for m, piece in enumerate(chunk.pieces):
            read = weights[m].div_(total.clamp(min=1))  # the largest is 1, so only an empty item is clamped
            if streams[m].offsets is None:
                out[m][chunk.items] = read.view(chunk.size, h, q, read.shape[-1]).to(out[m].dtype)
            else:
                scatter(out[m].flatten(1), piece, read.transpose(1, 2))


def attend_backward(streams: list[Rows], dy: list[Tensor], dmass: Tensor | None, u: list[Tensor], c: Tensor | None,
                    y: list[Tensor], mass: Tensor, lse: Tensor, need_u: bool, need_values: list[bool],
                    drop: Dropout | None = None, pool: Pooling = SOFTMAX,
                    dbias: Tensor | None = None) -> tuple[list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    """Gradients to ``u``, ``c`` and to the values asked for (an empty tensor for the others); that to the one stream's
    bias is added to ``dbias``, where it is wanted."""
    h, batch, q = lse.shape
    dtype = lse.dtype
    shared = u[0].shape[1] == 1 and batch != 1
    du = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in u]
    dc = torch.zeros(len(u), h, u[0].shape[1], q, dtype=dtype, device=lse.device)
    dx = [
        # A looked-up row may be read many times over: its gradient is summed in the wide type.
        torch.zeros(s.values.shape if n else (0,), dtype=s.values.dtype if s.lookup is None else dtype, device=lse.device)
        for s, n in zip(streams, need_values, strict=True)
    ]
    shift = lse.clamp(min=torch.finfo(dtype).min)
    for chunk in chunks(streams, batch, row_cost(streams, h * q)):
        weights = [pool.weights(s, _of_items(shift[..., None], chunk, dtype)) for s in _scores(chunk, u, c, dtype)]
        dread = [_of_items(g, chunk, dtype) for g in dy]  # [b, K, C]
        delta = _delta(dread, dmass, y, mass, chunk)  # [b, K, 1]
        for m, piece in enumerate(chunk.pieces):
            x = piece.x.to(dtype)
            ds = torch.bmm(dread[m], x.transpose(1, 2))  # [b, K, n]
            if dmass is not None:
                ds.add_(_of_items(dmass[m][..., None], chunk, dtype))
            kept = weights[m]
            if drop is not None:
                factors = _factors(drop, m, chunk, ds)
                ds.mul_(factors)
                kept = kept * factors
            pool.gradient_(ds, weights[m], delta)
            if dbias is not None and piece.bias is not None:
                scatter_bias(dbias, piece, ds.view(chunk.size, h, q, ds.shape[2]).sum(2).transpose(1, 2))
            if need_values[m]:
                grad = room(dx[m], piece, dtype)  # [b, n, C]
                torch.bmm(ds.transpose(1, 2), _of_items(u[m], chunk, dtype), out=grad)
                scatter(dx[m], piece, grad.baddbmm_(kept.transpose(1, 2), dread[m]))
            if need_u:
                grad, flat = torch.bmm(ds, x), ds.sum(-1)  # [b, K, C], [b, K]
                if shared:
                    du[m] += grad.sum(0).view(h, 1, q, grad.shape[-1])
                    dc[m] += flat.sum(0).view(h, 1, q)
                else:
                    du[m].transpose(0, 1)[chunk.items] = grad.view(chunk.size, h, q, grad.shape[-1])
                    dc[m].transpose(0, 1)[chunk.items] = flat.view(chunk.size, h, q)
    return [g.to(x.dtype) for g, x in zip(du, u, strict=True)], dc, [g.to(s.values.dtype) for g, s in zip(dx, streams, strict=True)]


def _factors(drop: Dropout, m: int, chunk: Chunk, weights: Tensor) -> Tensor:
    """What dropout multiplies a chunk's weights ``[b, K, n]`` of stream ``m`` with."""
    source, n = chunk.pieces[m].source, weights.shape[2]
    if isinstance(source, slice):
        items = torch.arange(source.start, source.stop, device=weights.device)
        source = items[:, None] * n + torch.arange(n, device=weights.device)
    return drop.factors(m, source, weights.shape[1], weights.dtype)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Scores and sums in float32 for the half types: a bf16 score of 8 is off by 0.03, its weight by 3%."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_cost(streams: list[Rows], rows: int) -> int:
    return max(rows, *(s.values.shape[-1] for s in streams))


def _highest(scores: list[Tensor]) -> Tensor:
    """The largest score of each row over all streams, ``[b, K]``; -inf where there is none."""
    tops = [s.amax(-1) for s in scores if s.shape[-1]]
    if not tops:
        return scores[0].new_full(scores[0].shape[:2], -torch.inf)
    return functools.reduce(torch.maximum, tops)


def _exponentials(scores: list[Tensor], pool: Pooling = SOFTMAX) -> tuple[list[Tensor], Tensor]:
    """Weights in place of the scores, ``exp(scores - shift)`` unless ``pool`` has others, and ``shift [b, K]``: the largest."""
    # The lowest finite number, where no stream has a token: every weight is then exp(-inf) = 0, and so is what is read.
    shift = _highest(scores).clamp_(min=torch.finfo(scores[0].dtype).min)
    return [pool.weights(s, shift[..., None]) for s in scores], shift


def _delta(dread: list[Tensor], dmass: Tensor | None, y: list[Tensor], mass: Tensor, chunk: Chunk) -> Tensor:
    """``sum_t p dp`` of each row, ``[b, K, 1]``."""
    dtype = dread[0].dtype
    parts = [(g * _of_items(r, chunk, dtype)).sum(-1, keepdim=True) for g, r in zip(dread, y, strict=True)]
    if dmass is not None:
        parts += [_of_items((g * p)[..., None], chunk, dtype) for g, p in zip(dmass, mass, strict=True)]
    return functools.reduce(torch.add, parts)


def _scores(chunk: Chunk, u: list[Tensor], c: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """``[b, K, n]`` of each stream, -inf where there is no token."""
    out = []
    for m, piece in enumerate(chunk.pieces):
        scores = torch.bmm(_of_items(u[m], chunk, dtype), piece.x.to(dtype).transpose(1, 2))
        if c is not None:
            scores += _of_items(c[m][..., None], chunk, dtype)
        if piece.bias is not None:
            heads = piece.bias.to(dtype).transpose(1, 2)[:, :, None]  # [b, H, 1, n]
            scores.view(chunk.size, u[m].shape[0], u[m].shape[2], scores.shape[2]).add_(heads)
        if piece.present is not None:
            scores.masked_fill_(~piece.present[:, None, :], -torch.inf)
        out.append(scores)
    return out


def _of_items(t: Tensor, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    """``[H, B, Q, C]`` -> the chunk's ``[b, K, C]``; what all items share, ``[H, 1, Q, C]``, is one block seen b times.

    Even so a product for each item is the fast one: 138 GFLOP/s against 113 for all items' rows at once (64 rows of 512
    against 8 x 256 tokens, float32, 2 threads), and it leaves the scores as the later products want them.
    """
    whole = t.shape[1] == 1
    part = (t if whole else t[:, chunk.items]).to(dtype).transpose(0, 1)
    rows = part.reshape(part.shape[0], t.shape[0] * t.shape[2], t.shape[3])
    return rows.expand(chunk.size, -1, -1) if whole else rows
