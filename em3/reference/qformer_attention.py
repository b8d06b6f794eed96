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
    tokens, places = _tokens(query, streams, masks)
    weights = _weights(query, tokens, w_q, w_k, b_q, b_k, num_heads, scale)
    if drop is not None:
        rows = num_heads * query.shape[-2]
        factors = [drop.factors(m, of, rows, query.dtype) for m, of in enumerate(places)]
        weights = weights * torch.cat(factors, 2).view_as(weights)
    b_v = [None] * len(tokens) if b_v is None else b_v
    v = torch.cat([F.linear(x, w, bias) for (x, _), w, bias in zip(tokens, w_v, b_v, strict=True)], 1)  # [B, N, D]
    out = (weights @ _heads(v, num_heads)).transpose(1, 2).flatten(2)  # [B, Q, D]
    return out if w_o is None else F.linear(out, w_o, b_o)


def qformer_attention_weights(query, streams, w_q, w_k, b_q=None, b_k=None, *, num_heads, masks=None,
                              scale=None) -> list[Tensor]:  # fmt: skip
    """``[B, H, Q, N]`` for each stream, the jagged ones padded."""
    tokens, _ = _tokens(query, streams, masks)
    weights = _weights(query, tokens, w_q, w_k, b_q, b_k, num_heads, scale)
    return list(weights.split([x.shape[1] for x, _ in tokens], 3))


def _tokens(query, streams, masks):
    """Each stream padded, ``[B, N, C]``, and what of it is real, ``[B, N]``; and the tokens' numbers ``[B, N]``."""
    tokens, places = [], []
    for source, given in zip(streams, masks or [None] * len(streams), strict=True):
        stream = parse_stream(source, given, "streams", "masks")
        x, seen = stream.values.to(query.dtype), stream.mask
        if stream.offsets is not None:
            x, seen = padded(x, stream.offsets)
        first = stream.offsets[:-1] if stream.offsets is not None else torch.arange(len(x)) * x.shape[1]  # [B]
        places.append(first[:, None] + torch.arange(x.shape[1], device=first.device))
        tokens.append((x, torch.ones_like(x[..., 0], dtype=torch.bool) if seen is None else seen))
    return tokens, places


def _weights(query, tokens, w_q, w_k, b_q, b_k, num_heads, scale):
    """The weights ``[B, H, Q, N]`` of the tokens of all streams, side by side."""
    b_k = [None] * len(tokens) if b_k is None else b_k
    k = torch.cat([F.linear(x, w, bias) for (x, _), w, bias in zip(tokens, w_k, b_k, strict=True)], 1)  # [B, N, D]
    seen = torch.cat([seen for _, seen in tokens], 1)[:, None, None, :]  # [B, 1, 1, N]
    q = query if w_q is None else F.linear(query, w_q, b_q)
    q, k = _heads(q.expand(len(k), -1, -1), num_heads), _heads(k, num_heads)  # [B, H, ., E]
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    # An item without tokens: a softmax over nothing is defined as nothing, so its attention is zero.
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).masked_fill(~seen, 0) if scores.shape[-1] else scores


def _heads(x, h):
    return x.unflatten(-1, (h, -1)).transpose(1, 2)
