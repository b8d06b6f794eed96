"""``qformer_attention`` as the textbooks write it: project every token to keys and values, then attend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..jagged import parse_stream
from .padding import padded


def qformer_attention(query, streams, w_q, w_k, w_v, w_o, b_q=None, b_k=None, b_v=None, b_o=None, *,
                      num_heads, masks=None, scale=None, drop=None) -> Tensor:  # fmt: skip
    """``drop``: an ``em3.ops._dropout.Dropout``, or None."""
    none = [None] * len(streams)
    keys, values, present, factors = [], [], [], []
    for m, source in enumerate(streams):
        stream = parse_stream(source, (masks or none)[m], "streams", "masks")
        x, mask = stream.values.to(query.dtype), stream.mask
        if stream.offsets is not None:
            x, mask = padded(x, stream.offsets)
        keys.append(F.linear(x, w_k[m], (b_k or none)[m]))
        values.append(F.linear(x, w_v[m], (b_v or none)[m]))
        if drop is not None:
            first = stream.offsets[:-1] if stream.offsets is not None else torch.arange(len(x)) * x.shape[1]  # [B]
            places = first[:, None] + torch.arange(x.shape[1])
            factors.append(drop.factors(m, places, num_heads * query.shape[-2], query.dtype))
        present.append(torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask)
    k, v, seen = torch.cat(keys, 1), torch.cat(values, 1), torch.cat(present, 1)  # [B, N, D], [B, N, D], [B, N]

    b, n, d = k.shape
    q = F.linear(query, w_q, b_q).expand(b, -1, d)  # [B, Q, D]
    heads = [t.reshape(b, t.shape[1], num_heads, d // num_heads).transpose(1, 2) for t in (q, k, v)]  # [B, H, ., E]
    scores = heads[0] @ heads[1].transpose(2, 3) * ((d // num_heads) ** -0.5 if scale is None else scale)
    # An item without tokens: a softmax over nothing is defined as nothing, so its attention is zero.
    scores = scores.masked_fill(~seen[:, None, None, :], -torch.inf)
    weights = scores.softmax(-1).masked_fill(~seen[:, None, None, :], 0) if n else scores
    if drop is not None:
        weights = weights * torch.cat(factors, 2).view_as(weights)
    out = (weights @ heads[2]).transpose(1, 2).reshape(b, q.shape[1], d)  # [B, Q, D]
    return F.linear(out, w_o, b_o)
