"""Jagged to padded, the obvious way: a loop over the items."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def padded(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """``values [T, ...]``, ``offsets [B + 1]`` -> ``[B, N, ...]`` with zeros behind the real rows, mask ``[B, N]``."""
    bounds = offsets.tolist()
    rows = [values[start:end] for start, end in pairwise(bounds)]
    longest = max((len(r) for r in rows), default=0)
    mask = torch.tensor([[n < len(r) for n in range(longest)] for r in rows], dtype=torch.bool, device=values.device)
    out = [torch.cat([r, r.new_zeros(longest - len(r), *r.shape[1:])]) for r in rows]
    stacked = torch.stack(out) if out else values[:0].reshape(0, longest, *values.shape[1:])
    return stacked, mask.reshape(len(rows), longest)
