"""``qformer_attention_weights``: what the queries of a ``qformer_attention`` read. Public function, registered operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..jagged import Jagged
from . import _checks
from ._qformer_operator import check_content
from .qformer_attention import absorbed_keys, check_call, heads_of, parse, per_stream, weights_of


@torch.no_grad()
def qformer_attention_weights(query: Tensor, streams: Any, w_q: Tensor | None, w_k: Sequence[Tensor],
                              b_q: Tensor | None = None, b_k: Sequence[Tensor | None] | None = None, *, num_heads: int,
                              masks: Sequence[Tensor | None] | None = None,
                              scale: float | None = None) -> list[Tensor | Jagged]:  # fmt: skip
    """The attention weights of :func:`em3.ops.qformer_attention`, for looking at what the queries read.

    ``softmax(scale * q_h [k_1h .. k_Mh]^T)``, cut into streams: over all tokens of all streams of an item the weights of a
    query and head add up to 1, to 0 for an item without tokens. No gradient flows through them, no key is formed, and
    they know nothing of dropout. Computed in plain PyTorch, a chunk of items at a time, whatever the backend.

    Args:
        query, streams, w_q, w_k, b_q, b_k, num_heads, masks, scale: as in :func:`em3.ops.qformer_attention`.

    Returns:
        One entry a stream, of the inputs' dtype (under autocast: of its dtype): ``[B, H, Q, N]`` of a padded stream,
        with 0 at masked places; of a jagged one an :class:`em3.Jagged` with values ``[T, H, Q]`` and the stream's offsets.

    Raises:
        ValueError: naming the argument, what it was and what it must be.

    Source: the cross-attention of BLIP-2's Q-Former (arXiv 2301.12597, section 3.1).
    """
    _checks.tensor(query, "query", " [Q, D] or [B, Q, D]")
    parsed = parse(streams, masks)
    m = len(parsed)
    wk, bk, none = weights_of(w_k, "w_k", m), per_stream(b_k, "b_k", m), [None] * m
    query, w_q, b_q, *rest = _checks.autocast(query, w_q, b_q, *wk, *bk, *(s.values for s in parsed), device=query.device)
    wk, bk, values = rest[:m], rest[m : 2 * m], rest[2 * m :]
    parsed = [s._replace(values=x) for s, x in zip(parsed, values, strict=True)]
    batch = check_call(query, parsed, w_q, wk, none, None, b_q, bk, none, None, num_heads)
    u, c = absorbed_keys(heads_of(query, w_q, b_q, num_heads, scale), wk, bk)
    offsets = [s.offsets for s in parsed]
    found = torch.ops.em3.qformer_attention_weights(u, c, values, offsets, [s.mask for s in parsed], batch)
    return [x if bounds is None else Jagged(x, bounds) for x, bounds in zip(found, offsets, strict=True)]


# u and c as those of em3::qformer_attention; a weight for each of its H * Q rows and each token.
torch.library.define(
    "em3::qformer_attention_weights",
    "(Tensor[] u, Tensor? c, Tensor[] values, Tensor?[] offsets, Tensor?[] masks, SymInt batch) -> Tensor[]",
)


@torch.library.impl("em3::qformer_attention_weights", "default")
def _weights(u, c, values, offsets, masks, batch):
    # Not above: the backends import this package.
    from ..backends.torch import qformer_attention as backend
    from ..backends.torch._chunks import Rows

    check_content(values, offsets)
    out = [u[0].new_zeros(shape) for shape in _shapes(u[0], values, offsets, batch)]
    if u[0].shape[2]:  # Q
        with _checks.no_autocast(values[0].device):
            backend.attention_weights([Rows(*s) for s in zip(values, offsets, masks, strict=True)], u, c, batch, out)
    return out


@torch.library.register_fake("em3::qformer_attention_weights")
def _weights_fake(u, c, values, offsets, masks, batch):
    return [u[0].new_empty(shape) for shape in _shapes(u[0], values, offsets, batch)]


def _shapes(u, values, offsets, batch):
    h, _, q, _ = u.shape
    pairs = zip(values, offsets, strict=True)
    return [(batch, h, q, x.shape[1]) if bounds is None else (x.shape[0], h, q) for x, bounds in pairs]
