"""Few queries read many tokens, keys and values never formed: the absorbed form in plain PyTorch.

The shapes and the contract of ``forward`` and ``backward`` are those of ``em3.ops.qformer_attention``; ``K = H * Q``
rows of scores stand beside each item's tokens. Memory beyond the outputs is one chunk of items.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._chunks import Chunk, Rows, chunks, scatter


def unavailable() -> str | None:
    return None


def supports(*args: object) -> str | None:
    return None


def wins(*args: object) -> bool:
    return True


def forward(u: list[Tensor], c: Tensor | None, values: list[Tensor], offsets: list[Tensor | None],
            masks: list[Tensor | None], batch: int) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    return attend([Rows(*s) for s in zip(values, offsets, masks, strict=True)], u, c, batch)


def backward(dy: list[Tensor], dmass: Tensor | None, u: list[Tensor], c: Tensor | None, values: list[Tensor],
             offsets: list[Tensor | None], masks: list[Tensor | None], y: list[Tensor], mass: Tensor, lse: Tensor,
             need_u: bool, need_values: list[bool]) -> tuple[list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    streams = [Rows(*s) for s in zip(values, offsets, masks, strict=True)]
    return attend_backward(streams, dy, dmass, u, c, y, mass, lse, need_u, need_values)


def attend(streams: list[Rows], u: list[Tensor], c: Tensor | None, batch: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """``u[m] [H, 1 or B, Q, C_m]`` reads the streams: ``y[m] [H, B, Q, C_m]``, ``mass [M, H, B, Q]``, ``lse [H, B, Q]``."""
    h, _, q, _ = u[0].shape
    dtype = compute_dtype(u[0])
    y = [u[0].new_empty(h, batch, q, s.values.shape[-1]) for s in streams]
    mass = torch.empty(len(streams), h, batch, q, dtype=dtype, device=u[0].device)
    lse = torch.empty(h, batch, q, dtype=dtype, device=u[0].device)
    for chunk in chunks(streams, batch, row_cost(streams, h * q)):
        scores = _scores(chunk, u, c, dtype)  # [b, K, n] a stream
        nothing = scores[0].new_full((chunk.size, h * q), -torch.inf)  # stands in where no stream has a token
        top = torch.stack([nothing, *(s.amax(-1) for s in scores if s.shape[-1])]).amax(0)  # [b, K]
        shift = top.masked_fill(top == -torch.inf, 0)[..., None]
        weights = [s.sub_(shift).exp_() for s in scores]
        sums = torch.stack([w.sum(-1) for w in weights])  # [M, b, K]
        total = sums.sum(0)
        lse[:, chunk.items] = _to_heads((total.log() + shift[..., 0])[..., None], h)[..., 0]
        one_over = torch.where(total > 0, total, 1).reciprocal()
        mass[:, :, chunk.items] = (sums * one_over).view(len(streams), chunk.size, h, q).transpose(1, 2)
        for m, piece in enumerate(chunk.pieces):
            read = torch.bmm(weights[m], piece.x.to(dtype)).mul_(one_over[..., None])  # [b, K, C]
            y[m][:, chunk.items] = _to_heads(read, h).to(y[m].dtype)
    return y, mass, lse


def attend_backward(streams: list[Rows], dy: list[Tensor], dmass: Tensor | None, u: list[Tensor], c: Tensor | None,
                    y: list[Tensor], mass: Tensor, lse: Tensor, need_u: bool, need_values: list[bool],
                    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    """Gradients to ``u``, ``c`` and to the values asked for (an empty tensor for the others)."""
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
    for chunk in chunks(streams, batch, row_cost(streams, h * q)):
        finite = lse[:, chunk.items].masked_fill(lse[:, chunk.items] == -torch.inf, 0)
        shift = _to_rows(finite[..., None])  # [b, K, 1]
        weights = [s.sub_(shift).exp_() for s in _scores(chunk, u, c, dtype)]
        dread = [_to_rows(g[:, chunk.items].to(dtype)) for g in dy]  # [b, K, C]
        delta = _to_rows(_delta(dy, dmass, y, mass, chunk.items, dtype)[..., None])
        for m, piece in enumerate(chunk.pieces):
            x = piece.x.to(dtype)
            ds = torch.bmm(dread[m], x.transpose(1, 2))  # [b, K, n]
            if dmass is not None:
                ds.add_(_to_rows(dmass[m][:, chunk.items, :, None]))
            ds.sub_(delta).mul_(weights[m])
            if need_values[m]:
                rows = _rows_of(u[m], chunk, dtype)
                grad = torch.matmul(ds.transpose(1, 2), rows) + torch.bmm(weights[m].transpose(1, 2), dread[m])
                scatter(dx[m], piece, grad)
            if need_u:
                grad, flat = _to_heads(torch.bmm(ds, x), h), _to_heads(ds.sum(-1, keepdim=True), h)[..., 0]
                if shared:
                    du[m] += grad.sum(1, keepdim=True)
                    dc[m] += flat.sum(1, keepdim=True)
                else:
                    du[m][:, chunk.items], dc[m][:, chunk.items] = grad, flat
    return [g.to(x.dtype) for g, x in zip(du, u, strict=True)], dc, [g.to(s.values.dtype) for g, s in zip(dx, streams, strict=True)]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Scores and sums in float32 for the half types: a bf16 score of 8 is off by 0.03, its weight by 3%."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_cost(streams: list[Rows], rows: int) -> int:
    return max(rows, *(s.values.shape[-1] for s in streams))


def _delta(dy: list[Tensor], dmass: Tensor | None, y: list[Tensor], mass: Tensor, items: Tensor | slice,
           dtype: torch.dtype) -> Tensor:  # fmt: skip
    """``sum_t p dp`` of each row, ``[H, b, Q]``."""
    reads = [(g[:, items].to(dtype) * r[:, items].to(dtype)).sum(-1) for g, r in zip(dy, y, strict=True)]
    delta = torch.stack(reads).sum(0)
    return delta if dmass is None else delta + (dmass[:, :, items] * mass[:, :, items]).sum(0)


def _scores(chunk: Chunk, u: list[Tensor], c: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """``[b, K, n]`` of each stream, -inf where there is no token."""
    out = []
    for m, piece in enumerate(chunk.pieces):
        scores = torch.matmul(_rows_of(u[m], chunk, dtype), piece.x.to(dtype).transpose(1, 2))
        if c is not None:
            scores += _rows_of(c[m][..., None], chunk, dtype)
        if piece.present is not None:
            scores.masked_fill_(~piece.present[:, None, :], -torch.inf)
        out.append(scores)
    return out


def _rows_of(u: Tensor, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    """``[H, B, Q, C]`` -> the chunk's ``[b, K, C]``; of shared queries ``[H, 1, Q, C]`` -> ``[K, C]``."""
    if u.shape[1] == 1 and chunk.size != 1:
        return u.to(dtype).reshape(-1, u.shape[-1])
    return _to_rows((u if u.shape[1] == 1 else u[:, chunk.items]).to(dtype))


def _to_rows(t: Tensor) -> Tensor:
    """``[H, b, Q, C]`` -> ``[b, K, C]``."""
    return t.transpose(0, 1).reshape(t.shape[1], -1, t.shape[-1])


def _to_heads(t: Tensor, h: int) -> Tensor:
    """``[b, K, C]`` -> ``[H, b, Q, C]``."""
    return t.view(t.shape[0], h, -1, t.shape[-1]).transpose(0, 1)
