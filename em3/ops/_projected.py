"""The ``project`` strategy of the two attention operations: keys and values formed, then PyTorch's own attention.

It is the better form when the queries of all heads outnumber the width. Jagged streams are padded after their
projection; the padded size depends on the data, so a registered operator computes it and ``torch.compile`` can trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..jagged import Stream
from . import _checks


class Projected(NamedTuple):
    """The keys and values of one stream."""

    keys: Tensor  # [B, N, D] or [T, D]
    values: Tensor  # like keys
    offsets: Tensor | None  # [B + 1], None = padded
    mask: Tensor | None  # [B, N] or [T] bool, True = a real token
    bias: Tensor | None = None  # [B, N, H] or [T, H], added to the scores; of a single stream only


def attend(q: Tensor, streams: Sequence[Projected], batch: int, names: Sequence[str]) -> Tensor:
    """``q [1 or B, Q, H, E]``, already scaled, over the projected tokens of the streams -> ``[B, Q, D]``."""
    _, nq, h, e = q.shape
    padded = [_padded(stream, f"{name}.offsets") for stream, name in zip(streams, names, strict=True)]
    k, v = (torch.cat(side, 1) if len(side) > 1 else side[0] for side in list(zip(*padded, strict=True))[:2])  # [B, N, D]
    q = q.transpose(1, 2).expand(batch, h, nq, e)
    k, v = (t.unflatten(-1, (h, e)).transpose(1, 2) for t in (k, v))  # [B, H, N, E]
    if batch == 0 or nq == 0 or k.shape[2] == 0:
        bias = padded[0][3]
        scores = q @ k.transpose(2, 3)
        scores = scores if bias is None else scores + bias.transpose(1, 2)[:, :, None].to(q.dtype)
        out = scores @ v  # zeros, and a graph in which every argument has its zero gradient
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_joined(padded, q.dtype), scale=1.0)
    return out.transpose(1, 2).reshape(batch, nq, h * e)


Padded = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _padded(stream: Projected, name: str) -> Padded:
    """Keys and values ``[B, N, D]``, their mask ``[B, N]`` (None = all real) and their bias ``[B, N, H]``."""
    keys, values, offsets, mask, bias = stream
    if offsets is None:
        return keys, values, mask, bias
    if offsets.is_meta:
        must = "must be on a device that holds data: how far the stream is padded depends on it; use strategy='absorb'"
        raise ValueError(f"{name}: was on meta, {must}")
    if (n := _common_length(offsets, keys.shape[0])) is not None:  # padded as it lies: no copies, no mask
        keys, values = keys.unflatten(0, (-1, n)), values.unflatten(0, (-1, n))
        mask, bias = (None if t is None else t.unflatten(0, (-1, n)) for t in (mask, bias))
        return keys, values, mask, bias
    index, present = torch.ops.em3.jagged_index(offsets, keys.shape[0], name)
    # Where there is no token, a row of zeros behind the others is read: NaN would pass through a weight of 0.

    def taken(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, 1)).index_select(0, index.view(-1)).view(*index.shape, t.shape[1])

    mask = present if mask is None else present & F.pad(mask, (0, 1))[index]
    return taken(keys), taken(values), mask, None if bias is None else taken(bias)


def _common_length(offsets: Tensor, total: int) -> int | None:
    """``N``, where Python can see that all items have that many tokens, one after the other."""
    if total == 0 or not _checks.readable(offsets):
        return None
    n = total // (offsets.shape[0] - 1) if offsets.shape[0] > 1 else 0
    whole = bool((offsets == torch.arange(offsets.shape[0], device=offsets.device) * n).all())
    return n if whole and int(offsets[-1]) == total else None


def real_tokens(stream: Stream) -> Tensor:
    """The values with zeros at masked places and behind the last item: what lies there must not reach the weights."""
    x, offsets, mask = stream
    if offsets is not None:
        mask = torch.arange(x.shape[0], device=x.device) < offsets[-1]
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


def _joined(padded: Sequence[Padded], dtype: torch.dtype) -> Tensor | None:
    """The masks of all streams side by side ``[B, 1, 1, N]``, or what is added to scores ``[B, H, 1, N]``, or None."""
    mask = None
    if any(of is not None for _, _, of, _ in padded):
        full = [k.new_ones(k.shape[:2], dtype=torch.bool) if of is None else of for k, _, of, _ in padded]
        mask = torch.cat(full, 1)[:, None, None, :]
    bias = padded[0][3]
    if bias is None:
        return mask
    added = bias.transpose(1, 2)[:, :, None].to(dtype)
    return added if mask is None else added.masked_fill(~mask, -torch.inf)


torch.library.define("em3::jagged_index", "(Tensor offsets, SymInt total, str name) -> (Tensor index, Tensor present)")


@torch.library.impl("em3::jagged_index", "default")
def _jagged_index(offsets, total, name):
    """Row numbers ``[B, N]`` (``total`` for none), ``N`` = the longest item but at least 1; and which are real."""
    _checks.offsets_content(offsets, total, name)
    offsets = offsets.clamp(0, total)  # on a GPU nobody has looked at them
    lengths = offsets.diff()
    longest = max(1, int(lengths.max())) if lengths.numel() else 1
    step = torch.arange(longest, device=offsets.device)
    present = step < lengths[:, None]
    return (offsets[:-1, None] + step).masked_fill(~present, total), present


@torch.library.register_fake("em3::jagged_index")
def _jagged_index_fake(offsets, total, name):
    shape = (offsets.shape[0] - 1, torch.library.get_ctx().new_dynamic_size(min=1))
    return offsets.new_empty(shape), offsets.new_empty(shape, dtype=torch.bool)
