"""``MeanTokens``: the mean token of each stream, projected to one content embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _checks
from ..ops._means import mean_rows
from ..ops.qformer_attention import parse
from . import _given


class MeanTokens(nn.Module):
    """``sum over streams m of W_m LayerNorm_m(mean of the tokens of stream m)``; a stream without tokens adds nothing.

    Args:
        token_dims: ``C_m`` of each stream.
        out_dim: width of the embedding.
    """

    def __init__(self, token_dims: Sequence[int], out_dim: int) -> None:
        super().__init__()
        _given.sizes("token_dims", token_dims)
        _given.size("out_dim", out_dim)
        self.token_dims = list(token_dims)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in token_dims)
        self.outs = nn.ModuleList(nn.Linear(c, out_dim, bias=False) for c in token_dims)

    def forward(self, streams: Any, masks: Sequence[Tensor | None] | None = None) -> Tensor:
        """``streams`` and ``masks`` as in :func:`em3.ops.qformer_attention` -> ``[B, out_dim]``."""
        like = next(self.parameters())
        _given.streams(streams, masks, self.token_dims, like)
        means = mean_tokens(streams, masks, like.dtype)
        parts = [
            out(norm(mean)) * present
            for (mean, present), norm, out in zip(means, self.norms, self.outs, strict=True)
        ]  # fmt: skip
        return sum(parts[1:], parts[0])


def mean_tokens(streams: Any, masks: Sequence[Tensor | None] | None = None,
                dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """The mean token ``[B, C_m]`` of each stream, zeros where an item has none, and whether it has any, ``[B, 1]``."""
    found = []
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype  # sums, and lengths, of a half type are off
    for i, (values, offsets, mask) in enumerate(parse(streams, masks)):
        if offsets is not None:
            if not torch.compiler.is_compiling():
                _checks.offsets_content(offsets, len(values), f"streams[{i}].offsets")
            found.append((mean_rows(values, offsets).to(dtype), offsets.diff()[:, None] > 0))
            continue
        values = values.to(wide)
        real = values if mask is None else values.masked_fill(~mask[..., None], 0)
        length = values.new_full((len(values), 1), values.shape[1]) if mask is None else mask.sum(1, keepdim=True)
        found.append(((real.sum(1) / length.clamp(min=1)).to(dtype), length > 0))
    return found

