"""DIN, small: history items weighed by a network that compares each with the target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from .ids import IDEmbedding, owners, sum_by_owner
from .mlp import mlp


class DIN(nn.Module):
    """Deep Interest Network on user, item and history IDs, with room for further dense features.

    Args:
        num_users, num_items: rows of the ID tables, row 0 for unseen ones included.
        dim: width ``V`` of the ID embeddings.
        extra_dim: width of the dense features that join its input, 0 for none.
        hidden: widths of the last network.
        dropout: in the last network, in training.
        id_dropout: as in :class:`em3.models.ids.IDEmbedding`, for the target item and the user.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", arXiv 1706.06978; the weights of the
    history are not normalised (section 4.3).
    """

    def __init__(self, num_users: int, num_items: int, *, dim: int = 32, extra_dim: int = 0,
                 hidden: tuple[int, ...] = (128, 64), dropout: float = 0.2, id_dropout: float = 0.0) -> None:  # fmt: skip
        super().__init__()
        self.users = IDEmbedding(num_users, dim, dropout=id_dropout)
        self.items = IDEmbedding(num_items, dim, dropout=id_dropout)
        self.attention = mlp(4 * dim, (36,), 1, 0.0)
        self.head = mlp(4 * dim + extra_dim, hidden, 1, dropout)

    def item_embedding(self, item_id: Tensor) -> Tensor:
        """``item_id [K]`` -> ``[K, V]``, without dropout."""
        return nn.functional.embedding(item_id, self.items.weight)

    def forward(self, batch: Batch, extra: Tensor | None = None) -> Tensor:
        """A batch and dense features ``[B, extra_dim]`` -> logits ``[B]``."""
        target = self.items(batch.item_id)  # [B, V]
        seen = self.item_embedding(batch.history_id.values())  # [T, V]
        owner = owners(batch.history_id.offsets(), len(seen))
        mine = target.index_select(0, owner)  # [T, V]
        weight = self.attention(torch.cat([seen, mine, seen - mine, seen * mine], 1))  # [T, 1]
        interest = sum_by_owner(weight * seen, owner, len(target))
        features = [self.users(batch.user_id), target, interest, target * interest]
        return self.head(torch.cat(features if extra is None else [*features, extra], 1))[:, 0]
