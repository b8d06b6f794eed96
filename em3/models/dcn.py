"""DCN-V2, small: explicit feature crosses beside a plain network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from .ids import IDEmbedding, owners, sum_by_owner
from .mlp import mlp


class DCNv2(nn.Module):
    """Deep & Cross Network V2, parallel form, on user and item ID, the mean of the history, and dense features.

    The crosses take dense features in as one more field, projected to the width of an ID: at their full width (321 beside
    96 of IDs, in EM3 as configured by default) the crosses alone would cost several times the ID-only ranker.

    Args: as :class:`em3.models.DIN`, and ``num_crosses``, the cross layers.

    Source: Wang et al., "DCN V2", arXiv 2008.13535, equation 1 and figure 1 (parallel).
    """

    def __init__(self, num_users: int, num_items: int, *, dim: int = 32, extra_dim: int = 0, num_crosses: int = 2,
                 hidden: tuple[int, ...] = (128, 64), dropout: float = 0.2, id_dropout: float = 0.0) -> None:  # fmt: skip
        super().__init__()
        self.users = IDEmbedding(num_users, dim, dropout=id_dropout)
        self.items = IDEmbedding(num_items, dim, dropout=id_dropout)
        self.field = nn.Linear(extra_dim, dim) if extra_dim else None
        width = (3 if self.field is None else 4) * dim
        self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(num_crosses))
        self.deep = mlp(3 * dim + extra_dim, hidden, None, dropout)
        self.head = nn.Linear(width + hidden[-1], 1)

    def item_embedding(self, item_id: Tensor) -> Tensor:
        """``item_id [K]`` -> ``[K, V]``, without dropout."""
        return nn.functional.embedding(item_id, self.items.weight)

    def forward(self, batch: Batch, extra: Tensor | None = None) -> Tensor:
        """A batch and dense features ``[B, extra_dim]`` -> logits ``[B]``."""
        target = self.items(batch.item_id)  # [B, V]
        seen = self.item_embedding(batch.history_id.values())  # [T, V]
        offsets = batch.history_id.offsets()
        mean = sum_by_owner(seen, owners(offsets, len(seen)), len(target)) / offsets.diff().clamp(min=1)[:, None]
        fields = [self.users(batch.user_id), target, mean]
        x0 = wide = torch.cat(fields if extra is None else [*fields, extra], 1)
        if self.field is not None:
            x0 = torch.cat([*fields, self.field(extra)], 1)  # [B, width]
        x = x0
        for cross in self.crosses:
            x = torch.addcmul(x, x0, cross(x))
        return self.head(torch.cat([x, self.deep(wide)], 1))[:, 0]
