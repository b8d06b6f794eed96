"""ID embeddings, and sums over jagged histories of them: what the built-in rankers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class IDEmbedding(nn.Embedding):
    """An embedding whose row 0 stands for everything that training has not seen.

    In training each ID is taken for an unseen one with probability ``dropout``, so that row 0 is trained and a model
    learns what to do without an ID.
    """

    def __init__(self, num_rows: int, dim: int, *, dropout: float = 0.0, std: float = 0.05) -> None:
        super().__init__(num_rows, dim)
        self.dropout = dropout
        nn.init.normal_(self.weight, std=std)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` of any shape, int64 -> ``[..., V]``."""
        if self.training and self.dropout:
            ids = ids.masked_fill(torch.rand(ids.shape, device=ids.device) < self.dropout, 0)
        return super().forward(ids)


def owners(offsets: Tensor, total: int) -> Tensor:
    """``[T]``: which sequence of a jagged batch each of its ``total`` entries belongs to."""
    return torch.repeat_interleave(offsets.diff(), output_size=total)


def sum_by_owner(values: Tensor, owner: Tensor, batch: int) -> Tensor:
    """``values [T, V]`` summed over each sequence -> ``[B, V]``, zeros for an empty one."""
    return values.new_zeros(batch, values.shape[1]).index_add(0, owner, values)
