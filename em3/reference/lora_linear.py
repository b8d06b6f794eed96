"""``lora_linear`` as the papers write it: the linear layer, then the two thin products of one adapter after another."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F


def lora_linear(x, weight, bias, lora_a, lora_b, *, scaling=1.0, adapter=None, offsets=None, drop=None):
    """``drop``: an ``em3.ops._dropout.Dropout``, or None."""
    y = F.linear(x, weight, bias)  # [..., D]
    if drop is not None:
        rows = torch.arange(x[..., 0].numel(), device=x.device)
        x = x * drop.factors(0, rows[None], x.shape[-1], x.dtype)[0].t().view_as(x)
    if lora_a.dim() == 2:
        return y + scaling * F.linear(F.linear(x, lora_a), lora_b)
    if offsets is not None:
        adapter = _adapter_of_rows(offsets, x.shape[:-1])
    for g in range(lora_a.shape[0]):
        factor = scaling[g].to(x.dtype) if isinstance(scaling, torch.Tensor) else scaling
        low_rank = factor * F.linear(F.linear(x, lora_a[g]), lora_b[g])
        y = y + torch.where((adapter == g)[..., None], low_rank, 0)
    return y


def _adapter_of_rows(offsets, shape):
    adapter = torch.full(shape, -1, device=offsets.device)
    flat = adapter.view(-1)
    for g, (start, end) in enumerate(pairwise(offsets.tolist())):
        flat[start:end] = g
    return adapter
